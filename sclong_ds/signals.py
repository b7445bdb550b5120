"""Stopping a run in an orderly way: signals, a dead launcher, and one process per run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

log = logging.getLogger(__name__)

STOP_STATUS = 75
"""Exit status of a run that was asked to stop and saved: EX_TEMPFAIL, start it again to go on."""


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody asked this process to stop; the training loop asks it once a step.

    SIGTERM, SIGINT and SIGUSR1 ask for a stop. So does the death of the `deepspeed` launcher's
    parent: a signal that kills only the outer `deepspeed` process would otherwise leave the ranks
    training on, unseen.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._launcher = _launcher()
        self._launched_by = self._launcher.ppid() if self._launcher else None
        for number in _STOP_SIGNALS:
            signal.signal(number, self._remember)

    def reason(self) -> str | None:
        """Return why to stop, or None."""
        if self._reason is None and self._launcher is not None:
            try:
                alive = self._launcher.ppid() == self._launched_by
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                self._reason = "the launcher is gone"
        return self._reason

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name
        # One is enough. Of signals that are sent again and again, one may meet the end of python,
        # which gives handled signals, but not ignored ones, back their default: to kill.
        for again in _STOP_SIGNALS:
            signal.signal(again, signal.SIG_IGN)


def _launcher() -> psutil.Process | None:
    """Return the deepspeed launcher process that started this rank, if one did."""
    try:
        parent = psutil.Process(os.getppid())
        return parent if "deepspeed.launcher.launch" in " ".join(parent.cmdline()) else None
    except psutil.Error:
        return None


def lock_run_folder(run_dir: Path, *, wait_s: float) -> IO[str]:
    """Take the run folder for this process; the lock goes with the process, however it ends.

    Args:
        run_dir: Run folder.
        wait_s: How long to wait for a process that is still saving.

    Returns:
        The open lock file; keep it.

    Raises:
        ValueError: Another process is training there.
    """
    handle = (run_dir / ".lock").open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise ValueError(
                    f"run.dir={run_dir}: this file system has no locks; put run.dir on one that has"
                ) from None
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() > deadline:
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                handle.close()
                raise ValueError(
                    f"run.dir={run_dir}: another process is training there ({owner}); "
                    f"stop it or use another run.dir"
                ) from None
            time.sleep(0.5)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    return handle
