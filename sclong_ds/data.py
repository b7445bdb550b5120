"""The loader: one order of cells for any number of ranks, exact resume, reading in the background.

Order. An epoch visits every cell of the split once: its chunks are permuted, taken in groups of
`data.shuffle_group_chunks`, and the cells of a group are permuted. The epochs follow each other
without a gap, so the training data are one endless stream that is a pure function of (seed, corpus,
group size). Global batch b is the cells [b * B, (b + 1) * B) of the stream; a batch may hold the
end of one epoch and the beginning of the next; no cell is dropped or repeated. Rank r of W takes,
of micro-step j, the cells [(j * W + r) * m, ... + m) of the batch. The position is therefore one
integer, the number of cells seen, and is valid for any world size.

Every rank decodes the whole group and keeps its cells of it; a group of 8 chunks is about 4 MB
packed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, vstack

from sclong_ds.store import Corpus


@dataclass(frozen=True, slots=True)
class CellBatch:
    """The cells of one micro-batch on one rank: raw counts and what identifies each cell.

    Attributes:
        counts: (B, G) CSR, raw counts.
        cell_ids: (B,) int64, row in the corpus.
        epochs: (B,) int64, epoch that each cell belongs to.
    """

    counts: csr_matrix
    cell_ids: np.ndarray
    epochs: np.ndarray


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank needs for one optimizer step.

    Attributes:
        micro_batches: One CellBatch per accumulation step.
        cell_ids: (train_batch_size,) the global batch, all ranks.
    """

    micro_batches: list[CellBatch]
    cell_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class _Group:
    """Cells that are read together, in their order."""

    start: int
    """Position in the stream of its first cell."""
    epoch: int
    rows: np.ndarray


class CellStream:
    """The endless global order of cells.

    Args:
        chunk_rows: (n + 1,) first row of each chunk of the split, ascending; the last entry is the
            end.
        seed: `run.seed`.
        group_chunks: Chunks that are shuffled together.
    """

    def __init__(self, chunk_rows: np.ndarray, *, seed: int, group_chunks: int) -> None:
        self._bounds = np.asarray(chunk_rows, dtype=np.int64)
        self.n_cells = int(self._bounds[-1] - self._bounds[0])
        if self.n_cells < 1:
            raise ValueError(
                "the training split has no cells: check the split of `python -m data_prep finalize`"
            )
        self._seed, self._group_chunks = seed, group_chunks

    def groups(self, position: int) -> Iterator[_Group]:
        """Yield the groups of the stream from the one that holds `position` on, without end."""
        epoch = position // self.n_cells
        while True:
            order = self._rng(epoch, 0).permutation(len(self._bounds) - 1)
            sizes = np.diff(self._bounds)[order]
            start = epoch * self.n_cells
            for first in range(0, len(order), self._group_chunks):
                members = order[first : first + self._group_chunks]
                size = int(sizes[first : first + self._group_chunks].sum())
                if start + size > position:
                    rows = np.concatenate(
                        [np.arange(self._bounds[c], self._bounds[c + 1]) for c in members]
                    )
                    yield _Group(start, epoch, self._rng(epoch, first + 1).permutation(rows))
                start += size
            epoch += 1

    def _rng(self, epoch: int, part: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, part, epoch]))


def split_chunk_rows(corpus: Corpus, split: str) -> np.ndarray:
    """Return the chunk borders of a split: (n + 1,) rows, ascending.

    Args:
        corpus: The corpus; its chunks never straddle a split border.
        split: Name of the split.

    Raises:
        ValueError: The corpus has no such split.
    """
    rows = corpus.split(split)
    if len(rows) == 0:
        return np.zeros(1, dtype=np.int64)
    bounds = np.asarray(corpus.chunk_rows)
    return bounds[(bounds >= rows[0]) & (bounds <= rows[-1] + 1)]


