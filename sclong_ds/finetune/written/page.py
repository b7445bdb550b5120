"""The page of a fine-tuning: verdict, table with the strongest row first, pictures, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame

from sclong_ds.finetune.scored.compare import Outcome
from sclong_ds.finetune.setting import Setting
from sclong_ds.finetune.written.figures import (
    calibration_figure,
    confusion_figure,
    numbers_figure,
)
from sclong_ds.page import html
from sclong_ds.report.curves import png_bytes

REPORT = "report.html"


def page(setting: Setting, outcome: Outcome, facts: Mapping[str, Any], shown: DataFrame) -> str:
    """Return the page.

    Args:
        setting: Of the fits.
        outcome: The comparison.
        facts: Content of scores.json.
        shown: The table as text, the strongest row first.
    """
    rows = [[str(row), *shown.loc[row].tolist()] for row in shown.index]
    scores = html.table(["row", *map(str, shown.columns)], rows, numeric=True)
    pictures = [
        html.image(png_bytes(figure), "image/png", title, text)
        for title, text, figure in _figures(setting, outcome)
    ]
    intervals = (
        "Intervals hold 95% of 1,000 resamples of groups, or of cells where there are fewer than "
        "5 groups. Every row predicts the same cells, from the same training groups, calibrated on "
        "the same held-out groups."
    )
    body = (
        html.section("Scores", scores + html.note(intervals))
        + html.section("Predictions of held-out groups", html.grid(pictures))
        + html.section("Cells and calibration", html.key_table(list(_shown_facts(facts))))
    )
    return html.document(
        f"{facts['label']}, mode {facts['mode']}",
        status=f"{facts['verdict']}.",
        body=body,
        footer=f"{setting.out}",
        kind="fine-tuning report",
    )


def _figures(setting: Setting, outcome: Outcome) -> Iterator[tuple[str, str, Figure]]:
    """Yield title, text and figure of each picture."""
    examples, scored = setting.examples, outcome.scored
    target, shares = examples.target[scored], outcome.shares[scored]
    if not examples.classes:
        text = "Mean over seeds; on the line they are equal."
        yield "Predicted against true", text, numbers_figure(target, shares[:, 0])
        return
    codes, best = target.astype(np.int64), shares.argmax(axis=1)
    text = "Rows are true labels, columns the predicted ones; numbers are cells."
    yield "Confusion matrix", text, confusion_figure(codes, best, examples.classes)
    text = "Probabilities are scaled by a temperature that held-out groups chose."
    yield "Calibration", text, calibration_figure(shares.max(axis=1), best == codes)


def _shown_facts(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and values of the last table."""
    names = {
        "n_cells": "cells", "n_scored": "cells scored: their label was in training",
        "folds": "folds", "training_cells": "of the model's own training",
        "temperatures": "temperature of each fit", "unknown_by": "unknown cells are called by",
        "unknown_among_right": "share called unknown, right predictions",
        "unknown_among_wrong": "share called unknown, wrong predictions",
        "unknown_among_label_not_in_training": "share called unknown, label not in training",
    }  # fmt: skip
    for name, words in names.items():
        if name in facts:
            value = facts[name]
            if isinstance(value, float):
                value = f"{value:.3f}"
            elif isinstance(value, list):
                value = ", ".join(map(str, value))
            yield words, str(value)
    yield "groups", ", ".join(f"{name} ({n})" for name, n in facts["groups"].items())
    for reason, n in facts["left_out"].items():
        yield f"left out: {reason}", str(n)
