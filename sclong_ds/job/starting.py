"""The start of a run: phases that are shown, have an end, and can be stopped.

    with Starting(stop, rank=0, node="n1") as starting:
        starting.of_run(run_dir, timeout_s=1800)
        starting.phase("corpus", "the corpus at /data/corpus")

Until the training loop takes over, the main thread may hang where nothing can interrupt it: in a
collective, in a lock of another process, in a file system. A daemon thread logs what it waits for,
after half a minute and then ever more rarely; it ends the process at the phase's time-out with
status 71, and at SIGTERM, SIGINT or when the launcher is gone, with status 75: nothing was trained
that could be lost. SIGUSR1, which batch systems send in advance, is left to the training loop.
Another one writes the rank's heartbeat file, which `status` reads, at once and every few seconds:
the run folder's file system may be what hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Self

import psutil

from sclong_ds.job.exit_status import PASSING_STATUS, STOP_STATUS
from sclong_ds.job.signals import StopRequest
from sclong_ds.run_folder.heartbeats import STARTING, Heartbeat, write_heartbeat

log = logging.getLogger("sclong_ds.pretrain")

_ENDS = frozenset({signal.SIGTERM, signal.SIGINT})
_LOOK_S, _WRITE_S = 0.5, 5.0
_FILES_S = 5.0
"""Longest wait for a file system at the end of a start."""
_FIRST_NOTICE_S = 30.0
LEAST_TIMEOUT_S = 600.0
"""Compilers take minutes, whatever a run's own time-out is."""


@dataclass(frozen=True, slots=True)
class _Phase:
    name: str
    waits_for: str
    since: float
    limit_s: float


