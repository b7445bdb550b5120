"""What a training run records, on rank 0 only: the run folder first, MLflow second.

`Tracker` is driven by `sclong_ds.pretrain`; nothing here is run by hand. It writes the files of
`sclong_ds.run_folder` and `plots/*.png`, and sends the same to one MLflow run that keeps its id
over restarts. `config.tracking` says where; `enabled: false` leaves MLflow out.

`metrics.jsonl` is the truth and the queue: MLflow receives it, in order, on a background thread,
from the byte offset `mlflow_synced_bytes` of run.json on. A tracking server that is slow, down, or
comes back a week later therefore costs training nothing and loses nothing. A row keeps its own time
stamp, so a batch sent twice (killed between sending and saving the offset) lands on the same rows
of MLflow's SQL store. This is the only module that imports mlflow, late: the import takes seconds.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sclong_ds.config import RunConfig
from sclong_ds.files import write_atomic
from sclong_ds.run_folder import (
    EVENTS_FILE,
    METRICS_FILE,
    RUN_FILE,
    RunFolder,
    now,
    read_run_json,
    record_start,
    update_run_json,
)
from sclong_ds.strict_yaml import to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

Status = Literal["FINISHED", "KILLED", "FAILED"]

log = logging.getLogger(__name__)

# Limits of MLflow's REST API: https://mlflow.org/docs/latest/rest-api.html#request-limits
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS, _MAX_TAG_CHARS = 1000, 100, 6000, 5000
# One flush sends at most this many requests: a long backlog is worked off over several flushes.
_MAX_BATCHES_PER_FLUSH = 20
_RETRY_AFTER_S = 30.0
_START_WAIT_S = 60.0  # the first use of an sqlite file creates its tables: some seconds
_FINISH_WAIT_S = 20.0  # twice at most; batch systems grant a minute or two after a signal


def tracking_uri(configured: str | None, run_dir: Path) -> str:
    """Return the tracking store: as configured, else MLFLOW_TRACKING_URI, else mlflow.db.

    Args:
        configured: `config.tracking.uri`.
        run_dir: Run folder; mlflow.db lies beside it.
    """
    beside = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or beside


def find_run_dir(run_id: str, *, uri: str | None = None) -> Path:
    """Return the run folder of a run by its MLflow id or by the run_id of its run.json.

    Args:
        run_id: Either id.
        uri: Tracking store; None: MLFLOW_TRACKING_URI, else runs/mlflow.db below the working
            directory.

    Raises:
        FileNotFoundError: No such store, or the run's folder is not on this machine.
        ValueError: The store cannot be read or does not know the run.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"
    file = _sqlite_file(uri)
    if file is not None and not file.is_file():  # opening would create it
        raise FileNotFoundError(
            f"{run_id}: no such run folder, and no tracking store {file} to look the id up in; "
            "give the folder, or set MLFLOW_TRACKING_URI"
        )
    client = _new_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        experiments = [e.experiment_id for e in client.search_experiments()]
        quoted = run_id.replace("'", "")
        query = f"attributes.run_id = '{quoted}'", f"tags.run_id = '{quoted}'"
        runs = [run for q in query for run in client.search_runs(experiments, q, max_results=1)]
    except (MlflowException, OSError) as error:
        raise ValueError(f"tracking store {uri}: {_one_line(error)}") from None
    if not runs:
        raise ValueError(f"{run_id}: neither a run folder nor a run of the tracking store {uri}")
    folder = Path(runs[0].data.tags.get("run_dir", ""))
    if not folder.is_dir():
        raise FileNotFoundError(f"run {run_id}: its folder {folder} is not on this machine")
    return folder


