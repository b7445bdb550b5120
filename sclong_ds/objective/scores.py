"""Figures of the hidden values of validation cells, model and baselines side by side.

Everything is computed from one table of targets, so that a figure means the same for the model and
for each baseline. Values that are zero genes are left out: their error is a figure of its own
(`sclong_ds.objective.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_CELLS = 8
"""Hidden values of a gene in a dataset, below which it has no correlation across cells."""
LEAST_GENES = 20
"""Hidden values of a cell, below which it has no correlation across genes."""


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


def strongest(figures: Mapping[str, float], names: tuple[str, ...]) -> str:
    """Return the baseline with the smallest error on hidden values."""
    return min(names, key=lambda name: figures[f"val/{name}/mse"])


def verdict(figures: Mapping[str, float]) -> str:
    """Return whether the model's error is above or below that of the strongest baseline."""
    mse, best = figures["val/mse"], figures["val/strongest_mse"]
    return "below" if mse < best else "above" if mse > best else "equal to"


def scores(table: TargetTable, datasets: Mapping[int, str]) -> dict[str, float]:
    """Return the figures by name; what has no values is left out.

    Args:
        table: The targets.
        datasets: Name of each dataset in the table.

    Returns:
        `val/mse`, `val/pearson`, `val/pearson_per_gene`, `val/pearson_within_cell` and
        `val/mse_several` (counts of 2 or more) of the model over hidden values; the same as
        `val/BASELINE/mse` and so on; `val/shown_mse`; `val/mse/dataset/NAME`, and that of the last
        baseline; `val/relative_mse`, the model's error over that of the strongest baseline.
    """
    hidden = table.hidden
    if not hidden.any():
        return {}
    figures: dict[str, float] = {"val/n_hidden": float(hidden.sum())}
    groups = table.dataset[hidden] * (table.gene.max() + 1) + table.gene[hidden]
    for name, values in table.predicted.items():
        prefix = "val" if name == "model" else f"val/{name}"
        error = (values - table.true) ** 2
        figures[f"{prefix}/mse"] = float(error[hidden].mean())
        figures[f"{prefix}/pearson"] = _correlation(values[hidden], table.true[hidden])
        for figure, group, least in (
            ("pearson_per_gene", groups, LEAST_CELLS),
            ("pearson_within_cell", table.cell[hidden], LEAST_GENES),
        ):
            found = grouped_pearson(values[hidden], table.true[hidden], group, least=least)
            if found is not None:
                figures[f"{prefix}/{figure}"] = found
        if (several := hidden & table.several).any():
            figures[f"{prefix}/mse_several"] = float(error[several].mean())
        if name == "model" and not hidden.all():
            figures["val/shown_mse"] = float(error[~hidden].mean())
    baselines = tuple(name for name in table.predicted if name != "model")
    if baselines:
        best = figures[f"val/{strongest(figures, baselines)}/mse"]
        figures["val/strongest_mse"] = best
        if best > 0:
            figures["val/relative_mse"] = figures["val/mse"] / best
    for number, dataset in datasets.items():
        if not (here := hidden & (table.dataset == number)).any():
            continue
        for name in {"model", *baselines[-1:]}:
            error = (table.predicted[name][here] - table.true[here]) ** 2
            prefix = "val" if name == "model" else f"val/{name}"
            figures[f"{prefix}/mse/dataset/{dataset}"] = float(error.mean())
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
