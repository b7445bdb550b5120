"""The cells of all datasets in one uniform random order per split, in bounded memory.

Every cell draws a 64-bit key from a generator seeded by (seed, dataset_id), and the cells of a
split are sorted by key: a uniform permutation that does not depend on memory limits. The sort takes
two passes (`data_prep.corpus.buckets`): encoded cells are scattered by ranges of the key, then one
range at a time is sorted in memory and written. Cells are moved as bytes, never decoded. A killed
call is continued by the next one: runs and buckets that are on disk are not made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus.buckets import RUN_BYTES, BucketRuns, bucket_of, plan_runs
from data_prep.corpus.dedup import Progress
from data_prep.corpus.work_folder import discard_scratch
from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.catalogue import SPLITS
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter

BUCKET_BYTES = RUN_BYTES
"""Encoded cells that are sorted in memory at once."""
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
    ]
)


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


def write_permuted(
    datasets: Sequence[StagedCells],
    writer: CellWriter,
    *,
    seed: int,
    scratch: Path,
    bucket_bytes: int = BUCKET_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the kept cells split by split, each split in uniform random order.

    Args:
        datasets: The cells, in the order that numbers the table `dataset`.
        writer: Where they go, with the tables dataset, obs_row (row in the staged dataset) and
            source_row (row in the source file). A resumable one continues after the buckets that it
            holds.
        seed: Seed of the permutation.
        scratch: Folder for the scattered cells (as large as the corpus without compression); it is
            created and removed. One that a killed call with the same arguments has left is
            continued.
        bucket_bytes: Cells sorted in memory at once; the result does not depend on it.
        progress: Called as cells are scattered and written.
    """
    n_buckets = [max(1, -(-size // bucket_bytes)) for size in _split_bytes(datasets)]
    first_bucket = np.concatenate(([0], np.cumsum(n_buckets)))
    runs = BucketRuns(scratch, n_buckets=int(first_bucket[-1]))
    stores, done = [d.cells for d in datasets], 0
    n_cells = sum(int(d.kept.sum()) for d in datasets)
    for number, run in enumerate(plan_runs(stores, run_bytes=bucket_bytes)):
        chosen = [_kept_rows(datasets[i], chunk) for i, chunk in run]
        if number >= len(runs):
            cell, packed = _read_run(datasets, run, chosen, seed)
            _scatter(runs, _buckets(datasets, cell, first_bucket), cell, packed)
        done += sum(map(len, chosen))
        if progress:
            progress("scatter", done, n_cells)
    for bucket in range(writer.mark, runs.n_buckets):
        if bucket in first_bucket:
            writer.end_chunk()
        _write_bucket(runs, bucket, writer)
        if writer.resumable:
            writer.checkpoint(mark=bucket + 1)
        if progress and n_cells:
            progress("write", writer.n_rows, n_cells)
    writer.end_chunk()
    discard_scratch(scratch)


def _split_bytes(datasets: Sequence[StagedCells]) -> NDArray[np.int64]:
    """Return the encoded size of each split."""
    sizes = np.zeros(len(SPLITS), np.int64)
    for d in datasets:
        for code in range(len(SPLITS)):
            chosen = d.kept & (d.split == code)
            sizes[code] += 2 * int(d.cells.row_entries[chosen].sum(dtype=np.int64))
    return sizes


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
    datasets: Sequence[StagedCells],
    run: Sequence[tuple[int, int]],
    chosen: Sequence[NDArray[np.int64]],
    seed: int,
) -> tuple[NDArray[np.void], PackedCells]:
    """Return the chosen cells of the chunks of a run, with their keys."""
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
        part["total"] = packed.row_total
        gap[entry : entry + len(packed.gap)] = packed.gap
        count[entry : entry + len(packed.gap)] = packed.count
        row, entry = row + len(rows), entry + len(packed.gap)
    return cell, PackedCells(gap, count, cell["entries"], cell["nnz"], cell["total"])


def _buckets(
    datasets: Sequence[StagedCells], cell: NDArray[np.void], first_bucket: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the bucket of each cell: its split's range of buckets, and there that of its key."""
    split = np.empty(len(cell), np.uint8)
    for i in np.unique(cell["dataset"]).tolist():
        here = cell["dataset"] == i
        split[here] = datasets[i].split[cell["obs_row"][here]]
    bucket = np.empty(len(cell), np.int64)
    for code in range(len(SPLITS)):
        here = split == code
        n_buckets = int(first_bucket[code + 1] - first_bucket[code])
        bucket[here] = first_bucket[code] + bucket_of(cell["key"][here], n_buckets)
    return bucket


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


def _scatter(
    runs: BucketRuns, bucket: NDArray[np.int64], cell: NDArray[np.void], packed: PackedCells
) -> None:
    order = np.argsort(bucket, kind="stable")
    cells = np.searchsorted(bucket[order], np.arange(runs.n_buckets + 1))
    entries = np.concatenate(([0], np.cumsum(packed.row_entries[order], dtype=np.int64)))[cells]
    runs.append(
        {"cell": cells, "gap": entries, "count": entries},
        (
            {"cell": part, "gap": moved.gap, "count": moved.count}
            for part, moved in _in_blocks(cell, packed, order)
        ),
    )


def _write_bucket(runs: BucketRuns, bucket: int, writer: CellWriter) -> None:
    cell = runs.read(bucket, "cell", _CELL)
    gap, count = runs.read(bucket, "gap", np.uint8), runs.read(bucket, "count", np.uint8)
    packed = PackedCells(gap, count, cell["entries"], cell["nnz"], cell["total"])
    order = np.argsort(cell["key"], kind="stable")
    for part, moved in _in_blocks(cell, packed, order):
        source: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(part[name]) for name in ("dataset", "obs_row", "source_row")
        }
        writer.append_packed(moved, source=source)
