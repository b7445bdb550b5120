"""Batches of cells: what the loader delivers, and how each kind of output is put together.

The cells of a micro-batch are put together in one reused `Buffer`, for each kind of output. Batches
that are to be kept get memory that comes back when no array lies in it any more (`OwnedBuffer`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.loader.pool import CellPool, gather_packed, to_csr, to_dense, to_dense_norm


@dataclass(frozen=True, slots=True, eq=False)
class CellBatch:
    """The cells of one micro-batch on one rank."""

    counts: PackedCells | csr_matrix | NDArray[np.float32]
    """packed: PackedCells whose arrays lie in one buffer; csr: (B, G) of uint32 raw counts; dense:
    (B, G) raw counts; dense_norm: (B, G) as `log1p_normalise`. From a loader, valid until the next
    `next`, unless its batches are `owned`."""
    cell_ids: NDArray[np.int64]
    """(B,) row in the corpus."""
    epochs: NDArray[np.int64]
    """(B,) epoch that the visit belongs to."""
    passes: NDArray[np.int64]
    """(B,) pass within the epoch; 0 without weights."""
    skipped: NDArray[np.bool_] | None = None
    """(B,) cells of damaged chunks, which have no counts; always set by a loader."""
    extra: Any = None
    """What `finish` returned."""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """(B,) codes of the annotations that the loader was asked for, positions in `values` of
    `Corpus.columns`, 0 for unknown; of numbers without codes these."""

    @property
    def packed(self) -> PackedCells:
        """The cells of a loader whose output is `packed`."""
        assert isinstance(self.counts, PackedCells)
        return self.counts


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """What one rank needs for one optimizer step."""

    micro_batches: list[CellBatch]
    """One for each accumulation step."""
    n_cells: int
    """Cells of the global batch, all ranks: train_batch_size, or fewer in the last before
    `stop_at`."""
    find_ids: Callable[[], NDArray[np.int64]]
    """Finds `cell_ids`."""
    skipped: int = 0
    """Cells of this rank's share that have no counts because their chunk is damaged."""

    @property
    def cell_ids(self) -> NDArray[np.int64]:
        """(n_cells,) rows of the global batch, all ranks, in the order of the stream.

        With more than one rank they are worked out when asked for, about 1 us a cell.
        """
        return self.find_ids()


def empty_bytes(size_bytes: int) -> NDArray[np.uint8]:
    """Return fresh memory of ordinary kind."""
    return np.empty(size_bytes, np.uint8)


class Buffer:
    """Memory of one micro-batch, used again for every step that its place in the ring holds."""

    def __init__(self, allocate: Callable[[int], NDArray[np.uint8]]) -> None:
        self._allocate, self._block = allocate, np.empty(0, np.uint8)

    def reserve(self, size: int, *, spare: int = 0) -> NDArray[np.uint8]:
        """Return the first `size` bytes; a new block gets `spare` more."""
        if len(self._block) < size:
            self._block = self._allocate(size + spare)
        return self._block[:size]


class OwnedBuffer(Buffer):
    """Memory of micro-batches that are kept: a block is used again once no array lies in it.

    Fresh memory from the system costs more than to decode a dense batch into it.
    """

    def __init__(
        self, allocate: Callable[[int], NDArray[np.uint8]], free: deque[NDArray[np.uint8]]
    ) -> None:
        super().__init__(allocate)
        self._free = free

    def reserve(self, size: int, *, spare: int = 0) -> NDArray[np.uint8]:
        """Return `size` bytes of a block that nothing else lies in."""
        try:
            block = self._free.pop()
        except IndexError:
            block = self._block  # of no bytes
        if len(block) < size:
            block = self._allocate(size + spare)
        return np.asarray(_Lent(block, self._free))[:size]


class _Lent:
    """A block as the base of arrays; it goes back when the last of them does."""

    def __init__(self, block: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self.__array_interface__ = block.__array_interface__
        self._block, self._free = block, free

    def __del__(self) -> None:
        self._free.append(self._block)


def assemble(
    pool: CellPool, buffer: Buffer, *, output: str, n_genes: int, target_sum: float | None
) -> PackedCells | csr_matrix | NDArray[np.float32]:
    """Put all cells of a pool together, in its order, in the memory of a buffer.

    Args:
        pool: B cells.
        buffer: Memory that the result is a view of.
        output: As for `CellLoader`.
        n_genes: G.
        target_sum: As for `CellLoader`.

    Returns:
        `counts` of a `CellBatch`.

    Raises:
        ValueError: Bytes that are not such cells.
    """
    if output == "packed":
        return _packed(pool, buffer)
    if output == "csr":
        size = int(pool.nnz.sum(dtype=np.int64))
        block = buffer.reserve(8 * size, spare=2 * size)
        out = block[: 4 * size].view(np.int32), block[4 * size :].view(np.uint32)
        return to_csr(pool, n_genes=n_genes, out=out, dtype=np.uint32)
    n_cells = len(pool.start)
    matrix = buffer.reserve(4 * n_cells * n_genes).view(np.float32).reshape(n_cells, n_genes)
    if target_sum is None:
        return to_dense(pool, out=matrix)
    return to_dense_norm(pool, target_sum=target_sum, out=matrix)


def _packed(pool: CellPool, buffer: Buffer) -> PackedCells:
    """Put cells into one block: tables, then gaps, then counts."""
    n, size = len(pool.start), int(pool.entries.sum(dtype=np.int64))
    block = buffer.reserve(16 * n + 2 * size, spare=size // 2)
    total = block[: 8 * n].view(np.int64)
    entries, nnz = block[8 * n : 16 * n].view(np.uint32).reshape(2, n)
    gap, count = block[16 * n :].reshape(2, size)
    gather_packed(pool, out=(gap, count))
    entries[:], nnz[:], total[:] = pool.entries, pool.nnz, pool.total
    return PackedCells(gap, count, entries, nnz, total)
