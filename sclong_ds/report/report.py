"""`report`: one self-contained HTML page about a training run, or about several.

    python -m sclong_ds report RUN_DIR_OR_RUN_ID [...] --out report.html

Reads the run folders (`sclong_ds.run_folder.record`); a run id is looked up in the tracking store.
The page holds its styles and images, so it opens without a network and can be mailed. What a run
did not record is left out. Several runs make a comparison: figures side by side, curves in one
picture, and the settings that differ (`sclong_ds.report.compare`).

`run.json` may hold a `summary` of what was trained on what: `n_cells_train`, `n_cells_validation`,
`n_genes`, `n_datasets`, `corpus`, `parameters` (part to count), `world_size`, `device`,
`expression_bins` (label of every bin by number), and further scalars, such as content hashes, shown
under their own name.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from sclong_ds.files.atomic import write_atomic
from sclong_ds.page import html as page
from sclong_ds.page import words
from sclong_ds.page.words import clock, duration, number
from sclong_ds.report import compare
from sclong_ds.report import curves as plots
from sclong_ds.report.figures import bin_error_figure, bin_numbers
from sclong_ds.report.training_page import drawn, loss_facts, loss_name, training_section
from sclong_ds.report.validation_page import (
    attention_section,
    other_validations,
    validation_section,
    verdict_sentence,
)
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.metric_names import (
    LOSS,
    MEAN_MSE,
    MEAN_PEARSON,
    MSE,
    N_CELLS,
    PEARSON,
    STRONGEST_MSE,
    of_baseline,
)
from sclong_ds.run_folder.record import HOURS, Rows, RunRecord
from sclong_ds.run_folder.rows import cells_scored, standing, strongest, verdict
from sclong_ds.tracking.client import find_runs

_MAX_EVENTS = 300
_STATUS = {
    "FINISHED": ("good", "Finished"),
    "KILLED": ("warn", "Interrupted, can be resumed"),
    "FAILED": ("bad", "Failed"),
    "RUNNING": ("live", "Running, or killed without notice"),
}
_SUMMARY_NAMES = {
    "corpus": "Corpus",
    "n_datasets": "Datasets",
    "n_cells_train": "Training cells",
    "n_cells_validation": "Cells of the validation split",
    "n_genes": "Genes",
    "world_size": "Ranks",
    "device": "Device",
}
_PART_NAMES = {
    "large": "large encoder",
    "mini": "mini encoder",
    "to_large": "projection into the large encoder",
    "from_large": "projection out of the large encoder",
    "head": "output head",
}
"""Parts of the model whose own names do not tell."""
_SHOWN_HASH = 12
"""Digits of a content hash that tell two apart; run.json has all."""
_PICTURES = {
    "predicted_vs_true": "Masked values of held-out cells: on the dashed line the prediction is "
    "the value that was hidden.",
    "expression_bins": "Hidden values grouped by their true size, the model beside the predictor "
    "that knows every gene's mean.",
    "cells": "Each dot is a held-out cell. Kinds of cells should lie apart, datasets mixed.",
    "genes": "Left: red genes are alike to the model. Right, of the weights "
    "that the layer computes: red, the row attends to the column more than other rows do.",
    "gradient_norms": "A part far below the others hardly learns; one that jumps is unstable.",
    "ranks": "The ranks should look alike. The slow one waits least for the others.",
}


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is; return the exit status."""
    try:
        write_report(find_runs(args.runs), args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


def write_report(records: Sequence[RunRecord], out: Path) -> None:
    """Write the page of a run, or the comparison of several.

    Args:
        records: The runs.
        out: HTML file to write; its folder is created.
    """
    content = build_page(records[0]) if len(records) == 1 else build_comparison(records)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content.encode())


def build_page(record: RunRecord) -> str:
    """Return the whole HTML page of a run; every text of the run is escaped."""
    body = page.join(
        [
            _damage(record),
            page.verdict(verdict_sentence(record)),
            _cards(record),
            page.section("What was run", _what_was_run(record)),
            page.section("Training", training_section(record)),
            page.section("Validation", _validation(record)),
            page.section("Is attention used?", attention_section(record)),
            page.section("Pictures", _pictures(record)),
            page.section("Nodes", _nodes(record)),
            page.section("Restarts and events", _sessions_table(record) + _events_table(record)),
            page.section("Configuration and environment", _details(record)),
        ]
    )
    return page.document(
        record.name,
        status=_status_line(record),
        body=body,
        footer=f"Written {_now()} from {record.folder}.",
    )


