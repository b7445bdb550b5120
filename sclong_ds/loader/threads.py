"""The threads behind a `CellLoader`: one reads groups of chunks ahead, one assembles batches.

Buffers are reused: a group's buffers from the assembling thread back to the reading one, a step's
buffers from the training loop back to the assembling thread. There are three of the former and
`prefetch_batches` + 2 of the latter, which bounds what is read ahead. Without prefetching nothing
can overlap: the caller assembles its batches itself, in one buffer that stays in the cache.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.batches import (
    Buffer,
    CellBatch,
    CsrOutput,
    DenseOutput,
    PackedOutput,
    StepBatch,
    empty_bytes,
)
from sclong_ds.loader.order import CellStream, Group, Visits
from sclong_ds.loader.pool import CellPool

log = logging.getLogger(__name__)

Output = Literal["packed", "csr", "dense", "dense_norm"]
OUTPUTS = ("packed", "csr", "dense", "dense_norm")
WAIT_WARNING_S = 30.0
_GROUPS_IN_MEMORY = 3  # in use, and read ahead: the last of an epoch may be small, and the next
_JOIN_S = 10.0  # a thread that hangs on a dead disk is left behind: it is a daemon


@functools.cache
def say_skipped(damage: str) -> None:
    """Log that cells are read without their counts, once a process for each damaged chunk."""
    log.warning("%s. Cells read with it are skipped: they go through without counts", damage)


@dataclass(frozen=True, slots=True, eq=False)
class LoaderPlan:
    """What a loader was asked to do."""

    corpus: Corpus
    stream: CellStream
    rank: int
    world_size: int
    batch: int
    micro: int
    prefetch_batches: int
    output: Output
    target_sum: float | None
    on_damage: Literal["stop", "skip"]
    stop_at: int | None
    finish: Callable[[CellBatch], Any] | None
    allocate: Callable[[int], NDArray[np.uint8]]

    def __post_init__(self) -> None:
        if min(self.batch, self.micro, self.world_size) < 1:
            raise ValueError(
                f"batch {self.batch}, micro-batch {self.micro}, {self.world_size} ranks: each must "
                "be at least 1"
            )
        if self.batch % (self.micro * self.world_size):
            raise ValueError(
                f"engine.train_batch_size {self.batch} must be a multiple of "
                f"engine.train_micro_batch_size_per_gpu {self.micro} x {self.world_size} ranks"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank}: allowed are 0 to {self.world_size - 1}")
        if self.prefetch_batches < 0:
            raise ValueError(f"prefetch_batches {self.prefetch_batches}: must be at least 0")
        if self.output not in OUTPUTS:
            raise ValueError(f"output '{self.output}': allowed are {', '.join(OUTPUTS)}")
        if (self.output == "dense_norm") != (self.target_sum is not None):
            raise ValueError(
                f"target_sum {self.target_sum} with output '{self.output}': dense_norm needs it, "
                "the others deliver raw counts and would ignore it"
            )
        if self.on_damage not in ("stop", "skip"):
            raise ValueError(f"on_damage '{self.on_damage}': allowed are stop and skip")


class _Stopped(Exception):
    """Ends a thread that was told to stop."""


@dataclass(frozen=True, slots=True, eq=False)
class _GroupBuffers:
    """Room for the bytes of a group of chunks."""

    gap: NDArray[np.uint8]
    count: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class _LoadedGroup:
    """A group in memory: its pool, and for each visit the cell in the pool."""

    start: int
    """Position of the first visit, at or after the loader's start."""
    pool: CellPool
    cells: NDArray[np.int64]
    damaged: NDArray[np.bool_]
    """(visits,)"""
    buffers: _GroupBuffers