class Tracker:
    """Writes the run folder at once and MLflow in the background; does nothing on ranks above 0.

    Args:
        config: Configuration of the run; `config.tracking.enabled: false` leaves MLflow out.
        run_dir: Run folder, created by `start`.
        enabled: True on rank 0.
    """

    def __init__(self, config: RunConfig, run_dir: Path, *, enabled: bool) -> None:
        self._config = config
        self._run_dir = run_dir
        self._enabled = enabled
        self._folder: RunFolder | None = None
        self._sender: _Sender | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: concurrent.futures.Future[None] | None = None
        self._next_flush_step: int | None = None
        self._retry_at = 0.0
        self._in_trouble = False

    def start(
        self,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        artifacts: Iterable[Path],
        resumed: bool,
    ) -> str | None:
        """Open the run folder and create, or open again, the one MLflow run that belongs to it.

        Args:
            params: Parameters beside the flattened configuration, for instance counts.
            tags: Further tags, for instance corpus, gene and graph hashes.
            artifacts: Files to attach, for instance config.yaml and ds_config.json.
            resumed: Whether training continues from a checkpoint; counted in run.json as a restart.

        Returns:
            The MLflow run id; None without MLflow or while it cannot be reached.
        """
        if not self._enabled:
            return None
        self._folder = RunFolder(self._run_dir)
        run = record_start(self._run_dir, resumed=resumed)
        if not self._config.tracking.enabled:
            return None
        self._sender = _Sender(
            run_dir=self._run_dir,
            uri=tracking_uri(self._config.tracking.uri, self._run_dir),
            experiment=self._config.tracking.experiment,
            run_name=self._config.tracking.run_name or self._run_dir.resolve().name,
            params=_flatten(to_dict(self._config)) | _flatten(params),
            tags=_own_tags(run, self._run_dir) | dict(tags),
        )
        folder = f"restart_{run['restarts']:03d}" if resumed else None
        self._sender.queue((path, folder) for path in artifacts)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._pending = self._pool.submit(self._sender.send)
        self._collect(wait_s=_START_WAIT_S)
        return self._sender.mlflow_run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row to metrics.jsonl; MLflow gets it within `tracking.flush_every_n_steps`.

        Args:
            step: Optimizer step.
            metrics: Name to value, for instance `train/loss`; the time is added.
        """
        if not self._enabled:
            return
        assert len(metrics) <= _MAX_METRICS, f"{len(metrics)} metrics in one row"
        self._open_folder.append_metrics(step, metrics)
        if self._next_flush_step is None:
            self._next_flush_step = step + self._config.tracking.flush_every_n_steps
        elif step >= self._next_flush_step:
            self._next_flush_step = step + self._config.tracking.flush_every_n_steps
            self._flush()

    def event(self, name: str, *, step: int, **fields: object) -> None:
        """Append one row to events.jsonl."""
        if self._enabled:
            self._open_folder.append_event(name, step=step, **fields)

    def figure(self, name: str, figure: Figure) -> None:
        """Write plots/NAME.png, replacing an older one, and attach it to the MLflow run."""
        if not self._enabled:
            return
        from sclong_ds.plots import png_bytes

        path = self._run_dir / "plots" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, png_bytes(figure))
        if self._sender is not None:
            self._sender.queue([(path, "plots")])

    def artifact(self, path: Path) -> None:
        """Attach a file to the MLflow run at the next flush."""
        if self._sender is not None:
            self._sender.queue([(path, None)])

    def finish(self, status: Status) -> None:
        """Close the files, send what is left, with a bounded wait, and end the MLflow run.

        Args:
            status: FINISHED, KILLED (stopped by a signal; resuming opens the run again) or FAILED.
        """
        if self._folder is None:
            return
        self._folder.close()
        self._folder = None
        update_run_json(self._run_dir, status=status, ended=now())
        if self._sender is None or self._pool is None:
            return
        files = (self._run_dir / EVENTS_FILE, self._run_dir / RUN_FILE)
        self._sender.queue((path, None) for path in files)
        self._collect(wait_s=_FINISH_WAIT_S)
        if self._pending is None:
            self._pending = self._pool.submit(self._sender.close, status)
            self._collect(wait_s=_FINISH_WAIT_S)
        self._sender.stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        left = self._sender.unsent_bytes()
        if left:
            log.warning(
                "MLflow at %s lacks the last %d bytes of %s; a resumed run sends them",
                self._sender.uri, left, self._run_dir / METRICS_FILE,
            )  # fmt: skip

    @property
    def _open_folder(self) -> RunFolder:
        assert self._folder is not None, "start() was not called, or finish() was"
        return self._folder

    def _flush(self) -> None:
        """Send in the background unless a flush is under way or failed a moment ago."""
        if self._sender is None or self._pool is None:
            return
        self._collect(wait_s=0.0)
        if self._pending is None and time.monotonic() >= self._retry_at:
            self._pending = self._pool.submit(self._sender.send)

    def _collect(self, *, wait_s: float) -> None:
        """Take the outcome of the flush under way, if it is there within wait_s."""
        assert self._sender is not None
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending], timeout=wait_s)
        if not self._pending.done():
            if wait_s:
                log.warning("MLflow at %s is slow; training does not wait for it", self._sender.uri)
            return
        error, self._pending = self._pending.exception(), None
        if error is not None:
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            # Once, loudly: a server that is down for a day must not fill the log of the run.
            log.log(
                logging.DEBUG if self._in_trouble else logging.ERROR,
                "MLFLOW DOES NOT RECORD (%s): %s. Training goes on; everything is kept in %s and "
                "sent once MLflow answers.", self._sender.uri, _one_line(error), self._run_dir,
            )  # fmt: skip
        elif self._in_trouble:
            log.warning("MLflow at %s answers again; what was kept is being sent", self._sender.uri)
        self._in_trouble = error is not None


@dataclasses.dataclass(kw_only=True, eq=False)
class _Sender:
    """The MLflow side of a tracker. Its methods run on the tracker's one background thread."""

    run_dir: Path
    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    mlflow_run_id: str | None = None
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    _client: MlflowClient | None = None
    _offset: int = 0
    _uploads: list[tuple[Path, str | None]] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def queue(self, uploads: Iterable[tuple[Path, str | None]]) -> None:
        """Add files with their artifact folders; one that already waits is kept once."""
        with self._lock:
            self._uploads += [u for u in uploads if u not in self._uploads]

    def unsent_bytes(self) -> int:
        """Return how much of metrics.jsonl MLflow does not have."""
        return (self.run_dir / METRICS_FILE).stat().st_size - self._offset

    def send(self, *, max_batches: int = _MAX_BATCHES_PER_FLUSH) -> None:
        """Open the run if need be, then send new rows and waiting files."""
        if self.mlflow_run_id is None:
            self._open()
        self._send_rows(max_batches)
        while self._uploads and not self.stop.is_set():
            self._send_file()

    def close(self, status: Status) -> None:
        """Send everything that is left and end the run, even if a file cannot be sent."""
        try:
            self.send(max_batches=sys.maxsize)
        finally:
            if self.mlflow_run_id is not None:
                self._connected.set_terminated(self.mlflow_run_id, status)

    @property
    def _connected(self) -> MlflowClient:
        if self._client is None:
            self._client = _new_client(self.uri)
        return self._client

    def _open(self) -> None:
        """Find the run of this folder or create it, and describe it."""
        saved = read_run_json(self.run_dir)
        experiment_id = self._experiment_id()
        run = self._find(saved, experiment_id)
        same = run is not None and run.info.run_id == saved.get("mlflow_run_id")
        if run is None:
            run = self._connected.create_run(
                experiment_id, run_name=self.run_name, tags=dict(self.tags)
            )
        self._describe(run)
        # A new run, or the same run in another store, gets the whole history.
        size = (self.run_dir / METRICS_FILE).stat().st_size
        offset = int(saved.get("mlflow_synced_bytes", 0)) if same else 0
        self._offset = offset if offset <= size else 0
        update_run_json(
            self.run_dir,
            mlflow_run_id=run.info.run_id,
            mlflow_tracking_uri=self.uri,
            mlflow_synced_bytes=self._offset,
        )
        self.mlflow_run_id = run.info.run_id

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._connected.get_experiment_by_name(self.experiment)
        if found is None:
            file = _sqlite_file(self.uri)
            location = (file.parent / "mlartifacts").as_uri() if file else None
            try:
                return self._connected.create_experiment(self.experiment, location)
            except MlflowException:  # another job may have created it in between
                found = self._connected.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return found.experiment_id

    def _find(self, saved: Mapping[str, Any], experiment_id: str) -> Run | None:
        """Return this folder's run by the saved id, else by tag (killed before saving it)."""
        from mlflow.exceptions import MlflowException

        if saved.get("mlflow_run_id") and saved.get("mlflow_tracking_uri") == self.uri:
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
        params = {k: _clip(v, _MAX_PARAM_CHARS) for k, v in self.params.items()}
        changed = sorted(k for k, v in params.items() if known.get(k, v) != v)
        tags = {**self.tags, **({"changed_params": ", ".join(changed)} if changed else {})}
        new = [Param(k, v) for k, v in params.items() if k not in known]
        self._connected.update_run(run_id, status="RUNNING")
        self._connected.log_batch(
            run_id, tags=[RunTag(k, _clip(str(v), _MAX_TAG_CHARS)) for k, v in tags.items()]
        )
        for start in range(0, len(new), _MAX_PARAMS):
            self._connected.log_batch(run_id, params=new[start : start + _MAX_PARAMS])

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

    def _send_rows(self, max_batches: int) -> None:
        """Send complete lines after the offset, in order, whole rows per request."""
        batch: list[Metric] = []
        batches = 0
        with (self.run_dir / METRICS_FILE).open("rb") as file:
            file.seek(self._offset)
            end = self._offset
            for line in file:
                if not line.endswith(b"\n"):
                    break
                row = _row_metrics(json.loads(line))
                if len(batch) + len(row) > _MAX_METRICS:
                    self._send_batch(batch, end)
                    batch, batches = [], batches + 1
                    if batches == max_batches or self.stop.is_set():
                        return
                batch += row
                end += len(line)
        if batch:
            self._send_batch(batch, end)

    def _send_batch(self, batch: list[Metric], end: int) -> None:
        assert self.mlflow_run_id is not None
        self._connected.log_batch(self.mlflow_run_id, metrics=batch)
        self._offset = end
        update_run_json(self.run_dir, mlflow_synced_bytes=end)


