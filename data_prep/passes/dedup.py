"""Exact duplicates: cells whose counts of all genes are the same, within and across datasets.

A cell has one encoding (`sclong_ds.corpus.byte_code`), so equal bytes mean equal cells. The 128-bit
BLAKE2b digests of the bytes go to disk in runs and are sorted bucket by bucket
(`data_prep.passes.buckets`), so memory stays at one bucket plus one byte a cell. Two different
cells of a corpus of 10^9 share a digest with probability 10^-21.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.passes.buckets import BucketRuns, bucket_of, discard_scratch, plan_runs
from sclong_ds.corpus.byte_code import digest_cells
from sclong_ds.corpus.cell_store import CellStore

CELLS_PER_BUCKET = 2**21
"""Digest records in memory at once (24 bytes each, and as much again while sorting)."""
RUN_BYTES = 2**33
"""Encoded cells whose digests are written at once: about two million cells, 50 MB of digests."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("cell", "<u8")])

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, cells done, and cells in all."""


def find_duplicates(
    cells: CellStore, folder: Path, *, progress: Progress | None = None
) -> NDArray[np.bool_]:
    """Find cells that are identical to an earlier one.

    Args:
        cells: The cells.
        folder: Scratch folder that does not exist; it is created and removed.
        progress: Called after every chunk.

    Returns:
        (cells,) True where an identical cell comes before.
    """
    n_cells = len(cells)
    runs = BucketRuns(folder, n_buckets=max(1, -(-n_cells // CELLS_PER_BUCKET)))
    done = 0
    for run in plan_runs([cells], run_bytes=RUN_BYTES):
        parts = []
        for _, chunk in run:
            parts.append(digest_cells(cells.read_packed(chunk)))
            done = int(cells.chunk_rows[chunk + 1])
            if progress:
                progress("duplicates", done, n_cells)
        digests = np.concatenate(parts)
        write_digests(runs, digests, done - len(digests))
    repeated = np.zeros(n_cells, dtype=bool)
    for numbers in repeated_cells(runs):
        repeated[numbers] = True
    discard_scratch(folder)
    return repeated


def write_digests(runs: BucketRuns, digests: NDArray[np.uint64], first_cell: int) -> None:
    """Write the digests of cells that follow each other as one run.

    Args:
        runs: Where to.
        digests: (cells, 2) as `digest_cells` returns them.
        first_cell: Number of the first of the cells.
    """
    bounds, records = digest_run(digests, first_cell, n_buckets=runs.n_buckets)
    runs.append(bounds, [records])


def digest_run(
    digests: NDArray[np.uint64], first_cell: int, *, n_buckets: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.void]]]:
    """Return bounds and records of a run of digests, for `buckets.write_run`.

    Args:
        digests: (cells, 2) as `digest_cells` returns them, of cells that follow each other.
        first_cell: Number of the first of them.
        n_buckets: Number of buckets.
    """
    bucket = bucket_of(digests[:, 0], n_buckets)
    order = np.argsort(bucket, kind="stable")
    records = np.empty(len(digests), _RECORD)
    records["high"], records["low"] = digests[order, 0], digests[order, 1]
    records["cell"] = first_cell + order
    bounds = np.searchsorted(bucket[order], np.arange(n_buckets + 1))
    return {"digest": bounds}, {"digest": records}


def repeated_cells(runs: BucketRuns) -> Iterable[NDArray[np.uint64]]:
    """Yield bucket by bucket the numbers of the cells whose digest an earlier cell has.

    Args:
        runs: All digests.
    """
    for bucket in range(runs.n_buckets):
        yield repeated_in(runs, bucket)


def repeated_in(runs: BucketRuns, bucket: int) -> NDArray[np.uint64]:
    """Return the numbers of the cells of a bucket whose digest an earlier cell has.

    Args:
        runs: All digests.
        bucket: The bucket.
    """
    records = runs.read(bucket, "digest", _RECORD)
    order = np.lexsort((records["cell"], records["low"], records["high"]))
    high, low = records["high"][order], records["low"][order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return records["cell"][order[1:]][same]
