"""From the fits of all folds to the table, and to one prediction for each cell.

Shapes: N cells, n scored cells, K classes, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sclong_ds.evaluation.representations import normalise
from sclong_ds.evaluation.scores import Scores
from sclong_ds.exported.head import Judgement, is_unknown, probabilities
from sclong_ds.finetune.examples import Examples
from sclong_ds.finetune.fit import Fitted
from sclong_ds.finetune.scored.baselines import (
    Features,
    constant_outputs,
    linear_outputs,
    principal_components,
)
from sclong_ds.finetune.scored.calibration import (
    fit_reference,
    fit_temperature,
    judge_labels,
    judge_numbers,
)
from sclong_ds.finetune.scored.table import (
    FINE_TUNED,
    Row,
    label_scores,
    number_scores,
    row_of,
)
from sclong_ds.finetune.setting import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A fit of one seed and fold."""

    seed: int
    fold: int
    fitted: Fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What all fits together found."""

    rows: dict[str, Row]
    """The table."""
    shares: NDArray[np.float64]
    """(N, K) probabilities by fits that did not see the cell's group, mean over seeds; (N, 1)
    numbers. NaN for cells that are not used."""
    unknown: NDArray[np.bool_]
    """(N,) called unknown by half of the seeds or more."""
    error: NDArray[np.float64]
    """(N,) of numbers: what holds 90% of the held-out cells of the fold."""
    scored: NDArray[np.bool_]
    """(N,) used, and the label was in training."""
    judgement: Judgement
    """For the last fit: chosen on the predictions of the first seed for all groups."""
    facts: dict[str, Any]
    """Temperatures, unknown cells; plain JSON."""


def compare(
    setting: Setting,
    found: Sequence[Fold],
    *,
    embedded: NDArray[np.float32],
    on_fit: Callable[[], None],
) -> Outcome:
    """Return the table of all rows, and the predictions of the fine-tuned fits.

    Args:
        setting: Of the fits.
        found: Fits of all seeds and folds.
        embedded: (N, W) embedding by the model before fine-tuning.
        on_fit: Called after each fold of a baseline.
    """
    examples = setting.examples
    n_cells, width = len(examples.target), examples.width
    seeds = sorted({fold.seed for fold in found})
    scored = _scored(setting)
    shares = np.full((len(seeds), n_cells, width), np.nan)
    outputs, distance = np.full((n_cells, width), np.nan), np.full(n_cells, np.nan)
    votes, error = np.zeros(n_cells), np.zeros(n_cells)
    judgements = []
    for fold in found:
        rows, own, away, judgement = _judged(setting, fold)
        judgements.append(judgement)
        shares[seeds.index(fold.seed), rows] = (
            probabilities(own, judgement.temperature) if examples.classes else own
        )
        sure = shares[seeds.index(fold.seed), rows].max(axis=1)
        votes[rows] += is_unknown(sure, away, judgement)
        error[rows] = np.maximum(error[rows], judgement.error)
        if fold.seed == seeds[0]:
            outputs[rows], distance[rows] = own, away
    rows_of_table = {FINE_TUNED: row_of([_scores_of(examples, s, scored) for s in shares])}
    rows_of_table |= _baselines(setting, embedded, scored, on_fit)
    unknown = votes >= len(seeds) / 2
    return Outcome(
        rows=rows_of_table, shares=shares.mean(axis=0), unknown=unknown & examples.used,
        error=error, scored=scored,
        judgement=_judge(setting, outputs[scored], distance[scored], np.flatnonzero(scored)),
        facts=_facts(examples, judgements, unknown, scored, shares.mean(axis=0)),
    )  # fmt: skip


def _scored(setting: Setting) -> NDArray[np.bool_]:
    """Return (N,) which cells have a label that their fold's training cells have."""
    scored = np.zeros(len(setting.examples.target), dtype=bool)
    for fold in range(setting.examples.n_folds):
        train, _, test = setting.examples.parts_of(fold)
        scored[test] = setting.known(test, train)
    return scored


