"""Validation: hidden values of held-out cells, under masks that never change.

The targets that keep their value are scored apart (`val/shown_mse`). Beside the model stand the
depth baselines (`sclong_ds.objective.baselines`), of which the linear one is fitted on the first
FIT_CELLS training cells, under masks drawn in the same way, and the 30 nearest of the first
SAMPLE_CELLS training cells (`sclong_ds.objective.nearest_cells`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sclong_ds.checkpoint.on_disk import name_of, record_best
from sclong_ds.corpus.byte_code import encode
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.engine.ranks import on_first_rank, sum_or_raise
from sclong_ds.loader.batches import CellBatch
from sclong_ds.loader.threads import say_skipped
from sclong_ds.model.attention_use import attention_figures
from sclong_ds.model.random_features import redraw_index
from sclong_ds.model.routing import unknown_genes
from sclong_ds.objective.baselines import DepthBaselines
from sclong_ds.objective.batch import MaskedBatch, masked_batch, unpack
from sclong_ds.objective.metrics import MaskedMetrics, routed_large
from sclong_ds.objective.nearest_cells import NearestCells
from sclong_ds.objective.scores import MODEL, TargetTable, scores
from sclong_ds.objective.targets import VALIDATION_EPOCH, prepare
from sclong_ds.run_folder.metric_names import BASELINES, MSE
from sclong_ds.run_folder.rows import judged, sentence
from sclong_ds.training.pictured import show
from sclong_ds.training.run import Run
from sclong_ds.training.timing import skew

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")

FIT_CELLS = 512
"""Training cells of the fit; a corpus is shuffled, so the first ones are any. About 10^5 values for
7 weights."""
SAMPLE_CELLS = 2048
"""Training cells among which neighbours are sought; every rank holds their expressed values."""
ATTENTION_CELLS = 4
"""Cells on which it is asked whether attention is used: four or five more forward passes of theirs,
of at most this many cells a rank, per validation."""


def validation_is_due(run: Run) -> bool:
    """Tell whether the current step is one to validate at; also true for a run resumed there."""
    every, last = run.config.run.validate_every_n_steps, run.config.run.max_steps
    return bool(every) and (run.state.step % every == 0 or run.state.step == last)


@torch.no_grad()
def validate(run: Run) -> bool:
    """Score the first cells of the validation split and log the figures.

    Returns:
        False when a rank was asked to stop: there are no figures, and a run resumed at this step
        validates again.
    """
    cells = run.corpus.splits["validation"]
    rows = np.arange(cells.start, cells.stop)[: run.config.run.validation_cells]
    if len(rows) == 0 or run.config.run.validate_every_n_steps == 0:
        return True
    started = time.perf_counter()
    run.engine.eval()
    run.model.redraw_features(redraw_index(run.config.model, run.state.step))
    if run.baselines is None:
        run.baselines = _fitted_baselines(run)
    metrics = MaskedMetrics(run.corpus.gene_stats.mean_expressed, run.ranks.device)
    tables: list[dict[str, np.ndarray]] = []
    for batch, masked, predicted in _predictions(run, rows):
        if predicted is None:
            run.engine.train()
            return False
        unseen = masked.valid & _hidden_targets(masked)
        metrics.add(predicted, masked.true, unseen, masked.positions, _in_large(run, masked))
        tables.append(_table(run, batch, masked, predicted))
    dist.all_reduce(metrics.sums)
    attention = _attention(run, rows)
    run.engine.train()
    everyone = _of_all_ranks(run, tables)
    figures = (
        metrics.compute()
        | _scores(run, everyone)
        | attention
        | {
            "val/n_cells": float(len(rows)),
            "cells_seen": run.state.cells_seen,
            "perf/validation_s": time.perf_counter() - started,
        }
    )
    times = run.rank_times.gather(run.ranks)
    if times is not None:
        figures |= skew(times)
    _record(run, figures)
    show(run, predicted_true=_predicted_true(everyone), times=times)
    return True


def _predicted_true(tables: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Return (2, n) float32: predicted and true hidden values."""
    pairs = [np.stack([t[MODEL], t["true"]])[:, t["hidden"]] for t in tables]
    return np.concatenate([np.zeros((2, 0)), *pairs], axis=1).astype(np.float32)


def _predictions(
    run: Run, rows: np.ndarray
) -> Iterator[tuple[CellBatch, MaskedBatch, Tensor | None]]:
    """Yield this rank's cells, their targets, and what the model predicts there.

    A prediction is None when a rank was asked to stop.
    """
    size, stride = run.config.engine.train_micro_batch_size_per_gpu, run.ranks.world_size
    for start in range(0, len(rows), size * stride):
        run.watchdog.beat(run.state.step, "validation: data")
        mine = rows[start : start + size * stride][run.ranks.rank * size :][:size]
        # Every rank makes the same number of forward passes, or ZeRO-3 hangs: a rank without cells
        # scores none of row 0.
        cells, problem = _read(run, mine if len(mine) else rows[:1])
        run.watchdog.beat(run.state.step, "validation")
        stop = sum_or_raise(run.ranks, run.stop.reason() is not None, problem=problem)[0]
        assert cells is not None
        masked, lengths = _masked(run, cells)
        if stop:
            yield cells, masked, None
            return
        predicted = _predicted(run, masked, lengths)
        if len(mine):
            yield cells, masked, predicted


