"""Reads the chunks of a rank's cells ahead of their use, with one or more threads.

Chunks are read into places of one large buffer that are used again. For each visit of the rank a
table holds where its cell lies in the buffer, in the order of the batches, so that a batch is put
together from a slice of the table. A place is free again when the last visit that needs its chunk
has been assembled. The places and the length of the table bound what is read ahead; a chunk that
the batch being waited for needs is read in any case, and the buffer or the table grown for it.

Threads take the chunks in the order in which they are needed, so errors come in this order too.
"""

from __future__ import annotations

import functools
import heapq
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.batches import empty_bytes
from sclong_ds.loader.order import CellOrder, ChunkRead
from sclong_ds.loader.pool import compiled
from sclong_ds.loader.shares import Share

log = logging.getLogger(__name__)

_TABLE_LIVES = 3  # the table covers as many times the visits that the first chunk is in use for


class StoppedError(Exception):
    """Ends what waits for cells of a loader that was told to stop."""


@functools.cache
def say_skipped(damage: str) -> None:
    """Log that cells are read without their counts, once a process for each damaged chunk."""
    log.warning("%s. Cells read with it are skipped: they go through without counts", damage)


class VisitTable(NamedTuple):
    """What is known of visits; all arrays are (visits,)."""

    rows: NDArray[np.int64]
    passes: NDArray[np.int64]
    positions: NDArray[np.int64]
    start: NDArray[np.int64]
    """First entry of the cell in the buffer."""
    total: NDArray[np.int64]
    entries: NDArray[np.uint32]
    nnz: NDArray[np.uint32]
    damaged: NDArray[np.bool_]


_TYPES = (*[np.int64] * 5, np.uint32, np.uint32, np.bool_)
"""Of the arrays of `VisitTable`."""

VISIT_BYTES = (_TABLE_LIVES + 1) * sum(np.dtype(dtype).itemsize for dtype in _TYPES)
"""Memory that the table takes for a visit to a chunk in use: as many times as the table covers it,
and once more while the table grows."""


def _table_of(length: int) -> tuple[NDArray[Any], ...]:
    return tuple(np.zeros(length, dtype) for dtype in _TYPES)


@dataclass(slots=True, eq=False)
class _Task:
    """A chunk that a thread has taken."""

    read: ChunkRead
    place: int
    done: bool = False
    error: BaseException | None = None
    reading: str | None = None