def build_comparison(records: Sequence[RunRecord]) -> str:
    """Return the HTML page that compares runs."""
    names = compare.names_of(records)
    figures = compare.figures_table(records)
    runs: dict[str, Rows] = {
        name: [*record.train, *record.validation]
        for name, record in zip(names, records, strict=True)
    }
    kinds: dict[str, dict[str, Rows]] = {}
    for name, record in zip(names, records, strict=True):
        kinds.setdefault(record.loss_kind, {})[name] = record.losses
    curves = []
    for metric, title, against, shown in (
        (MSE, "validation MSE", "step", runs),
        (MSE, "validation MSE", "cells_seen", runs),
        (MSE, "validation MSE", HOURS, runs),
        *((LOSS, f"training loss, {loss_name(kind)}", "step", own) for kind, own in kinds.items()),
        ("perf/cells_per_s", "cells / s", "step", runs),
    ):
        if any(metric in row and against in row for rows in shown.values() for row in rows):
            smooth = not metric.startswith("val/")  # a validation is a mean already
            figure = plots.runs_figure(shown, metric, ylabel=title, against=against, smooth=smooth)
            caption = f"{title[0].upper()}{title[1:]} by {plots.X_AXES[against]}"
            told = (
                plots.told(rows, {metric: f"{name}:"}, against=against)
                for name, rows in shown.items()
            )
            curves.append(drawn(figure, caption, "", " ".join(told)))
    notes = [other_validations(record) for record in records if record.n_other_validations]
    notes += compare.not_comparable(records)
    curves += [page.note(note) for note in notes]
    differences = compare.settings_table(records)
    settings = (
        page.table(["setting", *names], differences)
        if differences
        else page.note("The runs have the same settings.")
    )
    body = page.join(
        [
            page.section("Figures", page.table(["", *names], figures, numeric=True)),
            page.section("Curves", page.join(curves)),
            page.section("Settings that differ", settings),
        ]
    )
    folders = ", ".join(str(record.folder) for record in records)
    return page.document(
        f"{len(records)} runs compared",
        status=" · ".join(names),
        body=body,
        footer=f"Written {_now()} from {folders}.",
    )


def _now() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _damage(record: RunRecord) -> Markup:
    """Return what is not as the run wrote it, for whoever reads the page."""
    if not record.damage:
        return Markup("")
    text = "Files of this run were changed or lost; what is shown may be wrong:"
    return page.bullets(text, record.damage)


def _status_line(record: RunRecord) -> Markup:
    kind, text = _STATUS.get(str(record.run.get("status")), ("live", "Status not recorded"))
    parts = [f"step {record.steps:,}"]
    restarts = record.run.get("restarts")
    if restarts:
        parts.append(words.counted(int(restarts), "restart"))
    if record.run.get("created"):
        created = str(record.run["created"]).replace("T", " ").replace("+00:00", " UTC")
        parts.append(f"created {created}")
    if record.run.get("commit"):
        commit = str(record.run["commit"])
        parts.append(commit if commit.startswith("version") else f"commit {commit[:12]}")
    return page.badge(kind, text) + " · ".join(parts)


def _cards(record: RunRecord) -> Markup:
    cards: list[tuple[str, str, str]] = []
    if record.validation:
        last = record.validation[-1]
        mse, mean = last[MSE], last.get(MEAN_MSE, math.nan)
        if STRONGEST_MSE in last:
            sub = f"{standing(last)}; per-gene mean {number(mean)}; of {cells_scored(last)}"
            cards.append(("Validation MSE, hidden values", words.recorded(mse), sub))
        else:
            cards.append(("Validation MSE", words.recorded(mse), _against(mse, mean)))
        if PEARSON in last:
            cards.append(
                ("Validation Pearson", words.recorded(last[PEARSON]), _against_pearson(last))
            )
    if record.train:
        seen = record.train[-1].get("cells_seen")
        sub = f"{words.counted(int(seen), 'cell')} seen" if seen is not None else ""
        cards.append(("Optimizer steps", f"{int(record.train[-1]['step']):,}", sub))
    speed = record.median("perf/cells_per_s")
    if math.isfinite(speed):
        sub = f"median; {duration(record.wall_time_s)} in all"
        cards.append(("Cells per second", number(speed), sub))
    return page.cards(cards)


