"""Cells per CPU-second of small models, and what equal CPU-seconds of training reach.

    python -m benchmarks.visits CORPUS --graph FILE [--readings NAME ...] [--seconds N] [--seeds N]
        [--json OUT]

Trains `sclong_tiny_published` with a bias per gene on one thread, each reading for the same
CPU-seconds, and prints for each the visits, visits per CPU-second and the mean squared error of
hidden values of validation cells. The loop is plain torch: the product's model, targets, loss and
optimizer, without DeepSpeed and the loader, whose share is the same for all readings. The learning
rate follows the share of the CPU-seconds that are used, so that each reading has its whole
schedule.

With --step it prints where the CPU-seconds of a micro-batch go instead: each part of the model,
forward alone and with backward.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import write_result
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.batches import CellBatch
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.batch import MaskedBatch, masked_batch, masked_squared_error
from sclong_ds.objective.starts import cell_start
from sclong_ds.objective.targets import VALIDATION_EPOCH, Prepared, prepare
from sclong_ds.training.build import make_model

PACKED = ["model.routing=expressed"]
BIAS = ["model.gene_bias=true"]
READINGS = {
    "all": (1, 4, ["model.routing=top", "model.zero_genes=null"]),
    "all-4": (4, 4, ["model.routing=top", "model.zero_genes=null"]),
    "expressed": (4, 4, [*PACKED, "model.zero_genes=null"]),
    "zeros-1024": (4, 4, [*PACKED, "model.zero_genes=1024"]),
    "zeros-256": (4, 4, [*PACKED, "model.zero_genes=256"]),
    "zeros-64": (4, 4, [*PACKED, "model.zero_genes=64"]),
    "zeros-256-of-8": (8, 8, [*PACKED, "model.zero_genes=256"]),
    "zeros-256-of-16": (16, 16, [*PACKED, "model.zero_genes=256"]),
}
"""Cells of a micro-batch and of a step, and changes of the preset."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--graph", type=Path, required=True)
    parser.add_argument("--readings", nargs="+", choices=list(READINGS), default=list(READINGS))
    parser.add_argument("--seconds", type=float, default=140.0, help="CPU-seconds of a training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cells", type=int, default=64, help="validation cells")
    parser.add_argument("--set", nargs="*", default=[], help="more changes, for all readings")
    parser.add_argument("--step", action="store_true", help="where the time of one step goes")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    errors: dict[str, dict[str, float]] = {}
    corpus = Corpus(args.corpus, cache_dir=None)
    for seed in args.seeds:
        for name in args.readings:
            micro, batch, changes = READINGS[name]
            settings = [f"model.gene_graph={args.graph}", f"run.seed={seed}"]
            config = load_config("sclong_tiny_published", [*BIAS, *settings, *changes, *args.set])
            if args.step:
                print_step(name, config, corpus, micro)
                continue
            visits, model = train(config, corpus, micro, batch, args.seconds)
            mse = hidden_mse(config, corpus, model, args.cells)
            rate = visits / args.seconds
            errors.setdefault(f"seed_{seed}", {})[name] = mse
            print(
                f"{name:<16} seed {seed}: {visits:>6} visits, {rate:6.2f} per CPU-second; "
                f"hidden MSE {mse:.4f}",
                flush=True,
            )
    if args.json and not args.step:
        write_result(args.json, "visits", {"seconds": args.seconds, "hidden_mse": errors})


