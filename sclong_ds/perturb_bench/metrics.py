"""Scores of predicted effects, as perturbation screens are judged.

| score | what | best |
|---|---|---|
| delta_pearson | Pearson of predicted and true change over the 20 genes of clearest change | 1 |
| des | of the N genes that changed, how many are among the N of largest predicted change | 1 |
| pds | 1 less the share of other perturbations whose profile is nearer (L1) to the prediction | 1 |
| mae | mean absolute error of the predicted profile over all genes | 0 |

The perturbed genes themselves are left out everywhere: that a deleted gene is gone is no
prediction. A prediction of no change has no correlation: delta_pearson is 0. N is the number of
genes with a false discovery rate below 5% (rank-sum test); predictions are means of cells, without
a test of their own, so that the predicted set is always cut to N by size; a prediction
of no change names no gene. delta_pearson and des are NaN where N is 0. Ties in pds count half.
A prediction of no change has a pds of about 0.5; the mean of the other perturbations is below it
by construction, since it is made of all profiles except its own.
Sources of the definitions: GEARS (doi:10.1038/s41587-023-01905-6) for delta Pearson on top genes;
the Virtual Cell Challenge (doi:10.1016/j.cell.2025.06.008) for DES, PDS and MAE.

Shapes: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sclong_ds.objective.scores import interval
from sclong_ds.page.words import counted
from sclong_ds.perturb_bench.screen import Screen

TOP = 20
METRICS = ("delta_pearson", "des", "pds", "mae")
RESAMPLES = 2000
FEWEST = 10
"""Perturbations with a changed gene, below which no predictor is better or worse."""


def effect_scores(screen: Screen, predicted: NDArray[np.floating]) -> pd.DataFrame:
    """Return the scores of predicted effects, a row for each perturbation.

    Args:
        screen: The truth.
        predicted: (P, G) change that is predicted for each.
    """
    rows = [
        {
            "delta_pearson": _pearson(screen, predicted, i),
            "des": _overlap(screen, predicted, i),
            "pds": _discrimination(screen, predicted, i),
            "mae": _distances(screen, predicted, i)[i]
            / (screen.deltas.shape[1] - len(screen.targets[i])),
        }
        for i in range(len(screen.names))
    ]  # fmt: skip
    return pd.DataFrame(rows, index=list(screen.names), columns=list(METRICS))


def _pearson(screen: Screen, predicted: NDArray[np.floating], i: int) -> float:
    if screen.n_changed[i] == 0:
        return np.nan
    own = len(screen.targets[i])
    top = screen.ranked[i, : min(TOP, screen.ranked.shape[1] - own)]
    a, b = predicted[i, top], screen.deltas[i, top]
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 1e-12 else 0.0


def _overlap(screen: Screen, predicted: NDArray[np.floating], i: int) -> float:
    n = int(screen.n_changed[i])
    if n == 0:
        return np.nan
    size = np.abs(predicted[i]).astype(np.float64)
    size[list(screen.targets[i])] = 0.0
    first = np.argsort(-size, kind="stable")[:n]
    return float(np.isin(first[size[first] > 0], screen.ranked[i, :n]).sum()) / n


def _discrimination(screen: Screen, predicted: NDArray[np.floating], i: int) -> float:
    away = _distances(screen, predicted, i)
    others = np.delete(away, i)
    nearer = (others < away[i]).sum() + 0.5 * (others == away[i]).sum()
    return float(1.0 - nearer / len(others))


def _distances(screen: Screen, predicted: NDArray[np.floating], i: int) -> NDArray[np.float64]:
    """Return L1 distances (P,) of one prediction from all true changes, its targets left out."""
    away = np.delete(screen.deltas - predicted[i], screen.targets[i], axis=1)
    return np.asarray(np.abs(away).sum(axis=1))


def summary(scores: Mapping[str, pd.DataFrame], *, simple: set[str], seed: int) -> pd.DataFrame:
    """Return means over the perturbations with bounds of 95%, the strongest simple row first.

    Args:
        scores: By predictor, from `effect_scores`.
        simple: Predictors that read no model.
        seed: Of the resampled perturbations.

    Returns:
        Columns METRIC, METRIC_low, METRIC_high, and for delta_pearson the same of the
        difference from the strongest simple predictor (`gain`), whose bounds are of 1 - 0.05 / M
        for M predictors of the model; n_compared, the perturbations that have a delta_pearson.
    """
    means = {
        name: float(found["delta_pearson"].fillna(0.0).mean()) for name, found in scores.items()
    }
    best = max(sorted(simple & set(scores)), key=lambda name: means[name])
    n = len(scores[best])
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    level = _level(scores, simple)
    rows = {}
    for name in sorted(scores, key=lambda name: (name not in simple, -means[name])):
        row: dict[str, float] = {}
        for metric in METRICS:
            row |= _bounded(metric, scores[name][metric].to_numpy(), drawn)
        gain = scores[name]["delta_pearson"] - scores[best]["delta_pearson"]
        rows[name] = row | _bounded("gain", gain.to_numpy(), drawn, level=level)
        rows[name]["n_compared"] = int(gain.notna().sum())
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("predictor")


def _level(predictors: Iterable[str], simple: set[str]) -> float:
    """Return the share that bounds hold for 95% over all predictors of the model together."""
    return 1 - 0.05 / max(len(set(predictors) - simple), 1)


def _bounded(
    name: str, values: NDArray[np.float64], drawn: NDArray[np.int64], *, level: float = 0.95
) -> dict[str, float]:
    """Return the mean of values (P,), NaN left out, and bounds as `evaluate` gives them.

    They are NaN of one value, or where more than 5% of the resamples have none.
    """
    known = np.isfinite(values)
    if not known.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    totals = np.where(known, values, 0.0)[drawn].sum(axis=1)
    sizes = known[drawn].sum(axis=1)
    means = totals / np.where(sizes > 0, sizes, np.nan)
    mean = float(values[known].mean())
    bounds = interval(means, mean, n_units=int(known.sum()), level=level)
    low, high = (np.nan, np.nan) if bounds is None else bounds
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def worded(table: pd.DataFrame, *, simple: set[str]) -> str:
    """Return in words what the model's predictors are not better than.

    Args:
        table: From `summary`.
        simple: Predictors that read no model.
    """
    best, n = table.index[0], int(table["n_compared"].iloc[0])
    if n < FEWEST:
        return (
            f"delta_pearson: no verdict, {counted(n, 'perturbation')} with a changed gene; "
            f"{FEWEST} are needed"
        )
    parts = []
    for name in table.index:
        if name in simple:
            continue
        gain, low, high = (float(table.loc[name, c]) for c in ("gain", "gain_low", "gain_high"))
        word = "better" if low > 0 else "worse" if high < 0 else "not better"
        parts.append(f"{name} {word} than {best} ({gain:+z.3f} [{low:+z.3f}, {high:+z.3f}])")
    level = _level(table.index, simple)
    return f"delta_pearson, bounds of {level:.1%} for {len(parts)} predictors: {'; '.join(parts)}"
