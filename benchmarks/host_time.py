"""Measure the host's work per layer and micro-batch under each ZeRO stage.

    python -m benchmarks.host_time [--layers 42] [--only NAME ...] [--json OUT]

A GPU waits for the host where Python needs longer to start a layer's kernels than they run. A
model of 42 large layers (and two of each other stack) of width 16 on 48 genes has next to no
arithmetic, so its CPU time is that of Python, autograd and DeepSpeed's hooks. Measured in one
process a case, on one rank and one thread: CPU milliseconds and Python calls of the forward and
of the backward pass, per layer, and the ratio to ZeRO-1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result

CASES = ("plain", "zero1", "zero2", "zero3 by module", "zero3", "zero3 compiled")
"""`zero3 by module` gathers the weights of each module by itself, as DeepSpeed does unasked."""
N_GENES = 48
OTHER_LAYERS = 4


def count_calls(function: Callable[[], Any]) -> tuple[Any, int]:
    """Return a function's result and how many Python functions were called meanwhile."""
    calls = 0

    def count(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        return function(), calls
    finally:
        sys.setprofile(None)


def overrides(layers: int, *, recompute: bool) -> list[str]:
    """Return the changes to sclong_1b that leave its layers and take away their arithmetic."""
    small = "{depth: %d, heads: 1, dim_head: 16, nb_features: null, ff_mult: 1}"
    return [
        "model.base_dim=16", "model.large_dim=16", "model.top_seq_len=32",
        "model.gene_encoder=embedding", f"model.large_encoder={small % layers}",
        f"model.mini_encoder={small % 2}", f"model.decoder={small % 2}",
        "engine.precision=fp32", "engine.train_batch_size=1",
        "engine.train_micro_batch_size_per_gpu=1",
        f"engine.activation_checkpointing={str(recompute).lower()}",
        "run.dir=unused", "data.corpus=unused",
    ]  # fmt: skip


def measure(case: str, layers: int, *, recompute: bool) -> dict[str, float]:
    """Return CPU seconds and Python calls of the forward and the backward pass."""
    import dataclasses

    import torch

    from sclong_ds.config.load import load_config
    from sclong_ds.engine import deepspeed_engine
    from sclong_ds.engine.ds_config import resolve_ds_config
    from sclong_ds.engine.ranks import join_process_group
    from sclong_ds.model.sclong import ScLong
    from sclong_ds.training import build

    torch.set_num_threads(1)
    config = load_config("sclong_1b", overrides(layers, recompute=recompute))
    stage = 0 if case == "plain" else int(case[4])
    compiled = case.endswith("compiled")
    engine = dataclasses.replace(
        config.engine, compile_layers=compiled, ds_config=f"zero{stage or 1}"
    )
    config = dataclasses.replace(config, engine=engine)
    deepspeed_engine.quiet_deepspeed()
    join_process_group(timeout_s=60)
    ds_config = resolve_ds_config(engine, world_size=1)
    # As at full size: a layer's four matrices are gathered, its biases and norms stay.
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    model: Any = deepspeed_engine.build_partitioned(
        lambda: ScLong(config.model, n_genes=N_GENES, graph=None, output_mean=1.0),
        seed=0,
        ds_config=ds_config,
    )
    if case == "zero3 by module":
        build.gather_at_once = lambda *_: None
    build.set_options(model, engine, ds_config)
    call: Any = model
    backward: Callable[[Any], Any] = lambda loss: loss.backward()  # noqa: E731
    step: Callable[[], Any] = model.zero_grad
    if stage:
        call = deepspeed_engine.initialize(model, optim=config.optim, ds_config=ds_config)
        backward, step = call.backward, call.step
    x = torch.rand(1, N_GENES)
    mask = torch.zeros(1, N_GENES, dtype=torch.bool)
    mask[:, :5] = True
    times: dict[str, list[float]] = {"forward_s": [], "backward_s": []}
    for _ in range(9):
        begun = time.process_time()
        loss = call(x, mask).square().mean()
        middle = time.process_time()
        backward(loss)
        times["forward_s"].append(middle - begun)
        times["backward_s"].append(time.process_time() - middle)
        step()
    loss, forward_calls = count_calls(lambda: call(x, mask).square().mean())
    _, backward_calls = count_calls(lambda: backward(loss))
    medians = {name: statistics.median(values[4:]) for name, values in times.items()}
    return medians | {"forward_calls": forward_calls, "backward_calls": backward_calls}


def child(case: str, layers: int, *, recompute: bool) -> dict[str, float]:
    """Measure one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.host_time", "--layers", str(layers)]
    command += ["--case", case, *(["--recompute"] if recompute else [])]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{case}: {errors.read()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=42, help="layers of the large encoder")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="these cases")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help="with activation checkpointing")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.layers, recompute=args.recompute)))
        return
    n = args.layers + OTHER_LAYERS
    print(f"{n} layers; per layer and micro-batch, CPU ms (Python calls)")
    base = None
    rows = {}
    for case in args.only:
        row = child(case, args.layers, recompute=args.recompute)
        total = row["forward_s"] + row["backward_s"]
        base = total if case == "zero1" else base
        ratio = f"  {total / base:5.2f} x zero1" if base else ""
        rows[case] = row | {"total_ms": 1e3 * total, "over_zero1": total / base if base else None}
        parts = (
            f"{name} {1e3 * row[f'{name}_s'] / n:5.2f} ({row[f'{name}_calls'] / n:6.0f})"
            for name in ("forward", "backward")
        )
        print(f"{case:16} {'  '.join(parts)}  total {1e3 * total:6.0f} ms{ratio}", flush=True)
    if args.json:
        write_result(args.json, "host_time", {"layers": n, "cases": rows})


if __name__ == "__main__":
    main()