def train(
    config: RunConfig, corpus: Corpus, micro: int, batch: int, seconds: float
) -> tuple[int, ScLong]:
    """Train for some CPU-seconds; return the visits and the model."""
    torch.manual_seed(config.run.seed)
    model = make_model(config.model, corpus, cell_start(config.model, corpus))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    steps = batches(config, corpus, micro, batch)
    visits, started = 0, time.process_time()
    while (used := (time.process_time() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * rate(used, config)
        step = next(steps)
        n_targets = sum(int(prepared.targets.n_targets.sum()) for _, prepared in step)
        for masked, prepared in step:
            (loss(model, masked, prepared) / n_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.engine.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        visits += batch
    return visits, model


def rate(used: float, config: RunConfig) -> float:
    """Return the share of the learning rate at a share of the training: warm-up, then a cosine."""
    warm, least = float(config.optim.warmup_steps), config.optim.min_lr_ratio
    if used < warm:
        return used / warm
    fallen = 0.5 * (1 + math.cos(math.pi * (used - warm) / (1 - warm)))
    return least + (1 - least) * fallen


def batches(
    config: RunConfig, corpus: Corpus, micro: int, batch: int
) -> Iterator[list[tuple[MaskedBatch, Prepared]]]:
    """Yield the micro-batches of each step, the training cells in another order each epoch."""
    cells, epoch, waiting = corpus.splits["train"], 0, np.empty(0, np.int64)
    epochs = np.empty(0, np.int64)
    while True:
        while len(waiting) < batch:
            rng = np.random.default_rng([config.run.seed, epoch])
            waiting = np.append(waiting, rng.permutation(np.arange(cells.start, cells.stop)))
            epochs = np.append(epochs, np.full(len(waiting) - len(epochs), epoch))
            epoch += 1
        rows, at = waiting[:batch], epochs[:batch]
        waiting, epochs = waiting[batch:], epochs[batch:]
        yield [
            masked_cells(config, corpus, rows[i : i + micro], at[i : i + micro])
            for i in range(0, batch, micro)
        ]


def masked_cells(
    config: RunConfig, corpus: Corpus, rows: np.ndarray, epochs: np.ndarray
) -> tuple[MaskedBatch, Prepared]:
    """Return cells with their targets."""
    cells = corpus.packed_rows(rows)
    prepared = prepare(
        CellBatch(cells, rows, epochs, np.zeros_like(rows)),
        objective=config.objective,
        model=config.model,
        seed=config.run.seed,
        n_genes=corpus.n_genes,
    )
    masked = masked_batch(
        cells,
        prepared.targets,
        n_genes=corpus.n_genes,
        target_sum=config.data.target_sum,
        device=torch.device("cpu"),
    )
    return masked, prepared


def loss(model: ScLong, masked: MaskedBatch, prepared: Prepared) -> torch.Tensor:
    """Return the sum of squared errors over the targets."""
    predicted = model(masked.x, masked.hidden, positions=masked.positions, lengths=prepared.lengths)
    return masked_squared_error(predicted, masked.true, masked.valid)


@torch.no_grad()
def hidden_mse(config: RunConfig, corpus: Corpus, model: ScLong, n_cells: int) -> float:
    """Return the mean squared error of the hidden values of validation cells."""
    split, total, count = corpus.splits["validation"], 0.0, 0
    rows = np.arange(split.start, split.stop)[:n_cells]
    for some in np.array_split(rows, math.ceil(len(rows) / 4)):
        masked, prepared = masked_cells(config, corpus, some, np.full(len(some), VALIDATION_EPOCH))
        predicted = model(
            masked.x, masked.hidden, positions=masked.positions, lengths=prepared.lengths
        )
        wanted = masked.valid & masked.hidden.gather(1, masked.positions)
        total += float(masked_squared_error(predicted, masked.true, wanted))
        count += int(wanted.sum())
    return total / count


def print_step(name: str, config: RunConfig, corpus: Corpus, micro: int) -> None:
    """Print the CPU-seconds of a micro-batch and the shares of its operators."""
    model = make_model(config.model, corpus, cell_start(config.model, corpus))
    masked, prepared = next(batches(config, corpus, micro, micro))[0]
    loss(model, masked, prepared).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.process_time()
        value = loss(model, masked, prepared)
        forward = time.process_time() - started
        value.backward()
        whole = time.process_time() - started
    print(f"{name}: {micro} cells, forward {forward:.3f}, with backward {whole:.3f} CPU-seconds")
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


if __name__ == "__main__":
    main()
