"""`report`: one self-contained HTML page about a training run.

    python -m sclong_ds report RUN_DIR_OR_RUN_ID --out report.html

Reads the run folder (`run.json`, `metrics.jsonl`, `events.jsonl`, `config.yaml`, `ds_config.json`,
`plots/*.png`); a run id is looked up in the tracking store. The page holds its styles and images,
so it opens without a network and can be mailed. What a run did not record is left out.

`run.json` may hold a `summary` of what was trained on what: `n_cells_train`, `n_cells_validation`,
`n_genes`, `n_datasets`, `corpus`, `parameters` (part to count), `world_size`, `device`,
`expression_bins` (label of every bin by number), and further scalars, shown under their own name.
"""

from __future__ import annotations

import argparse
import datetime
import html
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sclong_ds import page, plots
from sclong_ds.files import write_atomic
from sclong_ds.run_folder import (
    read_events,
    read_every_row,
    read_metrics,
    read_run_json,
)
from sclong_ds.tracking import find_run_dir

Rows = list[dict[str, float]]

_LAST_STEPS = 10  # one batch of few cells is noisy: "last" training numbers are means
_MAX_VALIDATION_ROWS = 12
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
    "n_cells_validation": "Validation cells",
    "n_genes": "Genes",
    "world_size": "Ranks",
    "device": "Device",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds, read once.

    Attributes:
        folder: Run folder.
        run: run.json.
        train: Training rows by step.
        validation: Validation rows by step.
        events: Events in the order written.
        marks: Time and step of every row ever written, superseded ones too.
        texts: Name to content of the resolved configuration files.
        images: PNG files of plots/, sorted by name.
    """

    folder: Path
    run: dict[str, Any]
    train: Rows
    validation: Rows
    events: list[dict[str, Any]]
    marks: tuple[tuple[float, int], ...]
    texts: dict[str, str]
    images: tuple[Path, ...]

    @property
    def summary(self) -> dict[str, Any]:
        """The `summary` of run.json, or nothing."""
        return dict(self.run.get("summary") or {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds report`."""
    parser.add_argument("run", metavar="RUN_DIR_OR_RUN_ID", help="run folder, or a run's id")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="page to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is; return the exit status."""
    try:
        folder = Path(args.run)
        if not folder.is_dir():
            folder = find_run_dir(args.run)
        out = write_report(folder, args.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


def write_report(run_dir: Path, out: Path) -> Path:
    """Write the page of a run and return its path.

    Args:
        run_dir: Run folder.
        out: HTML file to write; its folder is created.

    Raises:
        FileNotFoundError: The folder or its metrics.jsonl does not exist.
        ValueError: There is nothing to report yet, or a file of the run is damaged.
    """
    content = build_page(read_run(run_dir))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content.encode())
    return out


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder; raises as `write_report`."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder")
    if not (run_dir / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{run_dir}: no metrics.jsonl in it; give the folder that training wrote (run.dir)"
        )
    rows = read_metrics(run_dir)
    train = [row for row in rows if "train/loss" in row]
    validation = [row for row in rows if "val/mse" in row]
    if not train and not validation:
        raise ValueError(
            f"{run_dir}: metrics.jsonl has no row with train/loss or val/mse; "
            "nothing was trained yet: run the report after the first step"
        )
    files = (run_dir / name for name in ("config.yaml", "ds_config.json"))
    return RunRecord(
        folder=run_dir.resolve(),
        run=read_run_json(run_dir),
        train=train,
        validation=validation,
        events=read_events(run_dir),
        marks=tuple((row["time"], int(row["step"])) for row in read_every_row(run_dir)),
        texts={f.name: f.read_text(encoding="utf-8") for f in files if f.is_file()},
        images=tuple(sorted((run_dir / "plots").glob("*.png"))),
    )


