"""Figures of the quality report: matplotlib drawings of plain arrays, as SVG text.

Imported by `data_prep.report.qc_report`. Figures are made without pyplot: no global state, no
display. The same data gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

# Blue, orange and vermilion of the Okabe-Ito palette: told apart with any colour vision.
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#6B7280"
_INK, _MUTED, _GRID = "#1F2937", "#4B5563", "#E5E7EB"
WIDTH, HEIGHT = 5.2, 3.0
_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)
_MOST_TICKS = 8


def bars(
    values: Mapping[str, float], *, xlabel: str, color: str = BLUE, percent: bool = False
) -> str:
    """Draw named horizontal bars, the first on top, each with its value.

    Args:
        values: Length of each bar.
        xlabel: Label of the axis.
        color: Color of the bars.
        percent: Values are shares, shown in percent of 1.
    """
    figure, axes = _new(height=max(1.6, 0.75 + 0.25 * len(values)))
    names = [_short(name) for name in values]
    places = np.arange(len(values))
    axes.barh(places, list(values.values()), color=color, height=0.68)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    for place, value in zip(places, values.values(), strict=True):
        text = f"{value:.1%}" if percent else f"{value:,.0f}"
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8, color=_MUTED)  # fmt: skip
    axes.set_xlim(0, 1.18 * max([*values.values(), 1e-9]))
    _number_axis(axes, percent=percent)
    axes.set_xlabel(xlabel)
    return _svg(figure)


def histogram(
    counts: NDArray[np.number],
    edges: NDArray[np.float64],
    *,
    xlabel: str,
    ylabel: str,
    median: float,
    log: bool,
    percent: bool = False,
) -> str:
    """Draw a histogram with its median.

    Args:
        counts: (bins,) heights.
        edges: (bins + 1,) borders.
        xlabel: What was counted.
        ylabel: What a height is.
        median: Where to draw the median.
        log: The bins are even on a logarithmic axis.
        percent: The values are shares, shown in percent of 1.
    """
    figure, axes = _new()
    used = np.flatnonzero(counts)
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.85, lw=0)
    if log:
        axes.set_xscale("log")
        if len(used):
            axes.set_xlim(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, len(edges) - 1)])
        _log_ticks(axes.xaxis)
    axes.axvline(median, color=RED, lw=1.4)
    text = f"{median:.1%}" if percent else f"{median:,.0f}"
    left, right = axes.get_xlim()
    where = (
        np.log(median / left) / np.log(right / left) if log else (median - left) / (right - left)
    )
    axes.annotate(
        f"median {text}", (median, 1.0), (5 if where < 0.7 else -5, 3),
        xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8.5,
        color=RED, ha="left" if where < 0.7 else "right", va="bottom",
    )  # fmt: skip
    if not log:
        axes.set_xlim(edges[0], edges[-1] + 0.02 * (edges[-1] - edges[0]))
        _number_axis(axes, percent=percent)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return _svg(figure)


def density(counts: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Draw the number of cells by counts and genes of a cell.

    Args:
        counts: (x bins, y bins) cells.
        x: Borders in counts a cell.
        y: Borders in genes a cell.
    """
    figure, axes = _new()
    shown = np.ma.masked_equal(counts.T, 0)
    picture = axes.pcolormesh(
        x, y, shown, norm=LogNorm(1, max(int(counts.max()), 2)), cmap="viridis", rasterized=True
    )
    axes.set(xscale="log", yscale="log", xlabel="counts a cell", ylabel="genes a cell")
    for edges, sums, limit in (
        (x, counts.sum(1), axes.set_xlim),
        (y, counts.sum(0), axes.set_ylim),
    ):
        used = np.flatnonzero(sums)
        if len(used):
            limit(edges[max(used[0] - 1, 0)], edges[min(used[-1] + 2, len(edges) - 1)])
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    _log_ticks(axes.xaxis, axes.yaxis, bar.ax.yaxis)
    bar.set_label("cells", fontsize=9, color=_MUTED)
    bar.ax.tick_params(labelsize=8, colors=_MUTED)
    bar.outline.set_visible(False)
    return _svg(figure)


def dataset_points(
    counts: NDArray[np.float64], genes: NDArray[np.float64], coverage: NDArray[np.float64]
) -> str:
    """Draw each dataset as a point: median counts, median genes, colored by coverage.

    Args:
        counts: (datasets,) median counts a cell.
        genes: (datasets,) median genes a cell.
        coverage: (datasets,) share of the counts on known genes.
    """
    figure, axes = _new()
    points = axes.scatter(
        counts, genes, c=100 * coverage, s=16 if len(counts) < 300 else 7, cmap="viridis",
        vmin=min(50.0, float(100 * coverage.min())), vmax=100, alpha=0.8, lw=0,
    )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="median counts a cell", ylabel="median genes a cell"
    )
    axes.margins(0.08)
    _log_ticks(axes.xaxis, axes.yaxis)
    bar = figure.colorbar(points, ax=axes, pad=0.02)
    bar.set_label("counts kept, %", fontsize=9, color=_MUTED)
    bar.ax.tick_params(labelsize=8, colors=_MUTED)
    bar.outline.set_visible(False)
    return _svg(figure)


def stacked(parts: Sequence[tuple[str, float, str]], *, xlabel: str) -> str:
    """Draw one bar of parts, named in a legend with their numbers.

    Args:
        parts: (name, size, color) of each part.
        xlabel: What the sizes count.
    """
    figure, axes = _new(height=1.6)
    left = 0.0
    for name, size, color in parts:
        axes.barh([0], [size], left=left, color=color, height=0.5, label=f"{size:,.0f} {name}")
        left += size
    axes.set(yticks=[], xlim=(0, max(left, 1)), ylim=(-0.4, 0.9), xlabel=xlabel)
    axes.legend(ncols=len(parts), frameon=False, fontsize=9, loc="upper left",
                borderaxespad=0, handlelength=1.0, labelcolor=_INK)  # fmt: skip
    _number_axis(axes)
    return _svg(figure)


def _new(*, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.tick_params(colors=_MUTED, labelsize=8.5, length=3)
    axes.grid(color=_GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(size=9, color=_MUTED)
    axes.yaxis.label.set(size=9, color=_MUTED)
    return figure, axes


def _number_axis(axes: Axes, *, percent: bool = False) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=not percent))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if percent else _compact(value))
    )


def _log_ticks(*axes: Axis) -> None:
    """Label logarithmic axes by round numbers, as many as there is room for."""
    for axis in axes:
        low, high = axis.get_view_interval()
        for steps in _TICKS:
            locator = LogLocator(subs=steps, numticks=99)
            shown = [v for v in locator.tick_values(low, high) if low <= v <= high]
            if len(shown) <= _MOST_TICKS:
                break
        axis.set_major_locator(locator)
        axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(value)))
        axis.set_minor_formatter(NullFormatter())


def _compact(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):,.4g}{letter}"
    return f"{value:,.4g}"


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    # Element ids from a salt and no date: the same data gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "sclong_ds", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    picture = text.getvalue()
    return picture[picture.index("<svg") :]
