"""The files a run writes about itself; everything else about a run is derived from them.

`sclong_ds.tracking.tracker` writes them during training (rank 0), `sclong_ds.report.report` and
tests read them: `run.json` (ids, starts, status, environment), `metrics.jsonl` (one JSON object per
logged row), `events.jsonl` (start, resume, signal, checkpoint, ...) and `system/NODE.jsonl`
(samples of a node). The .jsonl files only ever grow; their rows and run.json carry checksums, and
what is damaged in them is left out, with a line in the log, so that it never stops a run or a
reader. `plots/step_N` holds the pictures of the validation at a step.

JSON has no NaN: in metrics.jsonl it is `null`, an infinite number is `1e999` or `-1e999`, which
readers of JSON take for infinity, and a `non_finite` event names them (nan, inf, -inf). A resumed
run goes back to its checkpoint: `read_metrics` leaves out what an earlier start wrote beyond it.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from sclong_ds.files.json_lines import Lines, each_row, plain
from sclong_ds.files.sealed_json import CHECKSUM, read_object, read_sealed, write_sealed
from sclong_ds.run_folder.credentials import without_credentials

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
RUN_FILE = "run.json"
SYSTEM_DIR = "system"
PLOTS_DIR = "plots"
SEAL = "seal"
"""Key of run.json, see `sclong_ds.run_folder.seal`."""
REPORT_FILE = "report.html"

log = logging.getLogger(__name__)

_run_file_lock = threading.Lock()


class RunFolder:
    """The append-only files of a run; opening repairs a last line that a kill cut short."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._metrics = Lines(path / METRICS_FILE)
        self._events = Lines(path / EVENTS_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row of metrics.jsonl and hand it to the operating system.

        Args:
            step: Optimizer step of the row.
            metrics: Name to value. NaN becomes null, an infinite number 1e999 or -1e999; either
                makes a `non_finite` event too.
        """
        row: dict[str, object] = {"step": int(step)}
        odd: dict[str, str] = {}
        for name, value in metrics.items():
            number = value if isinstance(value, int) else float(value)
            row[name] = None if math.isnan(number) else number
            if not math.isfinite(number):
                odd[name] = str(number)
        self._metrics.append(row | {"time": time.time()})
        if odd:
            self.append_event("non_finite", step=step, values=odd)

    def append_event(self, name: str, *, step: int, **fields: object) -> None:
        """Write one row of events.jsonl: time, event name, step and any further fields."""
        shown = {key: plain(value) for key, value in fields.items()}
        self._events.append({"time": time.time(), "event": name, "step": int(step), **shown})

    def close(self) -> None:
        """Close both files; closing twice is allowed."""
        self._metrics.close()
        self._events.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of events.jsonl in the order written; an absent file is an empty list.

    Damaged lines are left out.
    """
    path = run_dir / EVENTS_FILE
    rows = each_row(path) if path.exists() else ()
    return [row for row in rows if isinstance(row.get("event"), str)]


def read_run_json(run_dir: Path) -> dict[str, Any]:
    """Return run.json; an absent file is an empty dict.

    Of a damaged one, what the newest checkpoint says about the run is all that is left.
    """
    try:
        return _sound_run_json(run_dir / RUN_FILE)
    except ValueError as error:
        log.warning("%s; ignored, the run is identified by its newest checkpoint", error)
        return _ids_of_newest_checkpoint(run_dir)


def _sound_run_json(path: Path) -> dict[str, Any]:
    """Return run.json without its checksum, which earlier versions did not write.

    Raises:
        ValueError: It is damaged, or the run's checkpoints are all of another run.
    """
    try:
        content = read_object(path)
    except FileNotFoundError:
        return {}
    if CHECKSUM in content:
        content = read_sealed(path)
        del content[CHECKSUM]
    elif "run_id" not in content or SEAL in content:
        raise ValueError(f"{path}: damaged (holds neither a checksum nor what one without has)")
    own = content.get("run_id")
    others = []
    for ids in _ids_of_checkpoints(path.parent):
        if ids["run_id"] == own:
            return content
        others.append(ids["run_id"])
    if own and others:
        raise ValueError(f"{path}: of another run ({own}; the checkpoints are of {others[0]})")
    return content


def _ids_of_checkpoints(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield what the run.json in each checkpoint says, the newest first, where it has an id."""
    for path in sorted((run_dir / "checkpoints").glob(f"step_*/{RUN_FILE}"), reverse=True):
        if path.parent.name.removeprefix("step_").isdecimal():
            ids = recorded_ids(path.parent)
            if "run_id" in ids:
                yield ids


def _ids_of_newest_checkpoint(run_dir: Path) -> dict[str, Any]:
    return next(_ids_of_checkpoints(run_dir), {})


def update_run_json(run_dir: Path, **fields: object) -> dict[str, Any]:
    """Merge fields into run.json (created if absent), atomically, and return the whole.

    A damaged one is set aside as run.json.damaged.
    """
    path = run_dir / RUN_FILE
    # The sender's thread saves its offset here while training adds its own fields.
    with _run_file_lock:
        try:
            before = _sound_run_json(path)
        except ValueError as error:
            aside = path.with_name(f"{RUN_FILE}.damaged")
            log.error("%s; set aside as %s", error, aside.name)
            path.replace(aside)
            before = _ids_of_newest_checkpoint(run_dir)
        merged = before | fields
        write_sealed(path, json.loads(json.dumps(plain(merged), allow_nan=False)))
    return merged


def picture_steps(run_dir: Path) -> dict[int, Path]:
    """Return the folders of pictures of a run by the step of the validation, in order."""
    folders = (run_dir / PLOTS_DIR).glob("step_*")
    found = {
        int(f.name.removeprefix("step_")): f
        for f in folders
        if re.fullmatch(r"step_[0-9]+", f.name) and f.is_dir()
    }
    return dict(sorted(found.items()))


def recorded_ids(folder: Path) -> dict[str, Any]:
    """Return what says which run a folder with a run.json belongs to: its ids, where MLflow is."""
    saved = read_run_json(folder)
    names = ("run_id", "mlflow_run_id", "mlflow_tracking_uri", "created")
    return {name: without_credentials(saved[name]) for name in names if saved.get(name)}


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a node, system/NODE.jsonl; damaged lines are left out.

    Args:
        path: The file.
    """
    return list(each_row(path, numbers=True))
