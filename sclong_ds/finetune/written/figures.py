"""Pictures of a fine-tuning: confusion matrix, calibration curve, predicted against true numbers.

Shapes: n scored cells, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sclong_ds.finetune.scored.table import BINS, bins_of

_MAX_NUMBERS = 15
"""Classes up to which cells of the matrix carry their number."""


def confusion_figure(
    target: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> Figure:
    """Return which label cells of each label were given: shares of a row, and numbers of cells."""
    width = len(classes)
    counts = np.zeros((width, width), np.int64)
    np.add.at(counts, (target, predicted), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(4 + 0.35 * width, 16)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true", xticks=range(width), yticks=range(width))
    axes.set_xticklabels(classes, rotation=90 if width > 3 else 0)
    axes.set_yticklabels(classes)
    if width <= _MAX_NUMBERS:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(drawn, ax=axes, label="share of the cells of a label")
    return figure


def calibration_figure(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Figure:
    """Return how often predictions of each confidence (n,) are right (n,)."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    bins = bins_of(confidence)
    sizes = np.bincount(bins, minlength=BINS)
    there = sizes > 0
    means = [np.bincount(bins, weights=w, minlength=BINS)[there] for w in (confidence, right)]
    x, y = (total / sizes[there] for total in means)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot(x, y, marker="o", label="held-out groups")
    shares = sizes[there] / sizes.sum()
    axes.bar(x, shares, width=0.8 / BINS, alpha=0.3, label="share of the cells")
    axes.set(xlabel="probability given", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
    return figure


def numbers_figure(target: NDArray[np.float64], predicted: NDArray[np.float64]) -> Figure:
    """Return predicted against true numbers (n,)."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    ends = [float(target.min()), float(target.max())]
    axes.plot(ends, ends, color="grey", linestyle="--")
    axes.scatter(target, predicted, s=8, alpha=0.4, linewidths=0)
    axes.set(xlabel="true", ylabel="predicted by fits that did not see the group")
    return figure
