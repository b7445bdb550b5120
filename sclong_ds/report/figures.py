"""Figures of what a model makes of held-out cells, and of how its ranks and parts fare.

Drawn by `sclong_ds.report.draw` from plain arrays, made like those of `sclong_ds.report.curves`.

Shapes: n cells, S genes, C base width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from sclong_ds.page.words import counted
from sclong_ds.report import curves as plots
from sclong_ds.report.curves import (
    COLORS,
    INK,
    MUTED,
    VALIDATION_COLOR,
    Row,
    new_figure,
    style_axes,
)
from sclong_ds.run_folder.metric_names import SPIKE_METRIC
from sclong_ds.run_folder.pending_pictures import RANK_COLUMNS
from sclong_ds.run_folder.rows import series

_NOTHING = "not given"
_MAX_RANK_BARS = 64
_ZERO_NORM = 1e-12


def cell_figure(
    points: NDArray[np.floating[Any]],
    groups: Mapping[str, NDArray[np.str_]],
    *,
    n_expressed: NDArray[np.integer[Any]],
    method: str,
) -> Figure:
    """Draw cells in the plane, a panel for each grouping and one for the expressed genes.

    Args:
        points: (n, 2).
        groups: Title of a panel to the (n,) group of each cell.
        n_expressed: (n,) expressed genes of each cell.
        method: How the points were found.
    """
    n_panels = len(groups) + 1
    figure = Figure(figsize=(4.4 * n_panels + 0.8, 4.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    size = float(np.clip(3000 / len(points), 4, 40))
    for axes, (title, values) in zip(panels, groups.items(), strict=False):
        _plain_panel(axes, f"by {title}", method)
        for color, (name, of_group) in zip(COLORS, _largest(values), strict=False):
            label = f"{name} ({of_group.sum():,})"
            axes.scatter(*points[of_group].T, s=size, color=color, alpha=0.8, lw=0, label=label)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=8,
            markerscale=max(1.0, 20 / size), labelcolor=INK, handletextpad=0.2, columnspacing=1.0,
        )  # fmt: skip
    _plain_panel(panels[-1], "by expressed genes", method)
    dots = panels[-1].scatter(*points.T, s=size, c=n_expressed, cmap="viridis", lw=0)
    bar = figure.colorbar(dots, ax=panels[-1], shrink=0.8)
    bar.set_label("expressed genes of the cell", fontsize=9, color=MUTED)
    _quiet_bar(bar)
    figure.suptitle(f"{len(points):,} held-out cells", fontsize=10, color=INK, x=0.01, ha="left")
    return figure


def gene_figure(
    encodings: NDArray[np.floating[Any]],
    attention: NDArray[np.floating[Any]] | None,
    symbols: Sequence[str] | NDArray[np.str_],
) -> Figure:
    """Draw how alike the shown genes are to the model, and which ones the decoder attends to.

    What all genes attend to alike, the mean of a column, is removed: it would hide the rest.

    Args:
        encodings: (S, C) mean encodings over the cells that express the gene.
        attention: (S, S) attention of gene (row) to gene (column), 1 where all get the same.
        symbols: (S,) names.
    """
    expressed = np.linalg.norm(encodings, axis=1) > 0
    encodings, names = encodings[expressed], np.asarray(symbols)[expressed]
    likeness = _cosines(encodings)
    order = _by_likeness(likeness)
    panels_of = [likeness[np.ix_(order, order)]]
    if attention is not None:
        attention = attention[np.ix_(expressed, expressed)]
        logs = np.log2(np.maximum(attention[np.ix_(order, order)], 2.0**-16))
        panels_of.append(logs - logs.mean(axis=0))
    figure = Figure(figsize=(8.4 * len(panels_of), 7.4), layout="constrained", facecolor="white")
    titles = (
        ("likeness of genes: cosine of their mean encodings", "cosine", 1.0),
        (
            "computed attention, decoder's last layer: row to column, mean of columns removed",
            "log2 of the column's mean",
            3.0,
        ),
    )
    panels = figure.subplots(1, len(panels_of), squeeze=False)[0]
    for axes, values, (title, unit, limit) in zip(panels, panels_of, titles, strict=False):
        top = limit if unit == "cosine" else max(0.05, float(np.percentile(np.abs(values), 98)))
        image = axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        at = np.arange(len(order))
        axes.set_xticks(at, names[order], rotation=90, fontsize=8, color=INK)
        axes.set_yticks(at, names[order], fontsize=8, color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=11, color=INK, loc="left")
        bar = figure.colorbar(image, ax=axes, shrink=0.6, extend="neither")
        bar.set_label(unit, fontsize=9, color=MUTED)
        _quiet_bar(bar)
    figure.suptitle(
        f"{len(order)} genes whose values vary most", fontsize=10, color=INK, x=0.01, ha="left"
    )
    return figure


def gradient_figure(rows: Sequence[Row]) -> Figure:
    """Draw the gradient norm of the whole model and of its parts, spikes and skipped steps marked.

    Args:
        rows: Training rows with `train/grad_norm`, `train/grad_norm/PART`.
    """
    figure, axes = plots.new_figure(9.0, 4.2)
    prefix = "train/grad_norm/"
    names = dict.fromkeys(n.removeprefix(prefix) for r in rows for n in r if n.startswith(prefix))
    curves = [("train/grad_norm", "whole model", "#111827", 2.2)]
    curves += [
        (prefix + n, n.replace("_", " "), color, 1.4)
        for n, color in zip(names, COLORS, strict=False)
    ]
    window = 1
    for name, label, color, width in curves:
        steps, values = series(rows, name)
        if len(values):
            values = np.maximum(values, _ZERO_NORM)
            window = max(window, plots.smooth_curve(axes, steps, values, color, label, width))
    spikes = [row["step"] for row in rows if row.get(SPIKE_METRIC)]
    for number, step in enumerate(spikes):
        named = "loss spike" if number == 0 else None
        axes.axvline(step, color="#B91C1C", lw=1.0, ls=":", label=named, zorder=1)
    skipped = max((row.get("train/skipped_steps", 0) for row in rows), default=0)
    axes.set_yscale("log")
    shown = f"\nmean of {window} steps" if window > 1 else ""
    axes.set(xlabel="optimizer step", ylabel=f"norm of the gradient, before clipping{shown}")
    axes.set_title(counted(int(skipped), "skipped step"), fontsize=10, color=INK, loc="right")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=4, loc="upper center",
                bbox_to_anchor=(0.5, -0.16))  # fmt: skip
    return figure


def rank_figure(times: NDArray[np.floating[Any]]) -> Figure:
    """Draw where the time of each rank goes, and its memory.

    Args:
        times: (ranks, columns) means per step of `RANK_COLUMNS`.
    """
    figure = Figure(figsize=(9.0, 5.2), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1.0))
    order = np.arange(len(times))
    title = "mean of a step since the last validation"
    if len(times) > _MAX_RANK_BARS:
        # Of a thousand ranks those that differ most.
        own = times[:, 0] + times[:, 1]
        order = np.sort(np.argsort(-np.abs(own - np.median(own)), kind="stable")[:_MAX_RANK_BARS])
        title += f"; the {_MAX_RANK_BARS} of {len(times):,} ranks that differ most"
    at, bottom = np.arange(len(order)), np.zeros(len(order))
    parts = ("waiting for data", "forward", "backward", "optimizer")
    for column, (name, color) in enumerate(zip(parts, ("#D55E00", *COLORS[5:3:-1], COLORS[2]),
                                               strict=True)):  # fmt: skip
        values = times[order, column]
        upper.bar(at, values, 0.8, bottom=bottom, color=color, label=name)
        bottom += values
    rest = np.maximum(times[order, RANK_COLUMNS.index("perf/step_time_s")] - bottom, 0)
    upper.bar(at, rest, 0.8, bottom=bottom, color="#D1D5DB", label="other, waiting for ranks")
    lower.bar(at, times[order, RANK_COLUMNS.index("mem/peak_gib")], 0.8, color="#0072B2")
    for axes, label in ((upper, "seconds"), (lower, "peak memory, GiB")):
        plots.style_axes(axes)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(label)
    lower.set(xlabel="rank", xlim=(-0.6, max(len(order), 8) - 0.4))
    shown = at if len(at) <= 16 else at[:: -(-len(at) // 16)]
    lower.set_xticks(shown, [str(order[i]) for i in shown])
    upper.set_title(title, fontsize=10, color=INK, loc="left")
    upper.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=5, loc="lower left",
                 bbox_to_anchor=(0.0, 1.08))  # fmt: skip
    return figure


def _largest(values: NDArray[np.str_]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return the groups by falling size, small ones together when there are more than colours."""
    names, counts = np.unique(values, return_counts=True)
    by_size = names[np.argsort(-counts, kind="stable")]
    groups = [(str(name) or _NOTHING, values == name) for name in by_size]
    if len(groups) <= len(COLORS):
        return groups
    rest = groups[len(COLORS) - 1 :]
    others = np.any([of_group for _, of_group in rest], axis=0)
    return [*groups[: len(COLORS) - 1], (f"{len(rest)} others", others)]


