"""Does training suffer from linear layers in fewer bits? Small models, several seeds.

    python -m benchmarks.fewer_bits [--seeds N] [--steps N] [--json OUT]

A model of 300 genes with the stacks of `sclong_tiny` at width 32 and 64 learns made counts whose
logarithms have rank 4, one optimizer in plain torch, `engine.linear_products` in turn from the same
weights and batches; 8-bit floats are emulated where the device has none. Error of hidden values
(MSE) of 256 other cells, and its ratio to that of `precision`, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import get_args

import torch
from scipy.stats import t
from torch import Tensor

from benchmarks.environment import write_result
from kernels.linear_products import Products
from sclong_ds.config.load import load_config
from sclong_ds.model.sclong import ScLong

N_GENES, BATCH, HELD_OUT, RANK = 300, 8, 256, 4
SMALL = [
    "model.gene_encoder=embedding", "model.base_dim=32", "model.large_dim=64",
    "model.top_seq_len=64", "model.routing=top", "model.zero_genes=null",
    "model.cell_vector=none", "model.cell_offset=none", "model.gene_bias=false",
    "data.corpus=unused", "run.dir=unused",
]  # fmt: skip


def made_cells(n: int, generator: torch.Generator, loadings: Tensor) -> tuple[Tensor, Tensor]:
    """Return transformed counts (n, G) and which expressed values are hidden (n, G)."""
    rate = torch.randn(n, RANK, generator=generator) @ loadings
    x = torch.poisson(rate.exp(), generator=generator).log1p()
    return x, (torch.rand(x.shape, generator=generator) < 0.15) & (x > 0)


def error(model: ScLong, x: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean squared error of the hidden values."""
    return (model(x, hidden) - x)[hidden].square().mean()


def trained(products: Products, seed: int, steps: int) -> float:
    """Return the error on other cells after training."""
    config = load_config("sclong_tiny", SMALL)
    torch.manual_seed(seed)
    model = ScLong(config.model, n_genes=N_GENES, graph=None, output_mean=1.0)
    model.performers()["large_encoder"].set_products(products)
    generator = torch.Generator().manual_seed(1000 + seed)
    loadings = torch.randn(RANK, N_GENES, generator=generator) / 2
    held_out = made_cells(HELD_OUT, generator, loadings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        error(model, *made_cells(BATCH, generator, loadings)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return error(model, *held_out).item()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds: tuple[Products, ...] = get_args(Products)
    rows = []
    for seed in range(args.seeds):
        rows.append({kind: trained(kind, seed, args.steps) for kind in kinds})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "steps": args.steps,
        "seeds": args.seeds,
        "mse": {kind: statistics.mean(row[kind] for row in rows) for kind in kinds},
        "times": {kind: ratio_of([row[kind] / row["precision"] for row in rows]) for kind in kinds},
        "rows": rows,
    }
    print(json.dumps(result["times"]))
    if args.json:
        write_result(args.json, "fewer_bits", result)


def ratio_of(ratios: list[float]) -> dict[str, float]:
    """Return the geometric mean of ratios paired by seed, and its 95% interval (Student's t)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = statistics.mean(logs), 0.0
    if len(logs) > 1:
        half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5
    return {
        "mean": math.exp(mean),
        "low": math.exp(mean - half),
        "high": math.exp(mean + half),
    }


if __name__ == "__main__":
    main()