def _new_client(uri: str) -> MlflowClient:
    """Import mlflow, quietly, and return a client whose calls give up soon."""
    # MLflow's defaults (120 s, 7 retries with back-off) would hold up the end of a run for minutes.
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


def _row_metrics(row: Mapping[str, float | None]) -> list[Metric]:
    from mlflow.entities import Metric

    step, stamp = row["step"], row["time"]
    assert step is not None
    assert stamp is not None
    make = functools.partial(Metric, timestamp=round(stamp * 1000), step=int(step))
    named = ((k, v) for k, v in row.items() if k not in ("step", "time"))
    return [make(key=k, value=math.nan if v is None else float(v)) for k, v in named]


def _own_tags(run: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    tags = {
        "run_id": run["run_id"],
        "run_dir": str(run_dir.resolve()),
        "restarts": str(run["restarts"]),
        "mlflow.source.name": "sclong_ds.pretrain",
        "mlflow.source.type": "JOB" if run.get("slurm_job_id") else "LOCAL",
        "mlflow.source.git.commit": run["commit"],
        "host": run["environment"]["host"],
    }
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    optional = {"mlflow.user": user, "slurm_job_id": run.get("slurm_job_id")}
    return tags | {k: v for k, v in optional.items() if v}


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return dotted names and text values of a nested mapping."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _one_line(error: BaseException) -> str:
    return _clip(f"{type(error).__name__}: {' '.join(str(error).split())}", 300)
