"""Validation: hidden values of held-out cells, under masks that never change.

The targets that keep their value are scored apart (`val/shown_mse`). Beside the model stand the
depth baselines (`sclong_ds.objective.baselines`), of which the linear one is fitted on the first
FIT_CELLS training cells, under masks drawn in the same way, and that one plus what the first
SAMPLE_CELLS training cells have beyond it: the 30 nearest of them, and their principal directions
(`sclong_ds.objective.sampled_cells`).
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

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.sections import ModelConfig, RunSection
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import sample
from sclong_ds.engine.ranks import Ranks, on_first_rank, sum_or_raise
from sclong_ds.loader.batches import CellBatch
from sclong_ds.model.attention_use import attention_figures
from sclong_ds.model.random_features import redraw_index
from sclong_ds.model.routing import unknown_genes
from sclong_ds.objective.baselines import DepthBaselines
from sclong_ds.objective.batch import MaskedBatch
from sclong_ds.objective.losses import ExpressedScore
from sclong_ds.objective.metrics import MaskedMetrics, routed_large
from sclong_ds.objective.sampled_cells import NearestCells, PrincipalResiduals
from sclong_ds.objective.scores import MODEL, TargetTable, scores
from sclong_ds.objective.starts import first_output
from sclong_ds.run_folder.metric_names import BASELINES, MSE, N_CELLS
from sclong_ds.run_folder.rows import judged, sentence
from sclong_ds.training.pictured import Pictures
from sclong_ds.training.run import Opened
from sclong_ds.training.saving import Saver
from sclong_ds.training.timing import RankTimes, skew

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")

FIT_CELLS = 512
"""Training cells of the fit, of `sample`. About 10^5 values for 7 weights."""
SAMPLE_CELLS = 2048
"""Training cells of `sample` that a cell is set beside; every rank holds their values."""
ATTENTION_CELLS = 4
"""Cells on which it is asked whether attention is used: four or five more forward passes of theirs,
of at most this many cells a rank, per validation."""

_Baselines = tuple[DepthBaselines, NearestCells, PrincipalResiduals]


class Validation:
    """Scores the model on held-out cells; all ranks together.

    Args:
        settings: Section run: when, and on how many cells.
        opened: What the run has open.
        micro_batch: Cells of a forward pass on one rank.
        rank_times: What the ranks measured of the steps since the last validation.
        saver: Judges checkpoints by the figures.
        pictures: Draws what was found.
    """

    def __init__(
        self,
        settings: RunSection,
        opened: Opened,
        *,
        micro_batch: int,
        rank_times: RankTimes,
        saver: Saver,
        pictures: Pictures,
    ) -> None:
        self._settings, self._micro_batch = settings, micro_batch
        self._cells, self._model, self._engine = opened.cells, opened.model, opened.engine
        self._ranks, self._stop, self._watchdog = opened.ranks, opened.stop, opened.watchdog
        self._tracker, self._rank_times = opened.tracker, rank_times
        self._callbacks = opened.callbacks
        self._saver, self._pictures = saver, pictures
        self._baselines: _Baselines | None = None
        self._step = 0

    def is_due(self, step: int) -> bool:
        """Tell whether the current step is one to validate at; also true for a run resumed there.

        Args:
            step: The last finished step.
        """
        every, last = self._settings.validate_every_n_steps, self._settings.max_steps
        return bool(every) and (step % every == 0 or step == last)

    @torch.no_grad()
    def validate(self, state: TrainState) -> bool:
        """Score the first cells of the validation split and log the figures.

        Args:
            state: The state after the last finished step.

        Returns:
            False when a rank was asked to stop: there are no figures, and a run resumed at this
            step validates again.
        """
        rows = sample(self._cells.corpus, "validation", self._settings.validation_cells)
        if len(rows) == 0 or self._settings.validate_every_n_steps == 0:
            return True
        started, self._step = time.perf_counter(), state.step
        self._engine.eval()
        self._model.redraw_features(redraw_index(self._cells.model, state.step))
        if self._baselines is None:
            self._baselines = self._fitted_baselines()
        metrics = MaskedMetrics(self._cells.corpus.gene_stats.mean_expressed, self._ranks.device)
        tables: list[dict[str, np.ndarray]] = []
        chance = self._expressed_score()
        for batch, masked, found in self._predictions(rows):
            if found is None:
                self._engine.train()
                return False
            predicted, eta = found
            if chance is not None and eta is not None:
                chance.add(eta, masked)
            unseen = masked.valid & _hidden_targets(masked)
            large = _in_large(self._cells.model, masked)
            metrics.add(predicted, masked.true, unseen, masked.positions, large)
            tables.append(self._table(batch, masked, predicted))
        dist.all_reduce(metrics.sums)
        if chance is not None:
            dist.all_reduce(chance.sums)
        attention = self._attention(rows)
        self._engine.train()
        everyone = _of_all_ranks(self._ranks, tables)
        figures = (
            metrics.compute()
            | (chance.compute() if chance is not None else {})
            | _scores(self._cells.corpus, everyone)
            | attention
            | {
                N_CELLS: float(len(rows)),
                "cells_seen": state.cells_seen,
                "perf/validation_s": time.perf_counter() - started,
            }
        )
        times = self._rank_times.gather(self._ranks)
        if times is not None:
            figures |= skew(times)
        self._record(state, figures)
        self._pictures.show(state.step, predicted_true=_predicted_true(everyone), times=times)
        self._callbacks.validation(state.step, figures)
        return True

    def _predictions(
        self, rows: np.ndarray
    ) -> Iterator[tuple[CellBatch, MaskedBatch, tuple[Tensor, Tensor | None] | None]]:
        """Yield this rank's cells, their targets, and what the model says there as `_predicted`.

        A prediction is None when a rank was asked to stop.
        """
        size, stride = self._micro_batch, self._ranks.world_size
        for start in range(0, len(rows), size * stride):
            self._watchdog.beat(self._step, "validation: data")
            mine = rows[start : start + size * stride][self._ranks.rank * size :][:size]
            # Every rank makes the same number of forward passes, or ZeRO-3 hangs: a rank without
            # cells scores none of row 0.
            cells, problem = self._cells.read(mine if len(mine) else rows[:1])
            self._watchdog.beat(self._step, "validation")
            stop = sum_or_raise(self._ranks, self._stop.reason() is not None, problem=problem)[0]
            assert cells is not None
            masked, lengths = self._masked(cells)
            if stop:
                yield cells, masked, None
                return
            predicted = self._predicted(masked, lengths)
            if len(mine):
                yield cells, masked, predicted

    def _fitted_baselines(self) -> _Baselines:
        """Fit the baselines on the same training cells at every start, shared by the ranks."""
        found = DepthBaselines(self._cells.corpus.gene_stats, self._ranks.device)
        rows = sample(self._cells.corpus, "train", FIT_CELLS)
        problem = None
        for own in _parts(rows[self._ranks.rank :: self._ranks.world_size]):
            self._watchdog.beat(self._step, "validation: baselines")
            batch, problem = self._cells.read(own)
            if batch is None:
                break
            masked, _ = self._masked(batch)
            wanted = masked.valid & _hidden_targets(masked) & (masked.true > 0)
            found.add(masked.x, _unknown(masked), masked.positions, wanted)
        sum_or_raise(self._ranks, 0, problem=problem)
        dist.all_reduce(found.normal)
        found.fit()
        sampled = self._sampled_residuals(found)
        return found, NearestCells(sampled), PrincipalResiduals(sampled)

    def _sampled_residuals(self, depth: DepthBaselines) -> csr_matrix:
        """Return what the linear baseline leaves of a sample of training cells, on every rank.

        Each rank reads a part of it.
        """
        n_genes = self._cells.corpus.n_genes
        rows = sample(self._cells.corpus, "train", SAMPLE_CELLS)
        parts: list[csr_matrix] = []
        problem = None
        for own in _parts(np.array_split(rows, self._ranks.world_size)[self._ranks.rank]):
            self._watchdog.beat(self._step, "validation: baselines")
            batch, problem = self._cells.read(own)
            if batch is None:
                break
            parts.append(depth.residuals(self._cells.values(batch)))
        sum_or_raise(self._ranks, 0, problem=problem)
        everyone: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(everyone, parts, group=self._ranks.control)
        empty = csr_matrix((0, n_genes), dtype=np.float32)
        return vstack([empty, *(part for own in everyone for part in own)]).tocsr()

    def _attention(self, rows: np.ndarray) -> dict[str, float]:
        """Return the figures of attention on the first ATTENTION_CELLS validation cells.

        Every rank makes the same number of forward passes, also one without cells.
        """
        started, ranks, size = time.perf_counter(), self._ranks, self._micro_batch
        mine = rows[:ATTENTION_CELLS][ranks.rank :: ranks.world_size]
        most = -(-min(ATTENTION_CELLS, len(rows)) // ranks.world_size)
        batches = []
        for start in range(0, most, size):
            self._watchdog.beat(self._step, "validation: attention")
            own = mine[start : start + size]
            cells, problem = self._cells.read(own if len(own) else rows[:1])
            if sum_or_raise(ranks, self._stop.reason() is not None, problem=problem)[0]:
                return {}
            assert cells is not None
            masked, lengths = self._masked(cells)
            unseen = masked.valid & _hidden_targets(masked) & (masked.true > 0)
            batches.append((masked, lengths, unseen & (len(own) > 0)))

        def error() -> Tensor:
            found = torch.zeros(2, dtype=torch.float64, device=ranks.device)
            for masked, lengths, unseen in batches:
                self._watchdog.beat(self._step, "validation: attention")
                squared = (self._predicted(masked, lengths)[0].double() - masked.true).square()
                found += torch.stack([torch.where(unseen, squared, 0.0).sum(), unseen.sum()])
            return found

        found = attention_figures(self._model, error, dist.all_reduce, counts=len(mine) > 0)
        return found | {"perf/attention_s": time.perf_counter() - started}

    def _masked(self, batch: CellBatch) -> tuple[MaskedBatch, list[int] | None]:
        """Draw the targets of cells and bring both to the device."""
        prepared = self._cells.prepare(batch)
        return self._cells.to_device(batch, prepared), prepared.lengths

    def _predicted(
        self, masked: MaskedBatch, lengths: list[int] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return predicted values (B, P) at the targets, and what the zero head says, if any."""
        some = self._cells.model.zero_head
        found: Tensor = self._engine(
            masked.x,
            masked.hidden,
            positions=masked.positions,
            lengths=lengths,
            unmeasured=masked.unmeasured,
            outputs=("value", "eta") if some else ("value",),
        )
        return (found[0], found[1]) if some else (found, None)

    def _expressed_score(self) -> ExpressedScore | None:
        """Return what scores the zero head, of a model that has one."""
        model, objective = self._cells.model, self._cells.objective
        if not model.zero_head:
            return None
        share = objective.mask_prob / objective.zero_mask_prob
        level = first_output(model, self._cells.corpus.gene_stats)
        return ExpressedScore(np.asarray(level), share, self._ranks.device)

    def _table(
        self, batch: CellBatch, masked: MaskedBatch, predicted: Tensor
    ) -> dict[str, np.ndarray]:
        """Return the targets above 0 of a batch, with what each predictor says of them."""
        assert self._baselines is not None
        depth, nearest, principal = self._baselines
        baselines = depth.predict(masked.x, _unknown(masked), masked.positions)
        residuals = depth.residuals(masked.x, _unknown(masked))
        positions = masked.positions.cpu().numpy()
        others = [
            baselines[-1]
            + torch.from_numpy(of_sample.predict(residuals, positions)).to(baselines.device)
            for of_sample in (nearest, principal)
        ]
        counts = self._cells.counts(batch)
        rows = torch.from_numpy(batch.cell_ids).to(masked.positions.device)
        wanted = masked.valid & (masked.true > 0)
        columns = {
            "true": masked.true.double(),
            "hidden": _hidden_targets(masked),
            "several": counts.gather(1, masked.positions) >= 2,
            "cell": rows[:, None].expand_as(masked.positions),
            "gene": masked.positions,
            MODEL: predicted.double(),
            **dict(zip(BASELINES, (*baselines, *others), strict=True)),
        }
        return {name: values[wanted].cpu().numpy() for name, values in columns.items()}

    def _record(self, state: TrainState, figures: dict[str, float]) -> None:
        """Log the figures, and keep the error for the choice of the best checkpoint."""
        step = state.step
        self._tracker.log(step, figures)
        by = judged(figures)
        if by is None:
            log.info("step %d validation: none of the cells has a hidden value", step)
            return
        self._saver.judge(state, by)
        self._tracker.event("validation", step=step, mse=figures[MSE])
        log.info("step %d validation: %s", step, sentence(figures))