class CellLoader:
    """Iterate over the optimizer steps of one rank from a position on, reading ahead in a thread.

    Args:
        corpus: Where the cells are.
        seed: `run.seed`.
        cells_seen: Position: cells consumed by all ranks so far.
        rank: This rank.
        world_size: Number of ranks.
        train_batch_size: Cells of a global batch.
        micro_batch_size: Cells of one rank's micro-batch.
        group_chunks: Chunks that are shuffled together.
        prefetch_batches: Steps kept ready.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        cells_seen: int,
        rank: int,
        world_size: int,
        train_batch_size: int,
        micro_batch_size: int,
        group_chunks: int,
        prefetch_batches: int,
    ) -> None:
        if train_batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"engine.train_batch_size {train_batch_size} must be a multiple of "
                f"engine.train_micro_batch_size_per_gpu {micro_batch_size} x {world_size} ranks"
            )
        bounds = split_chunk_rows(corpus, "train")
        self.stream = CellStream(bounds, seed=seed, group_chunks=group_chunks)
        self._corpus, self._cells_seen = corpus, cells_seen
        self._rank, self._world_size = rank, world_size
        self._batch, self._micro = train_batch_size, micro_batch_size
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(prefetch_batches)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="cell-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the reading thread; the loader cannot be used afterwards."""
        self._stop.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def _read_ahead(self) -> None:
        try:
            for step in self._steps():
                if not self._put(step):
                    return
        except BaseException as error:  # noqa: BLE001
            # Whatever it is: the training loop waits for this thread and must learn of its end.
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> bool:
        """Queue an item; False when the loader was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _steps(self) -> Iterator[StepBatch]:
        """Cut the stream into global batches and pick this rank's cells."""
        pending: list[CellBatch] = []
        have = 0
        for group in self.stream.groups(self._cells_seen):
            cells = self._read(group)
            pending.append(cells)
            have += len(cells.cell_ids)
            merged = _concatenate(pending)
            done = 0
            while have - done >= self._batch:
                yield self._share(_slice(merged, done, done + self._batch))
                done += self._batch
            pending = [_slice(merged, done, have)] if done < have else []
            have -= done

    def _read(self, group: _Group) -> CellBatch:
        """Read a group's cells in their order, without those before the starting position."""
        rows = group.rows[max(0, self._cells_seen - group.start) :]
        order = np.argsort(rows, kind="stable")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        counts = self._corpus.rows(rows[order])[inverse]
        return CellBatch(counts, rows, np.full(len(rows), group.epoch, dtype=np.int64))

    def _share(self, batch: CellBatch) -> StepBatch:
        stride = self._micro * self._world_size
        starts = range(self._rank * self._micro, self._batch, stride)
        return StepBatch([_slice(batch, s, s + self._micro) for s in starts], batch.cell_ids)


def _slice(batch: CellBatch, start: int, stop: int) -> CellBatch:
    part = slice(start, stop)
    return CellBatch(batch.counts[part], batch.cell_ids[part], batch.epochs[part])


def _concatenate(batches: list[CellBatch]) -> CellBatch:
    if len(batches) == 1:
        return batches[0]
    return CellBatch(
        vstack([b.counts for b in batches], format="csr"),
        np.concatenate([b.cell_ids for b in batches]),
        np.concatenate([b.epochs for b in batches]),
    )


def log1p_normalise(counts: csr_matrix, *, target_sum: float) -> np.ndarray:
    """Return log1p(target_sum * count / total of the cell) as a dense matrix.

    Args:
        counts: (B, G) raw counts of the vocabulary's genes.
        target_sum: Counts of a cell after scaling (1.0e4 in scLong's data).

    Returns:
        (B, G) float32; a cell without counts is all zero.
    """
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    dense = np.zeros(counts.shape, dtype=np.float32)
    cell = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    # Only the values are transformed; log1p over the dense matrix costs 15 times as much.
    dense[cell, counts.indices] = np.log1p(
        counts.data * (target_sum / np.maximum(totals, 1.0))[cell]
    )
    return dense
