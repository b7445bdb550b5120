"""Exact duplicates: cells whose counts of all genes are the same, within and across datasets.

A cell has one encoding (`sclong_ds.streams`), so equal bytes mean equal cells. The 128-bit BLAKE2b
digests of the bytes are sorted by buckets of files, so memory stays at one bucket plus one byte a
cell. Two different cells of a corpus of 10^9 share a digest with probability 10^-21.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.buckets import BucketFiles, bucket_of
from sclong_ds.store import CellStore, PackedCells

CELLS_PER_BUCKET = 2**21
"""Digest records in memory at once (24 bytes each, and as much again while sorting)."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("cell", "<u8")])

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, cells done, and cells in all."""


def find_duplicates(
    stores: Sequence[CellStore], folder: Path, *, progress: Progress | None = None
) -> list[NDArray[np.bool_]]:
    """Find cells that are identical to an earlier one.

    Args:
        stores: Cell stores with the same genes; earlier stores come first, as do earlier rows.
        folder: Scratch folder; it is created, and left empty.
        progress: Called after every chunk.

    Returns:
        Per store a (cells,) array, True where an identical cell comes before.
    """
    n_cells = sum(len(store) for store in stores)
    n_buckets = max(1, -(-n_cells // CELLS_PER_BUCKET))
    files = BucketFiles(folder)
    done = 0
    for store in stores:
        for chunk in range(len(store.chunk_rows) - 1):
            digests = digest_cells(store.read_packed(chunk))
            _append(files, digests, done, n_buckets)
            done += len(digests)
            if progress:
                progress("duplicates", done, n_cells)
    repeated = np.zeros(n_cells, dtype=bool)
    for bucket in range(n_buckets):
        repeated[_repeats(files.read(bucket, "digest", _RECORD))] = True
        files.drop(bucket)
    files.folder.rmdir()
    return np.split(repeated, np.cumsum([len(store) for store in stores])[:-1])


def digest_cells(cells: PackedCells) -> NDArray[np.uint64]:
    """Return a (cells, 2) array with the 128-bit digest of each cell."""
    gap, count = memoryview(cells.gap), memoryview(cells.count)  # type: ignore[arg-type]
    digests = bytearray()
    start = 0
    for stop in np.cumsum(cells.row_entries, dtype=np.int64).tolist():
        digest = hashlib.blake2b(gap[start:stop], digest_size=16)
        digest.update(count[start:stop])
        digests += digest.digest()
        start = stop
    return np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)


def _append(
    files: BucketFiles, digests: NDArray[np.uint64], first_cell: int, n_buckets: int
) -> None:
    records = np.empty(len(digests), _RECORD)
    records["high"], records["low"] = digests[:, 0], digests[:, 1]
    records["cell"] = np.arange(first_cell, first_cell + len(digests))
    bucket = bucket_of(digests[:, 0], n_buckets)
    order = np.argsort(bucket, kind="stable")
    files.append("digest", bucket[order], records[order], np.arange(1, len(order) + 1))


def _repeats(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return the cells of one bucket whose digest an earlier cell has."""
    order = np.lexsort((records["cell"], records["low"], records["high"]))
    records = records[order]
    high, low = records["high"], records["low"]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return records["cell"][1:][same]
