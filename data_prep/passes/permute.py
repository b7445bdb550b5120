"""The cells of all datasets in one uniform random order per split, in bounded memory.

Every cell draws a 64-bit key from a generator seeded by (seed, dataset_id), and the cells of a
split are sorted by key: a uniform permutation that does not depend on memory limits or processes.
The keys, and the sizes of the cells, say where every chunk will begin (`plan_layout`). Encoded
cells are then scattered to the units of the store that they belong to (`scatter_run`, see
`data_prep.passes.buckets`), and one unit at a time is sorted in memory and written (`write_unit`).
A unit is a number of whole shards, so units are written in any order and joined by name. Cells are
moved as bytes, never decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.passes.buckets import BucketRuns, write_run
from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.catalogue import SPLITS
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter

BLOCK_ENTRIES = 2**22
"""Entries that are moved at once."""
_CELL = np.dtype(
    [
        ("key", "<u8"),
        ("dataset", "<u4"),
        ("obs_row", "<i8"),
        ("source_row", "<i8"),
        ("entries", "<u4"),
        ("nnz", "<u4"),
        ("total", "<i8"),
        ("split", "u1"),
    ]
)
Chunk = tuple[int, int]
"""Place of a dataset, and number of one of its chunks."""


@dataclass(frozen=True, kw_only=True)
class StagedCells:
    """The cells of one dataset and where they go."""

    dataset_id: str
    """Seeds the cells' keys."""
    cells: CellStore
    """Staged cells with the table source_row."""
    kept: NDArray[np.bool_]
    """(cells,) False for cells that are left out."""
    split: NDArray[np.uint8]
    """(cells,) position in SPLITS."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the units of a store begin in the order of its cells."""

    split: NDArray[np.uint8]
    """(units,) split of the first cell."""
    key: NDArray[np.uint64]
    """(units,) its key."""
    n_cells: NDArray[np.int64]
    """(units,) number of cells."""

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.n_cells)

    def units_of(self, split: NDArray[np.uint8], key: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return (cells,) the unit of each cell."""
        unit = np.empty(len(key), np.int64)
        for code in range(len(SPLITS)):
            here, begins = split == code, self.split == code
            before = int(np.count_nonzero(self.split < code)) - 1
            unit[here] = before + np.searchsorted(self.key[begins], key[here], side="right")
        return unit


def plan_layout(
    datasets: Sequence[StagedCells], *, seed: int, chunk_entries: int, unit_chunks: int
) -> Layout:
    """Return where each unit begins.

    Args:
        datasets: The cells, in the order that numbers the table `dataset`.
        seed: Seed of the permutation.
        chunk_entries: Entries of a chunk of the store.
        unit_chunks: Chunks of a unit.

    Raises:
        ValueError: A cell that does not fit a chunk.
    """
    begins: list[tuple[int, int, int]] = []
    n_chunks = row = 0
    for code in range(len(SPLITS)):
        chosen = [d.kept & (d.split == code) for d in datasets]
        keys = [_keys(d, seed)[here] for d, here in zip(datasets, chosen, strict=True)]
        sizes = [d.cells.row_entries[here] for d, here in zip(datasets, chosen, strict=True)]
        key = np.concatenate(keys)
        order = np.argsort(key, kind="stable")
        ends = np.cumsum(np.concatenate(sizes)[order], dtype=np.int64)
        for first in _chunk_starts(ends, chunk_entries):
            if n_chunks % unit_chunks == 0:
                begins.append((code, int(key[order[first]]), row + first))
            n_chunks += 1
        row += len(key)
    rows = [first for _, _, first in begins] + [row]
    return Layout(
        split=np.array([code for code, _, _ in begins], np.uint8),
        key=np.array([key for _, key, _ in begins], np.uint64),
        n_cells=np.diff(rows).astype(np.int64),
    )


def _chunk_starts(ends: NDArray[np.int64], chunk_entries: int) -> Iterator[int]:
    """Yield the first cell of each chunk, as `CellWriter` fills them."""
    first, done = 0, 0
    while first < len(ends):
        yield first
        stop = int(np.searchsorted(ends, done + chunk_entries, side="right"))
        if stop == first:
            raise ValueError(
                f"a cell of {int(ends[first]) - done} entries does not fit a chunk of "
                f"{chunk_entries}"
            )
        first, done = stop, int(ends[stop - 1])


def scatter_run(
    datasets: Sequence[StagedCells],
    chunks: Sequence[Chunk],
    layout: Layout,
    *,
    seed: int,
    folder: Path,
    number: int,
) -> None:
    """Write the kept cells of some chunks as one run, ordered by unit.

    Args:
        datasets: The cells, in the order that numbers the table `dataset`.
        chunks: Some of them, in order.
        layout: Where each unit begins.
        seed: Seed of the permutation.
        folder: Of all runs.
        number: Of this one.
    """
    cell, packed = _read_run(datasets, chunks, seed)
    unit = layout.units_of(cell["split"], cell["key"])
    order = np.argsort(unit, kind="stable")
    cells = np.searchsorted(unit[order], np.arange(len(layout) + 1))
    entries = np.concatenate(([0], np.cumsum(packed.row_entries[order], dtype=np.int64)))[cells]
    blocks = (
        {"cell": part, "gap": moved.gap, "count": moved.count}
        for part, moved in _in_blocks(cell, packed, order)
    )
    write_run(folder, number, {"cell": cells, "gap": entries, "count": entries}, blocks)


def write_unit(
    runs: BucketRuns,
    unit: int,
    layout: Layout,
    writer: CellWriter,
    *,
    seen: Callable[[int, PackedCells], None] = lambda split, cells: None,
) -> None:
    """Write the cells of a unit to a store of its own, in their order.

    Args:
        runs: All cells by unit.
        unit: Its number.
        layout: Where each unit begins.
        writer: Of an empty store; it gets the tables dataset, obs_row (row in the staged dataset)
            and source_row (row in the source file).
        seen: Called with the place in SPLITS of cells, and these.

    Raises:
        ValueError: A run is damaged, or other cells came than were planned.
    """
    cell = runs.read(unit, "cell", _CELL)
    if len(cell) != layout.n_cells[unit]:
        raise ValueError(
            f"{runs.folder}: {len(cell)} cells of unit {unit}, {layout.n_cells[unit]} were "
            "planned; run finalize again"
        )
    gap, count = runs.read(unit, "gap", np.uint8), runs.read(unit, "count", np.uint8)
    packed = PackedCells(gap, count, cell["entries"], cell["nnz"], cell["total"])
    for code in range(len(SPLITS)):
        here = np.flatnonzero(cell["split"] == code)
        if not len(here):
            continue
        order = here[np.argsort(cell["key"][here], kind="stable")]
        for part, moved in _in_blocks(cell, packed, order):
            source: dict[str, NDArray[Any]] = {
                name: np.ascontiguousarray(part[name])
                for name in ("dataset", "obs_row", "source_row")
            }
            writer.append_packed(moved, source=source)
            seen(code, moved)
        writer.end_chunk()


def append_no_cells(writer: CellWriter) -> None:
    """Give an empty store the tables that `write_unit` gives.

    Args:
        writer: Of the store.
    """
    none = np.zeros(0, _CELL)
    cells = PackedCells(
        np.zeros(0, np.uint8), np.zeros(0, np.uint8), none["entries"], none["nnz"], none["total"]
    )
    names = ("dataset", "obs_row", "source_row")
    writer.append_packed(cells, source={name: none[name] for name in names})


def _kept_rows(dataset: StagedCells, chunk: int) -> NDArray[np.int64]:
    """Return the rows of a chunk's kept cells in the dataset."""
    first, last = dataset.cells.chunk_rows[chunk : chunk + 2].tolist()
    return first + np.flatnonzero(dataset.kept[first:last])


def _keys(dataset: StagedCells, seed: int) -> NDArray[np.uint64]:
    """Return the sort key of each staged cell; it depends on its row and the seed alone."""
    entropy = hashlib.sha256(f"{seed}/{dataset.dataset_id}".encode()).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(entropy, "big")))
    return random.integers(0, 2**64, size=len(dataset.kept), dtype=np.uint64)


