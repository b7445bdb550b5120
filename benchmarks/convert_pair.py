"""Cost of `data_prep convert` beside that of another checkout: paired, alternating, in one run.

    python -m benchmarks.convert_pair OTHER_CHECKOUT --out FOLDER [--rounds N] [--json OUT]

Two cases from `benchmarks.synthetic_corpus`: one dataset of 10,000 cells, and 8 datasets of 1,000
cells with --jobs 2. Each round runs both checkouts, and the order changes every round. Prints the
medians of CPU seconds (user and system, the whole process tree) and of wall seconds, the ratio of
the medians, and the smallest and largest ratio of a round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.data_prep import ROOT, adopt_orphans, timed
from benchmarks.environment import write_result

ROUNDS = 5
CASES = {"1 x 10,000 cells": (10_000, 1, 1), "8 x 1,000 cells, 2 jobs": (8_000, 8, 2)}
"""Cells of all datasets together, datasets, and `--jobs`."""
_WRITE = """
import sys
from pathlib import Path
from benchmarks.synthetic_corpus import write_h5ads
write_h5ads(Path(sys.argv[1]), n_cells=int(sys.argv[2]), n_datasets=int(sys.argv[3]))
"""


def measure(out: Path, other: Path, case: str, rounds: int) -> dict[str, Any]:
    """Convert the datasets of one case with both checkouts in turn.

    Args:
        out: Scratch folder.
        other: The other checkout.
        case: One of CASES.
        rounds: Pairs of runs.

    Returns:
        Per checkout (here, there) and round the cost, and the ratio here / there of CPU and wall.
    """
    n_cells, n_datasets, jobs = CASES[case]
    folder, corpus = out / f"{n_datasets}_datasets", out / "corpus"
    if not (folder / "manifest.tsv").exists():
        # In a process of its own: children count their parent's memory as theirs at the fork.
        write = [sys.executable, "-c", _WRITE, str(folder), str(n_cells), str(n_datasets)]
        subprocess.run(write, cwd=ROOT, check=True)
    command = ["-m", "data_prep", "convert", str(folder / "manifest.tsv"), "--out", str(corpus)]
    roots = {"here": ROOT, "there": other}
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for number in range(rounds):
        for name in sorted(roots, reverse=bool(number % 2)):
            shutil.rmtree(corpus, ignore_errors=True)
            costs[name].append(timed([[*command, "--jobs", str(jobs)]], root=roots[name]))
    shutil.rmtree(corpus)
    return {"costs": costs, **{key: compared(costs, key) for key in ("cpu_s", "wall_s")}}


def compared(costs: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """Return the medians of one figure for both checkouts, and how they compare.

    Args:
        costs: Per checkout (here, there) the figures of each round.
        key: The figure.
    """
    here, there = ([cost[key] for cost in costs[name]] for name in ("here", "there"))
    ratios = [ours / theirs for ours, theirs in zip(here, there, strict=True)]
    medians = statistics.median(here), statistics.median(there)
    return {
        "here": medians[0],
        "there": medians[1],
        "ratio": medians[0] / medians[1],
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }


def main() -> int:
    """Run all cases and print one line for each figure."""
    parser = argparse.ArgumentParser(description="convert beside that of another checkout.")
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    other, out = args.other.resolve(), args.out.resolve()
    if not (other / "data_prep").is_dir():
        parser.error(f"{other}: no data_prep here; give the root of a checkout")
    out.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    result = {}
    for case in CASES:
        result[case] = measure(out, other, case, args.rounds)
        for key in ("cpu_s", "wall_s"):
            found = result[case][key]
            print(
                f"{case:<24} {key:<7} here {found['here']:6.2f}  there {found['there']:6.2f}  "
                f"ratio {found['ratio']:.3f} ({found['least_ratio']:.3f} to "
                f"{found['largest_ratio']:.3f} over {args.rounds} rounds)",
                flush=True,
            )
    if args.json:
        write_result(args.json, "convert_pair", result, other=str(other))
    return 0


if __name__ == "__main__":
    sys.exit(main())
