"""Figures of the hidden values of validation cells, model and baselines side by side.

Everything is computed from one table of targets, so that a figure means the same for the model and
for each baseline. Values that are zero genes are left out: their error is a figure of its own
(`sclong_ds.objective.metrics`).

The bounds of the model's error less that of the strongest baseline hold 95% of 1,000 resamples of
cells, or of datasets where there are 5: a unit keeps its two sums of squared errors and its number
of hidden values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from sclong_ds.run_folder.metric_names import (
    DATASET_MSE,
    MSE,
    N_HIDDEN,
    PEARSON,
    PER_GENE,
    RELATIVE_MSE,
    SEVERAL_MSE,
    SHOWN_MSE,
    STRONGEST_MSE,
    VS_STRONGEST_HIGH,
    VS_STRONGEST_LOW,
    WITHIN_CELL,
    of_baseline,
)  # fmt: skip
from sclong_ds.run_folder.rows import strongest

MOST_DATASETS = 100
"""Datasets with a figure of their own, those with most hidden values: a row has 1,000 figures."""
MODEL = "model"
"""The predictor whose figures are without a prefix."""
RESAMPLES = 1000
LEVEL = 0.95
MOST_UNDEFINED = 0.05
"""Share of resamples in which a score may be undefined and still have an interval."""
LEAST_DATASETS = 5
"""With fewer datasets the cells are resampled: cells of a dataset are not independent, but 4 units
tell nothing of their spread."""
LEAST_CELLS = 8
"""Hidden values of a gene in a dataset, below which it has no correlation across cells."""
LEAST_GENES = 20
"""Hidden values of a cell, below which it has no correlation across genes."""


class Interval(NamedTuple):
    """Bounds that hold the truth in 95% of the cases."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTable:
    """The targets of all ranks, a row each."""

    true: NDArray[np.float64]
    """(n,) true values, above 0."""
    hidden: NDArray[np.bool_]
    """(n,) False: the model was shown the value."""
    several: NDArray[np.bool_]
    """(n,) counts of 2 or more."""
    cell: NDArray[np.int64]
    gene: NDArray[np.int64]
    dataset: NDArray[np.int64]
    predicted: Mapping[str, NDArray[np.float64]]
    """(n,) by predictor; `model` is one of them."""


def scores(table: TargetTable, datasets: Mapping[int, str]) -> dict[str, float]:
    """Return the figures by name; what has no values is left out.

    Args:
        table: The targets.
        datasets: Name of each dataset in the table.

    Returns:
        `val/mse`, `val/pearson`, `val/pearson_per_gene`, `val/pearson_within_cell` and
        `val/mse_several` (counts of 2 or more) of the model over hidden values; the same as
        `val/BASELINE/mse` and so on; `val/shown_mse`; `val/mse/dataset/NAME`, and that of the
        strongest baseline; `val/relative_mse`, the model's error over that baseline's, and
        `val/vs_strongest_low` and `_high`, the bounds of the model's less that baseline's.
    """
    hidden = table.hidden
    if not hidden.any():
        return {}
    figures: dict[str, float] = {N_HIDDEN: float(hidden.sum())}
    groups = table.dataset[hidden] * (table.gene.max() + 1) + table.gene[hidden]
    for name, values in table.predicted.items():
        error = (values - table.true) ** 2
        figures[_name(name, MSE)] = float(error[hidden].mean())
        figures[_name(name, PEARSON)] = _correlation(values[hidden], table.true[hidden])
        for figure, group, least in (
            (PER_GENE, groups, LEAST_CELLS),
            (WITHIN_CELL, table.cell[hidden], LEAST_GENES),
        ):
            found = grouped_pearson(values[hidden], table.true[hidden], group, least=least)
            if found is not None:
                figures[_name(name, figure)] = found
        if (several := hidden & table.several).any():
            figures[_name(name, SEVERAL_MSE)] = float(error[several].mean())
        if name == MODEL and not hidden.all():
            figures[SHOWN_MSE] = float(error[~hidden].mean())
    best = strongest(figures)
    if best is not None:
        figures[STRONGEST_MSE] = figures[of_baseline(best, MSE)]
        if figures[STRONGEST_MSE] > 0:
            figures[RELATIVE_MSE] = figures[MSE] / figures[STRONGEST_MSE]
        figures |= _against(table, best)
    return figures | _by_dataset(table, datasets, {MODEL, best} - {None})


