"""The table of a fine-tuning: every row on the same cells, with intervals over the same groups.

| score | what, best value |
|---|---|
| accuracy, macro_f1 | predicted labels of held-out groups; 1 |
| nll | mean negative log likelihood of the true label; 0 |
| ece | expected calibration error over 15 bins of confidence; 0 |
| mae, rmse | absolute and squared error of numbers; 0 |
| r2 | explained variance; 1 |

Each cell is predicted by fits that saw no cell of its group, and scored if its label was in
training. Intervals hold 95% of 1,000 resamples of groups, of cells where there are fewer than 5
groups; ece has none, since a resample of few cells errs more by itself, and r2 none where more than
5% of the resamples have one number only. All rows get the same
resamples. A row of several seeds has the mean of their scores.

Shapes: n scored cells, K classes, R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sclong_ds.evaluation.scores import (
    Layout,
    Scores,
    count_units,
    resampled_sums,
    unseen_of,
)
from sclong_ds.finetune.scored.calibration import losses
from sclong_ds.objective.scores import interval

BINS = 15
LABEL_SCORES = ("accuracy", "macro_f1", "nll", "ece")
NUMBER_SCORES = ("mae", "rmse", "r2")
LOWER_IS_BETTER = frozenset({"nll", "ece", "mae", "rmse"})
BIASED = frozenset({"ece"})
"""Scores of a resample that are not about those of all cells: they get no interval."""
FINE_TUNED = "fine-tuned"
_LEAST_VARIANCE = 1e-9
"""Share of the variance of all cells below which that of a resample is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the table: the mean over its seeds."""

    scores: Scores
    """Means, and their draws."""
    spread: float | None
    """Standard deviation over seeds of the first score; None: one seed, or no seed is used."""


def row_of(found: Sequence[Scores]) -> Row:
    """Return the mean over seeds of scores that have the same resamples."""
    first = next(iter(found[0].values))
    mean = Scores(units=found[0].units, unseen=found[0].unseen)
    for name in found[0].values:
        mean.values[name] = float(np.mean([s.values[name] for s in found]))
    for name in found[0].draws:
        mean.draws[name] = np.mean([s.draws[name] for s in found], axis=0)
    spread = None
    if len(found) > 1:
        spread = float(np.std(np.array([s.values[first] for s in found], dtype=float), ddof=1))
    return Row(scores=mean, spread=spread)


def label_scores(
    shares: NDArray[np.float64], target: NDArray[np.int64], groups: NDArray[np.str_]
) -> Scores:
    """Return the scores of probabilities.

    Args:
        shares: (n, K) probabilities.
        target: (n,) classes.
        groups: (n,) what is resampled.
    """
    n, width = shares.shape
    predicted, confidence = shares.argmax(axis=1), shares.max(axis=1)
    true, given = np.eye(width)[target], np.eye(width)[predicted]
    right = (predicted == target).astype(np.float64)
    members = np.eye(BINS)[bins_of(confidence)]
    columns = [
        true * given,
        true,
        given,
        losses(shares, target)[:, None],
        np.ones((n, 1)),
        right[:, None],
    ]
    columns += [members * (confidence - right)[:, None]]
    sums = _sums(np.concatenate(columns, axis=1), groups)
    hits, n_true, n_given, loss, count, n_right, gaps = np.split(
        sums, np.cumsum([width, width, width, 1, 1, 1]), axis=1
    )
    there = n_true + n_given > 0
    f1 = 2 * hits / np.maximum(n_true + n_given, 1)
    scores = _scores(
        groups,
        accuracy=n_right[:, 0] / count[:, 0],
        macro_f1=(f1 * there).sum(axis=1) / there.sum(axis=1),
        nll=loss[:, 0] / count[:, 0],
        ece=np.abs(gaps).sum(axis=1) / count[:, 0],
    )
    unseen = unseen_of(target, *_resampled(groups))
    scores.unseen |= dict(zip(LABEL_SCORES[:2], unseen, strict=True))
    return scores


def number_scores(
    predicted: NDArray[np.float64], target: NDArray[np.float64], groups: NDArray[np.str_]
) -> Scores:
    """Return the scores of predicted numbers (n,) of true ones (n,).

    r2 is undefined (NaN) in a resample whose numbers are all the same.
    """
    away, shifted = predicted - target, target - target.mean()
    columns = [np.abs(away), away**2, shifted, shifted**2, np.ones(len(away))]
    absolute, squared, first, second, count = _sums(np.stack(columns, axis=1), groups).T
    variance = second - first**2 / count
    least = _LEAST_VARIANCE * variance[0]
    return _scores(
        groups,
        mae=absolute / count,
        rmse=np.sqrt(squared / count),
        r2=1 - squared / np.where(variance > least, variance, np.nan),
    )


def bins_of(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return (n,) the bin of each confidence (n,) from 0 to 1."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def _sums(columns: NDArray[np.float64], groups: NDArray[np.str_]) -> NDArray[np.float64]:
    """Return (1 + R, width): sums over all cells, then over each resample."""
    return np.asarray(resampled_sums(columns, *_resampled(groups)))


def _resampled(groups: NDArray[np.str_]) -> tuple[Layout, NDArray[np.int64]]:
    return Layout(labels=groups, groups=groups), np.arange(len(groups))


def _scores(groups: NDArray[np.str_], **found: NDArray[np.float64]) -> Scores:
    scores = Scores()
    for name, draws in found.items():
        scores.values[name] = float(draws[0])
        if name not in BIASED:
            scores.draws[name] = draws[1:]
            scores.units[name] = count_units(*_resampled(groups))
    return scores


def ordered(rows: Mapping[str, Row]) -> list[str]:
    """Return the names of the rows, the strongest by the first score first."""
    first = next(iter(next(iter(rows.values())).scores.values))
    sign = 1 if first in LOWER_IS_BETTER else -1
    return sorted(rows, key=lambda name: sign * _value(rows[name], first))


def verdict(rows: Mapping[str, Row]) -> str:
    """Return the sentence that says where the fine-tuned model stands."""
    first = next(iter(rows[FINE_TUNED].scores.values))
    best = next(name for name in ordered(rows) if name != FINE_TUNED)
    own, other = rows[FINE_TUNED].scores, rows[best].scores
    gap = _value(rows[FINE_TUNED], first) - _value(rows[best], first)
    draws = own.draws[first] - other.draws[first]
    bounds = interval(draws, gap, n_units=own.units[first])
    better = gap < 0 if first in LOWER_IS_BETTER else gap > 0
    told = bounds is not None and not bounds.low <= 0 <= bounds.high
    word = "not told apart from" if not told else "above" if better else "below"
    shown = "" if bounds is None else f" [{bounds.low:+.3f}, {bounds.high:+.3f}]"
    spread = rows[FINE_TUNED].spread
    over = "" if spread is None else f" (standard deviation over seeds {spread:.3f})"
    return (
        f"{FINE_TUNED}: {first} {_shown(rows[FINE_TUNED], first)}{over}, {word} the strongest "
        f"baseline, {best} {_shown(rows[best], first)}: difference {gap:+.3f}{shown}"
    )


def shown_rows(rows: Mapping[str, Row]) -> pd.DataFrame:
    """Return the table as text, the strongest row first, each score with its interval."""
    names = list(next(iter(rows.values())).scores.values)
    table = {row: {name: _shown(rows[row], name) for name in names} for row in ordered(rows)}
    return pd.DataFrame.from_dict(table, orient="index")


def numbers_of(rows: Mapping[str, Row]) -> pd.DataFrame:
    """Return the table as numbers: columns SCORE, SCORE_low, SCORE_high and sd_over_seeds."""
    table = {}
    for row in ordered(rows):
        scores = rows[row].scores
        table[row] = {"sd_over_seeds": rows[row].spread} | {
            f"{name}{end}": value
            for name in scores.values
            for end, value in zip(
                ("", "_low", "_high"),
                (_value(rows[row], name), *(scores.interval(name) or ())),
                strict=False,
            )
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("row")


def _value(row: Row, name: str) -> float:
    value = row.scores.values[name]
    assert value is not None
    return value


def _shown(row: Row, name: str) -> str:
    bounds, value = row.scores.interval(name), _value(row, name)
    if np.isnan(value):
        return "undefined"
    if bounds is not None:
        return f"{value:.3f} [{bounds.low:.3f}, {bounds.high:.3f}]"
    if name in BIASED:
        return f"{value:.3f}"
    share = np.isnan(row.scores.draws[name]).mean()
    return f"{value:.3f} (no interval: undefined in {share:.0%} of the resamples)"
