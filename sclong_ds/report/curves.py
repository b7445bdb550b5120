"""Figures of a training run, drawn with matplotlib from plain arrays and metric rows.

`sclong_ds.report.draw` draws the figures of a validation, `sclong_ds.report.report` the curves.
Rows are those of `sclong_ds.run_folder.rows.read_metrics`. Figures are made without pyplot, so
there is no global state, nothing to close, and no display is needed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sclong_ds.run_folder.metric_names import LOSS, MEAN_MSE, MSE, STRONGEST_MSE
from sclong_ds.run_folder.rows import running_mean, series

Row = Mapping[str, float]

# Blue and orange of the Okabe-Ito palette: told apart with any colour vision, and in grey print.
TRAIN_COLOR, VALIDATION_COLOR, BASELINE_COLOR = "#0072B2", "#D55E00", "#6B7280"
INK, MUTED, _GRID = "#1F2937", "#4B5563", "#E5E7EB"
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B",
    "#7F7F7F", "#000000",
)  # fmt: skip
"""Okabe and Ito's colours, and a few more that are far from them."""
_MAX_NAMED = 16  # curves of one picture that a legend can name
_MAX_POINTS = 2000  # more than a page can show; keeps the SVG of a long run small
_HASH_SALT = "sclong_ds"  # element ids of an SVG: same rows, same bytes


X_AXES = {"step": "optimizer step", "cells_seen": "cells seen", "hours": "hours of training"}
"""Column of a row to the label of the axis that curves are drawn against."""


def loss_figure(
    rows: Sequence[Row],
    *,
    ylabel: str,
    restarts: Sequence[int] = (),
    against: str = "step",
    wide: bool = True,
) -> Figure:
    """Draw what is there of the training loss, the validation's error and its baselines.

    Args:
        rows: Metric rows with `train/loss`, `val/mse`, `val/baseline_mse`, all of one unit.
        ylabel: Axis label.
        restarts: Steps at which the run was resumed, marked by a thin line; against steps only.
        against: Key of `X_AXES`.
        wide: For the width of a page, or else for half of it.
    """
    figure, axes = new_figure(*((9.0, 3.9) if wide else (4.5, 2.9)))
    x, loss = series(rows, LOSS, against)
    if len(loss):
        _curve(axes, x, loss, color=TRAIN_COLOR, label="training")
    val_x, val = series(rows, MSE, against)
    if len(val):
        axes.plot(val_x, val, "o-", color=VALIDATION_COLOR, ms=4.5, lw=1.8, label="validation")
    base_x, base = series(rows, MEAN_MSE, against)
    if len(base):
        axes.plot(
            base_x, base, "--", color=BASELINE_COLOR, lw=1.5, marker="_", ms=10,
            label="validation, per-gene mean predictor",
        )  # fmt: skip
    best_x, best = series(rows, STRONGEST_MSE, against)
    if len(best):
        axes.plot(
            best_x, best, "-", color=BASELINE_COLOR, lw=1.5, marker="_", ms=10,
            label="validation, strongest baseline",
        )  # fmt: skip
    for number, step in enumerate(restarts):
        label = "restart" if number == 0 else None
        axes.axvline(step, color=BASELINE_COLOR, lw=1.0, ls=":", zorder=1, label=label)
    axes.set(xlabel=X_AXES[against], ylabel=ylabel)
    axes.set_ylim(bottom=0.0, top=_top(loss, val, base))
    if wide:
        _legend_above(figure)
    return figure


def runs_figure(
    runs: Mapping[str, Sequence[Row]],
    name: str,
    *,
    ylabel: str,
    against: str = "step",
    wide: bool = True,
    smooth: bool = True,
) -> Figure:
    """Draw one metric of several runs.

    Args:
        runs: Name of each run to its rows.
        name: Metric.
        ylabel: Axis label.
        against: Key of `X_AXES`.
        wide: For the width of a page, or else for half of it.
        smooth: Draw the running mean of a long curve, and say over how many values.
    """
    figure, axes = new_figure(*((9.0, 3.7) if wide else (4.5, 2.7)))
    curves, windows = [], []
    for (label, rows), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
        x, values = series(rows, name, against)
        if len(values):
            windows.append(_window(values) if smooth else 1)
            smooth_curve(axes, x, values, color, label, 1.8, window=windows[-1])
            curves.append(values)
    if max(windows, default=1) > 1:
        low, high = min(windows), max(windows)
        ylabel += f"\nmean of {high if low == high else f'{low} to {high}'} values"
    axes.set(xlabel=X_AXES[against], ylabel=ylabel)
    axes.set_ylim(bottom=min(0.0, *(c.min() for c in curves), 0.0), top=_top(*curves))
    if len(curves) <= _MAX_NAMED:
        _legend_above(figure)
    return figure