def _predicted_true(tables: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Return (2, n) float32: predicted and true hidden values."""
    pairs = [np.stack([t[MODEL], t["true"]])[:, t["hidden"]] for t in tables]
    return np.concatenate([np.zeros((2, 0)), *pairs], axis=1).astype(np.float32)


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield rows in parts of at most 16: dense, they are 27,874 values each."""
    for start in range(0, len(rows), 16):
        yield rows[start : start + 16]


def _of_all_ranks(ranks: Ranks, tables: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Return the tables of all ranks on rank 0, which then holds 80 bytes a target; else none."""
    everyone: list[Any] = [None] * ranks.world_size
    gathered = everyone if ranks.rank == 0 else None
    dist.gather_object(tables, gathered, dst=0, group=ranks.control)
    return [table for own in gathered or () for table in own]


def _scores(corpus: Corpus, parts: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return the figures of the tables that rank 0 has, on every rank."""

    def figures() -> dict[str, float]:
        if not parts:
            return {}
        column = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        dataset = corpus.row_dataset[column["cell"]].astype(np.int64)
        names = {int(d): corpus.datasets[d].dataset_id for d in np.unique(dataset)}
        table = TargetTable(
            **{name: column[name] for name in ("true", "hidden", "several", "cell", "gene")},
            dataset=dataset,
            predicted={name: column[name] for name in (MODEL, *BASELINES)},
        )
        return scores(table, names)

    return on_first_rank(figures)


def _in_large(model: ModelConfig, masked: MaskedBatch) -> Tensor:
    """Return (B, P) bool: which targets the large encoder reads."""
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


def _hidden_targets(masked: MaskedBatch) -> Tensor:
    """Return (B, P) bool: places whose value the model does not see; padding is as it falls."""
    return masked.hidden.gather(1, masked.positions)


def _unknown(masked: MaskedBatch) -> Tensor:
    """Return (B, G): values that no predictor may look at."""
    return masked.hidden if masked.unmeasured is None else masked.hidden | masked.unmeasured
