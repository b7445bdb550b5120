"""The files a run writes about itself; everything else about a run is derived from them.

`sclong_ds.tracking` writes them during training (rank 0), `sclong_ds.report` and tests read them:
`run.json` (ids, starts, status, environment), `metrics.jsonl` (one JSON object per logged row),
`events.jsonl` (start, resume, signal, checkpoint, ...) and `system/NODE.jsonl` (samples of a node).
The .jsonl files only ever grow; their rows and run.json carry checksums, and what is damaged in
them is left out, with a line in the log, so that it never stops a run or a reader. `plots/step_N`
holds the pictures of the validation at a step.

JSON has no NaN: a non-finite metric is `null` in metrics.jsonl, with a `non_finite` event that says
which of nan, inf, -inf it was; `read_metrics` gives NaN for it. A resumed run goes back to its
checkpoint: `read_metrics` leaves out what an earlier life wrote beyond it.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
import threading
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sclong_ds.files.json_lines import Lines, each_row, plain
from sclong_ds.files.sealed_json import CHECKSUM, read_object, read_sealed, write_sealed

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
RUN_FILE = "run.json"
SYSTEM_DIR = "system"
PLOTS_DIR = "plots"
REPORT_FILE = "report.html"
SPIKE_METRIC = "train/spike"
"""Column of metrics.jsonl: 1 where the loss of the step was a spike, else 0."""

log = logging.getLogger(__name__)

# What decides the numbers of a run, as recorded in run.json.
_PACKAGES = (
    "sclong_ds", "torch", "deepspeed", "triton", "torch-geometric", "numpy", "zarr", "anndata",
    "mlflow",
)  # fmt: skip
# USER:PASSWORD@ of a URI; SQLAlchemy takes a password with a slash in it, too.
_CREDENTIALS = re.compile(r"""(?<=://)(?:[^/\s"']*@|[^:/\s"'@]+:[^\s"'@]*@)""")
_WHOLE = frozenset({"step", "cells_seen"})  # columns of integers, exact in a float up to 2**53
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row of metrics.jsonl and hand it to the operating system.

        Args:
            step: Optimizer step of the row.
            metrics: Name to value; non-finite values become null plus a `non_finite` event.
        """
        row: dict[str, object] = {"step": int(step)}
        odd: dict[str, str] = {}
        for name, value in metrics.items():
            number = value if isinstance(value, int) else float(value)
            row[name] = number if math.isfinite(number) else None
            if row[name] is None:
                odd[name] = str(number)
        self._metrics.append(row | {"time": time.time()})
        if odd:
            self.append_event("non_finite", step=step, values=odd)

    def append_event(self, name: str, *, step: int, **fields: object) -> None:
        """Write one row of events.jsonl: time, event name, step and any further fields."""
        self._events.append({"time": time.time(), "event": name, "step": int(step), **fields})

    def close(self) -> None:
        """Close both files; closing twice is allowed."""
        self._metrics.close()
        self._events.close()


class Row(Mapping[str, float]):
    """A row of numbers that takes 8 bytes a number: runs have millions of rows.

    Args:
        names: Names of the numbers; rows with the same names share them.
        numbers: As many numbers.
    """

    __slots__ = ("_at", "_numbers")

    def __init__(self, names: tuple[str, ...], numbers: Iterable[float]) -> None:
        self._at, self._numbers = _positions(names), array("d", numbers)

    def __getitem__(self, name: str) -> float:
        """Return a number."""
        number = self._numbers[self._at[name]]
        return int(number) if name in _WHOLE else number

    def __setitem__(self, name: str, number: float) -> None:
        """Add a number."""
        assert name not in self._at, name
        self._at = _positions((*self._at, name))
        self._numbers.append(number)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a number of a name."""
        return name in self._at

    def __iter__(self) -> Iterator[str]:
        """Go over the names."""
        return iter(self._at)

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return len(self._at)


@functools.cache
def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


def read_metrics(run_dir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl that lead to the last one, by step.

    A row that goes back to an earlier step ends what was written of that step and later ones.

    Args:
        run_dir: Run folder.

    Returns:
        Rows sorted by step, a training row before the validation row of its step. A validation
        row is one with a `val/` metric; null values are NaN. Damaged lines are left out.

    Raises:
        FileNotFoundError: No metrics.jsonl in the folder.
    """
    return latest(read_every_row(run_dir))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return those of all rows ever written that lead to the last one."""
    kept: list[Row] = []
    for row in rows:
        while kept and _place(kept[-1]) >= _place(row):
            kept.pop()
        kept.append(row)
    return kept


def _place(row: Mapping[str, float]) -> tuple[float, bool]:
    """Return where a row belongs: by step, the training row of a step first."""
    return row["step"], "val/mse" in row or any(name.startswith("val/") for name in row)


def read_every_row(run_dir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl as written, repeated steps too; raises as `read_metrics`."""
    return [
        Row(tuple(row), (math.nan if v is None else v for v in row.values()))
        for row in each_row(run_dir / METRICS_FILE, numbers=True)
    ]


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
    """Return run.json without its checksum, which earlier versions did not write."""
    try:
        content = read_object(path)
    except FileNotFoundError:
        return {}
    if CHECKSUM in content:
        content = read_sealed(path)
        del content[CHECKSUM]
    return content


def _ids_of_newest_checkpoint(run_dir: Path) -> dict[str, Any]:
    copies = sorted((run_dir / "checkpoints").glob(f"step_*/{RUN_FILE}"), reverse=True)
    return recorded_ids(copies[0].parent) if copies else {}


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


def without_credentials(text: str) -> str:
    """Return a URI, or a text with URIs in it, without their users and passwords."""
    return _CREDENTIALS.sub("", text)


def take_over_ids(run_dir: Path, checkpoint: Path) -> None:
    """Stay the run that a checkpoint belongs to when the run folder has lost its run.json."""
    if not (run_dir / RUN_FILE).exists() and (checkpoint / RUN_FILE).exists():
        update_run_json(run_dir, **recorded_ids(checkpoint))


def record_start(
    run_dir: Path, *, resumed: bool, step: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Write into run.json who runs, on what, and how often the run was restarted; return it.

    Args:
        run_dir: Run folder; `run_id` and `created` of an existing run.json are kept.
        resumed: Whether training continues from a checkpoint; adds one to `restarts`.
        step: Step that this start goes on from.
        world_size: Number of ranks.
    """
    old, job = read_run_json(run_dir), os.environ.get("SLURM_JOB_ID")
    if "mlflow_pictures" in old:  # those of later steps are drawn, and sent, again
        update_run_json(run_dir, mlflow_pictures=min(old["mlflow_pictures"], step))
    start = {
        "time": now(),
        "step": step,
        "world_size": world_size,
        "host": platform.node(),
        "slurm_job_id": job,
    }
    return update_run_json(
        run_dir,
        run_id=old.get("run_id") or uuid.uuid4().hex,
        mlflow_run_id=old.get("mlflow_run_id"),
        mlflow_tracking_uri=old.get("mlflow_tracking_uri"),
        slurm_job_id=job,
        starts=[*old.get("starts", []), start],
        commit=git_commit(),
        created=old.get("created") or now(),
        restarts=int(old.get("restarts", 0)) + int(resumed),
        status="RUNNING",
        ended=None,
        environment=environment(),
    )


def git_commit() -> str:
    """Return the commit of this checkout (`-dirty` if edited), or the version if it is none."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            return done.stdout.strip()
    return f"version {_version('sclong_ds') or 'unknown'}"


def environment() -> dict[str, str]:
    """Return host, platform, Python and the versions of the packages that shape a run."""
    found = {name: _version(name) for name in _PACKAGES}
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": str(os.cpu_count()),
        **{name: version for name, version in found.items() if version},
    }


def installed_packages() -> str:
    """Return `name==version` lines of everything that is installed, sorted."""
    found = {
        f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions() if d.name
    }
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def node_name() -> str:
    """Return this node's name: Slurm's, where it has one, for several may be one host."""
    return os.environ.get("SLURMD_NODENAME") or platform.node() or "node"


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a node, system/NODE.jsonl; damaged lines are left out.

    Args:
        path: The file.
    """
    return list(each_row(path, numbers=True))