def curve_figure(rows: Sequence[Row], name: str, *, ylabel: str, smooth: bool = True) -> Figure:
    """Draw one training metric by step.

    Args:
        rows: Metric rows.
        name: Metric, for instance `train/grad_norm`.
        ylabel: Axis label with the unit.
        smooth: Add the running mean over the faint raw values.
    """
    figure, axes = new_figure(4.5, 2.7)
    steps, values = series(rows, name)
    _curve(axes, steps, values, color=TRAIN_COLOR, label=None, smooth=smooth)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.set_ylim(bottom=0.0, top=_top(values))
    return figure


def told(rows: Sequence[Row], curves: Mapping[str, str], *, against: str = "step") -> str:
    """Return what a picture of curves shows, for who does not see it.

    Args:
        rows: Metric rows.
        curves: Metric to its name; one without values is left out.
        against: Key of `X_AXES`.
    """
    parts = []
    for metric, name in curves.items():
        x, values = series(rows, metric, against)
        if len(values):
            ends = f"from {values[0]:.4g} at {x[0]:,.6g} to {values[-1]:.4g} at {x[-1]:,.6g}"
            span = f"between {values.min():.4g} and {values.max():.4g}"
            parts.append(f"{name} {ends}, {span}")
    return f"By {X_AXES[against]}: {'; '.join(parts)}." if parts else ""


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


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, in the style of all of them."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes the style of all figures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9CA3AF")
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)
    axes.grid(visible=True, color=_GRID, lw=0.8)
    axes.set_axisbelow(True)


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
    window = _window(values)
    smoothed = running_mean(values, window=window)
    axes.plot(steps[thin], values[thin], color=color, lw=0.8, alpha=0.28)
    named = f"{label}, mean of {window} steps" if label else None
    axes.plot(steps[thin], smoothed[thin], color=color, lw=2.0, label=named)


def smooth_curve(
    axes: Axes,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    color: str,
    label: str,
    width: float,
    *,
    window: int | None = None,
) -> int:
    """Plot the running mean of a curve, thinned, and return of how many values it is.

    Window None: by the curve's length.
    """
    window = _window(values) if window is None else window
    thin = slice(None, None, max(1, -(-len(values) // _MAX_POINTS)))
    smoothed = running_mean(values, window=window)
    marker = "o" if len(values) < 20 else ""
    axes.plot(steps[thin], smoothed[thin], color=color, lw=width, label=label, marker=marker, ms=3)
    return window


def _window(values: NDArray[np.float64]) -> int:
    """Return how many values a running mean is of: an odd number, 1 for a short curve."""
    return 1 if len(values) < 20 else max(5, len(values) // 25) | 1


def _legend_above(figure: Figure) -> None:
    """Name the curves above the axes, in as many columns as the figure has room for, 4 at most."""
    (axes,) = figure.axes
    _, labels = axes.get_legend_handles_labels()
    widest_in = 0.6 + 0.08 * max(map(len, labels), default=0)  # of the line, and of a character
    ncols = min(4, max(1, int(figure.get_figwidth() / widest_in)))
    axes.legend(
        frameon=False, fontsize=9, labelcolor=INK, ncols=ncols, loc="lower left",
        bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, columnspacing=1.4,
    )  # fmt: skip


def _top(*curves: NDArray[np.float64]) -> float | None:
    """Return an upper limit that a single spike does not set."""
    tops = [float(np.percentile(c, 99)) for c in curves if len(c)]
    return 1.12 * max(tops) if tops and max(tops) > 0 else None