def _fitted_baselines(run: Run) -> tuple[DepthBaselines, NearestCells]:
    """Fit the baselines on the same training cells at every start, shared by the ranks."""
    found = DepthBaselines(run.corpus.gene_stats, run.ranks.device)
    cells = run.corpus.splits["train"]
    mine = np.arange(cells.start, cells.stop)[:FIT_CELLS][run.ranks.rank :: run.ranks.world_size]
    problem = None
    for rows in _parts(mine):
        run.watchdog.beat(run.state.step, "validation: baselines")
        batch, problem = _read(run, rows)
        if batch is None:
            break
        masked, _ = _masked(run, batch)
        wanted = masked.valid & _hidden_targets(masked) & (masked.true > 0)
        found.add(masked.x, _unknown(masked), masked.positions, wanted)
    sum_or_raise(run.ranks, 0, problem=problem)
    dist.all_reduce(found.normal)
    found.fit()
    return found, _sampled_cells(run, found)


def _sampled_cells(run: Run, depth: DepthBaselines) -> NearestCells:
    """Return the same sample of training cells on every rank; each rank reads a part of it."""
    cells, n_genes = run.corpus.splits["train"], run.corpus.n_genes
    rows = np.arange(cells.start, cells.stop)[:SAMPLE_CELLS]
    parts: list[csr_matrix] = []
    problem = None
    for own in _parts(np.array_split(rows, run.ranks.world_size)[run.ranks.rank]):
        run.watchdog.beat(run.state.step, "validation: baselines")
        batch, problem = _read(run, own)
        if batch is None:
            break
        target_sum, device = run.config.data.target_sum, run.ranks.device
        x = unpack(batch.packed, n_genes=n_genes, target_sum=target_sum, device=device)
        parts.append(depth.residuals(x))
    sum_or_raise(run.ranks, 0, problem=problem)
    everyone: list[Any] = [None] * run.ranks.world_size
    dist.all_gather_object(everyone, parts, group=run.ranks.control)
    empty = csr_matrix((0, n_genes), dtype=np.float32)
    return NearestCells(vstack([empty, *(part for own in everyone for part in own)]).tocsr())


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield rows in parts of at most 16: dense, they are 27,874 values each."""
    for start in range(0, len(rows), 16):
        yield rows[start : start + 16]


def _attention(run: Run, rows: np.ndarray) -> dict[str, float]:
    """Return the figures of attention on the first ATTENTION_CELLS validation cells.

    Every rank makes the same number of forward passes, also one without cells.
    """
    started, ranks = time.perf_counter(), run.ranks
    size = run.config.engine.train_micro_batch_size_per_gpu
    mine = rows[:ATTENTION_CELLS][ranks.rank :: ranks.world_size]
    most = -(-min(ATTENTION_CELLS, len(rows)) // ranks.world_size)
    batches = []
    for start in range(0, most, size):
        run.watchdog.beat(run.state.step, "validation: attention")
        own = mine[start : start + size]
        cells, problem = _read(run, own if len(own) else rows[:1])
        if sum_or_raise(ranks, run.stop.reason() is not None, problem=problem)[0]:
            return {}
        assert cells is not None
        masked, lengths = _masked(run, cells)
        unseen = masked.valid & _hidden_targets(masked) & (masked.true > 0)
        batches.append((masked, lengths, unseen & (len(own) > 0)))

    def error() -> Tensor:
        found = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for masked, lengths, unseen in batches:
            run.watchdog.beat(run.state.step, "validation: attention")
            squared = (_predicted(run, masked, lengths).double() - masked.true).square()
            found += torch.stack([torch.where(unseen, squared, 0.0).sum(), unseen.sum()])
        return found

    found = attention_figures(run.model, error, dist.all_reduce, counts=len(mine) > 0)
    return found | {"perf/attention_s": time.perf_counter() - started}


def _predicted(run: Run, masked: MaskedBatch, lengths: list[int] | None) -> Tensor:
    """Return what the model predicts at the targets (B, P)."""
    predicted: Tensor = run.engine(
        masked.x,
        masked.hidden,
        positions=masked.positions,
        lengths=lengths,
        unmeasured=masked.unmeasured,
    )
    return predicted


def _hidden_targets(masked: MaskedBatch) -> Tensor:
    """Return (B, P) bool: places whose value the model does not see; padding is as it falls."""
    return masked.hidden.gather(1, masked.positions)


def _unknown(masked: MaskedBatch) -> Tensor:
    """Return (B, G): values that no predictor may look at."""
    return masked.hidden if masked.unmeasured is None else masked.hidden | masked.unmeasured


def _table(
    run: Run, batch: CellBatch, masked: MaskedBatch, predicted: Tensor
) -> dict[str, np.ndarray]:
    """Return the targets above 0 of a batch, with what each predictor says of them."""
    assert run.baselines is not None
    depth, nearest = run.baselines
    baselines = depth.predict(masked.x, _unknown(masked), masked.positions)
    residuals = depth.residuals(masked.x, _unknown(masked))
    beyond = torch.from_numpy(nearest.predict(residuals, masked.positions.cpu().numpy()))
    neighbours = baselines[-1] + beyond.to(baselines.device)
    counts = unpack(
        batch.packed, n_genes=run.corpus.n_genes, target_sum=None, device=masked.x.device
    )
    rows = torch.from_numpy(batch.cell_ids).to(masked.positions.device)
    wanted = masked.valid & (masked.true > 0)
    columns = {
        "true": masked.true.double(),
        "hidden": _hidden_targets(masked),
        "several": counts.gather(1, masked.positions) >= 2,
        "cell": rows[:, None].expand_as(masked.positions),
        "gene": masked.positions,
        MODEL: predicted.double(),
        **dict(zip(BASELINES, (*baselines, neighbours), strict=True)),
    }
    return {name: values[wanted].cpu().numpy() for name, values in columns.items()}


def _of_all_ranks(run: Run, tables: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return the tables of all ranks on rank 0, which then holds 80 bytes a target; else none."""
    everyone: list[Any] = [None] * run.ranks.world_size
    gathered = everyone if run.ranks.rank == 0 else None
    dist.gather_object(tables, gathered, dst=0, group=run.ranks.control)
    return [table for own in gathered or () for table in own]


