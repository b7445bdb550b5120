"""Processes that share the units of a long work: any number, in any order, killed at any time.

The work has stages, and a stage has numbered units. What a unit leaves depends on the unit alone,
so it does not matter who does it. A process begins with its own share of a stage and then takes
what others have not begun; it waits only for what is being done by a living process. Done is what
`WORK/done/STAGE.UNIT.json` says, which holds what the unit returned. Who does a unit holds one byte
of a lock file, which the system gives back when the process ends in whatever way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import named_errors, write_atomic

_log = logging.getLogger(__name__)

LOOK_S = 0.2
"""How often a process looks whether others are done, in seconds."""
_FAILED = "failed.json"
_UNITS = 2**32
"""Largest number of units of a stage."""
Do = Callable[[int], Any]
"""Does a unit, whatever a killed one has left of it, and returns what others want to know."""


class WorkIsGone(Exception):
    """The work folder is no more: another process has finished the work."""


class Parted(Exception):
    """The process that this one works for is gone."""


class Crew:
    """One of the processes that share a work."""

    def __init__(
        self,
        work: Path,
        lock: Path,
        *,
        member: int = 0,
        members: int = 1,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Join the work.

        Args:
            work: Folder of the work.
            lock: Lock file of its units, outside the folder.
            member: Number of this process, which says where it begins.
            members: Number of processes.
            progress: Called with (stage, done, all) after each unit.
        """
        self.work, self.member, self.members, self.progress = work, member, members, progress
        self._stages = 0
        self._parent = os.getppid()
        self.stop_with_parent = False
        """Whether to give up when the process is gone that has started this one."""
        lock.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._results: dict[str, list[Any]] = {}

    def close(self) -> None:
        """Leave; what this process held is free."""
        os.close(self._lock)

    def run(self, stage: str, sizes: Sequence[int], do: Do) -> None:
        """Return when all units of a stage are done, by this process or by others.

        All processes run the same stages in the same order.

        Args:
            stage: Its name.
            sizes: What each unit counts for in `progress`.
            do: Does a unit.

        Raises:
            ValueError: A unit of this stage, done here or elsewhere, has found damage.
            WorkIsGone: Another process has finished the work.
            Parted: See `stop_with_parent`.
        """
        self._stages += 1
        turn = [*range(self.member, len(sizes), self.members)]
        for other in range(self.member + 1, self.member + self.members):
            # From the end, where the one whose share it is comes last.
            turn += reversed(range(other % self.members, len(sizes), self.members))
        while True:
            done = self._done(stage, len(sizes))
            if self.progress:
                self.progress(stage, sum(sizes[unit] for unit in done), sum(sizes))
            left = [unit for unit in turn if unit not in done]
            if not left:
                return
            if not sum(self._try(stage, unit, sizes, do) for unit in left):
                time.sleep(LOOK_S)

    def results(self, stage: str) -> list[Any]:
        """Return what the units of a stage that is done have returned, in their order."""
        if stage not in self._results:
            names = sorted(path for path in (self.work / "done").glob(f"{stage}.*.json"))
            self._results[stage] = [json.loads(path.read_bytes())["result"] for path in names]
        return self._results[stage]

    def _try(self, stage: str, unit: int, sizes: Sequence[int], do: Do) -> bool:
        """Do a unit unless another process is at it; return whether it was done here or before."""
        self._look()
        marker = self.work / "done" / f"{stage}.{unit:06d}.json"
        if marker.exists():
            return True
        place = self._stages * _UNITS + unit
        if not self._hold(place):
            return False
        try:
            if marker.exists():
                return True
            self._do(unit, do, marker)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, place)
        if self.progress:
            done = self._done(stage, len(sizes))
            self.progress(stage, sum(sizes[unit] for unit in done), sum(sizes))
        return True

    def _do(self, unit: int, do: Do, marker: Path) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            result = do(unit)
        except ValueError as error:
            # The same work would fail again, whoever does it.
            if self.work.is_dir():
                write_atomic(self.work / _FAILED, json.dumps({"error": str(error)}).encode())
            raise
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write_atomic(marker, json.dumps({"result": result}).encode())
        _log.debug("%s: %.3f CPU s", marker.stem, spent)

    def _look(self) -> None:
        """Raise what ends the part of this process."""
        if self.stop_with_parent and os.getppid() != self._parent:
            raise Parted
        try:
            raise ValueError(json.loads((self.work / _FAILED).read_bytes())["error"])
        except FileNotFoundError:
            if not self.work.is_dir():
                raise WorkIsGone from None

    def _done(self, stage: str, units: int) -> set[int]:
        self._look()
        try:
            names = os.listdir(self.work / "done")
        except FileNotFoundError:
            raise WorkIsGone from None
        found = {
            int(name.split(".")[1])
            for name in names
            if name.startswith(f"{stage}.") and name.endswith(".json")
        }
        return {unit for unit in found if unit < units}

    def _hold(self, place: int) -> bool:
        """Take a byte of the lock file, if no other process has it."""
        try:
            with named_errors(self.work):
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            # Whole units are made twice then, which does no harm.
        return True


def has_failed(work: Path) -> bool:
    """Tell whether a process has found that the work cannot be done."""
    return (work / _FAILED).exists()