def _judged(
    setting: Setting, fold: Fold
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], Judgement]:
    """Return the tested cells of a fit, their outputs (n, K), distances (n,), and how it judges."""
    examples, fitted = setting.examples, fold.fitted
    train, held, _ = examples.parts_of(fold.fold)
    offset, spread = setting.scale(train)
    outputs = fitted.outputs.astype(np.float64) * spread + offset
    codes = np.zeros(len(fitted.reference), np.int64)
    if examples.classes:
        outputs[:, setting.weights(train) == 0] = -np.inf
        codes = examples.target[fitted.reference_rows].astype(np.int64)
    distance = fit_reference(fitted.reference, codes, examples.width).distance(fitted.features)
    is_held = np.isin(fitted.rows, held)
    rows = fitted.rows[is_held]
    judgement = _judge(setting, outputs[is_held], distance[is_held], rows)
    return fitted.rows[~is_held], outputs[~is_held], distance[~is_held], judgement


def _judge(
    setting: Setting,
    outputs: NDArray[np.float64],
    distance: NDArray[np.float64],
    rows: NDArray[np.int64],
) -> Judgement:
    target, rate = setting.examples.target[rows], setting.options.unknown_rate
    if setting.examples.classes:
        return judge_labels(outputs, distance, target.astype(np.int64), unknown_rate=rate)
    return judge_numbers(outputs[:, 0], distance, target, unknown_rate=rate)


def _scores_of(
    examples: Examples, shares: NDArray[np.float64], scored: NDArray[np.bool_]
) -> Scores:
    groups, target = examples.groups[scored], examples.target[scored]
    if examples.classes:
        return label_scores(shares[scored], target.astype(np.int64), groups)
    return number_scores(shares[scored, 0], target, groups)


def _baselines(
    setting: Setting,
    embedded: NDArray[np.float32],
    scored: NDArray[np.bool_],
    on_fit: Callable[[], None],
) -> dict[str, Row]:
    """Return the rows of the baselines, calibrated on the same held-out cells."""
    examples = setting.examples
    kind = "logistic" if examples.classes else "ridge"
    values = normalise(examples.counts, target_sum=setting.target_sum)
    features: dict[str, Features | None] = {
        f"{kind} on PCA": principal_components(values),
        f"{kind} on X_sclong": lambda _: embedded,
        **dict.fromkeys(("most common label",) if examples.classes else ("mean", "median")),
    }
    found = {}
    for name, make in features.items():
        shares = np.full((len(examples.target), examples.width), np.nan)
        for fold in range(examples.n_folds):
            train, held, test = examples.parts_of(fold)
            if make is None:
                centre = np.median if name == "median" else np.mean
                outputs = constant_outputs(examples, fold=fold, centre=centre)
            else:
                outputs = linear_outputs(
                    examples, make, fold=fold, balanced=setting.options.balanced
                )
                on_fit()
            if examples.classes:
                held = held[setting.known(held, train)]
                codes = examples.target[held].astype(np.int64)
                temperature = 1.0 if make is None else fit_temperature(outputs[held], codes)
                outputs = probabilities(outputs, temperature)
            shares[test] = outputs[test]
        found[name] = row_of([_scores_of(examples, shares, scored)])
    return found


def _facts(
    examples: Examples,
    judgements: Sequence[Judgement],
    unknown: NDArray[np.bool_],
    scored: NDArray[np.bool_],
    shares: NDArray[np.float64],
) -> dict[str, Any]:
    """Return what scores.json records of calibration and of unknown cells."""
    facts: dict[str, Any] = {
        "temperatures": [round(j.temperature, 4) for j in judgements],
        "unknown_by": [j.unknown_by for j in judgements],
        "n_scored": int(scored.sum()),
        "unknown_among_scored": float(unknown[scored].mean()),
    }
    new = examples.used & ~scored
    facts["n_label_not_in_training"] = int(new.sum())
    if new.any():
        facts["unknown_among_label_not_in_training"] = float(unknown[new].mean())
    if examples.classes:
        right = shares[scored].argmax(axis=1) == examples.target[scored].astype(np.int64)
        for name, some in (("right", right), ("wrong", ~right)):
            if some.any():
                facts[f"unknown_among_{name}"] = float(unknown[scored][some].mean())
    return facts
