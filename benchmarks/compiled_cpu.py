"""Do compiled Performer layers train faster on a CPU? Paired, under ZeRO-3.

    python -m benchmarks.compiled_cpu [--presets NAME ...] [--steps N] [--json OUT]

Two engines of the same model, eager and compiled, train in turn in one process on one rank and one
thread, on the same made cells: CPU seconds of a step with one optimizer step, after the steps that
compile. The median of the ratios of neighbouring steps, their quartiles, and the largest relative
difference of the losses. Large encoders have two layers; gene vectors come from a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor

from benchmarks.environment import write_result
from sclong_ds.config.load import load_config
from sclong_ds.engine import deepspeed_engine
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.ranks import join_process_group
from sclong_ds.model.sclong import ScLong
from sclong_ds.training.build import set_options

N_GENES, EXPRESSED, HIDDEN, WARM_UP = 27_874, 1_500, 225, 3


def engine_of(preset: str, cells: int, *, compiled: bool) -> Any:
    """Return the DeepSpeed engine of a preset's model."""
    config = load_config(
        preset,
        [
            "model.gene_encoder=embedding", "model.large_encoder.depth=2", "engine.precision=fp32",
            "engine.ds_config=zero3", f"engine.train_batch_size={cells}",
            f"engine.train_micro_batch_size_per_gpu={cells}", "data.corpus=unused",
            "run.dir=unused",
        ],
    )  # fmt: skip
    settings = dataclasses.replace(config.engine, compile_layers=compiled)
    ds_config = resolve_ds_config(settings, world_size=1)
    model: Any = deepspeed_engine.build_partitioned(
        lambda: ScLong(config.model, n_genes=N_GENES, graph=None, output_mean=1.0),
        seed=0,
        ds_config=ds_config,
    )
    set_options(model, settings, ds_config)
    return deepspeed_engine.initialize(model, optim=config.optim, ds_config=ds_config)


def made_cells(cells: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return cells (B, G), which values are hidden (B, G) and where they are (B, P)."""
    generator = torch.Generator().manual_seed(seed)
    genes = torch.rand(cells, N_GENES, generator=generator).topk(EXPRESSED, dim=1).indices
    counts = torch.randint(1, 9, (cells, EXPRESSED), generator=generator).float()
    positions = genes[:, :HIDDEN].contiguous()
    x = torch.zeros(cells, N_GENES).scatter_(1, genes, counts.log1p())
    return x, torch.zeros_like(x, dtype=torch.bool).scatter_(1, positions, True), positions


def step(engine: Any, x: Tensor, mask: Tensor, positions: Tensor) -> tuple[float, float]:
    """Return CPU seconds and loss of a step."""
    begun = time.process_time()
    loss = (engine(x, mask, positions=positions) - 1).square().mean()
    engine.backward(loss)
    engine.step()
    return time.process_time() - begun, loss.item()


def compare(preset: str, cells: int, steps: int) -> dict[str, Any]:
    """Return the figures of one preset."""
    engines = [engine_of(preset, cells, compiled=compiled) for compiled in (False, True)]
    rows = []
    for i in range(WARM_UP + steps):
        batch = made_cells(cells, seed=i)
        rows.append([step(engine, *batch) for engine in engines])
    timed = rows[WARM_UP:]
    ratios = [eager[0] / compiled[0] for eager, compiled in timed]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "cells": cells,
        "eager_s": statistics.median(eager[0] for eager, _ in timed),
        "compiled_s": statistics.median(compiled[0] for _, compiled in timed),
        "first_steps_s": sum(compiled[0] for _, compiled in rows[:WARM_UP]),
        "ratio": quarters[1],
        "quartiles": [quarters[0], quarters[2]],
        "loss_difference": max(abs(b[1] - a[1]) / abs(a[1]) for a, b in rows),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["sclong_tiny", "sclong_100m"])
    parser.add_argument("--cells", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each engine")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed_engine.quiet_deepspeed()
    join_process_group(timeout_s=600)
    rows = {}
    for preset in args.presets:
        rows[preset] = row = compare(preset, args.cells, args.steps)
        print(preset, json.dumps(row), flush=True)
    if args.json:
        write_result(args.json, "compiled_cpu", rows)


if __name__ == "__main__":
    main()
