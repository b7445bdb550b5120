"""What tracking costs a training step: in the training thread, beside it, and per validation.

    python -m benchmarks.tracking_overhead [--steps 60] [--work DIR] [--json OUT] [key=value ...]

Trains a small model on random cells in this process, with everything recorded (MLflow in an sqlite
file, gradient norms by part, system metrics, pictures), and takes the time of every part of
tracking while it runs. Prints seconds, and their share of the same run's step time: on a loaded
machine both grow alike. A small model has short steps: the share of a large one is far smaller.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import write_result
from sclong_ds.run_folder.rows import read_metrics
from tests.small_runs import make_corpus, settings

EVERY = 20
"""Steps between validations."""


def timed(seconds: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that adds its wall and its own thread's CPU seconds under a name."""

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        wall, processor = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[f"{name}, wall"] += time.perf_counter() - wall
            seconds[f"{name}, CPU"] += time.thread_time() - processor

    return run


def measure(work: Path, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, and return seconds by part, per step or per validation.

    Args:
        work: Folder for the corpus and the run.
        steps: Optimizer steps.
        overrides: Further `key=value` settings.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sclong_ds import pretrain
    from sclong_ds.engine.gradient_norms import GradientNorms
    from sclong_ds.tracking import node_sampler as system_metrics
    from sclong_ds.tracking.sender import Sender
    from sclong_ds.tracking.tracker import Tracker
    from sclong_ds.training.pictured import Pictures
    from sclong_ds.training.timing import RankTimes

    seconds: dict[str, float] = defaultdict(float)
    for owner, name, label in (
        (Tracker, "log", "metrics.jsonl"),
        (GradientNorms, "measure", "gradient norms"),
        (GradientNorms, "figures", "gradient norms"),
        (RankTimes, "add", "rank times"),
        (Sender, "_open", "MLflow, opening the run, background"),
        (Sender, "_send_rows", "MLflow, background"),
        (system_metrics._Counters, "read", "system metrics, background"),
        (Pictures, "show", "collecting for pictures"),
    ):
        setattr(owner, name, timed(seconds, label, getattr(owner, name)))
    before: list[float] = []
    start = Tracker.start

    def start_counting(*args: Any, **kwargs: Any) -> str | None:
        # Not what DeepSpeed compiles when it starts.
        before.append(_children_cpu_s())
        return start(*args, **kwargs)

    Tracker.start = start_counting
    arguments = settings(
        work / "run", make_corpus(work / "corpus"),
        **{
            "run.max_steps": steps, "run.validate_every_n_steps": EVERY, "tracking.enabled": "true",
            "tracking.picture_cells": 40, "tracking.system_metrics_every_s": 1.0,
        },
    )  # fmt: skip
    status = pretrain.main([*arguments, *overrides])
    if status != 0:
        raise RuntimeError(f"training ended with status {status}")
    rows = [r for r in read_metrics(work / "run") if "train/loss" in r]
    return {
        "steps": steps,
        "validations": steps // EVERY + 1,
        "step_s": float(np.median([r["perf/step_time_s"] for r in rows])),
        "values_per_step": len(rows[-1]),
        "seconds": dict(seconds),
        "drawing_cpu_s": _children_cpu_s() - before[0],
    }


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", type=Path, help="folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(args.work or Path(temporary), args.steps, args.overrides)
    step_s = found["step_s"]
    print(f"median step {step_s * 1e3:.1f} ms, {found['values_per_step']} values a step")
    for name, total in found["seconds"].items():
        if "opening" in name:
            print(f"{name:<44} {total:8.3f} s, once")
        elif name.startswith("collecting"):
            per = total / found["validations"]
            print(f"{name:<44} {per:8.3f} s a validation")
        else:
            per = total / found["steps"]
            print(f"{name:<44} {per * 1e3:8.3f} ms a step, {per / step_s:7.2%} of it")
    per = found["drawing_cpu_s"] / found["validations"]
    print(f"{'drawing, process of its own, CPU':<44} {per:8.3f} s a validation")
    if args.json:
        write_result(args.json, "tracking_overhead", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
