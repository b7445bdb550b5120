"""Measure how long training stands still for a checkpoint, waiting for it and in the background.

    python -m benchmarks.checkpoint_stall [--ranks 2] [--folder DIR]

Trains the wide model of `benchmarks.rank_memory` (40 million parameters, 480 MB a checkpoint) with
a checkpoint every few steps, below DIR (the system's folder for temporary files unless told
otherwise), once with checkpoint.asynchronous=false and once with true. Prints a table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.random_kills import make_corpus, settings, train
from benchmarks.rank_memory import WIDE
from sclong_ds.run_folder import read_events, read_metrics

EVERY, STEPS = 4, 24


def main() -> int:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--folder", type=Path, help="where the run folders lie for a while")
    args = parser.parse_args()
    titles = ("checkpoint.asynchronous", "MB", "written in, s", "training stands still, s",
              "step, s", "step while it is written, s")  # fmt: skip
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        work = Path(temporary)
        corpus = make_corpus(work / "corpus")
        for asynchronous in ("false", "true"):
            run_dir = work / asynchronous
            changes = WIDE | {
                "run.max_steps": STEPS, "run.validate_every_n_steps": 0,
                "checkpoint.every_n_steps": EVERY, "checkpoint.keep_last": 1,
                "checkpoint.asynchronous": asynchronous,
            }  # fmt: skip
            command = ["-m", "sclong_ds.pretrain", *settings(run_dir, corpus, **changes)]
            train(command, n_ranks=args.ranks, log=work / "log")
            # All but the last checkpoint, which a run always waits for.
            saved = [e for e in read_events(run_dir) if e["event"] == "checkpoint"][:-1]
            rows = [row for row in read_metrics(run_dir) if row["step"] > EVERY]
            after = [row for row in rows if row["step"] % EVERY == 1]
            # What a save costs is spread over the rows until the next one.
            stalls = [
                sum(r["perf/checkpoint_s"] for r in rows if 0 < r["step"] - e["step"] <= EVERY)
                for e in saved
            ]
            others = [row for row in rows if row["step"] % EVERY == 0]
            figures = (
                saved[0]["bytes"] / 1e6,
                statistics.median(e["seconds"] for e in saved),
                statistics.median(stalls),
                statistics.median(row["perf/step_time_s"] for row in others),
                statistics.median(row["perf/step_time_s"] for row in after),
            )
            text = " | ".join(f"{figure:.2f}" for figure in figures)
            print(f"| {asynchronous} | {text} |", flush=True)
    print(environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
