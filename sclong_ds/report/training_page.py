"""What the report shows of training steps: the loss beside the validations, then speed and memory.

A loss that is not the mean squared error has a chart of its own: no validation has its unit.
"""

from __future__ import annotations

from markupsafe import Markup
from matplotlib.figure import Figure

from sclong_ds.page import html as page
from sclong_ds.page.words import counted, number
from sclong_ds.report import curves as plots
from sclong_ds.run_folder.metric_names import LOSS, MEAN_MSE, MSE, STRONGEST_MSE
from sclong_ds.run_folder.record import HOURS, LAST_STEPS, MSE_LOSS, Rows, RunRecord
from sclong_ds.run_folder.rows import is_hidden_only, series

_CURVES = (
    ("train/lr", "Learning rate", "learning rate", False, "As applied at each step."),
    ("perf/cells_per_s", "Throughput", "cells / s", True, "All ranks together."),
    ("perf/mfu", "Model FLOP/s utilisation", "share of the device's peak", True, ""),
    ("perf/data_wait_s", "Waiting for data", "s / step", True, "Time the step had no batch."),
    ("mem/peak_gib", "Memory peak", "GiB", False, "Of rank 0 since it started."),
    ("train/skipped_steps", "Skipped steps", "so far", False, "Not finite, hence not applied."),
)
_LOSSES = {
    LOSS: "training",
    MSE: "validation",
    MEAN_MSE: "per-gene mean",
    STRONGEST_MSE: "strongest baseline",
}
"""Curves of the pictures of the loss, and their names."""


def loss_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the training loss of the first step and of the last ones, each under its name."""
    _, loss = series(record.losses, LOSS)
    if not len(loss):
        return []
    last = min(LAST_STEPS, len(loss))
    named = f"Training loss ({loss_name(record.loss_kind)})"
    return [
        (f"{named}, first step", number(loss[0])),
        (f"{named}, mean of last {counted(last, 'step')}", number(record.last_mean(LOSS))),
    ]


def loss_name(kind: str) -> str:
    """Return the name of a training loss: the MSE, unlike that of validation, is of all targets.

    Args:
        kind: `RunRecord.loss_kind`.
    """
    return f"{kind} of all targets" if kind == MSE_LOSS else kind


def training_section(record: RunRecord) -> Markup:
    """Return the HTML on the steps of a run."""
    if not record.train:
        return page.note("No training step was logged.")
    charts: list[tuple[str, str, Rows]] = [
        ("Mean squared error", "MSE", [*record.losses, *record.validation])
    ]
    if record.loss_kind != MSE_LOSS:
        charts = [
            (f"Training loss: {record.loss_kind}", "training loss", record.losses),
            ("Mean squared error of validation", "MSE", record.validation),
        ]
    blocks: list[Markup] = []
    small: list[Markup] = []
    if n_others := len(record.train) - len(record.losses):
        blocks.append(
            page.note(f"Left out: the losses of {counted(n_others, 'step')}, of another kind.")
        )
    for title, label, rows in charts:
        if rows:
            figure = plots.loss_figure(rows, ylabel=label, restarts=record.restart_steps)
            blocks.append(drawn(figure, title, _explained(rows), plots.told(rows, _LOSSES)))
        for against in ("cells_seen", HOURS):
            if any(against in row for row in rows):
                figure = plots.loss_figure(rows, ylabel=label, against=against, wide=False)
                text = "Pauses between two starts are left out." if against == HOURS else ""
                told = plots.told(rows, _LOSSES, against=against)
                small.append(drawn(figure, f"{title} by {plots.X_AXES[against]}", text, told))
    for name, title, label, smooth, text in _CURVES:
        if series(record.train, name)[1].any():
            figure = plots.curve_figure(record.train, name, ylabel=label, smooth=smooth)
            small.append(drawn(figure, title, text, plots.told(record.train, {name: title})))
    return page.join(blocks) + page.grid(small)


def _explained(rows: Rows) -> str:
    """Return what the lines of a picture of the loss are, of those that are there."""
    has = {name for name in _LOSSES if len(series(rows, name)[1])}
    parts = []
    if LOSS in has:
        parts.append("Training: the mean over all targets, those shown to the model among them.")
    if MSE in has:
        hidden = is_hidden_only([row for row in rows if MSE in row][-1])
        scored = "hidden values alone" if hidden else "targets, shown ones among them"
        parts.append(f"Validation: {scored}, of held-out cells.")
    if MEAN_MSE in has:
        parts.append("The dashed line predicts every gene's mean over the training cells.")
    if STRONGEST_MSE in has:
        parts.append(
            "The solid grey line is the strongest baseline: a model that learned nothing more ends "
            "there."
        )
    return " ".join(parts)


def drawn(figure: Figure, title: str, text: str, seen: str = "") -> Markup:
    """Return a figure as an image of the page.

    Args:
        figure: The figure.
        title: Its title.
        text: Caption.
        seen: What it shows, for who does not see it.
    """
    return page.image(plots.svg_bytes(figure), "image/svg+xml", title, text, seen=seen)
