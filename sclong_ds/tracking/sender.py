"""The MLflow side of a run: one run for all its starts, fed from the files of the run folder.

`sclong_ds.tracking.tracker` calls a `Sender` on a background thread; nothing here is run by hand.
What MLflow gets lies on disk first, and what it has got is written down in run.json, so that any
outage loses nothing and doubles nothing:

    metrics.jsonl, system/NODE.jsonl   rows, in order, from the byte offsets of `mlflow_synced` on
    plots/step_N/*.png                 after step `mlflow_pictures`, as artifacts of that name
    report.html                        whenever it is new

A row keeps its own time stamp: a batch that is sent twice (killed between sending and saving the
offset) lands on the same rows of MLflow's SQL store. mlflow is imported late: it takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclong_ds.files.json_lines import is_number, parse_line
from sclong_ds.run_folder.credentials import without_credentials
from sclong_ds.run_folder.files import (
    METRICS_FILE,
    PLOTS_DIR,
    REPORT_FILE,
    SYSTEM_DIR,
    picture_steps,
    read_run_json,
    update_run_json,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

from sclong_ds.tracking.check import deleted
from sclong_ds.tracking.client import (
    _MAX_PARAM_CHARS,
    _MAX_PARAMS,
    _MAX_TAG_CHARS,
    MAX_METRICS,
    Status,
    clip,
    new_client,
    one_line,
    sqlite_file,
)
from sclong_ds.tracking.description import Description
from sclong_ds.tracking.parent import PARENT_TAG, end_parent, parent_of

_LEAST_METRICS = 100  # a batch for a server that is slow
# A flush sends rows for so long: pictures and files come after them, and the end of a run waits for
# it. A long backlog is worked off over several flushes.
_FLUSH_S = 10.0
_QUICK_S = 2.0  # after a batch that took less, a larger one is tried


@dataclasses.dataclass(kw_only=True, eq=False)
class Sender:
    """Sends what a run folder holds. Its methods run on the tracker's one background thread."""

    run_dir: Path
    uri: str
    description: Description
    patient: bool = False
    """As `new_client`."""
    mlflow_run_id: str | None = None
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    complete: bool = False
    """Whether MLflow has all of a run that has ended."""
    _client: MlflowClient | None = None
    _synced: dict[str, int] = dataclasses.field(default_factory=dict)
    _batch_size: int = MAX_METRICS
    _page_sent: int = 0
    _parent: str | None = None
    _uploads: list[tuple[Path, str | None]] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def queue(self, uploads: Iterable[tuple[Path, str | None]]) -> None:
        """Add files with their artifact folders; one that already waits is kept once."""
        with self._lock:
            self._uploads += [u for u in uploads if u not in self._uploads]

    @property
    def shown_uri(self) -> str:
        """Tracking store, as it may be shown and stored."""
        return without_credentials(self.uri)

    def left(self) -> list[str]:
        """Return what of a run that has ended MLflow does not have, in words."""
        if self.complete:
            return []
        n_bytes = sum(f.stat().st_size - self._synced.get(n, 0) for n, f in self._row_files())
        done = read_run_json(self.run_dir).get("mlflow_pictures", -1)
        n_pictures = sum(step > done for step in picture_steps(self.run_dir))
        counts = {
            "bytes of metrics": n_bytes,
            "validations' pictures": n_pictures,
            "files": len(self._uploads),
        }
        return [f"{count:,} {name}" for name, count in counts.items() if count] + ["how it ended"]

    def send(self, *, rows_s: float = _FLUSH_S) -> None:
        """Open the run if need be, then send new rows, pictures and waiting files.

        Args:
            rows_s: Seconds after which rows are left to the next time.
        """
        if self.mlflow_run_id is None:
            self._open()
        deadline = time.monotonic() + rows_s
        for name, file in self._row_files():
            self._send_rows(name, file, deadline)
        self._send_pictures()
        while self._uploads and not self.stop.is_set():
            self._send_file()

    def close(self, status: Status) -> None:
        """Send everything that is left and end the run, even if a file cannot be sent."""
        try:
            self.send(rows_s=math.inf)
        finally:
            if self.mlflow_run_id is not None:
                self._connected.set_terminated(self.mlflow_run_id, status)
                if self._parent is not None:
                    end_parent(self._connected, self._parent, self.description.tags[PARENT_TAG])
        self.complete = not self.stop.is_set()

    def _row_files(self) -> list[tuple[str, Path]]:
        """Return names and paths of the files of rows: metrics, then what is furthest behind."""
        nodes = (self.run_dir / SYSTEM_DIR).glob("*.jsonl")
        named = [(str(file.relative_to(self.run_dir)), file) for file in nodes]
        named.sort(key=lambda item: (self._synced.get(item[0], 0), item[0]))
        return [(METRICS_FILE, self.run_dir / METRICS_FILE), *named]

    @property
    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = new_client(self.uri, patient=self.patient)
        return self._client

    def _open(self) -> None:
        """Find the run of this folder or create it, and describe it."""
        saved = read_run_json(self.run_dir)
        experiment_id = self._experiment_id()
        if PARENT_TAG in self.description.tags:
            named = self.description.tags[PARENT_TAG]
            self._parent = parent_of(self._connected, experiment_id, named)
        run = self._find(saved, experiment_id)
        same = run is not None and run.info.run_id == saved.get("mlflow_run_id")
        if run is None:
            tags = {**self._tags(), "mlflow.note.content": self.description.note}
            run = self._connected.create_run(
                experiment_id,
                run_name=self.description.run_name,
                tags={k: clip(v, _MAX_TAG_CHARS) for k, v in tags.items()},
            )
        self._describe(run, sent=saved if same else {})
        # A new run, or the same run in another store, gets the whole history.
        synced = saved.get("mlflow_synced", {}) if same else {}
        for name, offset in synced.items():
            file = self.run_dir / name
            whole = file.is_file() and offset <= file.stat().st_size
            self._synced[name] = int(offset) if whole else 0
        update_run_json(
            self.run_dir,
            mlflow_run_id=run.info.run_id,
            mlflow_tracking_uri=self.shown_uri,
            mlflow_synced=self._synced,
            mlflow_pictures=saved.get("mlflow_pictures", -1) if same else -1,
            mlflow_run_name=self._run_name,
        )
        self.mlflow_run_id = run.info.run_id

    def _tags(self) -> dict[str, str]:
        """Return the description's tags, with the parent's id for what names it."""
        tags = {k: v for k, v in self.description.tags.items() if k != PARENT_TAG}
        return tags if self._parent is None else {**tags, PARENT_TAG: self._parent}

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.description.experiment
        found = self._connected.get_experiment_by_name(name)
        if found is None:
            file = sqlite_file(self.uri)
            location = (file.parent / "mlartifacts").as_uri() if file else None
            try:
                # MLflow's page then opens with what belongs to training.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return self._connected.create_experiment(name, location, tags=kind)
            except MlflowException:  # another job may have created it in between
                found = self._connected.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise deleted(name, found.experiment_id)
        return found.experiment_id

    def _find(self, saved: Mapping[str, Any], experiment_id: str) -> Run | None:
        """Return this folder's run by the saved id, else by tag (killed before saving it)."""
        from mlflow.exceptions import MlflowException

        store = without_credentials(saved.get("mlflow_tracking_uri") or "")
        if saved.get("mlflow_run_id") and store == self.shown_uri:
            try:
                run = self._connected.get_run(saved["mlflow_run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                # By the setting: the experiment itself may have been renamed in MLflow.
                name = self.description.experiment
                same = run.data.params.get("tracking.experiment", name) == name
                if run.info.lifecycle_stage == "active" and same:
                    return run
        query = f"tags.run_id = '{saved['run_id']}'"
        found = self._connected.search_runs([experiment_id], query, max_results=1)
        return found[0] if found else None

    @property
    def _run_name(self) -> str | None:
        """The setting tracking.run_name, as text."""
        return self.description.params.get("tracking.run_name")

    def _describe(self, run: Run, *, sent: Mapping[str, Any]) -> None:
        """Set the tags and the parameters that are missing; MLflow cannot change a parameter.

        Args:
            run: MLflow's run.
            sent: The run.json of when it was last opened, or nothing.
        """
        from mlflow.entities import Param, RunTag

        run_id, known = run.info.run_id, run.data.params
        texts = {k: without_credentials(v) for k, v in self.description.params.items()}
        params = {k: clip(v, _MAX_PARAM_CHARS) for k, v in texts.items()}
        changed = sorted(k for k, v in params.items() if known.get(k, v) != v)
        tags = self._tags()
        if changed:
            tags["changed_params"] = ", ".join(changed)
        new = [Param(k, v) for k, v in params.items() if k not in known]
        # Not where the setting is what was sent last: the run may have been renamed in MLflow.
        first = known.get("tracking.run_name", self._run_name)
        renamed = sent.get("mlflow_run_name", first) != self._run_name
        name = self.description.run_name if renamed else None
        self._connected.update_run(run_id, status="RUNNING", name=name)
        self._connected.log_batch(
            run_id, tags=[RunTag(k, clip(str(v), _MAX_TAG_CHARS)) for k, v in tags.items()]
        )
        for start in range(0, len(new), _MAX_PARAMS):
            self._connected.log_batch(run_id, params=new[start : start + _MAX_PARAMS])
        if self.description.dataset is not None:
            self._connected.log_inputs(run_id, datasets=self.description.dataset.inputs())

    def _send_file(self) -> None:
        with self._lock:  # taken off first: training may queue a newer version meanwhile
            path, folder = self._uploads.pop(0)
        sent = False
        try:
            self._connected.log_artifact(self.mlflow_run_id, str(path), folder)
            sent = True
        finally:
            if not sent and path.is_file():
                self.queue([(path, folder)])

    def _send_pictures(self) -> None:
        """Send the pictures of validations that MLflow has not got, in order, and the newest page.

        The same picture twice is the same file: an attempt that was cut short is made again.
        """
        assert self.mlflow_run_id is not None
        done = int(read_run_json(self.run_dir).get("mlflow_pictures", -1))
        for step, folder in picture_steps(self.run_dir).items():
            if step > done and not self.stop.is_set():
                self._connected.log_artifacts(
                    self.mlflow_run_id, str(folder), f"{PLOTS_DIR}/{folder.name}"
                )
                update_run_json(self.run_dir, mlflow_pictures=step)
        page = self.run_dir / REPORT_FILE
        written = page.stat().st_mtime_ns if page.is_file() else 0
        if written != self._page_sent and not self.stop.is_set():
            self._connected.log_artifact(self.mlflow_run_id, str(page))
            self._page_sent = written

    def _send_rows(self, name: str, path: Path, deadline: float) -> None:
        """Send complete lines after the offset, in order, whole rows per request."""
        batch: list[Metric] = []
        if time.monotonic() > deadline or self.stop.is_set():
            return
        with path.open("rb") as file:
            end = self._synced.get(name, 0)
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                read, _ = parse_line(line)
                sound = read is not None and all(map(is_number, read.values()))
                row = _row_metrics(read) if read is not None and sound else []
                if batch and len(batch) + len(row) > self._batch_size:
                    self._send_batch(batch, name, end)
                    batch = []
                    if time.monotonic() > deadline or self.stop.is_set():
                        return
                batch += row
                end += len(line)
        if batch:
            self._send_batch(batch, name, end)

    def _send_batch(self, batch: list[Metric], name: str, end: int) -> None:
        assert self.mlflow_run_id is not None
        from mlflow.exceptions import MlflowException

        began = time.monotonic()
        try:
            self._connected.log_batch(self.mlflow_run_id, metrics=batch)
        except (MlflowException, OSError) as error:
            if re.search("timed ?out|timeout", str(error), re.IGNORECASE):
                # What a slow server cannot take in time it would be sent again for ever.
                self._batch_size = max(self._batch_size // 2, _LEAST_METRICS)
            raise
        if time.monotonic() - began < _QUICK_S:
            self._batch_size = min(2 * self._batch_size, MAX_METRICS)
        self._synced[name] = end
        update_run_json(self.run_dir, mlflow_synced=self._synced)


def send_all(sender: Sender, status: Status) -> None:
    """Send everything that is left of a run and end it; what arrived stays there if that fails.

    Raises:
        ValueError: MLflow refuses or cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    try:
        sender.close(status)
    except (MlflowException, OSError) as error:
        left = ", ".join(sender.left())
        raise ValueError(
            f"MLflow at {sender.shown_uri}: {one_line(error)}; it lacks {left}"
        ) from None


def _row_metrics(row: Mapping[str, float | None]) -> list[Metric]:
    from mlflow.entities import Metric

    step, stamp = row["step"], row["time"]
    assert step is not None
    assert stamp is not None
    make = functools.partial(Metric, timestamp=round(stamp * 1000), step=int(step))
    named = ((k, v) for k, v in row.items() if k not in ("step", "time"))
    return [make(key=k, value=math.nan if v is None else float(v)) for k, v in named]