def _against(mse: float, mean: float) -> str:
    if not (math.isfinite(mean) and mean > 0 and math.isfinite(mse)):
        return ""
    change = (mse - mean) / mean
    size, word = f"{abs(change):.0%}", "lower" if change < 0 else "higher"
    size = "less than 1%" if change and size == "0%" else size
    return f"{size} {word} than the per-gene mean ({number(mean)})"


def _against_pearson(row: Mapping[str, float]) -> str:
    """Return the correlation of the strongest baseline, or of the gene mean in older runs."""
    best = strongest(row)
    if best is not None and math.isfinite(other := row.get(of_baseline(best, PEARSON), math.nan)):
        return f"strongest baseline ({best.replace('_', ' ')}) {number(other)}"
    other = row.get(MEAN_PEARSON, math.nan)
    return f"per-gene mean predictor {number(other)}" if math.isfinite(other) else ""


def _what_was_run(record: RunRecord) -> Markup:
    summary = record.summary
    parameters = summary.pop("parameters", None)
    summary.pop("expression_bins", None)
    named = [(_SUMMARY_NAMES[k], summary.pop(k)) for k in _SUMMARY_NAMES if k in summary]
    left = [(name, words.text(value)) for name, value in named]
    left += [
        (k.replace("_", " "), words.text(v))
        for k, v in summary.items()
        if isinstance(v, str | int | float) and not k.endswith("_hash")
    ]
    if isinstance(parameters, Mapping):
        total = parameters.get("total", sum(parameters.values()))
        parts = {k: v for k, v in parameters.items() if k != "total"}
        left.append(("Parameters", words.text(total)))
        left += [
            (f"of which {_PART_NAMES.get(name, name.replace('_', ' '))}", words.text(value))
            for name, value in parts.items()
        ]
    tables = [page.key_table(left), page.key_table(_results(record))]
    return page.pair([table for table in tables if table])


def _results(record: RunRecord) -> list[tuple[str, str]]:
    rows = loss_facts(record)
    if record.validation:
        first, last_row = record.validation[0], record.validation[-1]
        if N_CELLS in last_row:
            rows.append(("Validation cells scored", number(last_row[N_CELLS])))
        if STRONGEST_MSE in last_row:
            rows.append(("Strongest baseline, validation", words.recorded(last_row[STRONGEST_MSE])))
            rows.append(("The model is", f"{verdict(last_row)} the strongest baseline"))
        rows.append(("Validation masked MSE, first", words.recorded(first[MSE])))
        rows.append(("Validation masked MSE, last", words.recorded(last_row[MSE])))
        if MEAN_MSE in last_row:
            rows.append(
                ("Per-gene mean predictor, same values", words.recorded(last_row[MEAN_MSE]))
            )
    rows.append(("Steps", f"{record.steps:,}"))
    for name, metric, scale, unit in (
        ("Step time, median", "perf/step_time_s", 1.0, "s"),
        ("Waiting for data, median", "perf/data_wait_s", 1000.0, "ms a step"),
        ("Python's share of the work, median", "perf/host_s", 1000.0, "ms a step"),
        ("Model FLOP/s utilisation, median", "perf/mfu", 100.0, "%"),
    ):
        value = record.median(metric)
        if math.isfinite(value):
            rows.append((name, f"{number(value * scale)} {unit}"))
    peak = record.highest("mem/peak_gib")
    if math.isfinite(peak):
        rows.append(("Memory peak", f"{number(peak)} GiB"))
    skipped = record.highest("train/skipped_steps")
    if math.isfinite(skipped):
        rows.append(("Skipped steps", number(skipped)))
        rows.append(("Loss spikes", number(record.spikes)))
    rows.append(("Wall time", duration(record.wall_time_s)))
    return rows


def _validation(record: RunRecord) -> Markup:
    text = validation_section(record)
    last = record.validation[-1] if record.validation else {}
    if bin_numbers(last) and not any(p.stem == "expression_bins" for p in record.images):
        labels = record.summary.get("expression_bins")
        title = f"By expression, step {int(last['step']):,}"
        text += drawn(bin_error_figure(last, labels=labels), title, _PICTURES["expression_bins"])
    return text


