"""Figures of a training run, drawn with matplotlib from plain arrays and metric rows.

`sclong_ds.pretrain` draws the validation figures (`Tracker.figure` stores them), `sclong_ds.report`
the curves. Rows are those of `sclong_ds.run_folder.read_metrics`. Figures are made without pyplot,
so there is no global state, nothing to close, and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Row = Mapping[str, float]

# Blue and orange of the Okabe-Ito palette: told apart with any colour vision, and in grey print.
TRAIN_COLOR, VALIDATION_COLOR, BASELINE_COLOR = "#0072B2", "#D55E00", "#6B7280"
_INK, _MUTED, _GRID = "#1F2937", "#4B5563", "#E5E7EB"
_MAX_POINTS = 2000  # more than a page can show; keeps the SVG of a long run small
_HASH_SALT = "sclong_ds"  # element ids of an SVG: same rows, same bytes


def loss_figure(rows: Sequence[Row], *, restarts: Sequence[int] = ()) -> Figure:
    """Draw the masked MSE by step: training, validation and the per-gene-mean predictor.

    Args:
        rows: Metric rows with `train/loss`, `val/mse`, `val/baseline_mse`.
        restarts: Steps at which the run was resumed, marked by a thin line.
    """
    figure, axes = _new_figure(9.0, 3.9)
    steps, loss = series(rows, "train/loss")
    _curve(axes, steps, loss, color=TRAIN_COLOR, label="training")
    val_steps, val = series(rows, "val/mse")
    if len(val):
        axes.plot(val_steps, val, "o-", color=VALIDATION_COLOR, ms=4.5, lw=1.8, label="validation")
    base_steps, base = series(rows, "val/baseline_mse")
    if len(base):
        axes.plot(
            base_steps, base, "--", color=BASELINE_COLOR, lw=1.5, marker="_", ms=10,
            label="validation, per-gene mean predictor",
        )  # fmt: skip
    for number, step in enumerate(restarts):
        label = "restart" if number == 0 else None
        axes.axvline(step, color=BASELINE_COLOR, lw=1.0, ls=":", zorder=1, label=label)
    axes.set(xlabel="optimizer step", ylabel="masked MSE")
    axes.set_ylim(bottom=0.0, top=_top(loss, val, base))
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper right")
    return figure


def curve_figure(
    rows: Sequence[Row], name: str, *, ylabel: str, smooth: bool = True, zero: bool = True
) -> Figure:
    """Draw one training metric by step.

    Args:
        rows: Metric rows.
        name: Metric, for instance `train/grad_norm`.
        ylabel: Axis label with the unit.
        smooth: Add the running mean over the faint raw values.
        zero: Start the axis at 0.
    """
    figure, axes = _new_figure(4.5, 2.7)
    steps, values = series(rows, name)
    _curve(axes, steps, values, color=TRAIN_COLOR, label=None, smooth=smooth)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    if zero:
        axes.set_ylim(bottom=0.0, top=_top(values))
    return figure


def bin_error_figure(row: Row, *, labels: Sequence[str] | None = None) -> Figure:
    """Draw the masked MSE of each expression bin, the model beside the per-gene-mean predictor.

    Args:
        row: A validation row with `val/mse/bin_K` and `val/baseline_mse/bin_K`.
        labels: Name of every bin by number; None: the numbers. A bin without values has no metric
            and is left out.

    Raises:
        ValueError: The row has no bins, or there are fewer labels than bins.
    """
    bins = bin_numbers(row)
    if not bins:
        raise ValueError("no val/mse/bin_K in the validation row")
    if labels is not None and len(labels) <= bins[-1]:
        raise ValueError(f"got {len(labels)} bin labels, but there is a bin {bins[-1]} (from 0)")
    at = np.arange(len(bins))
    model = [row[f"val/mse/bin_{k}"] for k in bins]
    mean = [row.get(f"val/baseline_mse/bin_{k}", np.nan) for k in bins]
    figure, axes = _new_figure(9.0, 3.3)
    bars = [
        axes.bar(at - 0.2, model, 0.38, color=VALIDATION_COLOR, label="model"),
        axes.bar(at + 0.2, mean, 0.38, color="#B6BBC4", label="per-gene mean predictor"),
    ]
    for container in bars:
        axes.bar_label(container, fmt="%.2f", fontsize=8, padding=2, color=_MUTED)
    axes.set_xticks(at, [labels[k] if labels is not None else f"bin {k}" for k in bins])
    axes.set(xlabel="true value, low to high", ylabel="masked MSE")
    axes.grid(visible=False, axis="x")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return figure


def prediction_density_figure(
    predicted: NDArray[np.floating[Any]], true: NDArray[np.floating[Any]]
) -> Figure:
    """Draw predicted against true masked values as a log-scaled density with the identity line.

    Args:
        predicted: (N,) predicted values, log1p of scaled counts.
        true: (N,) values that were masked, same unit.

    Raises:
        ValueError: The arrays are empty or differ in shape.
    """
    if predicted.shape != true.shape or predicted.ndim != 1 or not predicted.size:
        raise ValueError(
            f"got predicted {predicted.shape} and true {true.shape}; "
            "expected two 1-D arrays of one length, not empty"
        )
    predicted = np.asarray(predicted, dtype=np.float64)
    true = np.asarray(true, dtype=np.float64)
    finite = np.isfinite(predicted) & np.isfinite(true)
    figure, axes = _new_figure(5.4, 4.6)
    low = float(min(0.0, predicted[finite].min(initial=0.0)))
    high = float(max(predicted[finite].max(initial=0.0), true[finite].max(initial=1.0)))
    extent = (low, high, low, high)
    density = axes.hexbin(
        true[finite], predicted[finite], gridsize=55, bins="log", mincnt=1, cmap="viridis",
        extent=extent, linewidths=0.1,
    )  # fmt: skip
    axes.plot([low, high], [low, high], color="#B91C1C", lw=1.2, ls="--", label="predicted = true")
    axes.set(xlabel="true value, log1p(scaled count)", ylabel="predicted value")
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_title(_agreement(predicted, true), fontsize=10, color=_INK, loc="left")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper left")
    bar = figure.colorbar(density, ax=axes, shrink=0.85)
    bar.set_label("masked values per cell of the grid", fontsize=9, color=_MUTED)
    bar.ax.tick_params(labelsize=8, colors=_MUTED)
    bar.outline.set_visible(False)
    return figure


def series(rows: Sequence[Row], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps and the finite values of one metric, each (N,)."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return array[:, 0], array[:, 1]


def running_mean(values: NDArray[np.float64], *, window: int) -> NDArray[np.float64]:
    """Return the centred mean over `window` values (odd), over fewer at both ends; (N,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start = np.maximum(at - window // 2, 0)
    end = np.minimum(at + window // 2 + 1, len(values))
    return (total[end] - total[start]) / (end - start)


def bin_numbers(row: Row) -> list[int]:
    """Return the numbers K of the `val/mse/bin_K` metrics of a row, sorted."""
    prefix = "val/mse/bin_"
    return sorted(int(name.removeprefix(prefix)) for name in row if name.startswith(prefix))


def png_bytes(figure: Figure) -> bytes:
    """Return the figure as PNG, 160 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def svg_bytes(figure: Figure) -> bytes:
    """Return the figure as SVG with text as outlines, so that it needs no font."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": _HASH_SALT, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9CA3AF")
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.xaxis.label.set(color=_INK, fontsize=10)
    axes.yaxis.label.set(color=_INK, fontsize=10)
    axes.grid(visible=True, color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _curve(
    axes: Axes,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    *,
    color: str,
    label: str | None,
    smooth: bool = True,
) -> None:
    """Plot raw values, and their running mean where there are enough of them, thinned."""
    thin = slice(None, None, max(1, -(-len(values) // _MAX_POINTS)))
    if not smooth or len(values) < 20:
        marker = "o" if len(values) < 20 else ""
        axes.plot(steps[thin], values[thin], color=color, lw=1.6, marker=marker, ms=3, label=label)
        return
    window = max(5, len(values) // 25) | 1
    smoothed = running_mean(values, window=window)
    axes.plot(steps[thin], values[thin], color=color, lw=0.8, alpha=0.28)
    named = f"{label}, mean of {window} steps" if label else None
    axes.plot(steps[thin], smoothed[thin], color=color, lw=2.0, label=named)


def _top(*curves: NDArray[np.float64]) -> float | None:
    """Return an upper limit that a single spike does not set."""
    tops = [float(np.percentile(c, 99)) for c in curves if len(c)]
    return 1.12 * max(tops) if tops and max(tops) > 0 else None


def _agreement(predicted: NDArray[np.floating[Any]], true: NDArray[np.floating[Any]]) -> str:
    mse = float(np.mean((predicted - true) ** 2))
    spread = predicted.std() * true.std()
    covariance = float(np.mean((predicted - predicted.mean()) * (true - true.mean())))
    pearson = f"Pearson {covariance / spread:.3f}   " if spread > 0 else ""
    return f"{pearson}MSE {mse:.3f}   {len(true):,} values"
