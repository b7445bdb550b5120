"""Processes that share the units of a long work: any number, in any order, killed at any time.

The work has stages, and a stage has numbered units. What a unit leaves depends on the unit alone,
so it does not matter who does it. A process begins with its own share of a stage and then takes
what others have not begun; it waits only for what is being done by a living process. Done is what
`WORK/done/STAGE.UNIT.json` says, which holds what the unit returned, the checksums of its files
and its own. Who does a unit holds one byte of a lock file, which the system gives back when the
process ends in whatever way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import file_sha256, listed, named_errors, write_atomic
from sclong_ds.files.sealed_json import read_object, read_sealed, write_sealed

_log = logging.getLogger(__name__)

LOOK_S, MOST_LOOK_S = 0.2, 5.0
"""How long a process waits before it looks again whether others are done, in seconds."""
_FAILED = "failed.json"
_UNITS = 2**32
"""Largest number of units of a stage."""
Do = Callable[[int], Any]
"""Does a unit, whatever a killed one has left of it; returns `Made`, or only what others want to
know."""


class WorkIsGone(Exception):
    """The work folder is no more: another process has finished the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a unit has made."""

    result: Any = None
    """What others want to know, as JSON has it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of its files by their names in the work folder; of those without checksums inside."""


class Crew:
    """One of the processes that share a work."""

    def __init__(
        self,
        work: Path,
        lock: Path,
        *,
        stages: Sequence[str],
        member: int = 0,
        members: int = 1,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Join the work.

        Args:
            work: Folder of the work.
            lock: Lock file of its units, outside the folder, where locks hold between all
                processes.
            stages: Names of all stages, the same for all processes.
            member: Number of this process, which says where it begins.
            members: Number of processes.
            progress: Called with (stage, done, all) after each unit.
        """
        self.work, self.member, self.members, self.progress = work, member, members, progress
        self._stages, self._lock_path = tuple(stages), lock
        lock.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._made: dict[str, list[Made]] = {}

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
        """
        turn = [*range(self.member, len(sizes), self.members)]
        for other in range(self.member + 1, self.member + self.members):
            # From the end, where the one whose share it is comes last.
            turn += reversed(range(other % self.members, len(sizes), self.members))
        pause = LOOK_S
        while True:
            done = self._done(stage, len(sizes))
            if self.progress:
                self.progress(stage, sum(sizes[unit] for unit in done), sum(sizes))
            left = [unit for unit in turn if unit not in done]
            if not left:
                return
            if sum(self._try(stage, unit, sizes, do) for unit in left):
                pause = LOOK_S
            else:
                time.sleep(pause)
                pause = max(LOOK_S, min(1.5 * pause, MOST_LOOK_S))

    def is_done(self, stage: str, units: int) -> bool:
        """Tell whether all units of a stage are done.

        Args:
            stage: Its name.
            units: Their number.

        Raises:
            ValueError: A process has found damage.
            WorkIsGone: Another process has finished the work.
        """
        return len(self._done(stage, units)) == units

    def made_files(self, *paths: Path, result: Any = None) -> Made:
        """Return what a unit has made, with the SHA-256 of its files.

        Args:
            paths: Its files, in the work folder.
            result: What others want to know.
        """
        files = {path.relative_to(self.work).as_posix(): file_sha256(path) for path in paths}
        return Made(result=result, files=files)

    def results(self, stage: str) -> list[Any]:
        """Return what the units of a stage that is done have returned, in their order."""
        return [made.result for made in self.made(stage)]

    def made(self, stage: str) -> list[Made]:
        """Return what the units of a stage that is done have made, in their order.

        Args:
            stage: Its name.

        Raises:
            ValueError: Of one of them it cannot be told.
        """
        if stage not in self._made:
            markers = listed(self.work / "done")
            names = [path for path in markers if path.name.startswith(f"{stage}.")]
            self._made[stage] = [_read_marker(path) for path in names if path.suffix == ".json"]
        return self._made[stage]

    def _try(self, stage: str, unit: int, sizes: Sequence[int], do: Do) -> bool:
        """Do a unit unless another process is at it; return whether it was done here or before."""
        place = self._stages.index(stage) * _UNITS + unit
        if not self._hold(place):
            return False
        try:
            # A network file system may remember for a while that a file was not there; a folder
            # is listed as it is now.
            if unit in self._done(stage, len(sizes)):
                return True
            self._do(unit, do, self.work / "done" / f"{stage}.{unit:06d}.json")
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, place)
        if self.progress:
            done = self._done(stage, len(sizes))
            self.progress(stage, sum(sizes[unit] for unit in done), sum(sizes))
        return True

    def _do(self, unit: int, do: Do, marker: Path) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        with self.damage_ends_the_work():
            made = do(unit)
            made = made if isinstance(made, Made) else Made(result=made)
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        content = {"unit": marker.stem, "result": made.result, "files": dict(made.files)}
        write_sealed(marker, content)
        _log.debug("%s: %.3f CPU s", marker.stem, spent)

    @contextmanager
    def damage_ends_the_work(self) -> Iterator[None]:
        """Let all processes give up where what is read in the block is damaged.

        A file of the work that is missing is damage, too: it is looked for only after the unit that
        writes it is done. Whoever finds `has_failed` starts again from nothing.

        Raises:
            ValueError: Something is damaged.
        """
        try:
            try:
                yield
            except FileNotFoundError as error:
                if not self._lacks(error.filename):
                    raise
                raise ValueError(f"{error.filename}: missing; run finalize again") from error
        except ValueError as error:
            # The same work would fail again, whoever does it.
            if self.work.is_dir():
                write_atomic(self.work / _FAILED, json.dumps({"error": str(error)}).encode())
            raise

    def _lacks(self, name: Any) -> bool:
        """Tell whether a file of the work is missing now, whatever was looked up before."""
        if not isinstance(name, str | os.PathLike):
            return False
        path = Path(name)
        if not path.is_relative_to(self.work) or not self.work.is_dir():
            return False
        try:
            return path.name not in os.listdir(path.parent)
        except FileNotFoundError:
            return True

    def _look(self) -> None:
        """Raise what ends the part of this process."""
        try:
            raise ValueError(read_object(self.work / _FAILED)["error"])
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
        """Take a byte of the lock file, if no other process has it.

        Raises:
            OSError: The file system has no locks: two would do the same unit at once.
        """
        try:
            with named_errors(self._lock_path):
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True


def _read_marker(path: Path) -> Made:
    """Return what a unit that is done has made."""
    content = read_sealed(path)
    if content.get("unit") != path.stem:
        raise ValueError(f"{path}: damaged (it is of unit {content.get('unit')})")
    return Made(result=content["result"], files=content["files"])


def forget_damaged(work: Path) -> None:
    """Let units be done again that have not left what they say; no process is at work.

    All files that have no checksums inside are read.

    Args:
        work: Folder of the work.
    """
    for marker in listed(work / "done"):
        if marker.suffix != ".json":
            continue
        try:
            for name, digest in _read_marker(marker).files.items():
                if file_sha256(work / name) != digest:
                    raise ValueError(f"{work / name}: not what was written")
        except (FileNotFoundError, ValueError) as error:
            _log.warning("%s; %s is done again", error, marker.stem)
            marker.unlink()


def has_failed(work: Path) -> bool:
    """Tell whether a process has found that the work cannot be done."""
    return (work / _FAILED).exists()