class ChunkReader:
    """The threads that read for one rank from a position on.

    Attributes:
        gap: (places * chunk_entries,) the buffer, see `CellPool`.
        count: The same.
    """

    def __init__(
        self,
        corpus: Corpus,
        stream: CellOrder,
        share: Share,
        *,
        start: int,
        stop: int | None,
        batch: int,
        places: int,
        on_damage: Literal["stop", "skip"],
        ahead: bool = True,
    ) -> None:
        """Make the buffer; nothing is read before `work`.

        Args:
            corpus: Where the cells are.
            stream: Their order.
            share: The visits of the rank.
            start: Position to start at.
            stop: Position to end at; None: never.
            batch: Visits of a batch of all ranks.
            places: Chunks that the buffer holds.
            on_damage: As for `CellLoader`.
            ahead: Read chunks before a batch waits for them.
        """
        self._corpus, self._share, self._start, self._batch = corpus, share, start, batch
        self._on_damage, self._ahead = on_damage, ahead
        self._chunk_rows = np.asarray(corpus.chunk_rows)
        self._reads = stream.reads(start, stop=stop, lanes=share.lanes)
        self._size = corpus.chunk_entries
        self.gap, self.count = (empty_bytes(places * self._size) for _ in range(2))
        self._free = list(range(places))[::-1]
        self._in_use: list[tuple[int, int]] = []  # heap of (last position, place)
        self._table = _table_of(share.size)
        self._length = share.size
        self._changed = threading.Condition()
        self._open: deque[_Task] = deque()
        self._in_flight, self._stopped = 0, False
        self._failed: BaseException | None = None
        self._next: ChunkRead | None = None
        self._begun = False
        self._wanted = self._used = start

    @property
    def reading(self) -> str | None:
        """What is being read at this moment, of all threads what is needed first."""
        with self._changed:
            return next((task.reading for task in self._open if task.reading), None)

    def work(self) -> None:
        """Read chunks until the end of the stream; what each of the threads does."""
        while (task := self._take()) is not None:
            try:
                self._load(task)
            except BaseException as error:  # noqa: BLE001
                # Whatever it is: what waits for this chunk must learn of it.
                task.error = error
            with self._changed:
                task.reading, self._in_flight = None, self._in_flight - 1
                if task.error is None:
                    task.done = True
                    heapq.heappush(self._in_use, (task.read.last, task.place))
                front = self._front()
                failed = bool(self._open) and self._open[0].error is not None
                if failed or front >= self._wanted:
                    self._changed.notify_all()

    def wait_for(self, position: int, *, timeout_s: float) -> bool:
        """Wait until all visits before a position are in the table; False: it took too long.

        Raises:
            StoppedError: The reader was stopped.
            DamagedChunk: One of their chunks is damaged.
            OSError: One of their chunks cannot be read.
        """
        with self._changed:
            self._wanted = position
            if self._next is not None and self._next.first < position:
                self._changed.notify_all()
            while not self._covers(position):
                if not self._changed.wait(timeout_s):
                    return False
        return True

    def visits(self, first: int, last: int) -> VisitTable:
        """Return the visits of the share from number `first` to `last` - 1, all of one batch.

        Views, overwritten after `release`.
        """
        place = first % self._length
        return VisitTable._make(column[place : place + last - first] for column in self._table)

    def release(self, position: int) -> None:
        """Let go of what only visits before a position need."""
        with self._changed:
            self._used = position
            while self._in_use and self._in_use[0][0] < position:
                self._free.append(heapq.heappop(self._in_use)[1])
            # Waking a thread that has nothing to do costs two changes between threads.
            if self._next is not None and self._fits(self._next):
                self._changed.notify_all()

    def stop(self) -> None:
        """Tell the threads and what waits for them to end, without waiting for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _front(self) -> float:
        """Return the position before which all visits are in the table."""
        while self._open and self._open[0].done:
            self._open.popleft()
        if self._open:
            return self._open[0].read.first
        if not self._begun:
            return self._start
        return np.inf if self._next is None else self._next.first

    def _covers(self, position: int) -> bool:
        """Return whether all visits before a position are in the table, see `wait_for`."""
        if self._stopped:
            raise StoppedError
        front = self._front()
        # What was read ahead and failed does not concern the steps before it.
        error = self._open[0].error if self._open else self._failed
        if error is not None and (not self._open or front < position):
            raise error
        return front >= position

    def _take(self) -> _Task | None:
        """Wait for a chunk that is to be read; None: there are no more."""
        with self._changed:
            if not self._begun:
                self._begun = True
                self._advance()
            while not self._stopped and self._next is not None:
                read = self._next
                if not self._fits(read) and read.first < self._wanted and not self._in_flight:
                    self._grow(read)
                if self._fits(read):
                    task = _Task(read, self._free.pop())
                    self._open.append(task)
                    self._in_flight += 1
                    self._advance()
                    return task
                self._changed.wait()
            self._changed.notify_all()
            return None

    def _advance(self) -> None:
        try:
            self._next = next(self._reads, None)
        except BaseException as error:  # noqa: BLE001
            self._failed, self._next = error, None

    def _batches_until(self, read: ChunkRead) -> int:
        """Return the batches from the first one that is not assembled to the last of a chunk."""
        return (
            (read.last - self._start) // self._batch - (self._used - self._start) // self._batch + 1
        )

    def _fits(self, read: ChunkRead) -> bool:
        if not self._ahead and read.first >= self._wanted:
            return False
        return bool(self._free) and self._batches_until(read) * self._share.size <= self._length

    def _grow(self, read: ChunkRead) -> None:
        """Make room for a chunk; no thread is writing to the buffer or the table."""
        if not self._free:
            places = len(self.gap) // self._size
            more = empty_bytes(max(1, places // 4) * self._size)
            self.gap, self.count = (np.concatenate((b, more)) for b in (self.gap, self.count))
            self._free = list(range(places, len(self.gap) // self._size))[::-1]
        length = self._share.size * self._batches_until(read)
        if length > self._length:
            length *= _TABLE_LIVES
            first = (self._used - self._start) // self._batch * self._share.size
            numbers = np.arange(first, first + self._length)
            table = _table_of(length)
            for column, before in zip(table, self._table, strict=True):
                column[numbers % length] = before[numbers % self._length]
            self._table, self._length = table, length
        self._changed.notify_all()

    def _load(self, task: _Task) -> None:
        """Read the chunk of a task and enter its visits in the table."""
        positions, rows, passes = task.read.visits()
        numbers = self._share.numbers(positions)
        if numbers.max(initial=-1) < 0:
            return
        chunk = int(np.searchsorted(self._chunk_rows, rows[0], side="right")) - 1
        first = task.place * self._size
        here = slice(first, first + self._size)
        cells, damaged = self._read(task, chunk, (self.gap[here], self.count[here]))
        entered = _enter_visits(
            numbers, rows, passes, positions, int(self._chunk_rows[chunk]), first,
            cells.row_entries, cells.row_nnz, cells.row_total, damaged, *self._table,
        )  # fmt: skip
        if not entered:
            raise ValueError(
                f"chunk {chunk} of {self._corpus.location} has {len(cells.row_entries)} cells: "
                f"too few for the rows {rows.min()} to {rows.max()}; restore the corpus"
            )

    def _read(
        self, task: _Task, chunk: int, out: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    ) -> tuple[PackedCells, bool]:
        """Read a chunk; a damaged one that may be skipped is read as cells without counts."""
        corpus = self._corpus
        task.reading = f"chunk {chunk} of {corpus.location}"
        try:
            return corpus.read_packed(chunk, out=out), False
        except DamagedChunk as error:
            if self._on_damage == "stop" or error.missing:
                raise
            say_skipped(str(error))
            n = int(self._chunk_rows[chunk + 1] - self._chunk_rows[chunk])
            nothing = np.zeros(n, np.uint32)
            return PackedCells(
                out[0][:0], out[1][:0], nothing, nothing, nothing.astype(np.int64)
            ), True


# One pass over the visits, since chunks are short: numpy took fifteen.
@compiled
def _enter_visits(  # type: ignore[no-untyped-def]
    numbers, rows, passes, positions, first_row, first_entry, entries, nnz, total, damaged,
    to_rows, to_passes, to_positions, to_start, to_total, to_entries, to_nnz, to_damaged,
):  # fmt: skip
    starts = np.empty(len(entries), np.int64)
    place = first_entry
    for row in range(len(entries)):
        starts[row] = place
        place += entries[row]
    for k in range(len(numbers)):
        if numbers[k] < 0:
            continue
        to, row = numbers[k] % len(to_rows), rows[k] - first_row
        if not 0 <= row < len(entries):
            return False
        to_rows[to], to_passes[to], to_positions[to] = rows[k], passes[k], positions[k]
        to_start[to], to_total[to] = starts[row], total[row]
        to_entries[to], to_nnz[to], to_damaged[to] = entries[row], nnz[row], damaged
    return True