def build_page(record: RunRecord) -> str:
    """Return the whole HTML page; every text of the run is escaped."""
    body = "\n".join(
        [
            _cards(record),
            page.section("What was run", _what_was_run(record)),
            page.section("Training", _training(record)),
            page.section("Validation", _validation(record)),
            page.section("Plots of the run", _images(record.images)),
            page.section("Restarts and events", _sessions_table(record) + _events_table(record)),
            page.section("Configuration and environment", _details(record)),
        ]
    )
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return page.document(
        record.folder.name,
        status=_status_line(record),
        body=body,
        footer=f"Written {made} from {record.folder}.",
    )


def wall_time_s(record: RunRecord) -> float:
    """Return the seconds during which the run was alive; pauses before a restart do not count."""
    return sum(end - start for start, end, *_ in _sessions(record))


def _sessions(record: RunRecord) -> list[tuple[float, float, int, int, str]]:
    """Return start time, end time, first and last step and last event of every process."""
    starts = [e for e in record.events if e["event"] in ("start", "resume")]
    marks = sorted(
        [(float(e["time"]), int(e["step"]), str(e["event"])) for e in record.events]
        + [(time, step, "") for time, step in record.marks],
        key=lambda mark: mark[0],
    )
    bounds = [float(e["time"]) for e in starts] or [marks[0][0]]
    sessions = []
    for begin, until in zip(bounds, [*bounds[1:], math.inf], strict=True):
        own = [mark for mark in marks if begin <= mark[0] < until]
        steps = [step for _, step, _ in own]
        names = [name for _, _, name in own if name]
        sessions.append((begin, own[-1][0], steps[0], max(steps), names[-1] if names else ""))
    return sessions


def _mean_last(rows: Rows, name: str) -> float:
    values = plots.series(rows, name)[1][-_LAST_STEPS:]
    return float(values.mean()) if len(values) else math.nan


def _throughput(record: RunRecord) -> float:
    """Return the median cells per second; the first step, which warms up, does not count."""
    values = plots.series(record.train, "perf/cells_per_s")[1]
    values = values[1:] if len(values) > 1 else values
    return float(np.median(values)) if len(values) else math.nan


def _restart_steps(record: RunRecord) -> list[int]:
    return [int(e["step"]) for e in record.events if e["event"] == "resume"]


def _status_line(record: RunRecord) -> str:
    kind, text = _STATUS.get(str(record.run.get("status")), ("live", "Status not recorded"))
    parts = [f"step {_steps(record):,}"]
    restarts = record.run.get("restarts")
    if restarts:
        parts.append(f"{restarts} restart{'s' if restarts > 1 else ''}")
    if record.run.get("created"):
        created = str(record.run["created"]).replace("T", " ").replace("+00:00", " UTC")
        parts.append(f"created {created}")
    if record.run.get("commit"):
        commit = str(record.run["commit"])
        parts.append(commit if commit.startswith("version") else f"commit {commit[:12]}")
    return f'<span class="badge {kind}">{text}</span>{html.escape(" · ".join(parts))}'


def _steps(record: RunRecord) -> int:
    return int(max(row["step"] for row in record.train + record.validation))


def _cards(record: RunRecord) -> str:
    cards: list[tuple[str, str, str]] = []
    if record.validation:
        last = record.validation[-1]
        mse, mean = last["val/mse"], last.get("val/baseline_mse", math.nan)
        cards.append(("Validation MSE", _number(mse), _against(mse, mean)))
        if "val/pearson" in last:
            other = last.get("val/baseline_pearson", math.nan)
            sub = f"per-gene mean predictor {_number(other)}" if math.isfinite(other) else ""
            cards.append(("Validation Pearson", _number(last["val/pearson"]), sub))
    if record.train:
        seen = record.train[-1].get("cells_seen")
        sub = f"{int(seen):,} cells seen" if seen is not None else ""
        cards.append(("Optimizer steps", f"{int(record.train[-1]['step']):,}", sub))
    if math.isfinite(_throughput(record)):
        sub = f"median; {_duration(wall_time_s(record))} in all"
        cards.append(("Cells per second", _number(_throughput(record)), sub))
    blocks = (
        f'<div class="card"><b>{html.escape(name)}</b><strong>{html.escape(value)}</strong>'
        f"<span>{html.escape(sub)}</span></div>"
        for name, value, sub in cards
    )
    return f'<div class="cards">{"".join(blocks)}</div>'


