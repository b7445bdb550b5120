"""`compare`: figures of several runs side by side, and the settings in which they differ.

    python -m sclong_ds compare RUN_DIR_OR_RUN_ID RUN_DIR_OR_RUN_ID [...] [--json]

Reads the run folders (`sclong_ds.run_folder.record`); a run id is looked up in the tracking store.
Prints two tables, or one JSON document. `sclong_ds.report.report` shows the same on a page, with
curves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sclong_ds.page import words
from sclong_ds.page.words import duration, number
from sclong_ds.run_folder.metric_names import (
    MEAN_MSE,
    MEAN_PEARSON,
    MSE,
    N_CELLS,
    PEARSON,
    PER_GENE,
    RELATIVE_MSE,
    SEVERAL_MSE,
    STRONGEST_MSE,
    VS_STRONGEST_HIGH,
    VS_STRONGEST_LOW,
    WITHIN_CELL,
)
from sclong_ds.run_folder.record import RunRecord
from sclong_ds.run_folder.rows import is_hidden_only, standing, unlisted
from sclong_ds.tracking.client import find_runs

SCORE_HEAD = ("MSE", "of the mean", "Pearson", "of the mean", "Spearman", "of the mean")
"""Heads of the figures of `scores_table`; each beside that of the per-gene-mean predictor."""
TWO_KINDS = (
    "The errors of these runs do not compare: some are of hidden values alone, those of older "
    "versions of targets of which a tenth was shown."
)
TWO_LOSSES = (
    "The training losses of these runs do not compare: they are means of different things "
    "(train/loss is of)."
)
_SAME = ("objective.mask_prob", "objective.replace_prob", "data.target_sum")
"""Settings that decide which values a validation scores, and in what unit."""
_SCORES = ("mse", "pearson", "spearman")
_FACTS = (
    "n_cells_train", "n_genes", "world_size", "device", "corpus_hash", "genes_hash", "graph_hash",
    "features_hash", "weights_hash",
)  # fmt: skip
"""Keys of run.json's summary that are settings too."""
_OWN_SETTINGS = frozenset({"run.dir"})
"""Settings that differ between any two runs and say nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds compare`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN_DIR_OR_RUN_ID", help="run or sweep folders, or runs' ids"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the tables and return the exit status."""
    records = find_runs(args.runs)
    if len(records) < 2:
        raise ValueError(f"{args.runs[0]}: one run; give two runs or more")
    if args.json:
        text = json.dumps(as_json(records), indent=2, allow_nan=False)
    else:
        head, settings = ["", *names_of(records)], settings_table(records)
        text = _aligned([head, *figures_table(records)]) + "\n\n"
        text += _aligned([["setting", *head[1:]], *settings]) if settings else "same settings"
        for record in records:
            if record.n_other_validations:
                left_out = words.counted(record.n_other_validations, "validation")
                text += (
                    f"\n\nleft out: {left_out} of {record.name} by another version, with another "
                )
                text += "kind of error"
        text += "".join(f"\n\n{note}" for note in not_comparable(records))
    sys.stdout.write(f"{text}\n")
    return 0


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """Return a name for every run: its folder's, with as many parents as tell it apart."""
    assert len({record.folder for record in records}) == len(records), "a run is there twice"
    names, depth = [record.name for record in records], 1
    while len(set(names)) < len(names):
        counts, depth = Counter(names), depth + 1
        names = [
            name if counts[name] == 1 else str(Path(*record.folder.parts[-depth:]))
            for name, record in zip(names, records, strict=True)
        ]
    return names


def not_comparable(records: Sequence[RunRecord]) -> list[str]:
    """Return a sentence for each kind of figure that does not compare between the runs."""
    scored = {_scored(record.validation[-1]) for record in records if record.validation}
    losses = {record.loss_kind for record in records if record.train}
    found = ((TWO_KINDS, scored), (TWO_LOSSES, losses))
    notes = [sentence for sentence, kinds in found if len(kinds) > 1]
    others = _other_values([record for record in records if record.validation])
    if others:
        notes.append(
            "The errors of these runs cannot be set side by side, since they are of other values: "
            f"{'; '.join(others)}. Compare runs in which these are the same, or each model with "
            "the baselines of its own run."
        )
    return notes


def _other_values(records: Sequence[RunRecord]) -> list[str]:
    """Return what differs in the values that the last validations scored, as `name: a, b`."""
    kinds = {name: [r.settings.get(name) for r in records] for name in _SAME}
    kinds["corpus"] = [str(r.summary.get("corpus_hash") or "")[:8] for r in records]
    cells = (r.validation[-1].get(N_CELLS) for r in records)
    kinds["validation cells"] = [None if n is None else f"{n:,.0f}" for n in cells]
    known = {name: list(dict.fromkeys(filter(None, values))) for name, values in kinds.items()}
    return [f"{name}: {', '.join(values)}" for name, values in known.items() if len(values) > 1]