def _pictures(record: RunRecord) -> Markup:
    """Return the newest pictures, and which validation they show."""
    if record.pictured_step is None:
        return Markup("")
    note = f"Of the validation at step {record.pictured_step:,}."
    last = int(record.validation[-1]["step"]) if record.validation else record.pictured_step
    if last > record.pictured_step:
        note += (
            f" Those of step {last:,} are not drawn yet: "
            f"python -m sclong_ds.report.draw {record.folder} draws what waits."
        )
    order = list(_PICTURES)
    shown = sorted(
        record.images, key=lambda p: order.index(p.stem) if p.stem in order else len(order)
    )
    return page.note(note) + page.join(
        page.image(
            path.read_bytes(),
            "image/png",
            path.stem.replace("_", " ").capitalize(),
            _PICTURES.get(path.stem, ""),
        )
        for path in shown
    )


def _nodes(record: RunRecord) -> Markup:
    """Return a chart of what the nodes were busy with, all of them in one."""
    blocks = []
    for suffix, title, label in (
        ("cpu_utilization_percentage", "Processors", "% in use"),
        ("system_memory_usage_percentage", "Memory", "% in use"),
        ("gpu_0_utilization_percentage", "First GPU", "% in use"),
        ("gpu_0_memory_usage_percentage", "Memory of the first GPU", "% in use"),
    ):
        runs = {
            node: [
                {HOURS: row[HOURS], title: row[f"system/{node}/{suffix}"]}
                for row in rows
                if row.get(f"system/{node}/{suffix}") is not None
            ]
            for node, rows in record.system.items()
        }
        if any(runs.values()):
            figure = plots.runs_figure(runs, title, ylabel=label, against=HOURS, wide=False)
            told = " ".join(
                plots.told(rows, {title: f"{node}:"}, against=HOURS) for node, rows in runs.items()
            )
            blocks.append(drawn(figure, title, "By node.", told))
    return page.grid(blocks)


def _sessions_table(record: RunRecord) -> Markup:
    body = [
        [
            str(n), clock(s.start), clock(s.end), duration(s.end - s.start),
            f"{s.first_step:,}", f"{s.last_step:,}", _ending(record, n),
            "" if s.world_size is None else str(s.world_size), f"{s.lost_steps:,}",
        ]
        for n, s in enumerate(record.sessions, start=1)
    ]  # fmt: skip
    head = [
        "Start", "Started", "Last sign", "Alive", "From step", "To step", "How it ended", "Ranks",
        "Steps redone",
    ]  # fmt: skip
    return page.table(head, body)


def _ending(record: RunRecord, number_of_start: int) -> str:
    """Return how a start ended; the last one may still be running."""
    ended = record.sessions[number_of_start - 1].ended
    if ended is not None:
        return ended
    if number_of_start < len(record.sessions) or record.run.get("status") != "RUNNING":
        return "without a word (killed, or its node was lost)"
    return "running, or killed without a word"


def _events_table(record: RunRecord) -> Markup:
    if not record.events:
        return Markup("")
    shown = record.events[-_MAX_EVENTS:]
    body = []
    for event in shown:
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "step")}
        text = ", ".join(f"{k}: {words.text(v)}" for k, v in rest.items())
        body.append([clock(float(event["time"])), f"{event['step']:,}", event["event"], text])
    count = words.counted(len(record.events), "event")
    if len(shown) < len(record.events):
        count = f"Last {len(shown)} of {count}"
    table = page.table(["Time", "Step", "Event", "Details"], body)
    return page.folded(count, table)


def _details(record: RunRecord) -> Markup:
    names = {
        "config.yaml": "Resolved configuration (config.yaml)",
        "ds_config.json": "Resolved DeepSpeed configuration (ds_config.json)",
    }
    blocks = [page.folded(names[name], page.code(text)) for name, text in record.texts.items()]
    environment = record.run.get("environment") or {}
    keys = ("run_id", "mlflow_run_id", "mlflow_tracking_uri", "slurm_job_id", "commit")
    ids = [(k, without_credentials(str(record.run[k]))) for k in keys if record.run.get(k)]
    hashes = [
        (f"{name.removesuffix('_hash')}, content hash", str(value)[:_SHOWN_HASH])
        for name, value in record.summary.items()
        if name.endswith("_hash") and value is not None
    ]
    table = page.key_table(ids + [(k, str(v)) for k, v in environment.items()] + hashes)
    if table:
        blocks.append(page.folded("Environment and ids", table, unfolded=True))
    return page.join(blocks)