class LoaderThreads:
    """The two threads of a loader from one position on, and the queues between them."""

    def __init__(self, plan: LoaderPlan, start: int) -> None:
        self.pid = os.getpid()
        self.reading: str | None = None
        self._plan, self._start, self._stopped = plan, start, False
        self._chunk_rows = np.asarray(plan.corpus.chunk_rows)
        # Each has one thread that waits for it. The number of buffers bounds these queues.
        self._free_groups: queue.SimpleQueue[_GroupBuffers | None] = queue.SimpleQueue()
        self._groups: queue.SimpleQueue[_LoadedGroup | BaseException | None] = queue.SimpleQueue()
        # The buffers given back last are taken first: they may still be in the cache.
        self._free_steps: queue.LifoQueue[list[Buffer] | None] = queue.LifoQueue()
        self._steps: queue.SimpleQueue[tuple[list[Buffer], StepBatch] | BaseException] = (
            queue.SimpleQueue()
        )
        self._lent: list[Buffer] | None = None
        self._group: _LoadedGroup | None = None
        chunks = min(plan.stream.group_chunks, len(self._chunk_rows) - 1)
        group_bytes = chunks * plan.corpus.chunk_entries
        for _ in range(_GROUPS_IN_MEMORY):
            self._free_groups.put(_GroupBuffers(empty_bytes(group_bytes), empty_bytes(group_bytes)))
        self._micro_batches = plan.batch // (plan.micro * plan.world_size)
        self._buffers = [
            [Buffer(plan.allocate) for _ in range(self._micro_batches)]
            for _ in range(plan.prefetch_batches + 2 if plan.prefetch_batches else 1)
        ]
        for buffers in self._buffers:
            self._free_steps.put(buffers)
        self._assembled = self._assemble_steps()
        works: list[tuple[str, Callable[[], None], queue.SimpleQueue[Any]]] = [
            ("cells-read", self._read_groups, self._groups)
        ]
        if plan.prefetch_batches:
            works.append(("cells-assemble", self._assemble_ahead, self._steps))
        self._running = [
            threading.Thread(target=self._guarded, args=(work, report), name=name, daemon=True)
            for name, work, report in works
        ]
        for thread in self._running:
            thread.start()

    def next_step(self) -> StepBatch:
        """Return the next step, and take back the buffers of the one before."""
        if self._lent is not None:
            self._free_steps.put(self._lent)
            self._lent = None
        if self._plan.prefetch_batches:
            self._lent, step = self._get(self._steps)
        else:
            self._lent, step = next(self._assembled)
        return step

    def stop(self) -> None:
        """Tell the threads to end, without waiting for them."""
        if self.pid != os.getpid():
            # They are the parent's, and a lock of its queues may have been held at the fork.
            return
        self._stopped = True
        for waited_for in (self._free_groups, self._groups, self._free_steps):
            waited_for.put(None)

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in self._running:
            thread.join(timeout=_JOIN_S)

    def _guarded(
        self, work: Callable[[], None], report: queue.SimpleQueue[BaseException | Any]
    ) -> None:
        try:
            work()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001
            # Whatever it is: the training loop waits for this thread and must learn of its end.
            report.put(error)

    def _get(self, source: queue.SimpleQueue[Any] | queue.LifoQueue[Any]) -> Any:
        """Wait for an item; one that takes long is said to, with what is being read."""
        started = time.monotonic()
        while True:
            try:
                item = source.get(timeout=WAIT_WARNING_S)
                break
            except queue.Empty:
                if threading.current_thread() not in self._running:
                    log.warning(
                        "waiting for cells since %.0f s: %s",
                        time.monotonic() - started,
                        f"reading {self.reading}" if self.reading else "assembling a batch",
                    )
        if self._stopped:
            raise _Stopped
        if isinstance(item, BaseException):
            raise item
        return item

    def _read_groups(self) -> None:
        stop_at = self._plan.stop_at
        for group in self._plan.stream.groups(self._start):
            if stop_at is not None and group.start >= stop_at:
                return
            self._groups.put(self._load(group, self._get(self._free_groups)))

    def _load(self, group: Group, buffers: _GroupBuffers) -> _LoadedGroup:
        """Read the chunks of a group that hold visits between the loader's start and end."""
        skip, stop_at = max(0, self._start - group.start), self._plan.stop_at
        rows = group.rows[skip : None if stop_at is None else stop_at - group.start]
        chunk_of = np.searchsorted(self._chunk_rows, rows, side="right") - 1
        chunks, which = np.unique(chunk_of, return_inverse=True)
        size = self._plan.corpus.chunk_entries
        read, damaged = [], []
        for k, chunk in enumerate(chunks.tolist()):
            part = slice(k * size, (k + 1) * size)
            cells, bad = self._read(chunk, (buffers.gap[part], buffers.count[part]))
            read.append(cells)
            damaged.append(np.full(len(cells.row_nnz), bad))
        entries = np.concatenate([cells.row_entries for cells in read])
        n_cells = np.array([len(cells.row_entries) for cells in read])
        before = np.cumsum(n_cells) - n_cells
        chunk_starts = size * np.arange(len(read)) - np.concatenate(
            ([0], np.cumsum([len(cells.gap) for cells in read[:-1]], dtype=np.int64))
        )
        starts = np.cumsum(entries, dtype=np.int64) - entries + np.repeat(chunk_starts, n_cells)
        pool = CellPool(
            buffers.gap,
            buffers.count,
            starts,
            entries,
            np.concatenate([cells.row_nnz for cells in read]),
            np.concatenate([cells.row_total for cells in read]),
        )
        in_pool = before[which] + rows - self._chunk_rows[chunk_of]
        return _LoadedGroup(
            group.start + skip, pool, in_pool, np.concatenate(damaged)[in_pool], buffers
        )

    def _read(
        self, chunk: int, out: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    ) -> tuple[PackedCells, bool]:
        """Read a chunk; a damaged one that may be skipped is read as cells without counts."""
        if self._stopped:
            raise _Stopped
        corpus = self._plan.corpus
        self.reading = f"chunk {chunk} of {corpus.location}"
        try:
            return corpus.read_packed(chunk, out=out), False
        except DamagedChunk as error:
            if self._plan.on_damage == "stop":
                raise
            say_skipped(str(error))
            n = int(self._chunk_rows[chunk + 1] - self._chunk_rows[chunk])
            nothing = np.zeros(n, np.uint32)
            return PackedCells(
                out[0][:0], out[1][:0], nothing, nothing, nothing.astype(np.int64)
            ), True
        finally:
            self.reading = None

    def _assemble_ahead(self) -> None:
        if self._plan.output in ("dense", "dense_norm"):
            # Memory comes with the first touch, which takes longer than a batch: before the first.
            for buffer in (b for buffers in self._buffers for b in buffers):
                buffer.reserve(4 * self._plan.micro * self._plan.corpus.n_genes).fill(0)
        for item in self._assembled:
            self._steps.put(item)

    def _assemble_steps(self) -> Iterator[tuple[list[Buffer], StepBatch]]:
        plan = self._plan
        for visits in plan.stream.batches(self._start, size=plan.batch, stop=plan.stop_at):
            buffers: list[Buffer] = self._get(self._free_steps)
            batches = [self._micro_batch(visits, j, buffer) for j, buffer in enumerate(buffers)]
            skipped = sum(int(b.skipped.sum()) for b in batches if b.skipped is not None)
            yield buffers, StepBatch(batches, visits.rows, skipped)

    def _micro_batch(self, visits: Visits, j: int, buffer: Buffer) -> CellBatch:
        plan, n = self._plan, len(visits.rows)
        first = min((j * plan.world_size + plan.rank) * plan.micro, n)
        mine = slice(first, min(first + plan.micro, n))
        rows = visits.rows[mine]
        out = self._output(rows, buffer)
        skipped = np.zeros(len(rows), np.bool_)
        done = 0
        for group, part in self._visited(visits.start + mine.start, visits.start + mine.stop):
            cells = group.cells[part]
            try:
                out.put(group.pool, cells)
            except ValueError as error:
                here = ", ".join(map(str, rows[done : done + min(len(cells), 4)]))
                raise ValueError(
                    f"{plan.corpus.location}: rows {here}, ...: {error}; "
                    f"run: python -m data_prep verify {plan.corpus.location}"
                ) from None
            skipped[done : done + len(cells)] = group.damaged[part]
            done += len(cells)
        batch = CellBatch(out.counts(), rows, visits.epochs[mine], visits.passes[mine], skipped)
        return batch if plan.finish is None else replace(batch, extra=plan.finish(batch))

    def _visited(self, start: int, stop: int) -> Iterator[tuple[_LoadedGroup, slice]]:
        """Yield the groups, and their parts, that hold the visits `start` to `stop` - 1.

        Groups that the stream has passed give their buffers back.
        """
        while start < stop:
            if self._group is None:
                self._group = self._get(self._groups)
            group: _LoadedGroup = self._group
            end = min(stop, group.start + len(group.cells))
            if start < end:
                yield group, slice(start - group.start, end - group.start)
                start = end
            if end == group.start + len(group.cells):
                self._group = None
                self._free_groups.put(group.buffers)

    def _output(
        self, rows: NDArray[np.int64], buffer: Buffer
    ) -> PackedOutput | CsrOutput | DenseOutput:
        corpus, plan = self._plan.corpus, self._plan
        if plan.output == "packed":
            return PackedOutput(corpus.cells.row_entries[rows], buffer)
        if plan.output == "csr":
            return CsrOutput(corpus.row_nnz[rows], buffer, n_genes=corpus.n_genes)
        return DenseOutput(len(rows), buffer, n_genes=corpus.n_genes, target_sum=plan.target_sum)
