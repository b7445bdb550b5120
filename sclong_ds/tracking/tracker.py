"""What a training run records: the run folder first, MLflow and other trackers second.

`Tracker` is driven by `sclong_ds.pretrain`; nothing here is run by hand. Rank 0 writes the files of
`sclong_ds.run_folder.files` and sends the same to one MLflow run that keeps its id over restarts
(`sclong_ds.tracking.sender`) and to the trackers of `tracking.also` (`sclong_ds.recorders`); the
first rank of every node samples the node (`sclong_ds.tracking.node_sampler`). The section
`tracking` gives the store; `enabled: false` leaves MLflow out.

The files are the truth and the queue: MLflow receives them, in order, on a background thread. A
tracking server that is slow, down, or comes back a week later costs training nothing and loses
nothing. Pictures of a validation are drawn by a process of its own (`sclong_ds.report.draw`).
"""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sclong_ds.config.sections import TrackingConfig
from sclong_ds.recorders.follower import Follower
from sclong_ds.recorders.opening import RECORDERS
from sclong_ds.recorders.recorder import About
from sclong_ds.run_folder.files import (
    EVENTS_FILE,
    RUN_FILE,
    RunFolder,
    now,
    update_run_json,
)
from sclong_ds.run_folder.identity import installed_packages, record_start
from sclong_ds.run_folder.pending_pictures import Artist, Data
from sclong_ds.run_folder.seal import SEALING, seal
from sclong_ds.tracking.check import cure
from sclong_ds.tracking.client import MAX_METRICS, Status, one_line, tracking_uri
from sclong_ds.tracking.description import Description, describe, restart_folder
from sclong_ds.tracking.node_sampler import NodeSampler
from sclong_ds.tracking.sender import Sender

log = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.txt"
_RETRY_AFTER_S = 30.0
_START_WAIT_S = 60.0  # the first use of an sqlite file creates its tables: some seconds
_FINISH_WAIT_S = 20.0  # twice at most; batch systems grant a minute or two after a signal
_DRAW_WAIT_S = 180.0  # at the end of a run that is done; less than batch systems give a last rank
_EVENTS_TO_SEND = frozenset("start resume corpus_grown validation spike skipped_step".split())


