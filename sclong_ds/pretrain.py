r"""Pretrain scLong: the story from the command to the training step.

    deepspeed --module sclong_ds.pretrain --config sclong_tiny run.dir=runs/a \
        data.corpus=corpus model.gene_graph=graph.npz
    sbatch slurm/pretrain.sh --config sclong_1b run.dir=... data.corpus=... model.gene_graph=...

`main` reads the configuration, `train` builds the run and loops, `train_step` is one optimizer
step. Starting the same command again on the same run.dir resumes. Exit status: 0 done, 1 failed, 2
bad usage, 75 stopped by a signal after saving (start again to go on). Reads the corpus and the gene
graph; writes the run folder (README: "What a run folder holds") and MLflow.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from sclong_ds import checkpoint
from sclong_ds.build import Run, build, check_inputs
from sclong_ds.config import RunConfig, load_config
from sclong_ds.data import CellBatch, CellLoader, StepBatch
from sclong_ds.engine import (
    Ranks,
    join_process_group,
    limit_norm,
    peak_memory_gib,
    quiet_deepspeed,
    set_hyper_parameters,
)
from sclong_ds.model_dir import FEATURES, GRAPH
from sclong_ds.objective import (
    VALIDATION_EPOCH,
    MaskedBatch,
    MaskedMetrics,
    mask_batch,
    masked_squared_error,
    target_count,
)
from sclong_ds.plots import prediction_density_figure
from sclong_ds.signals import STOP_STATUS, StopRequest

log = logging.getLogger("sclong_ds.pretrain")

DENSITY_VALUES = 20_000
"""Points of the predicted-against-true picture."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.pretrain",
        description="Pretrain scLong. Starting again on the same run.dir resumes.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE|PRESET", help="complete YAML or name of a preset"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, build the model, do not train"
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance run.max_steps=100"
    )
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        check_inputs(config)
        stop = StopRequest()
        quiet_deepspeed()
        ranks = join_process_group(timeout_s=config.engine.timeout_s)
        level = logging.INFO if ranks.rank == 0 else logging.WARNING
        logging.basicConfig(
            level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
        )
        status = train(config, ranks, stop, dry_run=args.dry_run)
        dist.destroy_process_group()
        return status
    except (ValueError, OSError) as error:
        # The process group is left as it is: with NCCL, destroying it can wait for the other ranks.
        return report_error(error)


def train(config: RunConfig, ranks: Ranks, stop: StopRequest, *, dry_run: bool) -> int:
    """Build the run, go through the optimizer steps, return the exit status."""
    run = build(config, ranks, stop, dry_run=dry_run)
    if dry_run:
        log.info("dry run: everything fits together, nothing was trained")
        return 0
    outcome = "FAILED"
    progress = Progress(run)
    try:
        loader = open_loader(run)
        if validation_is_due(run):
            validate(run)
        while run.state.step < config.run.max_steps:
            started = time.perf_counter()
            batch = next(loader)
            waited = time.perf_counter() - started
            figures = train_step(run, batch)
            if figures is None:
                outcome = "KILLED"
                loader.close()
                return stop_early(run)
            record_step(run, figures, waited_s=waited, step_s=time.perf_counter() - started)
            progress.show(figures)
            step, done = run.state.step, run.state.step == config.run.max_steps
            if validation_is_due(run) or done:
                validate(run)
            if step % config.checkpoint.every_n_steps == 0 or done:
                save(run)
        loader.close()
        outcome = "FINISHED"
        log.info(
            "done: %d steps, %s cells; run folder %s",
            run.state.step,
            f"{run.state.cells_seen:,}",
            run.run_dir,
        )
        return 0
    finally:
        progress.close()
        run.tracker.event("finish", step=run.state.step, outcome=outcome)
        run.tracker.finish(outcome)


