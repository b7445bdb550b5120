"""The loader: one order of cells for any number of ranks, exact resume, reading in the background.

    stream = open_stream(Corpus("CORPUS"), seed=0, lanes=256, batch=256)
    with CellLoader(corpus, stream=stream, cells_seen=0, rank=0, world_size=1,
                    train_batch_size=256, micro_batch_size=64, prefetch_batches=4) as loader:
        for step in loader: ...

Order. `sclong_ds.loader.lanes` defines one endless stream of cells (`sclong_ds.loader.order` the
one that runs of earlier versions keep). Global batch b is the visits [b * B, (b + 1) * B) of it; a
batch may hold the end of one epoch and the beginning of the next; no visit is dropped or repeated.
Each rank gets the same number of visits of every batch, and reads the chunks of those alone. The
position is one integer, the number of visits so far, valid for any number of ranks. A stream that
ends (`stop_at`) may end with a short batch: the ranks beyond its end get micro-batches without
cells, so that every rank makes the same number of steps.

Threads. Some read and decompress chunks into buffers that are used again; one gathers or decodes
this rank's cells straight into the buffers of a step. They start with the first `next`, in the
process that calls it.

Memory of a rank, in bytes: 2 * chunk_entries for each chunk that it holds (1 MB for chunks of 2^19
entries), which are its lanes and a quarter more: on W ranks with 256 lanes 320 / W, at least 5, 24
more of a remote corpus; 49 for each visit that is known ahead, up to four times the visits to those
chunks; what the threads are reading; and (prefetch_batches + 2) times this rank's share of a batch,
or once without prefetching. A cell takes packed 16 + 2 * entries, csr 8 * non-zero values, dense
4 * genes. Packed and csr buffers grow with the largest share so far, by a quarter more than needed.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sclong_ds.annotations.columns import names_of
from sclong_ds.command_line import check_whole
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.files.cores import usable_cores
from sclong_ds.loader.batches import CellBatch, StepBatch, empty_bytes
from sclong_ds.loader.lanes import LaneStream, lanes_for
from sclong_ds.loader.order import CellOrder, CellStream, CellWeights, VisitWeights
from sclong_ds.loader.threads import (
    MOST_CELLS,
    LoaderPlan,
    LoaderThreads,
    OnDamage,
    Output,
    chunk_bytes,
    step_bytes_a_cell,
)

MOST_LANES = 256
"""Chunks in use at a time on one rank, unless told otherwise: 256 MB of chunks of 2^19 entries."""
MEMORY_BYTES = 512_000_000
"""What the chunks and steps of a rank may take, unless told otherwise."""
_FROM_ZERO = {"rank", "prefetch_batches", "stop_at"}
_OPTIONAL = {"group_chunks", "lanes", "batch", "micro_batch_size", "stop_at", "memory_bytes",
             "read_threads"}  # fmt: skip
_STEPS = 6  # in memory, with the usual prefetch_batches
_READ_THREADS, _REMOTE_READ_THREADS = 4, 32  # on this machine as many as it has cores

__all__ = ["CellBatch", "CellLoader", "Output", "StepBatch", "log1p_normalise", "open_stream"]


def open_stream(
    corpus: Corpus | str | Path,
    *,
    split: str = "train",
    seed: int,
    group_chunks: int | None = None,
    lanes: int | None = None,
    batch: int | None = None,
    weights: NDArray[np.int64] | VisitWeights | None = None,
) -> CellOrder:
    """Return the order in which the cells of a split are visited.

    Args:
        corpus: The corpus, or its path or address; its chunks never straddle a split border.
        split: Name of the split.
        seed: `run.seed`.
        group_chunks: For the order by groups: chunks that are shuffled together.
        lanes: For the order by lanes: their number, see `lanes.lanes_for`.
        batch: For the order by lanes: cells of a batch.
        weights: (datasets,) fixed-point weights, see `weights.dataset_weights` and
            `weights.explicit_weights`, or those of a column; None visits every cell once an epoch.

    Raises:
        ValueError: No such split, a split without cells, weights that do not fit the corpus, or
            neither group_chunks nor both lanes and batch.
        TypeError: Neither a corpus nor its path.
    """
    corpus = opened_corpus(corpus)
    seed = check_whole("seed", seed, least=0, most=2**128 - 1)
    group_chunks, lanes, batch = _checked(
        group_chunks=group_chunks, lanes=lanes, batch=batch
    ).values()
    if split not in corpus.splits:
        raise ValueError(f"split '{split}': this corpus has {', '.join(corpus.splits)}")
    if isinstance(weights, np.ndarray):
        if weights.shape != (len(corpus.datasets),):
            raise ValueError(
                f"weights of shape {weights.shape}: the corpus has {len(corpus.datasets)} datasets"
            )
        weights = CellWeights(weights, corpus)
    cells, bounds = corpus.splits[split], np.asarray(corpus.chunk_rows)
    if not len(cells):
        there = ", ".join(name for name, found in corpus.splits.items() if len(found)) or "none"
        raise ValueError(
            f"split '{split}' of {corpus.location} has no cells; splits with cells: {there}; "
            "`python -m data_prep finalize` holds cells out with --validation-fraction and "
            "--test-fraction"
        )
    # An empty split leaves one border, or none.
    borders = np.append(bounds[(bounds >= cells.start) & (bounds < cells.stop)], cells.stop)
    if group_chunks is not None and lanes is batch is None:
        return CellStream(borders, seed=seed, group_chunks=group_chunks, weights=weights)
    if group_chunks is not None or lanes is None or batch is None:
        raise ValueError("open_stream takes lanes and batch, or group_chunks")
    return LaneStream(borders, seed=seed, lanes=lanes, batch=batch, weights=weights)


def most_lanes(
    corpus: Corpus, batch: int, *, most: int, memory_bytes: int, prefetch_batches: int = 4
) -> int:
    """Return the number of lanes of a new run, so that one rank alone can hold their chunks.

    Args:
        corpus: The corpus.
        batch: Cells of a batch.
        most: Most lanes.
        memory_bytes: What chunks and steps of a rank may take; a quarter is left for the steps, or
            what those of one rank take.
        prefetch_batches: As for `CellLoader`.
    """
    steps = max(_STEPS, prefetch_batches + 2) * batch * step_bytes_a_cell(corpus)
    steps += _threads_for(corpus) * corpus.chunk_entries
    fitting = (memory_bytes - max(memory_bytes // 4, steps)) // chunk_bytes(corpus) - 1
    return lanes_for(batch, most=max(1, min(most, fitting)))


class CellLoader:
    """Iterate over the optimizer steps of one rank from a position on.

    The arrays of a step are valid until the next call of `next`, which lets a thread overwrite
    them, unless they are `owned`. `cell_ids`, `epochs`, `passes` and `skipped` stay as they are.
    The loader can be pickled, and can be carried over a fork: it starts threads of its own in each
    process, at its position. After an error, `next` tries again from the same position.

    Attributes:
        stream: The order of the cells.
        position: Cells consumed by all ranks after the last step delivered; with the arguments, the
            whole state.
        waited_s: Seconds that `next` has waited in all.
        skipped_cells: Cells delivered to this rank without counts because of damage.
    """

    def __init__(
        self,
        corpus: Corpus | str | Path,
        *,
        train_batch_size: int,
        stream: CellOrder | None = None,
        cells_seen: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        prefetch_batches: int = 4,
        output: Output = "packed",
        target_sum: float | None = None,
        on_damage: OnDamage = "stop",
        stop_at: int | None = None,
        finish: Callable[[CellBatch], Any] | None = None,
        allocate: Callable[[int], NDArray[np.uint8]] = empty_bytes,
        owned: bool = False,
        memory_bytes: int | None = MEMORY_BYTES,
        read_threads: int | None = None,
        columns: str | Sequence[str] = (),
    ) -> None:
        """Check the arguments; nothing is read before the first `next`.

        Args:
            corpus: Where the cells are: a corpus, or its path or address.
            train_batch_size: Cells of a global batch.
            stream: Their order, see `open_stream`; None: all training cells, shuffled with seed 0.
            cells_seen: Position: cells consumed by all ranks so far.
            rank: This rank.
            world_size: Number of ranks.
            micro_batch_size: Cells of one rank's micro-batch; None: its whole share of a batch.
            prefetch_batches: Steps kept ready; 0: the caller of `next` assembles each step itself.
            output: What `CellBatch.counts` is.
            target_sum: Total that dense_norm scales a cell to; None for the other outputs.
            on_damage: stop: `next` raises at a damaged chunk; skip: see `OnDamage`.
            stop_at: Position at which the stream ends, `cells_seen` or after it; None: never.
            finish: Called in a thread with each micro-batch; its result becomes `extra`.
            allocate: Makes the uint8 buffers of counts, one a micro-batch; for instance pinned.
            owned: `counts` stay valid while an array of them is kept; adds to `memory_bytes`.
            memory_bytes: Most memory for chunks and steps; None: as much as the order asks for.
            read_threads: None: as many as cores, up to 4; 32 for a remote corpus.
            columns: Annotations that `CellBatch.columns` gives, names in `Corpus.columns`.

        Raises:
            ValueError: Sizes that do not divide, wrong or ignored settings, too little memory.
            TypeError: Neither a corpus nor its path.
        """
        self._plan = _plan_of(
            opened_corpus(corpus), stream, columns, output=output, target_sum=target_sum,
            on_damage=on_damage, finish=finish, allocate=allocate, owned=owned, sizes=_checked(
                train_batch_size=train_batch_size, rank=rank, world_size=world_size,
                micro_batch_size=micro_batch_size, stop_at=stop_at, memory_bytes=memory_bytes,
                prefetch_batches=prefetch_batches, read_threads=read_threads,
            ),
        )  # fmt: skip
        self.stream, self.position = self._plan.stream, self._plan.check_start(cells_seen)
        self.waited_s, self.skipped_cells, self._began, self._closed = 0.0, 0, self.position, False
        self._threads: LoaderThreads | None = None
        self._finalizer: weakref.finalize | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the threads."""
        return self.__dict__ | {"_threads": None, "_finalizer": None}

    def __iter__(self) -> Iterator[StepBatch]:
        """Return the loader."""
        return self

    def __next__(self) -> StepBatch:
        """Return the next step of this rank."""
        if self._closed:
            raise ValueError("the loader is closed: open another one at its position")
        if self._plan.stop_at is not None and self.position >= self._plan.stop_at:
            self._stop_threads()
            raise StopIteration
        started = time.perf_counter()
        try:
            step = self._running_threads().next_step()
            if step.skipped:
                skipped, end = self.skipped_cells + step.skipped, self.position + step.n_cells
                self._plan.check_skipped(skipped, end - self._began)
            self.position += step.n_cells
            self.skipped_cells += step.skipped
            return step
        except BaseException:
            # A step may have left the queue already (KeyboardInterrupt): start over from here.
            self._stop_threads()
            raise
        finally:
            self.waited_s += time.perf_counter() - started

    def __enter__(self) -> Self:
        """Return the loader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loader."""
        self.close()

    @property
    def reading(self) -> str | None:
        """What is being read from the corpus at this moment; None when nothing is."""
        return None if self._threads is None else self._threads.reading

    def close(self) -> None:
        """Stop the threads; the loader cannot be used afterwards."""
        self._closed = True
        threads = self._threads
        self._stop_threads()
        if threads is not None and threads.pid == os.getpid():
            threads.join()

    def _running_threads(self) -> LoaderThreads:
        # A forked child has the parent's queues, but not its threads.
        if self._threads is None or self._threads.pid != os.getpid():
            self._stop_threads()
            self._threads = LoaderThreads(self._plan, self.position)
            # The threads do not know the loader, so one that is forgotten takes them along.
            self._finalizer = weakref.finalize(self, self._threads.stop)
        return self._threads

    def _stop_threads(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._threads = self._finalizer = None


def opened_corpus(corpus: object) -> Corpus:
    """Return a corpus that is given as one, or as its path or address.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(corpus, str | Path):
        return Corpus(corpus)
    if not isinstance(corpus, Corpus):
        raise TypeError(
            f"corpus: got {type(corpus).__name__}; give a sclong_ds.Corpus, or the path of one"
        )
    return corpus


def _threads_for(corpus: Corpus) -> int:
    """Return the number of threads that read a corpus."""
    if not corpus.location.is_local:
        return _REMOTE_READ_THREADS
    return min(_READ_THREADS, usable_cores())


def _checked(**sizes: int | None) -> dict[str, Any]:
    """Return arguments that must be whole numbers.

    Raises:
        ValueError: One is none, or is too small or too large.
    """
    return {
        name: None if value is None and name in _OPTIONAL else check_whole(
            name, value, least=0 if name in _FROM_ZERO else 1,
            most=MOST_CELLS if name == "stop_at" else None,
        )
        for name, value in sizes.items()
    }  # fmt: skip


def _plan_of(
    corpus: Corpus,
    stream: CellOrder | None,
    columns: str | Sequence[str],
    *,
    sizes: Mapping[str, Any],
    **settings: Any,
) -> LoaderPlan:
    """Return what a loader was asked to do, with the order and the sizes that it left open."""
    batch, world_size, memory = (
        sizes[name] for name in ("train_batch_size", "world_size", "memory_bytes")
    )
    return LoaderPlan(
        corpus=corpus, stream=stream or _stream_for(corpus, batch, memory_bytes=memory),
        rank=sizes["rank"], world_size=world_size, batch=batch,
        micro=sizes["micro_batch_size"] or max(1, batch // world_size),
        prefetch_batches=sizes["prefetch_batches"], stop_at=sizes["stop_at"], memory_bytes=memory,
        read_threads=sizes["read_threads"] or _threads_for(corpus), columns=names_of(columns),
        order=None if stream is not None else partial(_stream_for, corpus, batch), **settings,
    )  # fmt: skip


def _stream_for(corpus: Corpus, batch: int, *, memory_bytes: int | None) -> CellOrder:
    """Return all training cells by lanes, with seed 0."""
    memory = MEMORY_BYTES if memory_bytes is None else memory_bytes
    lanes = most_lanes(corpus, batch, most=MOST_LANES, memory_bytes=memory)
    return open_stream(corpus, seed=0, lanes=lanes, batch=batch)