def _scores(run: Run, parts: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the figures of the tables that rank 0 has, on every rank."""

    def figures() -> dict[str, float]:
        if not parts:
            return {}
        column = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        dataset = run.corpus.row_dataset[column["cell"]].astype(np.int64)
        names = {int(d): run.corpus.datasets[d].dataset_id for d in np.unique(dataset)}
        table = TargetTable(
            **{name: column[name] for name in ("true", "hidden", "several", "cell", "gene")},
            dataset=dataset,
            predicted={name: column[name] for name in (MODEL, *BASELINES)},
        )
        return scores(table, names)

    return on_first_rank(figures)


def _read(run: Run, rows: np.ndarray) -> tuple[CellBatch | None, str | None]:
    """Read cells, or return why they cannot be read; damaged ones may be without counts."""
    epochs, passes = np.full(len(rows), VALIDATION_EPOCH), np.zeros(len(rows), dtype=np.int64)
    try:
        cells = run.corpus.packed_rows(rows)
    except DamagedChunk as error:
        if run.config.data.on_damage == "stop":
            return None, str(error)
        say_skipped(str(error))
        cells = encode(csr_matrix((len(rows), run.corpus.n_genes), dtype=np.uint32))
    except (ValueError, OSError) as error:
        return None, str(error)
    return CellBatch(cells, rows, epochs, passes), None


def _masked(run: Run, batch: CellBatch) -> tuple[MaskedBatch, list[int] | None]:
    """Draw the targets of cells and bring both to the device."""
    prepared = prepare(
        batch,
        objective=run.config.objective,
        model=run.config.model,
        seed=run.config.run.seed,
        n_genes=run.corpus.n_genes,
        measured=run.measured,
    )
    masked = masked_batch(
        batch.packed,
        prepared.targets,
        n_genes=run.corpus.n_genes,
        target_sum=run.config.data.target_sum,
        device=run.ranks.device,
        unmeasured=prepared.unmeasured,
    )
    return masked, prepared.lengths


def _in_large(run: Run, masked: MaskedBatch) -> Tensor:
    """Return (B, P) bool: which targets the large encoder reads."""
    model = run.config.model
    if model.contextual_encoder == "mini":
        return torch.zeros_like(masked.valid)
    unknown = unknown_genes(masked.hidden, masked.unmeasured, routing=model.routing)
    assert unknown is not None
    return routed_large(
        masked.x,
        unknown,
        masked.positions,
        top_seq_len=model.top_seq_len,
        routing=model.routing,
        pad_token=model.pad_token,
    )


def _record(run: Run, figures: dict[str, float]) -> None:
    """Log the figures, and keep the error for the choice of the best checkpoint."""
    step = run.state.step
    run.tracker.log(step, figures)
    by = judged(figures)
    if by is None:
        log.info("step %d validation: none of the cells has a target", step)
        return
    run.validated = (step, by)
    if run.ranks.rank == 0 and run.last_checkpoint == name_of(step):
        # A run that was stopped before it validated at this step, and continues from there.
        try:
            record_best(
                run.run_dir / "checkpoints", name_of(step), by,
                compared_after=run.state.compared_after,
            )  # fmt: skip
        except OSError as error:  # on this rank alone
            log.warning("the best checkpoint is not recorded: %s", error)
    run.tracker.event("validation", step=step, mse=figures[MSE])
    log.info(
        "step %d validation on %d cells: %s", step, int(figures["val/n_cells"]), sentence(figures)
    )