def _against(mse: float, mean: float) -> str:
    if not (math.isfinite(mean) and mean > 0 and math.isfinite(mse)):
        return ""
    change = (mse - mean) / mean
    word = "lower" if change < 0 else "higher"
    return f"{abs(change):.0%} {word} than the per-gene mean ({_number(mean)})"


def _what_was_run(record: RunRecord) -> str:
    summary = record.summary
    parameters = summary.pop("parameters", None)
    summary.pop("expression_bins", None)
    named = [(_SUMMARY_NAMES[k], summary.pop(k)) for k in _SUMMARY_NAMES if k in summary]
    left = [(name, _text(value)) for name, value in named]
    left += [(key, _text(v)) for key, v in summary.items() if isinstance(v, str | int | float)]
    if isinstance(parameters, Mapping):
        total = parameters.get("total", sum(parameters.values()))
        parts = {k: v for k, v in parameters.items() if k != "total"}
        left.append(("Parameters", _text(total)))
        left += [
            (f"of which {name.replace('_', ' ')}", _text(value)) for name, value in parts.items()
        ]
    tables = [page.key_table(left), page.key_table(_results(record))]
    return f'<div class="pair">{"".join(f"<div>{t}</div>" for t in tables if t)}</div>'


def _results(record: RunRecord) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if record.train:
        _, loss = plots.series(record.train, "train/loss")
        if len(loss):
            rows.append(("Training masked MSE, first step", _number(loss[0])))
            last = f"Training masked MSE, mean of last {min(_LAST_STEPS, len(loss))} steps"
            rows.append((last, _number(_mean_last(record.train, "train/loss"))))
    if record.validation:
        first, last_row = record.validation[0], record.validation[-1]
        rows.append(("Validation masked MSE, first", _number(first["val/mse"])))
        rows.append(("Validation masked MSE, last", _number(last_row["val/mse"])))
        if "val/baseline_mse" in last_row:
            rows.append(
                ("Per-gene mean predictor, same values", _number(last_row["val/baseline_mse"]))
            )
    rows.append(("Steps", f"{_steps(record):,}"))
    for name, metric, scale, unit in (
        ("Step time, median", "perf/step_time_s", 1.0, "s"),
        ("Waiting for data, median", "perf/data_wait_s", 1000.0, "ms a step"),
    ):
        values = plots.series(record.train, metric)[1]
        if len(values):
            rows.append((name, f"{_number(float(np.median(values)) * scale)} {unit}"))
    peak = plots.series(record.train, "mem/peak_gib")[1]
    if len(peak):
        rows.append(("Memory peak", f"{_number(float(peak.max()))} GiB"))
    rows.append(("Wall time", _duration(wall_time_s(record))))
    return rows


def _training(record: RunRecord) -> str:
    if not record.train:
        return '<p class="note">No training step was logged.</p>'
    rows = record.train + record.validation
    blocks = [
        _figure(
            plots.loss_figure(rows, restarts=_restart_steps(record)),
            "Masked MSE",
            "Mean squared error of the hidden expression values. The dashed line predicts every "
            "gene's mean over the training cells: a model that learned nothing more ends there.",
        )
    ]
    small = []
    for name, title, label, smooth, text in (
        ("train/lr", "Learning rate", "learning rate", False, "As applied at each step."),
        ("train/grad_norm", "Gradient norm", "global norm", True, "Before clipping."),
        ("perf/cells_per_s", "Throughput", "cells / s", True, "All ranks together."),
        ("perf/data_wait_s", "Waiting for data", "s / step", True, "Time the step had no batch."),
    ):
        if len(plots.series(record.train, name)[1]):
            figure = plots.curve_figure(record.train, name, ylabel=label, smooth=smooth)
            small.append(_figure(figure, title, text))
    return "".join(blocks) + f'<div class="grid">{"".join(small)}</div>'


