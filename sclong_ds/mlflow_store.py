"""The MLflow side of a run: one run for its whole life, fed from the files of the run folder.

`sclong_ds.tracking` calls a `Sender` on a background thread; nothing here is run by hand. What
MLflow gets lies on disk first, and what it has got is written down in run.json, so that any outage
loses nothing and doubles nothing:

    metrics.jsonl, system/NODE.jsonl   rows, in order, from the byte offsets of `mlflow_synced` on
    plots/step_N/*.png                 after step `mlflow_pictures`, as artifacts of that name
    report.html                        whenever it is new

A row keeps its own time stamp: a batch that is sent twice (killed between sending and saving the
offset) lands on the same rows of MLflow's SQL store. mlflow is imported late: it takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    from mlflow.entities import DatasetInput, Metric, Run
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "KILLED", "FAILED"]

# Limits of MLflow's REST API: https://mlflow.org/docs/latest/rest-api.html#request-limits
MAX_METRICS = 1000
_LEAST_METRICS = 100  # a batch for a server that is slow
_MAX_PARAMS, _MAX_PARAM_CHARS, _MAX_TAG_CHARS, _MAX_DIGEST_CHARS = 100, 6000, 5000, 36
# A flush sends rows for so long: pictures and files come after them, and the end of a run waits for
# it. A long backlog is worked off over several flushes.
_FLUSH_S = 10.0
_QUICK_S = 2.0  # after a batch that took less, a larger one is tried


def tracking_uri(configured: str | None, run_dir: Path, *, recorded: str | None = None) -> str:
    """Return the tracking store: as configured, else MLFLOW_TRACKING_URI, else mlflow.db.

    Args:
        configured: `config.tracking.uri`.
        run_dir: Run folder; mlflow.db lies beside it.
        recorded: Store that the run was tracked in, before mlflow.db.
    """
    beside = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or recorded or beside


def with_credentials(uri: str) -> str:
    """Return MLFLOW_TRACKING_URI where that is the same store, else the URI itself."""
    found = os.environ.get("MLFLOW_TRACKING_URI", "")
    return found if without_credentials(found) == without_credentials(uri) else uri


def find_run_dir(run_id: str, *, uri: str | None = None, patient: bool = False) -> Path:
    """Return the run folder of a run by its MLflow id or by the run_id of its run.json.

    Args:
        run_id: Either id.
        uri: Tracking store; None: MLFLOW_TRACKING_URI, else runs/mlflow.db below the working
            directory.
        patient: As `new_client`.

    Raises:
        FileNotFoundError: No such store, or the run's folder is not on this machine.
        ValueError: The store cannot be read or does not know the run.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    file = sqlite_file(uri)
    if file is not None and not file.is_file():  # opening would create it
        raise FileNotFoundError(
            f"{run_id}: no such run folder, and no tracking store {file} to look the id up in; "
            "give the folder, or set MLFLOW_TRACKING_URI"
        )
    client, shown = new_client(uri, patient=patient), without_credentials(uri)
    from mlflow.exceptions import MlflowException

    try:
        experiments = [e.experiment_id for e in client.search_experiments()]
        quoted = run_id.replace("'", "")
        query = f"attributes.run_id = '{quoted}'", f"tags.run_id = '{quoted}'"
        runs = [run for q in query for run in client.search_runs(experiments, q, max_results=1)]
    except (MlflowException, OSError) as error:
        raise ValueError(f"tracking store {shown}: {one_line(error)}") from None
    if not runs:
        raise ValueError(f"{run_id}: neither a run folder nor a run of the tracking store {shown}")
    folder = Path(runs[0].data.tags.get("run_dir", ""))
    if not folder.is_dir():
        raise FileNotFoundError(f"run {run_id}: its folder {folder} is not on this machine")
    return folder


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The corpus of a run, for the dataset column of MLflow."""

    name: str
    """Its name for people."""
    hash: str
    """Content hash."""
    url: str
    """Where it is."""
    cells: Mapping[str, int]
    """Cells by split (training, validation)."""
    profile: Mapping[str, int]
    """Further counts, for instance of genes."""

    def inputs(self) -> list[DatasetInput]:
        """Return an MLflow dataset input for every split."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        kind = self.url.partition("://")[0] if "://" in self.url else "local"
        return [
            DatasetInput(
                Entity(
                    name=f"{self.name} ({split})",
                    digest=self.hash[:_MAX_DIGEST_CHARS],
                    source_type=kind[:_MAX_DIGEST_CHARS],
                    source=json.dumps({"uri": self.url}),
                    profile=json.dumps({"num_rows": n_cells, **self.profile}),
                ),
                tags=[InputTag("mlflow.data.context", split)],
            )
            for split, n_cells in self.cells.items()
        ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What MLflow is told about a run when it is opened."""

    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    note: str
    """Markdown that the page of a new run begins with."""
    dataset: Dataset | None


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
        run = self._find(saved, experiment_id)
        same = run is not None and run.info.run_id == saved.get("mlflow_run_id")
        if run is None:
            tags = {**self.description.tags, "mlflow.note.content": self.description.note}
            run = self._connected.create_run(
                experiment_id,
                run_name=self.description.run_name,
                tags={k: clip(v, _MAX_TAG_CHARS) for k, v in tags.items()},
            )
        self._describe(run)
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
        )
        self.mlflow_run_id = run.info.run_id

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
                if run.info.lifecycle_stage == "active":
                    return run
        query = f"tags.run_id = '{saved['run_id']}'"
        found = self._connected.search_runs([experiment_id], query, max_results=1)
        return found[0] if found else None

    def _describe(self, run: Run) -> None:
        """Set the tags and the parameters that are missing; MLflow cannot change a parameter."""
        from mlflow.entities import Param, RunTag

        run_id, known = run.info.run_id, run.data.params
        texts = {k: without_credentials(v) for k, v in self.description.params.items()}
        params = {k: clip(v, _MAX_PARAM_CHARS) for k, v in texts.items()}
        changed = sorted(k for k, v in params.items() if known.get(k, v) != v)
        tags = dict(self.description.tags)
        if changed:
            tags["changed_params"] = ", ".join(changed)
        new = [Param(k, v) for k, v in params.items() if k not in known]
        self._connected.update_run(run_id, status="RUNNING")
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


def new_client(uri: str, *, patient: bool = False) -> MlflowClient:
    """Import mlflow, quietly, and return a client.

    Args:
        uri: Tracking store.
        patient: Whether its calls may take minutes; for commands that send much and are waited for.
    """
    if not patient:
        # MLflow's defaults (120 s, 7 retries with back-off) would hold up the end of a run.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    # Usage statistics would leave the machine, and compute nodes often have no way out.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A line per migration of a new sqlite file; a line per request while a server is down.
    for name in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # mlflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates; nothing a user can act on.
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an sqlite store; None for any other store."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def clip(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    text = without_credentials(" ".join(str(error).split()))
    return clip(f"{type(error).__name__}: {text}", 300)


def _row_metrics(row: Mapping[str, float | None]) -> list[Metric]:
    from mlflow.entities import Metric

    step, stamp = row["step"], row["time"]
    assert step is not None
    assert stamp is not None
    make = functools.partial(Metric, timestamp=round(stamp * 1000), step=int(step))
    named = ((k, v) for k, v in row.items() if k not in ("step", "time"))
    return [make(key=k, value=math.nan if v is None else float(v)) for k, v in named]
