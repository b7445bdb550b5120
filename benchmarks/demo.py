"""Figures of `make demo`: what the model and the baselines reach, and how long it takes.

    python -m benchmarks.demo --out FOLDER [--json OUT]

Runs `python -m sclong_ds.demo` below FOLDER, as a user would, and reads the metrics of its run:
errors of the hidden values of the held-out cells before the first step and after the last one,
beside those of every baseline, where the model stands to the strongest, and the correlation per
gene across cells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result
from sclong_ds.run_folder.files import read_run_json
from sclong_ds.run_folder.metric_names import BASELINES, LOSS, MSE, PER_GENE, of_baseline
from sclong_ds.run_folder.rows import read_metrics, standing

ROOT = Path(__file__).parents[1]


def figures(run_dir: Path) -> dict[str, Any]:
    """Return the figures of a finished run of the demo.

    Args:
        run_dir: Its run folder.
    """
    rows = read_metrics(run_dir)
    train, scores = [r for r in rows if LOSS in r], [r for r in rows if MSE in r]
    first, last = scores[0], scores[-1]
    about = read_run_json(run_dir)["summary"]
    return {
        "parameters": sum(about["parameters"].values()),
        "n_cells": about["n_cells_train"],
        "n_held_out": about["n_cells_validation"],
        "steps": int(train[-1]["step"]),
        "batch": round(train[-1]["cells_seen"] / train[-1]["step"]),
        "world_size": about["world_size"],
        "first_mse": first[MSE],
        "mse": last[MSE],
        "standing": standing(last),
        "per_gene": last[PER_GENE],
        "baselines": {name: last[of_baseline(name, MSE)] for name in BASELINES},
        "baselines_per_gene": {name: last[of_baseline(name, PER_GENE)] for name in BASELINES},
    }


def main() -> int:
    """Run the demo and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "sclong_ds.demo", "--out", str(args.out)], cwd=ROOT, check=True
    )
    minutes = (time.perf_counter() - started) / 60
    result = {"minutes": minutes, **figures(args.out / "runs" / "demo")}
    for name, value in result.items():
        print(f"{name:<20} {value}")
    if args.json:
        write_result(args.json, "demo", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
