"""The cells of all datasets in one uniform random order per split, in bounded memory.

Every cell draws a 64-bit key from a generator seeded by (seed, dataset_id), and the cells of a
split are sorted by key: a uniform permutation that does not depend on memory limits. The sort
takes two passes: encoded cells are scattered to files by ranges of the key, then one file at a
time is sorted in memory and written. Cells are moved as bytes, never decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.buckets import BucketFiles, bucket_of
from data_prep.dedup import Progress
from sclong_ds.store import SPLITS, CellStore, CellWriter, PackedCells, slices_to_index

BUCKET_BYTES = 2**28
"""Encoded cells that are sorted in memory at once."""
BLOCK_ENTRIES = 2**22
"""Entries that are moved at once; their positions take 8 bytes each."""
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
) -> dict[str, tuple[int, int]]:
    """Write the kept cells split by split, each split in uniform random order.

    Args:
        datasets: The cells, in the order that numbers the table `dataset`.
        writer: Where they go, with the tables dataset, obs_row (row in the staged dataset) and
            source_row (row in the source file).
        seed: Seed of the permutation.
        scratch: Folder for the scattered cells (as large as the corpus without compression); it is
            created and removed.
        bucket_bytes: Cells sorted in memory at once; the result does not depend on it.
        progress: Called as cells are scattered and written.

    Returns:
        First cell and end of each split.
    """
    n_buckets = [max(1, -(-size // bucket_bytes)) for size in _split_bytes(datasets)]
    first_bucket = np.concatenate(([0], np.cumsum(n_buckets)))
    files = BucketFiles(scratch)
    n_cells = sum(int(d.kept.sum()) for d in datasets)
    done = 0
    for number, dataset in enumerate(datasets):
        for cell, packed in _staged_blocks(dataset, number, seed):
            split = dataset.split[cell["obs_row"]]
            bucket = np.empty(len(cell), np.int64)
            for code in range(len(SPLITS)):
                here = split == code
                bucket[here] = first_bucket[code] + bucket_of(cell["key"][here], n_buckets[code])
            _scatter(files, bucket, cell, packed)
            done += len(cell)
            if progress:
                progress("scatter", done, n_cells)
    ends = {}
    for code, name in enumerate(SPLITS):
        start = writer.n_rows
        for bucket_number in range(first_bucket[code], first_bucket[code + 1]):
            _write_bucket(files, int(bucket_number), writer)
            if progress and n_cells:
                progress("write", writer.n_rows, n_cells)
        writer.end_chunk()
        ends[name] = (start, writer.n_rows)
    files.folder.rmdir()
    return ends


def _split_bytes(datasets: Sequence[StagedCells]) -> NDArray[np.int64]:
    """Return the encoded size of each split."""
    sizes = np.zeros(len(SPLITS), np.int64)
    for d in datasets:
        for code in range(len(SPLITS)):
            chosen = d.kept & (d.split == code)
            sizes[code] += 2 * int(d.cells.row_entries[chosen].sum(dtype=np.int64))
    return sizes


def _staged_blocks(
    dataset: StagedCells, number: int, seed: int
) -> Iterator[tuple[NDArray[np.void], PackedCells]]:
    """Yield the kept cells of a dataset chunk by chunk, with their keys."""
    entropy = hashlib.sha256(f"{seed}/{dataset.dataset_id}".encode()).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(entropy, "big")))
    store = dataset.cells
    source_row = store.table("source_row")
    for chunk in range(len(store.chunk_rows) - 1):
        first, last = int(store.chunk_rows[chunk]), int(store.chunk_rows[chunk + 1])
        # Dropped cells draw a key too: a cell's key depends on its row alone.
        keys = random.integers(0, 2**64, size=last - first, dtype=np.uint64)
        rows = np.flatnonzero(dataset.kept[first:last])
        packed = store.read_packed(chunk)
        cell = np.empty(len(rows), _CELL)
        cell["key"], cell["dataset"], cell["obs_row"] = keys[rows], number, first + rows
        cell["source_row"] = source_row[first + rows]
        cell["entries"] = packed.row_entries[rows]
        cell["nnz"] = packed.row_nnz[rows]
        cell["total"] = packed.row_total[rows]
        if len(rows):
            yield cell, _take(packed, rows)


def _take(packed: PackedCells, rows: NDArray[np.int64]) -> PackedCells:
    """Return chosen cells in the order given."""
    starts = np.cumsum(packed.row_entries, dtype=np.int64) - packed.row_entries
    index = slices_to_index(starts[rows], packed.row_entries[rows])
    return PackedCells(
        packed.gap[index],
        packed.count[index],
        packed.row_entries[rows],
        packed.row_nnz[rows],
        packed.row_total[rows],
    )


def _scatter(
    files: BucketFiles, bucket: NDArray[np.int64], cell: NDArray[np.void], packed: PackedCells
) -> None:
    order = np.argsort(bucket, kind="stable")
    bucket, packed = bucket[order], _take(packed, order)
    ends = np.cumsum(packed.row_entries, dtype=np.int64)
    files.append("cell", bucket, cell[order], np.arange(1, len(order) + 1))
    files.append("gap", bucket, packed.gap, ends)
    files.append("count", bucket, packed.count, ends)


def _write_bucket(files: BucketFiles, bucket: int, writer: CellWriter) -> None:
    cell = files.read(bucket, "cell", _CELL)
    gap, count = files.read(bucket, "gap", np.uint8), files.read(bucket, "count", np.uint8)
    packed = PackedCells(gap, count, cell["entries"], cell["nnz"], cell["total"])
    order = np.argsort(cell["key"], kind="stable")
    ends = np.cumsum(cell["entries"][order], dtype=np.int64)
    block = ends // BLOCK_ENTRIES
    for rows in np.split(order, np.flatnonzero(np.diff(block)) + 1):
        source: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(cell[name][rows])
            for name in ("dataset", "obs_row", "source_row")
        }
        writer.append_packed(_take(packed, rows), source=source)
    files.drop(bucket)
