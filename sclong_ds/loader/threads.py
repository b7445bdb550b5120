"""The threads behind a `CellLoader`: some read chunks ahead, one assembles batches.

A step's buffers are used again: they go from the training loop back to the assembling thread. There
are `prefetch_batches` + 2 of them, which bounds what is assembled ahead; `sclong_ds.loader.reading`
bounds what is read ahead. Without prefetching nothing can overlap: the caller assembles its batches
itself, in one buffer that stays in the cache.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sclong_ds.command_line import check_positive, check_whole
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.batches import Buffer, CellBatch, OwnedBuffer, StepBatch, assemble
from sclong_ds.loader.order import CellOrder
from sclong_ds.loader.pool import CellPool
from sclong_ds.loader.reading import VISIT_BYTES, ChunkReader, StoppedError
from sclong_ds.loader.shares import Share

log = logging.getLogger(__name__)

Output = Literal["packed", "csr", "dense", "dense_norm"]
OnDamage = Literal["stop", "skip"]
"""stop: a damaged chunk is an error. skip: its cells are delivered without counts, until they are
more than a tenth of what a rank got; a missing file is an error all the same."""
OUTPUTS = ("packed", "csr", "dense", "dense_norm")
MOST_CELLS = 2**62
"""Largest position of a stream."""
WAIT_WARNING_S = 30.0
_REMOTE_AHEAD = 24  # more chunks: an answer takes as long as reading many from a disk
_MOST_SKIPPED = 0.1
_JOIN_S = 10.0  # a thread that hangs on a dead disk is left behind: it is a daemon


@dataclass(frozen=True, slots=True, eq=False)
class LoaderPlan:
    """What a loader was asked to do."""

    corpus: Corpus
    stream: CellOrder
    rank: int
    world_size: int
    batch: int
    micro: int
    prefetch_batches: int
    output: Output
    target_sum: float | None
    on_damage: OnDamage
    stop_at: int | None
    finish: Callable[[CellBatch], Any] | None
    allocate: Callable[[int], NDArray[np.uint8]]
    owned: bool
    memory_bytes: int | None
    read_threads: int
    columns: tuple[str, ...] = ()
    order: Callable[..., CellOrder] | None = None
    """Makes the stream for a `memory_bytes`; None: it is the caller's."""

    def __post_init__(self) -> None:
        if self.batch % (self.micro * self.world_size):
            raise ValueError(
                f"engine.train_batch_size {self.batch} must be a multiple of "
                f"engine.train_micro_batch_size_per_gpu {self.micro} x {self.world_size} ranks"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank}: allowed are 0 to {self.world_size - 1}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output '{self.output}': allowed are {', '.join(OUTPUTS)}")
        if (self.output == "dense_norm") != (self.target_sum is not None):
            raise ValueError(
                f"target_sum {self.target_sum} with output '{self.output}': dense_norm needs it, "
                "the others deliver raw counts and would ignore it"
            )
        if self.target_sum is not None:
            check_positive("target_sum", self.target_sum)
        if self.on_damage not in ("stop", "skip"):
            raise ValueError(f"on_damage '{self.on_damage}': allowed are stop and skip")
        for name in self.columns:
            if name not in self.corpus.columns:
                raise ValueError(
                    f"columns: {self.corpus.location} has no column '{name}', it has "
                    f"{', '.join(sorted(self.corpus.columns))}"
                )

    def check_start(self, cells_seen: int) -> int:
        """Return the position of the first visit, and check what depends on it.

        Raises:
            ValueError: No position, one after the end, or too little memory.
        """
        cells_seen = check_whole("cells_seen", cells_seen, least=0, most=MOST_CELLS)
        if self.stop_at is not None and self.stop_at < cells_seen:
            raise ValueError(
                f"stop_at {self.stop_at}: the stream begins at cells_seen {cells_seen}; give "
                f"{cells_seen} or more, or None for no end"
            )
        if self.memory_bytes is not None:
            share = self.share(cells_seen)
            if self.places_in_memory(share) < self.least_places(share):
                raise ValueError(self._too_little_memory(share, cells_seen))
        return cells_seen

    def check_skipped(self, skipped: int, visits: int) -> None:
        """Check how much of what a loader delivered was without counts.

        One damaged chunk is the more of it the earlier it comes, so it is looked at after 32
        batches, and 20 chunks or an epoch.

        Args:
            skipped: Cells that this rank got without counts.
            visits: Cells that all ranks got.

        Raises:
            ValueError: More than a tenth.
        """
        n_chunks = self.world_size * 20 * self.stream.epoch_visits // (len(self.corpus.chunk_rows))
        few = max(32 * self.batch, min(n_chunks, self.stream.epoch_visits))
        own = visits // self.world_size
        if visits >= few and skipped > _MOST_SKIPPED * own:
            raise ValueError(
                f"{self.corpus.location}: {skipped} of {own} cells that this rank got are damaged "
                f"and were skipped, more than {_MOST_SKIPPED:.0%}; restore the corpus "
                "(python -m data_prep verify CORPUS lists all damage)"
            )

    @property
    def steps_in_memory(self) -> int:
        """Steps whose buffers exist."""
        return self.prefetch_batches + 2 if self.prefetch_batches else 1

    def share(self, start: int) -> Share:
        """Return the visits of the rank from a position on."""
        return Share(
            self.stream, start=start, stop=self.stop_at, batch=self.batch, micro=self.micro,
            rank=self.rank, world_size=self.world_size,
        )  # fmt: skip

    def least_places(self, share: Share) -> int:
        """Return how many chunks of a rank are in use at a time."""
        least, _ = self.stream.chunks_in_use(len(share.lanes))
        return min(least, 2 * (len(self.corpus.chunk_rows) - 1))

    def places(self, share: Share) -> int:
        """Return how many chunks of a rank to hold in memory.

        Args:
            share: Of the rank.
        """
        _, enough = self.stream.chunks_in_use(len(share.lanes))
        enough += 0 if self.corpus.location.is_local else _REMOTE_AHEAD
        enough = min(enough, 2 * (len(self.corpus.chunk_rows) - 1))
        return enough if self.memory_bytes is None else min(enough, self.places_in_memory(share))

    def places_in_memory(self, share: Share) -> int:
        """Return for how many chunks of a rank `memory_bytes` leaves room."""
        assert self.memory_bytes is not None
        return (self.memory_bytes - self._step_bytes(share)) // self._chunk_bytes

    def needed_bytes(self, share: Share) -> int:
        """Return the least `memory_bytes` of a rank."""
        return self._step_bytes(share) + self.least_places(share) * self._chunk_bytes

    @property
    def _chunk_bytes(self) -> int:
        return chunk_bytes(self.corpus, self.stream.epoch_visits)

    def _step_bytes(self, share: Share) -> int:
        """Return about how much memory the steps of a rank take, with what is being read."""
        steps = self.steps_in_memory * share.size * step_bytes_a_cell(self.corpus, self.output)
        # A thread holds a stored chunk while it reads it.
        return steps + self.read_threads * self.corpus.chunk_entries

    def _too_little_memory(self, share: Share, cells_seen: int) -> str:
        """Return what to do about it."""
        cure = -(-self.needed_bytes(share) // 10**6)
        while self.order is not None:
            # Of more memory the order may make more lanes, which need more.
            more = replace(self, stream=self.order(memory_bytes=cure * 10**6))
            needed = more.needed_bytes(more.share(cells_seen))
            if needed <= cure * 10**6:
                break
            cure = -(-needed // 10**6)
        return (
            f"memory_bytes={self.memory_bytes}: this rank has {self.least_places(share)} chunks of "
            f"{self._chunk_bytes / 1e6:.1f} MB in use at a time, and {self.steps_in_memory} steps "
            f"of {share.size} cells ({self._step_bytes(share) / 1e6:.0f} MB with what is being "
            f"read): set memory_bytes={cure * 10**6} (data.loader_memory: {cure} MB), or use more "
            "ranks"
        )


def chunk_bytes(corpus: Corpus, epoch_visits: int | None = None) -> int:
    """Return about how much memory a chunk takes: its bytes, and what is known of its visits.

    Args:
        corpus: The corpus, whose mean cells of a chunk count.
        epoch_visits: Visits of an epoch to the training cells; None: one to each.
    """
    cells, trained = len(corpus), len(corpus.splits["train"])
    visits = cells / max(1, len(corpus.chunk_rows) - 1)
    if epoch_visits is not None and trained:
        visits *= max(1.0, epoch_visits / trained)
    return 2 * corpus.chunk_entries + round(visits * VISIT_BYTES)


def step_bytes_a_cell(corpus: Corpus, output: Output = "packed") -> int:
    """Return about how much memory a cell takes in the buffers of a step.

    Args:
        corpus: The corpus, whose mean cell counts.
        output: As for `CellLoader`.
    """
    if output in ("dense", "dense_norm"):
        return 4 * corpus.n_genes
    values = corpus.cells.n_values // max(1, len(corpus))
    return 10 * values if output == "csr" else 16 + 3 * values


class LoaderThreads:
    """The threads of a loader from one position on, and the queues between them."""

    def __init__(self, plan: LoaderPlan, start: int) -> None:
        self.pid = os.getpid()
        self._plan, self._start, self._stopped = plan, start, False
        self._share = plan.share(start)
        self._reader = ChunkReader(
            plan.corpus, plan.stream, self._share, start=start, stop=plan.stop_at,
            batch=plan.batch, places=plan.places(self._share), on_damage=plan.on_damage,
            ahead=plan.prefetch_batches > 0,
        )  # fmt: skip
        # Each has one thread that waits for it. The number of buffers bounds these queues.
        # The buffers given back last are taken first: they may still be in the cache.
        self._free_steps: queue.LifoQueue[list[Buffer] | None] = queue.LifoQueue()
        self._steps: queue.SimpleQueue[tuple[list[Buffer], StepBatch] | BaseException] = (
            queue.SimpleQueue()
        )
        self._lent: list[Buffer] | None = None
        micro_batches = self._share.size // plan.micro
        free: deque[NDArray[np.uint8]] = deque(maxlen=plan.steps_in_memory * micro_batches)
        self._buffers = [
            [
                OwnedBuffer(plan.allocate, free) if plan.owned else Buffer(plan.allocate)
                for _ in range(micro_batches)
            ]
            for _ in range(plan.steps_in_memory)
        ]
        for buffers in self._buffers:
            self._free_steps.put(buffers)
        self._assembled = self._assemble_steps()
        works: list[tuple[str, Callable[[], None]]] = [
            ("cells-read", self._reader.work) for _ in range(plan.read_threads)
        ]
        if plan.prefetch_batches:
            works.append(("cells-assemble", self._assemble_ahead))
        self._running = [
            threading.Thread(target=work, name=name, daemon=True) for name, work in works
        ]
        for thread in self._running:
            thread.start()

    @property
    def reading(self) -> str | None:
        """What is being read at this moment."""
        return self._reader.reading

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
        self._reader.stop()
        self._free_steps.put(None)

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in self._running:
            thread.join(timeout=_JOIN_S)

    def _get(self, source: queue.SimpleQueue[Any] | queue.LifoQueue[Any]) -> Any:
        """Wait for an item; one that takes long is said to, with what is being read."""
        started = time.monotonic()
        while True:
            try:
                item = source.get(timeout=WAIT_WARNING_S)
                break
            except queue.Empty:
                self._say_waiting(started)
        if self._stopped:
            raise StoppedError
        if isinstance(item, BaseException):
            raise item
        return item

    def _say_waiting(self, started: float) -> None:
        """Log what the training loop waits for; its own threads may wait as long as they like."""
        if threading.current_thread() in self._running:
            return
        reading = self.reading
        log.warning(
            "waiting for cells since %.0f s: %s",
            time.monotonic() - started,
            f"reading {reading}" if reading else "assembling a batch",
        )

    def _assemble_ahead(self) -> None:
        try:
            if self._plan.output in ("dense", "dense_norm"):
                self._touch_memory()
            for item in self._assembled:
                self._steps.put(item)
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001
            # Whatever it is: the training loop waits for this thread and must learn of its end.
            self._steps.put(error)

    def _touch_memory(self) -> None:
        """Let the memory of all dense batches come, which takes longer than to assemble one."""
        size = 4 * self._plan.micro * self._plan.corpus.n_genes
        # All at a time: an owned block that is let go is the next one's.
        for block in [b.reserve(size) for buffers in self._buffers for b in buffers]:
            block.fill(0)

    def _assemble_steps(self) -> Iterator[tuple[list[Buffer], StepBatch]]:
        plan, number, position = self._plan, 0, self._start
        while plan.stop_at is None or position < plan.stop_at:
            buffers: list[Buffer] = self._get(self._free_steps)
            end = position + plan.batch
            end = end if plan.stop_at is None else min(end, plan.stop_at)
            started = time.monotonic()
            while not self._reader.wait_for(end, timeout_s=WAIT_WARNING_S):
                self._say_waiting(started)
            batches, first = [], number * self._share.size
            sizes = self._share.micro_batches(number)
            for j, (n, buffer) in enumerate(zip(sizes, buffers, strict=True)):
                batches.append(self._micro_batch(first + j * plan.micro, n, buffer))
            self._reader.release(end)
            skipped = sum(int(b.skipped.sum()) for b in batches if b.skipped is not None)
            yield (
                buffers,
                StepBatch(batches, end - position, self._ids(batches, position, end), skipped),
            )
            number, position = number + 1, end

    def _ids(
        self, batches: list[CellBatch], start: int, stop: int
    ) -> Callable[[], NDArray[np.int64]]:
        """Return what finds the cells of a global batch."""
        stream = self._plan.stream
        if self._plan.world_size > 1:
            return functools.cache(lambda: stream.between(start, stop).rows)

        @functools.cache
        def own_rows() -> NDArray[np.int64]:
            places = stream.places(
                start, micro_batch_size=self._plan.micro, world_size=1, batch=self._plan.batch
            )
            # Where the stream ends within the batch, the last ones are left out of the order of
            # places.
            order = np.argsort(np.argsort(places[: stop - start]))
            return np.concatenate([b.cell_ids for b in batches])[order]

        return own_rows

    def _micro_batch(self, first: int, n: int, buffer: Buffer) -> CellBatch:
        plan, reader = self._plan, self._reader
        visits = reader.visits(first, first + n)
        pool = CellPool(
            reader.gap, reader.count, visits.start, visits.entries, visits.nnz, visits.total
        )
        rows = visits.rows.copy()
        try:
            counts = assemble(
                pool, buffer, output=plan.output, n_genes=plan.corpus.n_genes,
                target_sum=plan.target_sum,
            )  # fmt: skip
        except ValueError as error:
            here = ", ".join(map(str, rows[:4]))
            raise ValueError(
                f"{plan.corpus.location}: rows {here}, ...: {error}; "
                f"run: python -m data_prep verify {plan.corpus.location}"
            ) from None
        batch = CellBatch(
            counts, rows, visits.positions // plan.stream.epoch_visits,
            visits.passes.copy(), visits.damaged.copy(), None,
            {name: plan.corpus.columns[name].codes(rows) for name in plan.columns},
        )  # fmt: skip
        return batch if plan.finish is None else replace(batch, extra=plan.finish(batch))
