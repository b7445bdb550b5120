"""Validation: hidden values of held-out cells, under masks that never change."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sclong_ds import checkpoint
from sclong_ds.build import Run
from sclong_ds.data import CellBatch
from sclong_ds.engine import sum_over_ranks
from sclong_ds.masking import VALIDATION_EPOCH
from sclong_ds.metrics import MaskedMetrics, routed_large
from sclong_ds.objective import MaskedBatch, masked_batch
from sclong_ds.plots import prediction_density_figure
from sclong_ds.preparation import prepare

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")

DENSITY_VALUES = 20_000
"""Points of the predicted-against-true picture."""


def validation_is_due(run: Run) -> bool:
    """Tell whether the current step is one to validate at; also true for a run resumed there."""
    every = run.config.run.validate_every_n_steps
    return bool(every) and run.state.step % every == 0


@torch.no_grad()
def validate(run: Run) -> None:
    """Score the first cells of the validation split and log the figures.

    Gives up without figures when asked to stop; a run resumed at this step validates again.
    """
    cells = run.corpus.splits["validation"]
    rows = np.arange(cells.start, cells.stop)[: run.config.run.validation_cells]
    if len(rows) == 0 or run.config.run.validate_every_n_steps == 0:
        return
    started = time.perf_counter()
    run.engine.eval()
    run.model.redraw_features(checkpoint.redraw_index(run.config, run.state.step))
    metrics = MaskedMetrics(run.corpus.gene_stats.mean_expressed, run.ranks.device)
    pairs: list[Tensor] = []
    for masked, predicted in _predictions(run, rows):
        if predicted is None:
            run.engine.train()
            return
        metrics.add(predicted, masked.true, masked.valid, masked.positions, _in_large(run, masked))
        if sum(len(pair) for pair in pairs) < DENSITY_VALUES:
            shown = masked.valid & (masked.true > 0)
            pairs.append(torch.stack([predicted.float()[shown], masked.true[shown]], dim=1).cpu())
    dist.all_reduce(metrics.sums)
    run.engine.train()
    figures = metrics.compute() | {
        "val/n_cells": float(len(rows)),
        "cells_seen": run.state.cells_seen,
        "perf/validation_s": time.perf_counter() - started,
    }
    _record(run, figures)
    if run.ranks.rank == 0 and pairs:
        predicted, true = torch.cat(pairs)[:DENSITY_VALUES].numpy().T
        if len(true):
            run.tracker.figure("predicted_vs_true", prediction_density_figure(predicted, true))


def _predictions(run: Run, rows: np.ndarray) -> Iterator[tuple[MaskedBatch, Tensor | None]]:
    """Yield this rank's batches and what the model predicts at their targets.

    A prediction is None when a rank was asked to stop.
    """
    size, stride = run.config.engine.train_micro_batch_size_per_gpu, run.ranks.world_size
    for start in range(0, len(rows), size * stride):
        run.watchdog.beat(run.state.step, "validation")
        stop = bool(sum_over_ranks(run.ranks, int(run.stop.reason() is not None))[0])
        mine = rows[start : start + size * stride][run.ranks.rank * size :][:size]
        # Every rank makes the same number of forward passes, or ZeRO-3 hangs: a rank without cells
        # scores none of row 0.
        masked, lengths = _masked(run, mine if len(mine) else rows[:1])
        if stop:
            yield masked, None
            return
        predicted = run.engine(masked.x, masked.hidden, positions=masked.positions, lengths=lengths)
        if len(mine):
            yield masked, predicted


def _masked(run: Run, rows: np.ndarray) -> tuple[MaskedBatch, list[int] | None]:
    """Read cells, draw their targets and bring both to the device."""
    n_genes = run.corpus.n_genes
    cells = run.corpus.packed_rows(rows)
    epochs, passes = np.full(len(rows), VALIDATION_EPOCH), np.zeros(len(rows), dtype=np.int64)
    prepared = prepare(CellBatch(cells, rows, epochs, passes), config=run.config, n_genes=n_genes)
    masked = masked_batch(
        cells,
        prepared.targets,
        n_genes=n_genes,
        target_sum=run.config.data.target_sum,
        device=run.ranks.device,
    )
    return masked, prepared.lengths


def _in_large(run: Run, masked: MaskedBatch) -> Tensor:
    """Return (B, P) bool: which targets the large encoder reads."""
    model = run.config.model
    if model.contextual_encoder == "mini":
        return torch.zeros_like(masked.valid)
    return routed_large(
        masked.x,
        masked.hidden,
        masked.positions,
        top_seq_len=model.top_seq_len,
        routing=model.routing,
        pad_token=model.pad_token,
    )


def _record(run: Run, figures: dict[str, float]) -> None:
    """Log the figures, and keep the error for the choice of the best checkpoint."""
    step = run.state.step
    run.tracker.log(step, figures)
    mse = figures.get("val/mse")
    if mse is None:
        log.info("step %d validation: none of the cells has a target", step)
        return
    run.validated = (step, mse)
    run.tracker.event("validation", step=step, mse=mse)
    log.info(
        "step %d validation on %d cells: masked MSE %.4f, "
        "per-gene-mean predictor %.4f, Pearson %.3f (%.3f)",
        step, int(figures["val/n_cells"]), mse, figures["val/baseline_mse"],
        figures["val/pearson"], figures["val/baseline_pearson"],
    )  # fmt: skip
