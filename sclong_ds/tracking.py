"""What a training run records: the run folder first, MLflow second.

`Tracker` is driven by `sclong_ds.pretrain`; nothing here is run by hand. Rank 0 writes the files of
`sclong_ds.run_folder.files` and sends the same to one MLflow run that keeps its id over restarts
(`sclong_ds.mlflow_store`); the first rank of every node samples the node
(`sclong_ds.system_metrics`). `config.tracking` says where; `enabled: false` leaves MLflow out.

The files are the truth and the queue: MLflow receives them, in order, on a background thread. A
tracking server that is slow, down, or comes back a week later costs training nothing and loses
nothing. Pictures of a validation are drawn by a process of its own (`sclong_ds.pictures`).
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_dict
from sclong_ds.mlflow_store import (
    MAX_METRICS,
    Dataset,
    Description,
    Sender,
    Status,
    one_line,
    tracking_uri,
)
from sclong_ds.run_folder.files import (
    EVENTS_FILE,
    PLOTS_DIR,
    RUN_FILE,
    RunFolder,
    now,
    update_run_json,
)
from sclong_ds.run_folder.identity import installed_packages, record_start
from sclong_ds.run_folder.pending_pictures import Data, drop_after, pending, put_back, write_data
from sclong_ds.system_metrics import NodeSampler

log = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.txt"
_RETRY_AFTER_S = 30.0
_START_WAIT_S = 60.0  # the first use of an sqlite file creates its tables: some seconds
_FINISH_WAIT_S = 20.0  # twice at most; batch systems grant a minute or two after a signal
_DRAW_WAIT_S = 180.0  # at the end of a run that is done; less than batch systems give a last rank
_EVENTS_TO_SEND = frozenset({"start", "resume", "validation", "spike", "skipped_step"})


class Tracker:
    """Writes the run folder at once and MLflow in the background; rank 0 alone does.

    Args:
        config: Configuration of the run; `config.tracking.enabled: false` leaves MLflow out.
        run_dir: Run folder, created by `start`.
        enabled: True on rank 0.
        samples_node: True on the first rank of a node.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, *, enabled: bool, samples_node: bool = False
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._enabled = enabled
        self._samples_node = samples_node
        self._step = 0
        self._sampler: NodeSampler | None = None
        self._folder: RunFolder | None = None
        self._sender: Sender | None = None
        self._artist: _Artist | None = None
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
        step: int = 0,
        summary: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Open the run folder and create, or open again, the one MLflow run that belongs to it.

        Args:
            params: Parameters beside the flattened configuration, for instance counts.
            tags: Further tags, for instance corpus, gene and graph hashes.
            artifacts: Files to attach, for instance config.yaml and ds_config.json.
            resumed: Whether training continues from a checkpoint; counted in run.json as a restart.
            step: Step that it goes on from.
            summary: What is trained on what, for run.json, the report and MLflow's dataset.

        Returns:
            The MLflow run id; None without MLflow or while it cannot be reached.
        """
        settings, about = self._config.tracking, dict(summary or {})
        self._step = step
        if self._samples_node and settings.system_metrics_every_s:
            try:
                self._sampler = NodeSampler(
                    self._run_dir, every_s=settings.system_metrics_every_s, step=lambda: self._step
                )
            except OSError as error:  # a rank that gave up here would leave the others waiting
                log.warning("this node is not sampled: %s", error)
        if not self._enabled:
            return None
        self._folder = RunFolder(self._run_dir)
        world_size = int(about.get("world_size", 1))
        run = record_start(self._run_dir, resumed=resumed, step=step, world_size=world_size)
        packages = self._run_dir / ENVIRONMENT_FILE
        packages.write_text(installed_packages(), encoding="utf-8")
        if about:
            run = update_run_json(self._run_dir, summary=about)
        if settings.picture_cells is not None:
            self._artist = _Artist(self._run_dir, step=step)
        if not settings.enabled:
            return None
        self._sender = Sender(
            run_dir=self._run_dir,
            uri=tracking_uri(settings.uri, self._run_dir),
            description=describe(self._config, self._run_dir, run, params=params, tags=tags),
        )
        if not run["mlflow_run_id"]:  # for `sync`, should MLflow never answer
            update_run_json(self._run_dir, mlflow_tracking_uri=self._sender.shown_uri)
        folder = restart_folder(run) if resumed else None
        self._sender.queue((path, folder) for path in (*artifacts, packages))
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
        self._step = step
        if not self._enabled:
            return
        assert len(metrics) <= MAX_METRICS, f"{len(metrics)} metrics in one row"
        self._open_folder.append_metrics(step, metrics)
        if self._next_flush_step is None:
            self._next_flush_step = step + self._config.tracking.flush_every_n_steps
        elif step >= self._next_flush_step:
            self._next_flush_step = step + self._config.tracking.flush_every_n_steps
            self._flush()

    def event(self, name: str, *, step: int, **fields: object) -> None:
        """Append one row to events.jsonl."""
        if not self._enabled:
            return
        self._open_folder.append_event(name, step=step, **fields)
        if self._sender is not None and name in _EVENTS_TO_SEND:
            self._sender.queue([(self._run_dir / EVENTS_FILE, None)])

    def draw(self, step: int, data: Data) -> None:
        """Have the pictures of a validation drawn while training goes on; MLflow gets them too.

        Args:
            step: Optimizer step.
            data: What `sclong_ds.pictures` draws from.
        """
        if self._artist is not None:
            self._artist.draw(step, data)

    def artifact(self, path: Path) -> None:
        """Attach a file to the MLflow run at the next flush."""
        if self._sender is not None:
            self._sender.queue([(path, None)])

    def finish(self, status: Status) -> None:
        """Close the files, send what is left, with a bounded wait, and end the MLflow run.

        Args:
            status: FINISHED, KILLED (stopped by a signal; resuming opens the run again) or FAILED.
        """
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        if self._folder is None:
            return
        self._folder.close()
        self._folder = None
        update_run_json(self._run_dir, status=status, ended=now())
        if self._artist is not None:
            self._artist.finish(wait_s=_DRAW_WAIT_S if status == "FINISHED" else 0.0)
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
        left = self._sender.left()
        if left:
            log.warning(
                "MLflow at %s lacks %s; a resumed run sends it, or: python -m sclong_ds sync %s",
                self._sender.shown_uri, ", ".join(left), self._run_dir,
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
                log.warning(
                    "MLflow at %s is slow; training does not wait for it", self._sender.shown_uri
                )
            return
        error, self._pending = self._pending.exception(), None
        if error is not None:
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            # Once, loudly: a server that is down for a day must not fill the log of the run.
            log.log(
                logging.DEBUG if self._in_trouble else logging.ERROR,
                "MLFLOW DOES NOT RECORD (%s): %s. Training goes on; everything is kept in %s and "
                "sent once MLflow answers.", self._sender.shown_uri, one_line(error), self._run_dir,
            )  # fmt: skip
        elif self._in_trouble:
            log.warning(
                "MLflow at %s answers again; what was kept is being sent", self._sender.shown_uri
            )
        self._in_trouble = error is not None


class _Artist:
    """Draws pictures in a process of its own, one at a time: validations wait in files."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None
        put_back(run_dir)
        drop_after(run_dir, step)

    def draw(self, step: int, data: Data) -> None:
        """Write what is to be drawn, and start a process unless one is at work."""
        try:
            write_data(self._run_dir, step, data)
        except OSError as error:  # a full disk, on this rank alone
            log.error("the pictures of step %d are not drawn: %s", step, error)
            return
        self._start()

    def finish(self, *, wait_s: float) -> None:
        """Wait until all is drawn, and end the process when that takes longer."""
        deadline = time.monotonic() + wait_s
        while self._is_busy() or pending(self._run_dir):
            if time.monotonic() >= deadline:
                break
            self._start()
            time.sleep(0.1)
        if self._process is not None and self._is_busy():
            log.info(
                "pictures that are missing: a resumed run draws them, or python -m "
                "sclong_ds.pictures %s", self._run_dir,
            )  # fmt: skip
            self._process.kill()
            self._process.wait()

    def _is_busy(self) -> bool:
        """Tell whether a process is at work; one that failed is reported once."""
        if self._process is None:
            return False
        status = self._process.poll()
        if status is None:
            return True
        self._process = None
        if status != 0:
            log.warning("pictures were not drawn (status %d): see %s", status, self._log_file)
        return False

    def _start(self) -> None:
        if self._is_busy() or not pending(self._run_dir):
            return
        place = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        # It shares the node with training: one thread, and behind it.
        threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        try:
            with self._log_file.open("wb") as output:
                self._process = subprocess.Popen(
                    ["nice", "-n", "10", sys.executable, "-m", "sclong_ds.pictures", self._run_dir],
                    env=os.environ | place | threads, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
        except OSError as error:  # a full disk, no memory: the next validation tries again
            log.error("pictures are not drawn now: %s", error)

    @property
    def _log_file(self) -> Path:
        return self._run_dir / PLOTS_DIR / "pictures.log"


def restart_folder(run: Mapping[str, Any]) -> str:
    """Return the artifact folder of the files that the last restart of a run began with."""
    return f"restart_{run['restarts']:03d}"


def describe(
    config: RunConfig,
    run_dir: Path,
    run: Mapping[str, Any],
    *,
    params: Mapping[str, object],
    tags: Mapping[str, str],
) -> Description:
    """Return what MLflow is told about a run.

    Args:
        config: Its configuration.
        run_dir: Its folder.
        run: Its run.json.
        params: Parameters beside the configuration.
        tags: Tags beside those of run.json and `tracking.tags`.
    """
    settings, about = config.tracking, run.get("summary") or {}
    packages = {k: v for k, v in run["environment"].items() if k not in ("host", "cpu_cores")}
    further = {"environment": packages, **params}
    name = settings.run_name or run_dir.resolve().name
    dataset = None
    if "corpus_hash" in tags and "corpus" in about:
        dataset = Dataset(
            name=str(about["corpus"]).rstrip("/").rpartition("/")[2],
            hash=tags["corpus_hash"],
            url=str(about["corpus"]),
            cells={
                "training": about["n_cells_train"],
                "validation": about["n_cells_validation"],
            },
            profile={"genes": about["n_genes"], "datasets": about["n_datasets"]},
        )
    return Description(
        experiment=settings.experiment,
        run_name=name,
        params=_flatten(to_dict(config)) | _flatten(further),
        tags={**settings.tags, **tags, **_own_tags(config, run, run_dir)},
        note=_note(run, run_dir),
        dataset=dataset,
    )


def _own_tags(config: RunConfig, run: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """Return the tags that say which run it is, and one for every start but the first."""
    tags = {
        "run_id": run["run_id"],
        "run_dir": str(run_dir.resolve()),
        "restarts": str(run["restarts"]),
        "mlflow.source.name": "sclong_ds.pretrain",
        "mlflow.source.type": "JOB" if run.get("slurm_job_id") else "LOCAL",
        "mlflow.source.git.commit": run["commit"],
        "host": run["environment"]["host"],
    }
    for number, start in enumerate(run["starts"][1:], start=1):
        job = f", Slurm job {start['slurm_job_id']}" if start["slurm_job_id"] else ""
        where = f"{start['world_size']} ranks from {start['host']}{job}"
        tags[f"restart_{number:03d}"] = f"after step {start['step']}, {start['time']}, {where}"
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    optional = {
        "mlflow.user": user,
        "mlflow.parentRunId": config.tracking.parent_run,
        "slurm_job_id": run.get("slurm_job_id"),
    }
    return tags | {k: v for k, v in optional.items() if v}


def _note(run: Mapping[str, Any], run_dir: Path) -> str:
    """Return the text that MLflow shows above the run's figures."""
    about = run.get("summary") or {}
    lines = [f"Run folder `{run_dir.resolve()}`, commit `{run['commit']}`."]
    if "corpus" in about:
        lines.append(
            f"\n{about['n_cells_train']:,} training cells of {about['n_datasets']:,} datasets, "
            f"{about['n_cells_validation']:,} validation cells, {about['n_genes']:,} genes, from "
            f"`{about['corpus']}`; {sum(about['parameters'].values()):,} parameters on "
            f"{about['world_size']} x {about['device']}."
        )
    lines.append(f"\n`python -m sclong_ds report {run_dir.resolve()}` writes a page about it.")
    return "\n".join(lines)


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return dotted names and text values of a nested mapping."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat
