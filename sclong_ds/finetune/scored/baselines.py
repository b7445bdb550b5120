"""What a fine-tuned model must be better than: linear models on the same cells and folds.

| row | what |
|---|---|
| logistic on PCA | logistic regression on 50 principal components of the training cells |
| logistic on X_sclong | the same on the embedding of the model before fine-tuning |
| most common label | the label of most training cells; no cell is looked at |

Numbers are predicted by ridge regression and by the mean. The strength of the penalty is chosen on
the held-out groups that also stop and calibrate the fine-tuned model. scikit-learn does the work.

Shapes: N cells, W features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from sclong_ds.finetune.examples import Examples
from sclong_ds.finetune.scored.calibration import nll

COMPONENTS = 50
_LEAST_SINGULAR = 1e-6
"""Share of the largest singular value. Components below it are rounding, where training cells are
fewer than they seem: scaled to variance 1 they would blow up every other cell."""
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_ITERATIONS = 2000

Features = Callable[[NDArray[np.int64]], NDArray[np.floating]]
"""From the training cells of a fold to the features (N, W) of all cells."""


def principal_components(values: csr_matrix) -> Features:
    """Return PCA of log1p-normalised counts (N, G), fitted on the training cells of a fold."""

    def found(train: NDArray[np.int64]) -> NDArray[np.floating]:
        width = min(COMPONENTS, len(train) - 1, values.shape[1] - 1)
        pca = PCA(width, svd_solver="arpack", random_state=0)
        pca.fit(values[train].astype(np.float64))
        there = pca.singular_values_ >= _LEAST_SINGULAR * pca.singular_values_[0]
        return np.asarray(pca.transform(values.astype(np.float64)))[:, there]

    return found


def linear_outputs(
    examples: Examples, features: Features, *, fold: int, balanced: bool
) -> NDArray[np.float64]:
    """Return the outputs (N, K) of a linear model of one fold: log probabilities, or numbers.

    Classes that no training cell has get -inf.

    Args:
        examples: The cells.
        features: What it reads.
        fold: The fold to be tested.
        balanced: Whether cells are weighted by how rare their label is.
    """
    train, held, _ = examples.parts_of(fold)
    x = features(train)
    scaler = StandardScaler().fit(x[train])
    x = scaler.transform(x)
    y = examples.target
    fits = [_fit(x[train], y[train], strength, examples, balanced) for strength in _STRENGTHS]
    outputs = [_outputs(model, x, examples) for model in fits]
    losses = [_loss(found[held], y[held], examples) for found in outputs]
    return outputs[int(np.argmin(losses))]


def _fit(
    x: NDArray[np.floating],
    y: NDArray[np.float64],
    strength: float,
    examples: Examples,
    balanced: bool,
) -> LogisticRegression | Ridge:
    if not examples.classes:
        return Ridge(alpha=1 / strength).fit(x, y)
    weight = "balanced" if balanced else None
    return LogisticRegression(C=strength, max_iter=_ITERATIONS, class_weight=weight).fit(
        x, y.astype(np.int64)
    )


def _outputs(
    model: LogisticRegression | Ridge, x: NDArray[np.floating], examples: Examples
) -> NDArray[np.float64]:
    if isinstance(model, Ridge):
        return np.asarray(model.predict(x))[:, None]
    scores = model.decision_function(x)
    if scores.ndim == 1:  # of two classes scikit-learn gives the second's alone
        scores = np.stack([np.zeros(len(scores)), scores], axis=1)
    found = np.full((len(x), examples.width), -np.inf)
    # Not the logarithm of its probabilities: of sure ones that is -inf, which no temperature mends.
    found[:, model.classes_] = log_softmax(scores, axis=1)
    return found


def _loss(outputs: NDArray[np.float64], y: NDArray[np.float64], examples: Examples) -> float:
    """Return the loss of held-out cells; those whose label was not learnt are left out."""
    if not examples.classes:
        return float(np.abs(outputs[:, 0] - y).mean())
    codes = y.astype(np.int64)
    known = np.isfinite(outputs[0, codes])
    return nll(np.exp(outputs[known]), codes[known])


def constant_outputs(
    examples: Examples, *, fold: int, centre: Callable[..., Any] = np.mean
) -> NDArray[np.float64]:
    """Return the outputs (N, K) of a model that looks at no cell.

    Args:
        examples: The cells.
        fold: The fold to be tested.
        centre: What it says of numbers: their mean, or the median, of least absolute error.
    """
    train, _, _ = examples.parts_of(fold)
    n_cells = len(examples.target)
    if not examples.classes:
        return np.full((n_cells, 1), centre(examples.target[train]))
    sizes = np.bincount(examples.target[train].astype(np.int64), minlength=examples.width)
    with np.errstate(divide="ignore"):
        return np.tile(np.log(sizes / sizes.sum()), (n_cells, 1))
