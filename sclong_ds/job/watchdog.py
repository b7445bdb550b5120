"""A heartbeat per rank, and a time-out that names the rank that holds up the others.

    with Watchdog(run_dir / "heartbeat", rank=0, world_size=8, timeout_s=1800, node="n1") as dog:
        dog.beat(step, "data")

Ranks see each other through files alone, so this works with NCCL and gloo, in any phase, and while
the main thread hangs in a collective. A daemon thread writes `rank_00000.json` (a `Heartbeat`) at
a fixed interval. Until two steps are done, which compilers and the first batches delay, rank 0 logs
who is behind after half a minute, and then ever more rarely. After half the time-out without a
beat, one rank logs who is behind (`slow.json`); at the time-out one rank prints it as an error
(`hang.json`), every rank writes its stacks (`stack_rank_0.txt`) and ends with status 1, without
clean-up: nothing can interrupt a collective.

Clocks of nodes differ, so a rank is alive when its file changes between two looks; one whose main
thread never lets go of Python's global lock counts as frozen. Every rank must beat at the same
places of the program: the ranks with the fewest beats are behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Self

from sclong_ds.run_folder.heartbeats import (
    ENDED,
    HANG_FILE,
    SLOW_FILE,
    Heartbeat,
    _sentence,
    read_heartbeats,
    read_json,
    who_is_behind,
    write_heartbeat,
)

log = logging.getLogger(__name__)

PATIENCE = 4
"""Saving, callbacks and the baselines of a fine-tuning may take this many times engine.timeout_s.
Collectives wait twice as long: the watchdog, which names the slow rank, must come first."""
_FIRST_NOTICE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Beat:
    step: int
    phase: str
    reading: Callable[[], str | None] | None
    count: int
    since: float
    limit_s: float


class Watchdog:
    """Writes this rank's heartbeat and watches its progress; a context manager.

    Args:
        folder: The run's `heartbeat` folder, shared by all ranks; made if absent.
        rank: This rank.
        world_size: Number of ranks.
        timeout_s: Seconds without a beat after which the run ends. Collectives must have a longer
            time-out of their own, or they end the run first, without a name.
        node: Name of this node.
    """

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, timeout_s: float, node: str
    ) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._timeout_s, self._node = timeout_s, node
        # 1,000 ranks write 50 small files a second between them; within a time-out of minutes this
        # is often enough to see which ranks run.
        self._interval_s = min(timeout_s / 8, max(10.0, world_size / 50))
        self._beat = _Beat(0, "start", None, 0, time.monotonic(), timeout_s)
        self._written = 0
        self._first: int | None = None
        self._told, self._notice_s = self._beat, _FIRST_NOTICE_S
        self._files_fail = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        # What an earlier start left would be taken for this one's.
        for name in (SLOW_FILE, HANG_FILE, self._stack_name()):
            (self._folder / name).unlink(missing_ok=True)
        if self._rank == 0:
            for path in self._folder.glob("rank_*.json"):
                rank = path.stem.removeprefix("rank_")
                if not (rank.isdecimal() and int(rank) < self._world_size):
                    path.unlink(missing_ok=True)
        self._write_heartbeat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.beat(self._beat.step, ENDED)
        self._write_heartbeat()

    def beat(
        self,
        step: int,
        phase: str,
        *,
        reading: Callable[[], str | None] | None = None,
        patience: float = 1.0,
    ) -> None:
        """Tell what this rank begins to do; as cheap as setting an attribute.

        Args:
            step: Optimizer step, from 1.
            phase: What begins: data, forward, backward, step, checkpoint, validation, ...
            reading: Tells what is being read at the moment it is called.
            patience: This phase may take so many times the time-out, at least 1; all ranks give
                the same number, since they wait for each other.
        """
        limit_s = patience * self._timeout_s
        self._beat = _Beat(step, phase, reading, self._beat.count + 1, time.monotonic(), limit_s)

    def _watch(self) -> None:
        """Write and look until stopped; runs on the daemon thread."""
        warned: _Beat | None = None
        claimed = False
        while not self._stop.wait(self._interval_s):
            self._write_heartbeat()
            if read_json(self._folder / HANG_FILE):
                self._end()
            beat = self._beat
            self._tell_of_first_steps(beat)
            if claimed and beat is not warned:
                self._release(SLOW_FILE)
                claimed = False
            stalled_s = time.monotonic() - beat.since
            # Two looks at the others take two intervals; the second is at the time-out.
            if stalled_s >= beat.limit_s - 2 * self._interval_s:
                self._end_if_hung(beat, stalled_s)
            elif stalled_s >= beat.limit_s / 2 and beat is not warned:
                warned = beat
                claimed = self._claim(SLOW_FILE)
                if claimed:
                    self._warn_if_slow(beat)
        if claimed:
            self._release(SLOW_FILE)

    def _tell_of_first_steps(self, beat: _Beat) -> None:
        """Log on rank 0 who is behind in the first steps of a start."""
        if self._first is None and beat.count:
            self._first = beat.step
        if self._rank or (self._first is not None and beat.step > self._first + 1):
            return
        if beat is not self._told:
            self._told, self._notice_s = beat, _FIRST_NOTICE_S
        if time.monotonic() - beat.since >= self._notice_s:
            self._notice_s *= 2
            found = read_heartbeats(self._folder) | {self._rank: self._heartbeat()}
            text = who_is_behind({}, found, world_size=self._world_size)
            log.warning("%s; the run ends after %.0f s without progress", text, beat.limit_s)

    def _warn_if_slow(self, beat: _Beat) -> None:
        text = self._diagnose(beat)
        if text is not None:
            log.warning("%s; the run ends after %.0f s without progress", text, beat.limit_s)
            self._write(SLOW_FILE, {"text": text, "time": time.time()})

    def _end_if_hung(self, beat: _Beat, stalled_s: float) -> None:
        """Report and end the process, unless another rank reports or there is progress."""
        if self._claim(HANG_FILE):
            text = self._diagnose(beat)
            if text is None:
                self._release(HANG_FILE)
                return
        elif stalled_s >= beat.limit_s + 4 * self._interval_s:
            # The rank that was to report is gone: log at least what is known here.
            text = _sentence([self._heartbeat()], alive=True)
        else:
            return
        error = f"{text}; all ranks stop; start the same command again to resume"
        # Straight to the descriptor: the main thread may hang with the lock of sys.stderr.
        os.write(2, f"error: {error}\n".encode())
        self._write(HANG_FILE, {"error": error, "time": time.time()})
        self._end()

    def _end(self) -> NoReturn:
        try:
            with (self._folder / self._stack_name()).open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            self._complain(error)
        # The end of one process makes a launcher kill the others: they write their stacks first.
        time.sleep(2 * self._interval_s)
        os._exit(1)

    def _diagnose(self, beat: _Beat) -> str | None:
        """Look at all ranks twice and return which is behind; None: this rank has moved on."""
        before = read_heartbeats(self._folder)
        looked_at = time.monotonic()
        if self._moves(beat, until=lambda: time.monotonic() - looked_at >= 2 * self._interval_s):
            return None
        after = read_heartbeats(self._folder) | {self._rank: self._heartbeat()}
        return who_is_behind(before, after, world_size=self._world_size)

    def _moves(self, beat: _Beat, *, until: Callable[[], bool]) -> bool:
        """Wait until something holds, still writing; tells whether this rank moved on meanwhile."""
        while not until():
            if self._stop.wait(self._interval_s / 2) or self._beat is not beat:
                return True
            self._write_heartbeat()
        return False

    def _stack_name(self) -> str:
        return f"stack_rank_{self._rank}.txt"

    def _heartbeat(self) -> Heartbeat:
        beat = self._beat
        return Heartbeat(
            rank=self._rank,
            node=self._node,
            pid=os.getpid(),
            step=beat.step,
            phase=beat.phase,
            phase_s=round(time.monotonic() - beat.since, 1),
            beats=beat.count,
            reading=beat.reading() if beat.reading else None,
            written=self._written,
            interval_s=self._interval_s,
        )

    def _write_heartbeat(self) -> None:
        self._written += 1
        self._write(f"rank_{self._rank:05d}.json", asdict(self._heartbeat()))

    def _write(self, name: str, content: Mapping[str, object]) -> None:
        """Write a file of the folder; that it cannot be written is logged once."""
        try:
            write_heartbeat(self._folder / name, content, rank=self._rank)
        except OSError as error:
            self._complain(error)

    def _claim(self, name: str) -> bool:
        """Tell whether this rank is the first to make a file, so that one rank speaks for all."""
        try:
            os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError as error:
            self._complain(error)
        return True

    def _release(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()

    def _complain(self, error: OSError) -> None:
        """Log the first failure: training continues without heartbeats."""
        if not self._files_fail:
            self._files_fail = True
            log.warning("rank %d: no heartbeat, hangs are not seen: %s", self._rank, error)
