"""Memory and time of the search for duplicate cells at the size of the whole corpus.

    python -m benchmarks.dedup --out FOLDER [--cells N] [--json OUT]

Sends N seeded 128-bit digests (48,024,242 unless told otherwise, 3% of them repeats of earlier
ones, at all distances) through `data_prep.passes.dedup` as `finalize` does after it has read the
cells, and checks that exactly the repeats are found. Prints the peak resident memory of the process
and the largest size of the files in FOLDER.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import write_result
from data_prep.passes.buckets import BucketRuns
from data_prep.passes.dedup import CELLS_PER_BUCKET, repeated_cells, write_digests

N_CELLS, SHARE_REPEATED = 48_024_242, 0.03
CELLS_PER_RUN = 2**21


def measure(out: Path, n_cells: int) -> dict[str, Any]:
    """Find the repeats among synthetic digests.

    Args:
        out: Folder for the scratch files, which are removed.
        n_cells: Number of digests.

    Returns:
        Times, peak memory, size of the scratch files and number of repeats.

    Raises:
        RuntimeError: Other cells than the repeats were found.
    """
    runs = BucketRuns(out, n_buckets=-(-n_cells // CELLS_PER_BUCKET))
    expected = np.zeros(n_cells, dtype=bool)
    rng = np.random.default_rng(0)
    # A cell and its repeat are one draw of a counter-like number, spread over 64 bits.
    start = time.perf_counter()
    for first in range(0, n_cells, CELLS_PER_RUN):
        number = np.arange(first, min(first + CELLS_PER_RUN, n_cells), dtype=np.uint64)
        repeats = np.flatnonzero((rng.random(len(number)) < SHARE_REPEATED) & (number > 0))
        number[repeats] = (rng.random(len(repeats)) * number[repeats]).astype(np.uint64)
        # A copy of a copy names the first cell of all: copies are taken of even cells only, and
        # even cells are never copies.
        number[repeats] -= number[repeats] % np.uint64(2)
        even = repeats[(first + repeats) % 2 == 0]
        number[even] = (first + even).astype(np.uint64)
        odd = repeats[(first + repeats) % 2 == 1]
        expected[first + odd] = True
        digests = np.stack([_mix(number), _mix(number ^ np.uint64(2**63 - 1))], axis=1)
        write_digests(runs, digests, first)
    written = time.perf_counter()
    found = np.zeros(n_cells, dtype=bool)
    for cells in repeated_cells(runs):
        found[cells] = True
    if not np.array_equal(found, expected):
        raise RuntimeError(f"{int((found != expected).sum())} cells are judged wrongly")
    return {
        "n_cells": n_cells,
        "repeated": int(found.sum()),
        "write_s": written - start,
        "sort_s": time.perf_counter() - written,
        "seconds": time.perf_counter() - start,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "scratch_mib": sum(path.stat().st_size for path in out.iterdir()) / 2**20,
    }


def _mix(number: np.ndarray) -> np.ndarray:
    """Return well-spread 64-bit numbers, different for different numbers (SplitMix64)."""
    with np.errstate(over="ignore"):
        value = number + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def main() -> int:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description="Memory of the search for duplicate cells.")
    parser.add_argument("--out", type=Path, required=True, help="folder for scratch files")
    parser.add_argument("--cells", type=int, default=N_CELLS, help=f"default {N_CELLS}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=args.out))
    try:
        result = measure(scratch, args.cells)
    finally:
        shutil.rmtree(scratch)
    for name, value in result.items():
        print(
            f"{name:<14} {value:>14,.1f}"
            if isinstance(value, float)
            else f"{name:<14} {value:>12,}"
        )
    if args.json:
        write_result(args.json, "dedup", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
