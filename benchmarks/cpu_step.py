"""CPU seconds and memory of a training step at published widths, beside literal Performer code.

    python -m benchmarks.cpu_step [--rounds N] [--threads N] [--only NAME ...] [--json OUT]

The published widths over 27,874 genes with 2 layers of the large encoder and one of each other
stack, one cell, forward and backward; gene vectors come from a table, since the gene graph takes
the same in all. `literal` computes attention operator by operator (`benchmarks/favor_literal.py`)
and predicts all genes; `like for like` differs by the attention alone; `as trained` predicts the
225 hidden genes, as training does; `expressed` sends the 1,500 expressed genes alone to the large
encoder; `bf16` has engine.linear_products=bf16. Each measurement is a process of its own, the
contenders in turn; medians over the rounds of CPU seconds, and of the process's peak resident size.
CPU seconds of several threads on a busy machine include their waits for each other: compare with
one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import write_result
from benchmarks.favor_literal import literal_attention
from kernels.linear_products import Products
from sclong_ds.config.load import load_config
from sclong_ds.model import performer
from sclong_ds.model.sclong import ScLong

N_GENES, EXPRESSED, HIDDEN = 27_874, 1_500, 225


class Contender(NamedTuple):
    """A way to compute the step."""

    literal: bool = False
    """Attention operator by operator."""
    hidden_alone: bool = False
    """Whether the hidden genes alone are predicted."""
    routing: str = "top"
    """`model.routing`."""
    products: Products = "precision"
    """`engine.linear_products`."""


CONTENDERS = {
    "literal": Contender(literal=True),
    "like for like": Contender(),
    "as trained": Contender(hidden_alone=True),
    "expressed": Contender(hidden_alone=True, routing="expressed"),
    "like for like, bf16": Contender(products="bf16"),
    "as trained, bf16": Contender(hidden_alone=True, products="bf16"),
    "expressed, bf16": Contender(hidden_alone=True, routing="expressed", products="bf16"),
}


def build(contender: Contender) -> ScLong:
    """Return the model of a contender."""
    config = load_config(
        "sclong_1b",
        [
            "model.gene_encoder=embedding", "model.large_encoder.depth=2",
            "model.mini_encoder.depth=1", "model.decoder.depth=1",
            f"model.routing={contender.routing}", "data.corpus=unused", "run.dir=unused",
        ],
    )  # fmt: skip
    if contender.literal:
        performer.favor_attention_packed = lambda qkv, features, **_: literal_attention(
            qkv, features
        )
    torch.manual_seed(0)
    model = ScLong(config.model, n_genes=N_GENES, graph=None, output_mean=1.0)
    for stack in model.performers().values():
        stack.set_products(contender.products)
    return model


def cell() -> tuple[Tensor, Tensor, Tensor]:
    """Return a cell (1, G), which of its values are hidden (1, G), and where they are (1, P)."""
    generator = torch.Generator().manual_seed(1)
    genes = torch.rand(1, N_GENES, generator=generator).topk(EXPRESSED, dim=1).indices
    values = 0.5 + 4 * torch.rand(1, EXPRESSED, generator=generator)
    positions = genes[:, :HIDDEN].contiguous()
    x = torch.zeros(1, N_GENES).scatter_(1, genes, values)
    return x, torch.zeros_like(x, dtype=torch.bool).scatter_(1, positions, True), positions


def measure(name: str, threads: int) -> dict[str, float]:
    """Measure one contender in this process."""
    torch.set_num_threads(threads)
    contender = CONTENDERS[name]
    model = build(contender)
    x, mask, positions = cell()
    for stack in model.performers().values():
        stack.features(x.device)  # drawn with the first call, once a thousand steps
    wall, start = time.perf_counter(), time.process_time()
    out = model(x, mask, positions=positions if contender.hidden_alone else None)
    loss = (out - 1).square().mean()
    middle = time.process_time()
    loss.backward()
    done = time.process_time()
    return {
        "forward_s": middle - start,
        "backward_s": done - middle,
        "total_s": done - start,
        "wall_s": time.perf_counter() - wall,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def measure_apart(name: str, threads: int) -> dict[str, float]:
    """Measure one contender in a new process."""
    command = [sys.executable, "-m", "benchmarks.cpu_step", "--contender", name]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.threads)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name, found in rounds.items():
            found.append(measure_apart(name, args.threads))
    columns = ("forward_s", "backward_s", "total_s", "wall_s", "peak_gib")
    print(f"{'':20}" + "".join(f"{c:>12}" for c in columns) + f"{'literal/it':>12}")
    medians: dict[str, Any] = {}
    for name, found in rounds.items():
        row = {c: statistics.median(r[c] for r in found) for c in columns}
        # Of each round, since the machine's speed changes with what else runs.
        pairs = zip(rounds.get("literal", []), found, strict=False)
        ratios = [base["total_s"] / r["total_s"] for base, r in pairs]
        row["ratio"] = statistics.median(ratios) if ratios else float("nan")
        medians[name] = row
        print(f"{name:20}" + "".join(f"{row[c]:12.2f}" for c in (*columns, "ratio")), flush=True)
    if args.json:
        write_result(args.json, "cpu_step", {"threads": args.threads, "median": medians} | rounds)


if __name__ == "__main__":
    main()