def figures(record: RunRecord) -> dict[str, float | str | None]:
    """Return the figures that sum a run up; None for what it did not record."""
    last = record.validation[-1] if record.validation else {}
    errors = [row[MSE] for row in record.compared if math.isfinite(row[MSE])]
    row = record.train[-1] if record.train else last
    found: dict[str, float | str] = {
        "status": str(record.run.get("status", "unknown")).lower(),
        "step": record.steps,
        "cells_seen": row.get("cells_seen", math.nan),
        "train/loss": record.last_mean("train/loss"),
        "train/loss is of": record.loss_kind if record.train else math.nan,
        "val/mse is of": _scored(last),
        N_CELLS: last.get(N_CELLS, math.nan),
        STRONGEST_MSE: last.get(STRONGEST_MSE, math.nan),
        "the model is": standing(last).partition(" (")[0] or math.nan,
        f"{MSE}, last": last.get(MSE, math.nan),
        f"{MSE}, best": min(errors, default=math.nan),
        **{
            name: last.get(name, math.nan)
            for name in (
                RELATIVE_MSE,
                VS_STRONGEST_LOW,
                VS_STRONGEST_HIGH,
                MEAN_MSE,
                PEARSON,
                MEAN_PEARSON,
                PER_GENE,
                WITHIN_CELL,
                SEVERAL_MSE,
                "val/spearman",
            )
        },
        "perf/cells_per_s": record.median("perf/cells_per_s"),
        "perf/mfu": record.median("perf/mfu"),
        "perf/data_wait_s": record.median("perf/data_wait_s"),
        "mem/peak_gib": record.highest("mem/peak_gib"),
        "wall_time_s": record.wall_time_s,
        "restarts": float(record.run.get("restarts", 0)),
        "skipped_steps": record.highest("train/skipped_steps"),
        "spikes": float(record.spikes),
        "parameters": float(sum((record.summary.get("parameters") or {}).values())) or math.nan,
        **unlisted(last),
    }
    return {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in found.items()}


def _scored(row: Mapping[str, float]) -> str | float:
    """Return which targets a validation scored; NaN without one."""
    if MSE not in row:
        return math.nan
    return "hidden values" if is_hidden_only(row) else "hidden and shown targets"


def figures_table(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return a row for every figure that some run has: its name, and the runs' values."""
    columns = [figures(record) for record in records]
    names = dict.fromkeys(name for column in columns for name in column)
    return [
        [name, *(_shown(name, column.get(name)) for column in columns)]
        for name in names
        if any(column.get(name) is not None for column in columns)
    ]


def settings_table(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return a row for every setting that is not the same in all runs: its key, and the values."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    rows = ([key, *(r.settings.get(key, "not recorded") for r in records)] for key in keys)
    about = [
        ["commit", *(str(r.run.get("commit", "not recorded")) for r in records)],
        *(
            [name, *(words.text(r.summary.get(name, "not recorded")) for r in records)]
            for name in _FACTS
        ),
    ]
    return [row for row in (*rows, *about) if len(set(row[1:])) > 1 and row[0] not in _OWN_SETTINGS]


def scores_table(row: Mapping[str, float], labels: Sequence[str] | None) -> list[list[str]]:
    """Return the scores of a validation beside those of the per-gene-mean predictor.

    Args:
        row: A validation row.
        labels: Name of every expression bin.

    Returns:
        A row for all values, for each expression bin and for each encoder: its name, the number of
        values, and the figures under `SCORE_HEAD`.
    """
    groups = {"all values": ""}
    # With model.routing top no hidden value is read by the large encoder: nothing to tell apart.
    if f"{MSE}/large" in row and f"{MSE}/mini" in row:
        groups |= {"large encoder": "/large", "mini encoder": "/mini"}
    groups |= {f"value {label}": f"/bin_{k}" for k, label in enumerate(labels or ())}
    return [
        [name, number(row.get(f"val/n_values{suffix}", math.nan))]
        + [
            _score(row.get(f"val/{prefix}{score}{suffix}", math.nan))
            for score in _SCORES
            for prefix in ("", "baseline_")
        ]
        for name, suffix in groups.items()
        if f"val/mse{suffix}" in row and f"val/n_values{suffix}" in row
    ]


def as_json(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return both tables as plain data."""
    names = names_of(records)
    return {
        "runs": [
            {"name": name, "folder": str(record.folder), "figures": figures(record)}
            for name, record in zip(names, records, strict=True)
        ],
        "differences": {
            key: dict(zip(names, values, strict=True)) for key, *values in settings_table(records)
        },
    }


def _score(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _shown(name: str, value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name.startswith("val/") and not name.startswith("val/n_"):
        return f"{value:.4f}"
    return duration(value) if name == "wall_time_s" else number(value)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