def _cosines(encodings: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return (S, S) cosines, after taking off what all genes have in common."""
    centred = encodings.astype(np.float64) - encodings.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.maximum(norms, _ZERO_NORM)
    return np.clip(unit @ unit.T, -1.0, 1.0)


def _by_likeness(likeness: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return an order of the genes that puts alike ones side by side."""
    if len(likeness) < 3:
        return np.arange(len(likeness))
    distance = 1.0 - (likeness + likeness.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average", optimal_ordering=True)
    return leaves_list(tree)


def _plain_panel(axes: Axes, title: str, method: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9CA3AF")
    axes.set_xlabel(f"{method} 1", fontsize=8, color=MUTED, loc="left")
    axes.set_ylabel(f"{method} 2", fontsize=8, color=MUTED, loc="bottom")


def _quiet_bar(bar: Any) -> None:
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)


def bin_error_figure(row: Row, *, labels: Sequence[str] | None = None) -> Figure:
    """Draw MSE and Pearson of each expression bin, the model beside the per-gene-mean predictor.

    Args:
        row: A validation row with `val/mse/bin_K`, `val/baseline_mse/bin_K` and, for the second
            panel, `val/pearson/bin_K`, `val/baseline_pearson/bin_K`.
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
    names = [labels[k] if labels is not None else f"bin {k}" for k in bins]
    shown = [("mse", "masked MSE")]
    if any(f"val/pearson/bin_{k}" in row for k in bins):
        shown.append(("pearson", "Pearson correlation"))
    figure = Figure(figsize=(5.2 * len(shown), 3.5), layout="constrained", facecolor="white")
    for axes, (metric, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown,
                                     strict=True):  # fmt: skip
        style_axes(axes)
        for shift, prefix, color, label in (
            (-0.2, "val", VALIDATION_COLOR, "model"),
            (0.2, "val/baseline", "#B6BBC4", "per-gene mean predictor"),
        ):
            join = "/" if prefix == "val" else "_"
            values = [row.get(f"{prefix}{join}{metric}/bin_{k}", np.nan) for k in bins]
            bars = axes.bar(at + shift, values, 0.38, color=color, label=label)
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2, color=MUTED)
        axes.set_xticks(at, names)
        axes.set(xlabel="true value, low to high", ylabel=title)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.16)
    figure.axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
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
    figure, axes = new_figure(5.4, 4.6)
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
    axes.set_title(_agreement(predicted, true), fontsize=10, color=INK, loc="left")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
    bar = figure.colorbar(density, ax=axes, shrink=0.85)
    bar.set_label("masked values per cell of the grid", fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    bar.outline.set_visible(False)
    return figure


def bin_numbers(row: Row) -> list[int]:
    """Return the numbers K of the `val/mse/bin_K` metrics of a row, sorted."""
    prefix = "val/mse/bin_"
    return sorted(int(name.removeprefix(prefix)) for name in row if name.startswith(prefix))


def _agreement(predicted: NDArray[np.floating[Any]], true: NDArray[np.floating[Any]]) -> str:
    mse = float(np.mean((predicted - true) ** 2))
    spread = predicted.std() * true.std()
    covariance = float(np.mean((predicted - predicted.mean()) * (true - true.mean())))
    pearson = f"Pearson {covariance / spread:.3f}   " if spread > 0 else ""
    return f"{pearson}MSE {mse:.3f}   {counted(len(true), 'value')}"