class Starting:
    """Watches the start of a rank; a context manager, which `done` ends early.

    Its first phase is that of the settings. There is no heartbeat before `of_run`.

    Args:
        stop: The request to stop.
        rank: This rank.
        node: Name of this node.
    """

    def __init__(self, stop: StopRequest, *, rank: int, node: str) -> None:
        self._stop, self._rank, self._node = stop, rank, node
        self._run_dir: Path | None = None
        self._made_folder, self._timeout_s = False, LEAST_TIMEOUT_S
        self._phase = _Phase("settings", "its settings", time.monotonic(), self._timeout_s)
        self._notice_s, self._written = _FIRST_NOTICE_S, 0
        self._ended, self._news, self._failed = threading.Event(), threading.Event(), False
        self._pipe: tuple[int, ...] = ()
        self._watcher = threading.Thread(target=self._watch, name="starting", daemon=True)
        self._writer = threading.Thread(target=self._keep_heartbeat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # Python's own handlers wait until the main thread is back from what it hangs in.
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watcher.start()
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._failed = kind is not None and not self._ended.is_set()
        self.done()

    def of_run(self, run_dir: Path | None, *, timeout_s: float) -> None:
        """Tell which run starts; its heartbeat begins with the next phase, or a few seconds later.

        A command that is refused at once makes no folder.

        Args:
            run_dir: Run folder, for the heartbeat; None: no heartbeat.
            timeout_s: Longest time of a phase, at least LEAST_TIMEOUT_S.
        """
        self._timeout_s = max(timeout_s, LEAST_TIMEOUT_S)
        # One that holds heartbeats alone was made by another rank of this start.
        self._made_folder = run_dir is not None and (
            not run_dir.exists() or os.listdir(run_dir) == ["heartbeat"]
        )
        self._run_dir = run_dir

    def phase(self, name: str, waits_for: str, *, patience: float = 1.0) -> None:
        """Tell what begins.

        Args:
            name: The phase: imports, extensions, rendezvous, tracking, corpus, model, checkpoint or
                record.
            waits_for: What it waits for, in words.
            patience: It may take so many times the time-out.
        """
        self._notice_s = _FIRST_NOTICE_S
        self._phase = _Phase(name, waits_for, time.monotonic(), patience * self._timeout_s)
        self._news.set()

    def waits(self, what: str) -> None:
        """Tell what the phase waits for now."""
        phase = self._phase
        self._phase = _Phase(phase.name, what, phase.since, phase.limit_s)

    def done(self) -> None:
        """End the watch: from here on the training loop sees signals and hangs."""
        if self._ended.is_set() or not self._pipe:
            return
        self._ended.set()
        self._news.set()
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(BlockingIOError):  # full of signals, which wake it as well
            os.write(self._pipe[1], b"\0")
        self._watcher.join()
        self._writer.join(_FILES_S)
        for end in self._pipe:
            os.close(end)

    def _watch(self) -> None:
        """Look twice a second, and at once when there is a signal; runs on the daemon thread."""
        while not self._ended.is_set():
            if select.select([self._pipe[0]], [], [], _LOOK_S)[0]:
                for number in _ENDS.intersection(os.read(self._pipe[0], 64)):
                    self._end(f"stopped by {signal.Signals(number).name}", STOP_STATUS)
            if self._stop.reason() == "the launcher is gone":
                self._end("the launcher is gone", STOP_STATUS)
            phase, now = self._phase, time.monotonic()
            if now - phase.since >= phase.limit_s:
                self._end(f"no progress for {phase.limit_s:.0f} s", PASSING_STATUS)
            if now - phase.since >= self._notice_s:
                self._notice_s *= 2
                # Rank 0 tells what all wait for; a thousand others only what is their own.
                if self._rank == 0 or phase.name == "extensions":
                    log.warning("rank %d (%s): %s", self._rank, self._node, self._words())

    def _words(self) -> str:
        phase = self._phase
        taken = time.monotonic() - phase.since
        return f"starting, phase '{phase.name}': waits for {phase.waits_for} since {taken:.0f} s"

    def _end(self, why: str, status: int) -> NoReturn:
        """End the process, whatever its main thread hangs in, with the children that it waits for.

        Straight to the descriptor: the main thread may hang with the lock of sys.stderr.
        """
        with contextlib.suppress(OSError):
            os.write(2, f"error: rank {self._rank} ({self._node}): {why} while {self._words()}; "
                        f"nothing is lost: start the same command again\n".encode())  # fmt: skip
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                child.kill()
        self._failed = True
        self._ended.set()
        self._news.set()
        self._writer.join(_FILES_S)
        os._exit(status)

    def _path(self, run_dir: Path) -> Path:
        return run_dir / "heartbeat" / f"rank_{self._rank:05d}.json"

    def _keep_heartbeat(self) -> None:
        """Write the heartbeat until the start is over; runs on a daemon thread of its own."""
        while True:
            self._news.clear()
            if self._ended.is_set():
                break
            self._write_heartbeat()
            self._news.wait(_WRITE_S)
        if self._failed:
            self._leave_nothing()

    def _write_heartbeat(self) -> None:
        """Write the rank's heartbeat; a file system that fails does not end a start."""
        if self._run_dir is None:
            return
        phase, self._written = self._phase, self._written + 1
        content = asdict(
            Heartbeat(
                rank=self._rank, node=self._node, pid=os.getpid(), step=0,
                phase=f"{STARTING}{phase.name}", phase_s=round(time.monotonic() - phase.since, 1),
                beats=0, reading=phase.waits_for, written=self._written, interval_s=_WRITE_S,
            )
        )  # fmt: skip
        path = self._path(self._run_dir)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_heartbeat(path, content, rank=self._rank)

    def _leave_nothing(self) -> None:
        """Remove the heartbeat of a start that failed, and the folders made for it."""
        if self._run_dir is None or not self._written:
            return
        with contextlib.suppress(OSError):
            self._path(self._run_dir).unlink(missing_ok=True)
            if self._made_folder:
                (self._run_dir / "heartbeat").rmdir()
                self._run_dir.rmdir()
