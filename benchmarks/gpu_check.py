"""Everything about the kernels and the model that needs a GPU, in nine minutes.

    python -m benchmarks.gpu_check [--budget 540] [--json OUT] [--reference PATH] [--only STAGE,...]
    python -m benchmarks.gpu_check --device cpu --tiny      the same stages, small, without a GPU

Stages, each in a process of its own with its own time limit, so that a failure or a hang in one
leaves the others alone; whatever a stage found is written to OUT at once:

    device       names, versions, the GPU's own ceilings (copy, matrix product)
    resources    registers, spills and shared memory of every compiled kernel
    correctness  output and gradients against float64, bits twice and alone, next to literal code
    timing       each kernel, forward and backward against literal code, torch.compile and flash
    sweep        block sizes around the chosen ones, the three best of each kernel
    model        a training step of the published configuration: cells/s, MFU, peak memory
    reference    with --reference: the released model from a checkout of its code, beside it

Prints a table of figures against targets. Exit status 1 when the kernels are wrong or miss a target
by more than 25 %, or a stage failed; the reference's troubles do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import gpu_attention, gpu_model
from benchmarks.environment import environment
from sclong_ds.files import write_atomic

Stage = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]
STAGES: dict[str, tuple[Stage, float]] = {
    "device": (gpu_attention.device, 40),
    "correctness": (gpu_attention.correctness, 110),
    "resources": (gpu_attention.resources, 60),
    "timing": (gpu_attention.timing, 150),
    "model": (gpu_model.model, 150),
    "sweep": (gpu_attention.sweep, 75),
    "reference": (gpu_model.reference, 60),
}
"""What a stage does, and its longest time in seconds; in the order of worth."""
LEAST_S = 15.0
"""A stage is not started with less time left."""
SLACK = 1.25


def run_stage(name: str, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run one stage in a new process; return what it found, whole or not."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.jsonl"
        found.touch()
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", name]
        command += ["--found", str(found), "--device", args.device]
        command += ["--tiny"] if args.tiny else []
        command += ["--reference", str(args.reference)] if args.reference else []
        started = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
            status = "done" if done.returncode == 0 else "failed"
            message = done.stderr[-3000:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            status, message = "out of time", f"stopped after {limit_s:.0f} s"
        rows = [json.loads(line) for line in found.read_text().splitlines()]
        spent = round(time.monotonic() - started, 1)
    return {"status": status, "seconds": spent, "message": message, "rows": rows}


def record_stage(args: argparse.Namespace) -> None:
    """Run a stage in this process, writing each row as it comes."""
    with args.found.open("a") as out:
        for row in STAGES[args.stage][0](args):
            out.write(json.dumps(row) + "\n")
            out.flush()


def verdict(results: dict[str, Any], *, on_gpu: bool) -> list[str]:
    """Return what is wrong: failed stages, wrong results, targets missed by more than 25 %."""
    wrong = [
        f"stage {name}: {stage['status']}: {stage['message'].strip().splitlines()[-1:]}"
        for name, stage in results.items()
        if stage["status"] not in ("done", "skipped") and name not in ("reference", "sweep")
    ]
    rows = [row for stage in results.values() for row in stage["rows"]]
    wrong += [f"wrong result: {row['case']}" for row in rows if row.get("correct") is False]
    if on_gpu:
        wrong += [
            f"{row['case']}: {row['us']:.0f} us, target {row['target_us']:.0f} us"
            for row in rows
            if row.get("target_us") and row["us"] > SLACK * row["target_us"]
        ]
    return wrong


def show(results: dict[str, Any]) -> None:
    """Print one line per row: its case, then its figures."""
    for name, stage in results.items():
        print(f"== {name}: {stage['status']}, {stage['seconds']} s {stage['message'][-300:]}")
        for row in stage["rows"]:
            figures = (f"{k}={_short(v)}" for k, v in row.items() if k != "case")
            print(f"  {row['case']:46} {' '.join(figures)}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    return found


def main() -> int:
    """Run the stages."""
    cli = parser()
    args = cli.parse_args()
    if args.stage:
        record_stage(args)
        return 0
    wanted = args.only.split(",") if args.only else list(STAGES)
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
        document = {"environment": environment(), "stages": results}
        write_atomic(args.json, (json.dumps(document, indent=2) + "\n").encode())
        print(f"{name}: {results[name]['status']}, {results[name]['seconds']} s", file=sys.stderr)
    show(results)
    wrong = verdict(results, on_gpu=args.device == "cuda")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
