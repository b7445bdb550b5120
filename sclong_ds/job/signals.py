"""Stopping a run in an orderly way: signals, a dead launcher, and one process per run folder."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

import psutil

log = logging.getLogger(__name__)


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
        self._before = {n: signal.signal(n, self._remember) for n in _STOP_SIGNALS}

    def release(self) -> None:
        """Give the signals back to what handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ask(self, reason: str) -> None:
        """Ask for a stop, as a signal does; the first reason stays.

        Args:
            reason: Why; without words it is a callback's.
        """
        self._reason = self._reason or reason or "a callback"

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
        self._reason = self._reason or signal.Signals(number).name
        # Handle the first signal, ignore repeats: at interpreter shutdown Python restores default
        # handlers, and a repeated signal would kill the rank.
        for again in _STOP_SIGNALS:
            signal.signal(again, signal.SIG_IGN)


def _launcher() -> psutil.Process | None:
    """Return the deepspeed launcher process that started this rank, if one did."""
    try:
        parent = psutil.Process(os.getppid())
        return parent if "deepspeed.launcher.launch" in " ".join(parent.cmdline()) else None
    except psutil.Error:
        return None