def train_step(run: Run, batch: StepBatch) -> dict[str, float] | None:
    """Do one optimizer step; returns its figures, or None when asked to stop before its end."""
    config, engine = run.config, run.engine
    lr = set_hyper_parameters(engine, config, run.state.step)
    run.model.redraw_features(checkpoint.redraw_index(config, run.state.step))
    # Every rank knows the targets of the whole global batch, so the loss is their mean whatever the
    # number of ranks, micro-batches and targets per cell. DeepSpeed averages over ranks and
    # micro-batches; the weight undoes that.
    n_targets = sum(
        target_count(int(n), config.objective) for n in run.corpus.row_nnz[batch.cell_ids]
    )
    weight = run.ranks.world_size * len(batch.micro_batches) / n_targets
    squared_error = torch.zeros((), dtype=torch.float64, device=run.ranks.device)
    for micro_batch in batch.micro_batches:
        # A step of many micro-batches takes longer than a launcher waits for its ranks to end.
        if any_rank_must_stop(run):
            return None
        masked = prepare(run, micro_batch)
        loss = masked_squared_error(engine(masked.x, masked.hidden), masked.x, masked.targets)
        engine.backward(loss * weight)
        engine.step()
        squared_error += loss.detach()
    if config.model.mask_vector_max_norm is not None:
        limit_norm(run.model.expression_encoder.mask_vector, config.model.mask_vector_max_norm)
    dist.all_reduce(squared_error)
    train_loss, grad_norm = squared_error.item() / n_targets, float(engine.get_global_grad_norm())
    if not (math.isfinite(train_loss) and math.isfinite(grad_norm) and engine.was_step_applied()):
        cells = ", ".join(map(str, batch.cell_ids[:16]))
        raise ValueError(
            f"step {run.state.step + 1}: the loss is {train_loss}, the gradient norm {grad_norm} "
            f"(corpus rows {cells}...); nothing was saved since the last checkpoint: lower "
            f"optim.lr or look at these cells, then start again from that checkpoint"
        )
    seen = run.state.cells_seen + len(batch.cell_ids)
    run.state = replace(run.state, step=run.state.step + 1, cells_seen=seen)
    return {"train/loss": train_loss, "train/grad_norm": grad_norm, "train/lr": lr}


def any_rank_must_stop(run: Run) -> bool:
    """Tell every rank whether one of them was asked to stop, so that all stop at the same place."""
    asked = torch.tensor(float(run.stop.reason() is not None), device=run.ranks.device)
    dist.all_reduce(asked)
    return bool(asked.item())


def stop_early(run: Run) -> int:
    """Save the last finished step and return the status that asks for a restart."""
    step = run.state.step
    if step and not (run.run_dir / "checkpoints" / checkpoint.name_of(step)).exists():
        save(run)
    run.tracker.event("signal", step=step, reason=run.stop.reason() or "another rank")
    log.info("stopped after step %d; start the same command again to go on", step)
    return STOP_STATUS


def prepare(run: Run, batch: CellBatch) -> MaskedBatch:
    """Transform and mask a micro-batch and bring it to the rank's device."""
    masked = mask_batch(
        batch,
        run.config.objective,
        target_sum=run.config.data.target_sum,
        seed=run.config.run.seed,
    )
    return MaskedBatch(*(t.to(run.ranks.device) for t in (masked.x, masked.hidden, masked.targets)))


def validation_is_due(run: Run) -> bool:
    """Tell whether the current step is one to validate at; also true for a run resumed there."""
    every = run.config.run.validate_every_n_steps
    return bool(every) and run.state.step % every == 0


