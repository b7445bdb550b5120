"""Memory of building the published model under ZeRO-3: no process holds the whole of it.

    python -m benchmarks.partitioned_build [--ranks 2] [--json OUT]

Builds `sclong_1b` in float32 on ranks of this machine's CPU (`tests/instantiate_partitioned.py`),
once with pages of its own for every large tensor, which go back when it is freed, and once with
glibc's default allocator. Prints the highest resident memory of a rank less what it had before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.environment import write_result
from tests.small_runs import ROOT, train

SETTINGS = ("sclong_1b", "model.gene_encoder=embedding", "engine.precision=fp32")
ALLOCATORS = {"own_pages": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, "default": {}}


def measure(folder: Path, allocator: dict[str, str], *, ranks: int) -> list[dict[str, int]]:
    """Return the figures of each rank.

    Args:
        folder: Scratch folder, created.
        allocator: Environment of the ranks.
        ranks: Number of ranks.
    """
    folder.mkdir(parents=True)
    command = [str(ROOT / "tests" / "instantiate_partitioned.py"), str(folder), *SETTINGS]
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with mock.patch.dict(os.environ, own | allocator):
        train(command, n_ranks=ranks, log=folder / "log")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


def main() -> int:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    result: dict[str, Any] = {"ranks": args.ranks}
    with tempfile.TemporaryDirectory() as work:
        for name, allocator in ALLOCATORS.items():
            found = measure(Path(work) / name, allocator, ranks=args.ranks)
            result["parameters"] = found[0]["parameters"]
            result["model_bytes"] = found[0]["model_bytes"]
            took = max(rank["peak_bytes"] - rank["before_bytes"] for rank in found)
            result[name] = {"peak_bytes": took, "all_ranks": found}
            print(f"{name:<10} {took / 1e9:.2f} GB of {found[0]['model_bytes'] / 1e9:.2f}")
    if args.json:
        write_result(args.json, "partitioned_build", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