def _name(predictor: str, metric: str) -> str:
    return metric if predictor == MODEL else of_baseline(predictor, metric)


def interval(
    draws: np.ndarray, estimate: float, *, n_units: int, level: float = LEVEL
) -> Interval | None:
    """Return the bounds of a score, or of the difference of two with the same resamples.

    Args:
        draws: (R,) its value in each resample, NaN where it is undefined.
        estimate: Its value.
        n_units: U, the cells or groups that were resampled.
        level: Share of the cases in which the bounds hold the truth.

    Returns:
        The bounds, widened for few units (see the head of `sclong_ds.evaluation.scores`); None of
        one unit, or where more than 5% of the resamples are undefined.
    """
    if n_units < 2 or np.isnan(draws).mean() > MOST_UNDEFINED:
        return None
    end = (1 + level) / 2
    quantiles = np.nanquantile(draws, [1 - end, end])
    wider = stdtrit(n_units - 1, end) / ndtri(end) * np.sqrt(n_units / (n_units - 1))
    low, high = estimate + wider * (quantiles - estimate)
    return Interval(float(low), float(high))


def _against(table: TargetTable, best: str) -> dict[str, float]:
    """Return the bounds of the model's error less a baseline's; nothing of fewer than 2 cells.

    The units are in the order of their numbers, so that the resamples are the same whichever rank
    had a cell.
    """
    hidden = table.hidden
    unit = table.dataset if len(np.unique(table.dataset[hidden])) >= LEAST_DATASETS else table.cell
    _, place, sizes = np.unique(unit[hidden], return_inverse=True, return_counts=True)
    n = len(sizes)
    ours, other = ((table.predicted[name] - table.true)[hidden] ** 2 for name in (MODEL, best))
    gap = np.bincount(place, ours - other)
    if not np.isfinite(gap).all():
        return {}
    rng, draws = np.random.default_rng(0), np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = rng.integers(n, size=n)
        draws[i] = gap[drawn].sum() / sizes[drawn].sum()
    bounds = interval(draws, gap.sum() / sizes.sum(), n_units=n)
    return {} if bounds is None else {VS_STRONGEST_LOW: bounds.low, VS_STRONGEST_HIGH: bounds.high}


def _by_dataset(
    table: TargetTable, datasets: Mapping[int, str], predictors: set[str | None]
) -> dict[str, float]:
    """Return the error of predictors on the hidden values of each dataset, of the largest ones."""
    numbers, place = np.unique(table.dataset[table.hidden], return_inverse=True)
    sizes = np.bincount(place)
    largest = np.sort(np.argsort(-sizes, kind="stable")[:MOST_DATASETS])
    figures = {}
    for name in predictors:
        assert name is not None
        error = (table.predicted[name] - table.true)[table.hidden] ** 2
        means = np.bincount(place, error) / sizes
        for k in largest:
            if (dataset := datasets.get(int(numbers[k]))) is not None:
                figures[f"{_name(name, DATASET_MSE)}{dataset}"] = float(means[k])
    return figures


def grouped_pearson(
    predicted: NDArray[np.float64],
    true: NDArray[np.float64],
    group: NDArray[np.int64],
    *,
    least: int,
) -> float | None:
    """Return the mean over groups of the correlation within each.

    Args:
        predicted: (n,).
        true: (n,).
        group: (n,) number of each value's group.
        least: Groups of fewer values are left out, and those whose true values are all equal.

    Returns:
        The mean, in which a group with constant predictions counts as 0; None without groups.
    """
    _, place, sizes = np.unique(group, return_inverse=True, return_counts=True)

    def centred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values - (np.bincount(place, values) / sizes)[place]

    p, t = centred(predicted), centred(true)
    pp, tt, pt = (np.bincount(place, product) for product in (p * p, t * t, p * t))
    scale = np.bincount(place, true**2)
    counted = (sizes >= least) & (tt > 1e-12 * scale)
    if not counted.any():
        return None
    flat = pp <= 1e-12 * np.bincount(place, predicted**2)
    product = np.sqrt(np.where(flat, 1.0, pp) * tt)
    r = np.where(flat | (tt <= 0), 0.0, pt / np.where(product > 0, product, 1.0))
    return float(r[counted].mean())


def _correlation(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    found = grouped_pearson(predicted, true, np.zeros(len(true), dtype=np.int64), least=1)
    return 0.0 if found is None else found