@torch.no_grad()
def validate(run: Run) -> None:
    """Score the first cells of the validation split under fixed masks and log the figures.

    Gives up without figures when asked to stop; a run resumed at this step validates again.
    """
    rows = run.corpus.split("validation")[: run.config.run.validation_cells]
    if len(rows) == 0 or run.config.run.validate_every_n_steps == 0:
        return
    started = time.perf_counter()
    run.engine.eval()
    run.model.redraw_features(checkpoint.redraw_index(run.config, run.state.step))
    metrics = MaskedMetrics(run.corpus.gene_stats.mean_expressed, run.ranks.device)
    pairs: list[np.ndarray] = []
    size, stride = run.config.engine.train_micro_batch_size_per_gpu, run.ranks.world_size
    for start in range(0, len(rows), size * stride):
        if any_rank_must_stop(run):
            run.engine.train()
            return
        mine = rows[start : start + size * stride][run.ranks.rank * size :][:size]
        # Every rank makes the same number of forward passes, or ZeRO-3 hangs: a rank without cells
        # scores none of row 0.
        ids = mine if len(mine) else rows[:1]
        masked = prepare(
            run, CellBatch(run.corpus.rows(ids), ids, np.full(len(ids), VALIDATION_EPOCH))
        )
        predicted = run.engine(masked.x, masked.hidden)
        if len(mine):
            metrics.add(predicted, masked.x, masked.targets)
            pairs.append(
                torch.stack([predicted[masked.targets], masked.x[masked.targets]])
                .float()
                .cpu()
                .numpy()
            )
    dist.all_reduce(metrics.sums)
    run.engine.train()
    figures = metrics.compute() | {
        "val/n_cells": float(len(rows)),
        "cells_seen": run.state.cells_seen,
        "perf/validation_s": time.perf_counter() - started,
    }
    run.tracker.log(run.state.step, figures)
    run.tracker.event("validation", step=run.state.step, mse=figures["val/mse"])
    log.info(
        "step %d validation on %d cells: masked MSE %.4f, "
        "per-gene-mean predictor %.4f, Pearson %.3f (%.3f)",
        run.state.step, len(rows), figures["val/mse"], figures["val/baseline_mse"],
        figures["val/pearson"], figures["val/baseline_pearson"],
    )  # fmt: skip
    if run.ranks.rank == 0 and sum(pair.shape[1] for pair in pairs):
        predicted, true = np.concatenate(pairs, axis=1)[:, :DENSITY_VALUES]
        run.tracker.figure("predicted_vs_true", prediction_density_figure(predicted, true))


def save(run: Run) -> None:
    """Write a checkpoint of the current state."""
    started = time.perf_counter()
    files = [
        run.run_dir / n
        for n in ("config.yaml", "genes.tsv", GRAPH, FEATURES)
        if (run.run_dir / n).is_file()
    ]
    path = checkpoint.save(
        run.engine,
        run.run_dir / "checkpoints",
        run.state,
        files=files,
        keep_last=run.config.checkpoint.keep_last,
    )
    seconds = time.perf_counter() - started
    run.tracker.event("checkpoint", step=run.state.step, path=path.name, seconds=round(seconds, 3))
    log.info("saved %s in %.1f s", path, seconds)


def record_step(run: Run, figures: dict[str, float], *, waited_s: float, step_s: float) -> None:
    """Log one step's figures."""
    speed = {
        "cells_seen": run.state.cells_seen,
        "perf/step_time_s": step_s,
        "perf/cells_per_s": run.config.engine.train_batch_size / step_s,
        "perf/data_wait_s": waited_s,
        "mem/peak_gib": peak_memory_gib(run.ranks.device),
    }
    run.tracker.log(run.state.step, figures | speed)


def open_loader(run: Run) -> CellLoader:
    """Open the loader at the run's position."""
    return CellLoader(
        run.corpus,
        seed=run.config.run.seed,
        cells_seen=run.state.cells_seen,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        train_batch_size=run.config.engine.train_batch_size,
        micro_batch_size=run.config.engine.train_micro_batch_size_per_gpu,
        group_chunks=run.config.data.shuffle_group_chunks,
        prefetch_batches=run.config.data.prefetch_batches,
    )


class Progress:
    """A bar on a terminal, a line a minute in a log; rank 0 only."""

    def __init__(self, run: Run) -> None:
        self._run, self._next = run, time.monotonic()
        terminal = run.ranks.rank == 0 and sys.stderr.isatty()
        total = run.config.run.max_steps
        self._bar = tqdm(total=total, initial=run.state.step, unit="step", disable=not terminal)

    def show(self, figures: dict[str, float]) -> None:
        """Show one finished step."""
        self._bar.update()
        self._bar.set_postfix(loss=f"{figures['train/loss']:.4f}", refresh=False)
        if self._bar.disable and time.monotonic() >= self._next:
            self._next = time.monotonic() + 60
            step, last = self._run.state.step, self._run.config.run.max_steps
            log.info(
                "step %d of %d: loss %.4f, learning rate %.2e",
                step,
                last,
                figures["train/loss"],
                figures["train/lr"],
            )

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def report_error(error: Exception) -> int:
    """Print one line about what went wrong; returns exit status 1."""
    message = " ".join(str(error).split())
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # Rank 0 says what all ranks run into; the others give it the time to, and speak only for
        # what they alone ran into.
        time.sleep(1)
        log.warning("rank %d: %s", rank, message)
    return 1


if __name__ == "__main__":
    sys.exit(main())
