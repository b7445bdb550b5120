"""Batches of cells: what the loader delivers, and how each kind of output is put together.

An output (`PackedOutput`, `CsrOutput`, `DenseOutput`) is laid out in one reused `Buffer` for the
cells of a micro-batch, takes the cells in their order from one or more pools (`put`), and gives the
whole (`counts`).
"""

from __future__ import annotations

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
    `next`."""
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


class PackedOutput:
    """Cells put one after the other into one block: tables, then gaps, then counts."""

    def __init__(self, entries: NDArray[np.uint32], buffer: Buffer) -> None:
        cells, size = len(entries), int(entries.sum(dtype=np.int64))
        block = buffer.reserve(16 * cells + 2 * size, spare=size // 2)
        self._total = block[: 8 * cells].view(np.int64)
        self._entries = block[8 * cells : 12 * cells].view(np.uint32)
        self._nnz = block[12 * cells : 16 * cells].view(np.uint32)
        self._gap, self._count = block[16 * cells :][:size], block[16 * cells + size :]
        self._cells, self._size = 0, 0

    def put(self, pool: CellPool, cells: NDArray[np.int64]) -> None:
        """Add cells of a pool."""
        size = int(pool.entries[cells].sum(dtype=np.int64))
        here = slice(self._size, self._size + size)
        part = gather_packed(pool, cells, out=(self._gap[here], self._count[here]))
        rows = slice(self._cells, self._cells + len(cells))
        self._entries[rows], self._nnz[rows] = part.row_entries, part.row_nnz
        self._total[rows] = part.row_total
        self._cells, self._size = rows.stop, here.stop

    def counts(self) -> PackedCells:
        """Return all cells."""
        # Skipped cells leave the end of both streams empty.
        return PackedCells(
            self._gap[: self._size],
            self._count[: self._size],
            self._entries,
            self._nnz,
            self._total,
        )


class CsrOutput:
    """A CSR matrix built from parts: indices, then counts, in one block."""

    def __init__(self, nnz: NDArray[np.uint32], buffer: Buffer, *, n_genes: int) -> None:
        size = int(nnz.sum(dtype=np.int64))
        block = buffer.reserve(8 * size, spare=2 * size)
        self._indices, self._data = block[: 4 * size].view(np.int32), block[4 * size :].view("u4")
        wide = np.int32 if size < 2**31 else np.int64
        self._bounds: NDArray[np.signedinteger] = np.zeros(len(nnz) + 1, wide)
        self._cells = 0
        self._n_genes = n_genes

    def put(self, pool: CellPool, cells: NDArray[np.int64]) -> None:
        """Add cells of a pool."""
        rows = slice(self._cells + 1, self._cells + len(cells) + 1)
        start = self._bounds[self._cells]
        self._bounds[rows] = start + np.cumsum(pool.nnz[cells], dtype=np.int64)
        self._cells += len(cells)
        here = slice(start, self._bounds[self._cells])
        out = (self._indices[here], self._data[here])
        to_csr(pool, cells, n_genes=self._n_genes, out=out, dtype=np.uint32)

    def counts(self) -> csr_matrix:
        """Return all cells."""
        size = self._bounds[-1]
        matrix = csr_matrix((len(self._bounds) - 1, self._n_genes), dtype=self._data.dtype)
        # Not through the constructor, which copies views of buffers that are mostly unused.
        matrix.indptr, matrix.indices = self._bounds, self._indices[:size]
        matrix.data = self._data[:size]
        matrix.has_canonical_format = True
        return matrix


class DenseOutput:
    """A dense matrix, raw or normalised, filled from its first row on."""

    def __init__(
        self, n_cells: int, buffer: Buffer, *, n_genes: int, target_sum: float | None
    ) -> None:
        block = buffer.reserve(4 * n_cells * n_genes)
        self._matrix = block.view(np.float32).reshape(n_cells, n_genes)
        self._cells, self._target_sum = 0, target_sum

    def put(self, pool: CellPool, cells: NDArray[np.int64]) -> None:
        """Add cells of a pool."""
        out = self._matrix[self._cells : self._cells + len(cells)]
        if self._target_sum is None:
            to_dense(pool, cells, out=out)
        else:
            to_dense_norm(pool, cells, target_sum=self._target_sum, out=out)
        self._cells += len(cells)

    def counts(self) -> NDArray[np.float32]:
        """Return all cells."""
        return self._matrix