class Tracker:
    """Writes the run folder at once and MLflow in the background; rank 0 alone does.

    Args:
        settings: Section tracking of the run; `enabled: false` leaves MLflow out.
        run_dir: Run folder, created by `start`.
        enabled: True on rank 0.
        samples_node: True on the first rank of a node.
    """

    def __init__(
        self, settings: TrackingConfig, run_dir: Path, *, enabled: bool, samples_node: bool = False
    ) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._enabled = enabled
        self._samples_node = samples_node
        self._step = 0
        self._sampler: NodeSampler | None = None
        self._folder: RunFolder | None = None
        self._sender: Sender | None = None
        self._followers: list[Follower] = []
        self._artist: Artist | None = None
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
        waits: Callable[[str], None] = log.debug,
    ) -> str | None:
        """Open the run folder and create, or open again, the one MLflow run that belongs to it.

        Args:
            params: Nested parameters: the configuration, and for instance counts.
            tags: Further tags, for instance corpus, gene and graph hashes.
            artifacts: Files to attach, for instance config.yaml and ds_config.json.
            resumed: Whether training continues from a checkpoint, which counts as a restart.
            step: Step that it continues from.
            summary: What is trained on what, for run.json, the report and MLflow's dataset.
            waits: Told what is waited for.

        Returns:
            The MLflow run id; None without MLflow or while it cannot be reached.
        """
        settings, about = self._settings, dict(summary or {})
        self._step = step
        self._sample_node()
        if not self._enabled:
            return None
        self._folder = RunFolder(self._run_dir)
        world_size = int(about.get("world_size", 1))
        run = record_start(self._run_dir, resumed=resumed, step=step, world_size=world_size)
        (packages := self._run_dir / ENVIRONMENT_FILE).write_text(installed_packages(), "utf-8")
        if about:
            run = update_run_json(self._run_dir, summary=about)
        if settings.picture_cells is not None:
            self._artist = Artist(self._run_dir, step=step)
        artifacts = [*artifacts, packages]
        description = describe(settings, self._run_dir, run, params=params, tags=tags)
        self._followers = followers(settings, self._run_dir, run, description)
        for follower in self._followers:
            follower.queue(artifacts)
            follower.flush()
        if not settings.enabled:
            return None
        self._sender = Sender(
            run_dir=self._run_dir,
            uri=tracking_uri(settings.uri, self._run_dir),
            description=description,
        )
        if not run["mlflow_run_id"]:  # for `sync`, should MLflow never answer
            update_run_json(self._run_dir, mlflow_tracking_uri=self._sender.shown_uri)
        folder = restart_folder(run) if resumed else None
        self._sender.queue((path, folder) for path in artifacts)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        waits(f"MLflow at {self._sender.shown_uri}, {_START_WAIT_S:.0f} s at most")
        self._pending = self._pool.submit(self._sender.send)
        self._collect(wait_s=_START_WAIT_S)
        return self._sender.mlflow_run_id

    def _sample_node(self) -> None:
        every_s = self._settings.system_metrics_every_s
        if not self._samples_node or not every_s:
            return
        try:
            self._sampler = NodeSampler(self._run_dir, every_s=every_s, step=lambda: self._step)
        except OSError as error:  # a rank that gave up here would leave the others waiting
            log.warning("this node is not sampled: %s", error)

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
            self._next_flush_step = step + self._settings.flush_every_n_steps
        elif step >= self._next_flush_step:
            self._next_flush_step = step + self._settings.flush_every_n_steps
            self._flush()

    def event(self, name: str, *, step: int, **fields: object) -> None:
        """Append one row to events.jsonl."""
        if not self._enabled:
            return
        self._open_folder.append_event(name, step=step, **fields)
        if name in SEALING:
            seal(self._run_dir)
        if self._sender is not None and name in _EVENTS_TO_SEND:
            self._sender.queue([(self._run_dir / EVENTS_FILE, None)])

    def draw(self, step: int, data: Data) -> None:
        """Have the pictures of a validation drawn while training continues; MLflow gets them too.

        Args:
            step: Optimizer step.
            data: What `sclong_ds.report.draw` draws from.
        """
        if self._artist is not None:
            self._artist.draw(step, data)

    def artifact(self, path: Path) -> None:
        """Attach a file to the run in MLflow and the other trackers, at the next flush."""
        for follower in self._followers:
            follower.queue([path])
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
        seal(self._run_dir)
        if self._artist is not None:
            self._artist.finish(wait_s=_DRAW_WAIT_S if status == "FINISHED" else 0.0)
        for follower in self._followers:
            follower.queue([self._run_dir / EVENTS_FILE, self._run_dir / RUN_FILE])
            if not follower.finish(status, wait_s=_FINISH_WAIT_S):
                log.warning(
                    "%s lacks a part of the run; a resumed run hands it over, or: python -m "
                    "sclong_ds sync %s", follower.name, self._run_dir,
                )  # fmt: skip
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
        for follower in self._followers:
            follower.flush()
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
            what = cure(error)
            log.log(
                logging.DEBUG if self._in_trouble else logging.ERROR,
                "MLflow logging failed (%s): %s. Training continues; metrics are kept in %s and "
                "sent %s.", self._sender.shown_uri, one_line(error), self._run_dir,
                "later" if what is None else f"once this is mended: {what}",
            )  # fmt: skip
        elif self._in_trouble:
            log.warning(
                "MLflow at %s answers again; what was kept is being sent", self._sender.shown_uri
            )
        self._in_trouble = error is not None


def followers(
    settings: TrackingConfig, run_dir: Path, run: Mapping[str, Any], description: Description
) -> list[Follower]:
    """Return what feeds the trackers of `tracking.also`; nothing is opened yet.

    Args:
        settings: Section tracking of the run.
        run_dir: Its folder.
        run: Its run.json.
        description: What the trackers are told.
    """
    about = About(
        run_dir=run_dir.resolve(), run_id=str(run["run_id"]), name=description.run_name,
        group=description.experiment, params=description.params, tags=description.tags,
    )  # fmt: skip
    return [Follower(name, about, RECORDERS[name]) for name in settings.also]
