"""How outputs become predictions: temperature and the rule for unknown cells, on held-out groups.

The temperature makes the held-out labels likeliest. Unknown cells are called by their highest
probability or by their distance from the training cells: by the one that tells right from wrong
held-out predictions better (area under the ROC curve); its threshold lets a given share of the held
out cells that are right be called unknown.

Shapes: n held-out cells, K classes, F features, m training cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from sclong_ds.exported.head import Judgement, Reference, probabilities

_TEMPERATURES = (0.05, 20.0)
_MIN_WRONG = 5
"""With fewer wrong predictions confidence is taken: a curve of a few is chance."""
_WITHIN = 0.9


def fit_temperature(outputs: NDArray[np.floating], target: NDArray[np.int64]) -> float:
    """Return the temperature under which labels (n,) are likeliest by scores (n, K)."""
    if not len(target):
        return 1.0

    def loss(log_temperature: float) -> float:
        return nll(probabilities(outputs, float(np.exp(log_temperature))), target)

    found = minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def nll(shares: NDArray[np.float64], target: NDArray[np.int64]) -> float:
    """Return the mean negative log likelihood of labels (n,) by probabilities (n, K)."""
    return float(losses(shares, target).mean())


def losses(shares: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the negative log likelihood (n,) of labels (n,) by probabilities (n, K)."""
    chosen = shares[np.arange(len(target)), target]
    return np.asarray(-np.log(np.maximum(chosen, 1e-12)))


def judge_labels(
    outputs: NDArray[np.floating],
    distance: NDArray[np.float64],
    target: NDArray[np.int64],
    *,
    unknown_rate: float,
) -> Judgement:
    """Choose the temperature and what calls cells unknown, on cells that training did not see.

    Args:
        outputs: (n, K) scores.
        distance: (n,) from the training cells.
        target: (n,) classes.
        unknown_rate: Share of the cells that are right which may be called unknown.
    """
    temperature = fit_temperature(outputs, target)
    shares = probabilities(outputs, temperature)
    right, confidence = shares.argmax(axis=1) == target, shares.max(axis=1)
    if not unknown_rate or not right.any():
        return Judgement(temperature=temperature)
    if (~right).sum() >= _MIN_WRONG:
        by_distance = roc_auc_score(right, -distance) > roc_auc_score(right, confidence)
    else:
        by_distance = False
    if by_distance:
        threshold = float(np.quantile(distance[right], 1 - unknown_rate))
        return Judgement(temperature=temperature, unknown_by="distance", threshold=threshold)
    threshold = float(np.quantile(confidence[right], unknown_rate))
    return Judgement(temperature=temperature, unknown_by="confidence", threshold=threshold)


def judge_numbers(
    predicted: NDArray[np.float64],
    distance: NDArray[np.float64],
    target: NDArray[np.float64],
    *,
    unknown_rate: float,
) -> Judgement:
    """Choose the error that holds 90% of held-out cells, and the distance of unknown ones.

    Args:
        predicted: (n,) numbers.
        distance: (n,) from the training cells.
        target: (n,) true numbers.
        unknown_rate: Share of the cells that may be called unknown.
    """
    error = float(np.quantile(np.abs(predicted - target), _WITHIN))
    if not unknown_rate:
        return Judgement(error=error)
    threshold = float(np.quantile(distance, 1 - unknown_rate))
    return Judgement(error=error, unknown_by="distance", threshold=threshold)


def fit_reference(scaled: NDArray[np.float32], codes: NDArray[np.int64], width: int) -> Reference:
    """Return where training cells lie.

    Args:
        scaled: (m, F) scaled features.
        codes: (m,) classes; zeros for numbers.
        width: K, or 1.
    """
    centroids = np.full((width, scaled.shape[1]), np.nan, dtype=np.float32)
    within = scaled.astype(np.float64)
    for code in np.unique(codes):
        here = codes == code
        centroids[code] = scaled[here].mean(axis=0)
        within[here] -= centroids[code]
    precision = LedoitWolf(assume_centered=True).fit(within).precision_
    return Reference(centroids=centroids, precision=precision.astype(np.float32))