def _read_run(
    datasets: Sequence[StagedCells], run: Sequence[Chunk], seed: int
) -> tuple[NDArray[np.void], PackedCells]:
    """Return the kept cells of the chunks of a run, with their keys."""
    chosen = [_kept_rows(datasets[i], chunk) for i, chunk in run]
    n_cells = sum(map(len, chosen))
    n_entries = sum(
        int(datasets[i].cells.row_entries[rows].sum(dtype=np.int64))
        for (i, _), rows in zip(run, chosen, strict=True)
    )
    cell = np.empty(n_cells, _CELL)
    gap, count = np.empty(n_entries, np.uint8), np.empty(n_entries, np.uint8)
    row, entry, keys_of = 0, 0, -1
    for (i, chunk), rows in zip(run, chosen, strict=True):
        store = datasets[i].cells
        if i != keys_of:
            keys, keys_of = _keys(datasets[i], seed), i
        packed = store.read_packed(chunk)
        if len(rows) < len(packed.row_entries):
            packed = _take(packed, rows - store.chunk_rows[chunk])
        part = cell[row : row + len(rows)]
        part["key"], part["dataset"], part["obs_row"] = keys[rows], i, rows
        part["source_row"] = store.table("source_row")[rows]
        part["entries"], part["nnz"] = packed.row_entries, packed.row_nnz
        part["total"], part["split"] = packed.row_total, datasets[i].split[rows]
        gap[entry : entry + len(packed.gap)] = packed.gap
        count[entry : entry + len(packed.gap)] = packed.count
        row, entry = row + len(rows), entry + len(packed.gap)
    return cell, PackedCells(gap, count, cell["entries"], cell["nnz"], cell["total"])


def _take(packed: PackedCells, rows: NDArray[np.int64]) -> PackedCells:
    """Return chosen cells in the order given."""
    ends = np.cumsum(packed.row_entries, dtype=np.int64)
    stops = ends[rows].tolist()
    starts = (ends[rows] - packed.row_entries[rows]).tolist()
    return PackedCells(
        _joined(packed.gap, starts, stops),
        _joined(packed.count, starts, stops),
        packed.row_entries[rows],
        packed.row_nnz[rows],
        packed.row_total[rows],
    )


def _joined(
    stream: NDArray[np.uint8], starts: Sequence[int], stops: Sequence[int]
) -> NDArray[np.uint8]:
    """Return slices of a stream one after the other.

    A cell is a few thousand bytes, and copying those costs less than a position for each of them.
    """
    view = memoryview(stream)  # type: ignore[arg-type]
    pieces = [view[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return np.frombuffer(b"".join(pieces), np.uint8)


def _in_blocks(
    cell: NDArray[np.void], packed: PackedCells, order: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.void], PackedCells]]:
    """Yield all cells in another order, a few millions of entries at a time."""
    block = np.cumsum(packed.row_entries[order], dtype=np.int64) // BLOCK_ENTRIES
    for rows in np.split(order, np.flatnonzero(np.diff(block)) + 1):
        yield cell[rows], _take(packed, rows)