def _validation(record: RunRecord) -> str:
    if not record.validation:
        return ""
    last = record.validation[-1]
    parts = []
    if plots.bin_numbers(last):
        labels = record.summary.get("expression_bins")
        figure = plots.bin_error_figure(last, labels=labels)
        step = f"Masked MSE by expression, step {int(last['step']):,}"
        text = "Values grouped by their true size; the last validation of the run."
        parts.append(_figure(figure, step, text))
    columns = [
        ("step", "Step"),
        ("cells_seen", "Cells seen"),
        ("val/mse", "MSE"),
        ("val/baseline_mse", "MSE, per-gene mean"),
        ("val/pearson", "Pearson"),
        ("val/baseline_pearson", "Pearson, per-gene mean"),
        ("val/n_cells", "Cells"),
        ("val/n_values", "Masked values"),
    ]
    columns = [(key, name) for key, name in columns if any(key in r for r in record.validation)]
    picked = _spread(record.validation, _MAX_VALIDATION_ROWS)
    body = [[_cell(row.get(key, math.nan), key) for key, _ in columns] for row in picked]
    parts.append(page.table([name for _, name in columns], body, numeric=True))
    if len(picked) < len(record.validation):
        text = f"{len(picked)} of {len(record.validation)} validations, evenly spread."
        parts.append(f'<p class="note">{text}</p>')
    return "".join(parts)


def _images(paths: Sequence[Path]) -> str:
    figures = (
        page.image(path.read_bytes(), "image/png", path.stem.replace("_", " ").capitalize(), "")
        for path in paths
    )
    joined = "".join(figures)
    return f'<div class="grid">{joined}</div>' if joined else ""


def _sessions_table(record: RunRecord) -> str:
    body = [
        [str(n), _clock(begin), _clock(end), _duration(end - begin), f"{a:,}", f"{b:,}", last]
        for n, (begin, end, a, b, last) in enumerate(_sessions(record), start=1)
    ]
    head = ["Process", "Started", "Last sign", "Duration", "First step", "Last step", "Last event"]
    return page.table(head, body)


def _events_table(record: RunRecord) -> str:
    if not record.events:
        return ""
    shown = record.events[-_MAX_EVENTS:]
    body = []
    for event in shown:
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "step")}
        text = ", ".join(f"{k}: {_text(v)}" for k, v in rest.items())
        body.append([_clock(float(event["time"])), f"{event['step']:,}", event["event"], text])
    count = f"{len(record.events):,} events"
    if len(shown) < len(record.events):
        count = f"Last {len(shown)} of {count}"
    table = page.table(["Time", "Step", "Event", "Details"], body)
    return f"<br><details><summary>{count}</summary>{table}</details>"


def _details(record: RunRecord) -> str:
    names = {
        "config.yaml": "Resolved configuration (config.yaml)",
        "ds_config.json": "Resolved DeepSpeed configuration (ds_config.json)",
    }
    blocks = [
        f"<details><summary>{names[name]}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in record.texts.items()
    ]
    environment = record.run.get("environment") or {}
    keys = ("run_id", "mlflow_run_id", "mlflow_tracking_uri", "slurm_job_id", "commit")
    ids = [(key, str(record.run[key])) for key in keys if record.run.get(key)]
    table = page.key_table(ids + [(k, str(v)) for k, v in environment.items()])
    if table:
        blocks.append(f"<details open><summary>Environment and ids</summary>{table}</details>")
    return "".join(blocks)


def _figure(figure: Figure, title: str, text: str) -> str:
    return page.image(plots.svg_bytes(figure), "image/svg+xml", title, text)


def _spread(rows: Rows, count: int) -> Rows:
    """Return at most `count` rows, evenly spread, the first and the last among them."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]


def _text(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _number(value) if is_number else str(value)  # type: ignore[arg-type]


def _number(value: float) -> str:
    """Return a count with separators, any other number with four significant digits."""
    if not math.isfinite(value):
        return "not recorded"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _cell(value: float, key: str) -> str:
    """Return a validation number: errors and correlations with as many digits down a column."""
    scored = key.endswith(("mse", "pearson"))
    return f"{value:.4f}" if scored and math.isfinite(value) else _number(value)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def _clock(timestamp: float) -> str:
    return datetime.datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
