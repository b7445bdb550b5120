"""Everything about the kernels, the model and the product that needs a GPU, in nine minutes.

    python -m benchmarks.gpu_check [--budget 540] [--json OUT] [--reference PATH] [--only STAGE,...]
    python -m benchmarks.gpu_check --device cpu --tiny      the same stages, small, without a GPU

Needs torch, triton and numpy, for `model` and `reference` also pyyaml and torch-geometric, for
`step` what `sclong_ds.pretrain` needs: without it the stage says what is missing. Stages,
each in a process of its own with its own time limit, so that a failure or a hang in one leaves the
others alone; whatever a stage found is written to OUT at once:

    device       names, versions, the GPU's own ceilings (copy, matrix product)
    resources    registers, spills and shared memory of every compiled kernel
    correctness  output and gradients against float64, bits twice and alone, next to literal code
    timing       each kernel, forward and backward against literal code, torch.compile and flash
    model        a training step of the published configuration: cells/s, MFU, peak memory
    step         the product: `sclong_ds.pretrain` on one rank, by ZeRO stage, recomputed or not,
                 compiled or not: cells/s, times of the GPU by part, of Python, of waiting for data
    reference    with --reference: the released model from a checkout of its code, beside it
    sweep        block sizes around the chosen ones, the three best of each kernel

Prints all figures, then those that have a target. Exit status 1 when the kernels are wrong, a stage
failed or had no time or, on an H100 or H200, a target is missed by more than 25 % or not measured;
troubles of the reference and of the sweep do not count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.gpu_targets import add_floors, on_target_chip, targets, verdict
from sclong_ds.files.atomic import write_atomic

STAGES: dict[str, tuple[str, float]] = {
    "device": ("gpu_attention", 40),
    "resources": ("gpu_attention", 75),
    "correctness": ("gpu_attention", 100),
    "timing": ("gpu_timing", 120),
    "model": ("gpu_model", 150),
    "step": ("gpu_step", 240),
    "reference": ("gpu_model", 75),
    "sweep": ("gpu_timing", 90),
}
"""The module of a stage, and its longest time in seconds; in the order of worth."""
IN_CASE = ("case", "layer", "b", "m", "way", "part")
"""What a row's name says."""
LEAST_S = 15.0
"""A stage is not started with less time left."""


def run_stage(name: str, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run one stage in a new process; return what it found, whole or not."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        found.touch()
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", name]
        command += ["--found", str(found), "--device", args.device, "--seconds", str(limit_s)]
        command += ["--tiny"] if args.tiny else []
        command += ["--reference", str(args.reference)] if args.reference else []
        started = time.monotonic()
        pipe = subprocess.PIPE
        stage = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        try:
            _, errors = stage.communicate(timeout=limit_s)
            status = "done" if stage.returncode == 0 else "failed"
            message = errors[-3000:] if stage.returncode else ""
        except subprocess.TimeoutExpired:
            status, message = "out of time", f"stopped after {limit_s:.0f} s"
        finally:
            if stage.poll() is None:
                os.killpg(stage.pid, signal.SIGKILL)  # with the processes that it started
                stage.communicate()
        rows = [json.loads(line) for line in found.read_text().splitlines()]
        spent = round(time.monotonic() - started, 1)
    return {"status": status, "seconds": spent, "message": message, "rows": rows}


def record_stage(args: argparse.Namespace) -> None:
    """Run a stage in this process, writing each row as it comes."""
    args.deadline = time.monotonic() + args.seconds
    stage = getattr(importlib.import_module(f"benchmarks.{STAGES[args.stage][0]}"), args.stage)
    with args.found.open("a") as out:
        for row in stage(args):
            out.write(json.dumps(row) + "\n")
            out.flush()


def show(results: dict[str, Any]) -> None:
    """Print one line per row, its case and its figures; last, the figures that have a target."""
    for name, stage in results.items():
        print(f"== {name}: {stage['status']}, {stage['seconds']} s {stage['message'][-300:]}")
        for row in stage["rows"]:
            figures = (f"{k}={_short(v)}" for k, v in row.items() if k not in IN_CASE)
            print(f"  {row['case']:46} {' '.join(figures)}")
    chip = "" if on_target_chip(results) else " (not for this device)"
    print(f"== targets for one H100{chip}")
    for target in targets(results):
        print(f"  {target}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(results: dict[str, Any], path: Path) -> None:
    """Write the document."""
    add_floors(results)
    document = {
        "environment": environment(),
        "stages": results,
        "targets": [target.row() for target in targets(results)],
    }
    write_atomic(path, (json.dumps(document, indent=2) + "\n").encode())


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = found.add_argument
    add("--budget", type=float, default=540, help="seconds in all (default: %(default)s)")
    add("--json", type=Path, default=Path("gpu_check.json"), help="default: %(default)s")
    add("--reference", type=Path, help="checkout of the released code, to time its model too")
    add("--only", help="stages to run, separated by commas (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="small sizes: a test of this program")
    add("--stage", choices=STAGES, help=argparse.SUPPRESS)
    add("--found", type=Path, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    return found


def main() -> int:
    """Run the stages."""
    cli = parser()
    args = cli.parse_args()
    if args.stage:
        record_stage(args)
        return 0
    # What the others find means nothing without the name of the device.
    wanted = ["device", *args.only.split(",")] if args.only else list(STAGES)
    if unknown := set(wanted) - set(STAGES):
        cli.error(f"--only: got {', '.join(sorted(unknown))}, must be of {', '.join(STAGES)}")
    if args.reference is None:
        wanted = [name for name in wanted if name != "reference"]
    deadline = time.monotonic() + args.budget
    results: dict[str, Any] = {}
    for name in (name for name in STAGES if name in wanted):
        left = deadline - time.monotonic()
        if left < LEAST_S:
            results[name] = {"status": "skipped", "seconds": 0, "message": "no time", "rows": []}
        else:
            results[name] = run_stage(name, args, min(left, STAGES[name][1]))
        write(results, args.json)
        print(f"{name}: {results[name]['status']}, {results[name]['seconds']} s", file=sys.stderr)
    show(results)
    wrong = verdict(results)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
