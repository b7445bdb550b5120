"""From the bytes of cells to a batch on the CPU: packed, sparse or dense, one pass over the bytes.

The loader keeps some thousand cells in memory as they are stored, about two bytes a non-zero value.
Where those of a batch lie there is a `CellPool`. The kernels follow the byte code of
`sclong_ds.corpus.byte_code` straight into the result; they release the GIL, and never write outside
of it, whatever the bytes are. numba compiles them at their first call and keeps the machine code in
`__pycache__`, or where that cannot be written in the user's cache folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray
from scipy.sparse import csr_matrix

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.transform import scale_of

_POOL_ARRAYS: dict[str, tuple[np.dtype[Any], bool]] = {
    "gap": (np.dtype(np.uint8), True),
    "count": (np.dtype(np.uint8), True),
    "start": (np.dtype(np.int64), False),
    "entries": (np.dtype(np.uint32), False),
    "nnz": (np.dtype(np.uint32), False),
    "total": (np.dtype(np.int64), False),
}
"""Type of each array of a pool, and whether it has an element for each byte or each cell."""


@dataclass(frozen=True, slots=True)
class CellPool:
    """Encoded cells somewhere in two byte buffers.

    Raises:
        ValueError: An array of another type or shape than said below.
    """

    gap: NDArray[np.uint8]
    """(bytes,) contiguous."""
    count: NDArray[np.uint8]
    """(bytes,) contiguous."""
    start: NDArray[np.int64]
    """(cells,) first entry of each cell in `gap` and `count`."""
    entries: NDArray[np.uint32]
    """(cells,) number of entries."""
    nnz: NDArray[np.uint32]
    """(cells,) number of genes with a count."""
    total: NDArray[np.int64]
    """(cells,) sum of the counts."""

    def __post_init__(self) -> None:
        """Check the arrays: the kernels are compiled for these types."""
        n_bytes, n_cells = self.gap.shape[:1], self.start.shape[:1]
        for name, (dtype, of_bytes) in _POOL_ARRAYS.items():
            _check_array(getattr(self, name), name, n_bytes if of_bytes else n_cells, dtype)
        if not (self.gap.flags.c_contiguous and self.count.flags.c_contiguous):
            raise ValueError("gap and count must be contiguous: copy them first")


def gather_packed(
    pool: CellPool, *, out: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
) -> PackedCells:
    """Copy the cells, still encoded, one behind the other.

    Args:
        pool: B cells.
        out: Buffers for gap and count of at least as many bytes as the cells have entries; the
            result's streams are then views of them.

    Returns:
        The cells; its tables are those of the pool.

    Raises:
        ValueError: A cell outside the pool's buffers, or unfit buffers.
    """
    entries = pool.entries.astype(np.int64)
    size = int(entries.sum())
    gap, count = out or (np.empty(size, np.uint8), np.empty(size, np.uint8))
    gap, count = _cut(gap, "gap", size, np.uint8), _cut(count, "count", size, np.uint8)
    _check_cell(_gather(pool.gap, pool.count, pool.start, entries, gap, count), pool)
    return PackedCells(gap, count, pool.entries, pool.nnz, pool.total)


def to_csr(
    pool: CellPool,
    *,
    n_genes: int,
    out: tuple[NDArray[np.int32], NDArray[Any]] | None = None,
    dtype: type[np.float32] | type[np.uint32] = np.float32,
) -> csr_matrix:
    """Decode the cells into a sparse matrix.

    Args:
        pool: B cells.
        n_genes: G.
        out: Buffers for indices (int32) and data (`dtype`) of at least as many elements as the
            cells have values; the matrix then is a view of them.
        dtype: Type of the counts. float32 is exact up to 2^24 and rounds above.

    Returns:
        (B, G) CSR with sorted int32 indices.

    Raises:
        ValueError: Bytes that are not such cells, or unfit buffers.
    """
    entries, n_cells = pool.entries.astype(np.int64), len(pool.start)
    indptr = np.zeros(n_cells + 1, np.int64)
    np.cumsum(pool.nnz, out=indptr[1:])
    size = int(indptr[-1])
    indices, data = out or (np.empty(size, np.int32), np.empty(size, dtype))
    indices, data = _cut(indices, "indices", size, np.int32), _cut(data, "data", size, dtype)
    wrong = _decode_csr(pool.gap, pool.count, pool.start, entries, n_genes, indptr, indices, data)
    _check_cell(wrong, pool, n_genes)
    result = csr_matrix((n_cells, n_genes), dtype=dtype)
    # Not through the constructor, which copies the views of buffers that are mostly unused.
    index = np.int32 if size < 2**31 else np.int64
    result.indptr, result.indices = indptr.astype(index), indices.astype(index, copy=False)
    result.data = data
    result.has_canonical_format = True
    return result


def to_dense(pool: CellPool, *, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Decode the cells into a dense matrix of raw counts.

    Args:
        pool: B cells.
        out: (B, G) C-contiguous; all of it is overwritten.

    Returns:
        out. Counts above 2^24 are rounded to float32.

    Raises:
        ValueError: Bytes that are not such cells, or an unfit buffer.
    """
    _check_dense(out, len(pool.start))
    entries = pool.entries.astype(np.int64)
    wrong = _decode_dense(pool.gap, pool.count, pool.start, entries, out)
    _check_cell(wrong, pool, out.shape[1])
    return out


def to_dense_norm(
    pool: CellPool, *, target_sum: float, out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Decode the cells into log1p(target_sum * count / total of the cell).

    Args:
        pool: B cells.
        target_sum: Counts of a cell after scaling.
        out: (B, G) C-contiguous; all of it is overwritten.

    Returns:
        out; calculated in float64, then rounded. A cell without counts is all zero. numpy, torch
        and this kernel give the same float32: their log1p differ in the last bit of a float64,
        which survives the rounding of about one value in 10^10.

    Raises:
        ValueError: Bytes that are not such cells, or an unfit buffer.
    """
    _check_dense(out, len(pool.start))
    entries, scale = pool.entries.astype(np.int64), scale_of(pool.total, target_sum)
    wrong = _decode_dense_norm(pool.gap, pool.count, pool.start, entries, scale, out)
    _check_cell(wrong, pool, out.shape[1])
    return out


def _check_array(array: NDArray[Any], name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{name} is {array.dtype} of shape {array.shape}, needed is {np.dtype(dtype)} of shape "
            f"{shape}"
        )


def _check_dense(out: NDArray[np.float32], n_cells: int) -> None:
    _check_array(out, "out", (n_cells, *out.shape[1:2]), np.float32)
    if not (out.ndim == 2 and out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"out of shape {out.shape}: must be (B, G), C-contiguous and writeable")


def _cut(array: NDArray[Any], name: str, size: int, dtype: type) -> NDArray[Any]:
    """Return the first `size` elements of a buffer that was given."""
    fits = array.ndim == 1 and array.dtype == dtype and len(array) >= size
    if not (fits and array.flags.c_contiguous and array.flags.writeable):
        raise ValueError(
            f"buffer for {name} is {array.dtype} of shape {array.shape}, needed is "
            f"{np.dtype(dtype)} of at least {size} elements, contiguous and writeable"
        )
    return array[:size]


def _check_cell(wrong: int, pool: CellPool, n_genes: int | None = None) -> None:
    """Raise what a kernel reports: the first cell that it could not read, or -1."""
    if wrong < 0:
        return
    raise ValueError(
        f"damaged cell {wrong} of the batch: {pool.entries[wrong]} entries from byte "
        f"{pool.start[wrong]} of {len(pool.gap)} on are not a cell with {pool.nnz[wrong]} values"
        + ("" if n_genes is None else f" of {n_genes} genes")
    )


def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel at its first call; it does not hold the GIL."""
    try:
        return njit(nogil=True, cache=True)(kernel)
    except RuntimeError:  # no folder can be written: every process compiles for itself
        return njit(nogil=True)(kernel)


# Kernels. `gap` and `count` are those of a pool; `start` and `entries` (B,) int64 say where the
# cells are. Each returns -1, or the number of the first cell that is damaged. Positions are
# unsigned because numba tests at each access whether a signed one counts from the end, which takes
# as long as the access; hence `gene` is the index plus one, 0 before the first.
_ONE = np.uint64(1)


@compiled
def _outside(gap, first, size):  # type: ignore[no-untyped-def]
    return first < 0 or first > len(gap) - size  # the sum of both could overflow


@compiled
def _value_until(gap, count, first, last):  # type: ignore[no-untyped-def]
    """Return the count that the entries up to `last` give their gene; -1 if they cannot."""
    value = 0
    for k in range(last, max(last - 4, first - 1), -1):
        value = (value << 8) | count[k]
        if gap[k] > 0:
            return value
    return -1


@compiled
def _gather(gap, count, start, entries, out_gap, out_count):  # type: ignore[no-untyped-def]
    place = 0
    for b in range(len(start)):
        first, size = start[b], entries[b]
        if _outside(gap, first, size):
            return b
        # Loops over views become block copies, an assignment of slices does not.
        source, target = gap[first : first + size], out_gap[place : place + size]
        for k in range(size):
            target[k] = source[k]
        source, target = count[first : first + size], out_count[place : place + size]
        for k in range(size):
            target[k] = source[k]
        place += size
    return -1


@compiled
def _decode_csr(gap, count, start, entries, n_genes, indptr, indices, data):  # type: ignore[no-untyped-def]
    for b in range(len(start)):
        if _outside(gap, start[b], entries[b]):
            return b
        k, last = np.uint64(start[b]), np.uint64(start[b] + entries[b])
        place, end, gene = np.uint64(indptr[b]), np.uint64(indptr[b + 1]), np.uint64(0)
        while k < last:
            # The plain entries up to the next special one, as far as there is room.
            run = min(last - k, end - place)
            for j in range(run):
                if gap[k + j] == 0 or count[k + j] == 0:
                    run = j
                    break
                gene += np.uint64(gap[k + j])
                indices[place + j] = gene - _ONE
                data[place + j] = count[k + j]
            k += run
            place += run
            if k == last:
                break
            if gap[k] > 0:
                if count[k] > 0:
                    return b  # more values than the cell's table says
                gene += np.uint64(gap[k])
            else:
                value = _value_until(gap, count, start[b], k)
                if value < 0:
                    return b
                if value > 0:
                    # A gene whose low byte is 0 has no place yet.
                    seen = place > np.uint64(indptr[b]) and indices[place - _ONE] == gene - _ONE
                    if not seen:
                        if place == end:
                            return b
                        indices[place] = gene - _ONE
                        place += _ONE
                    data[place - _ONE] = value
            k += _ONE
        if place != end or gene > np.uint64(n_genes):
            return b
    return -1


@compiled
def _decode_dense(gap, count, start, entries, out):  # type: ignore[no-untyped-def]
    n_genes = np.uint64(out.shape[1])
    for b in range(len(start)):
        if _outside(gap, start[b], entries[b]):
            return b
        row = out[b]
        row[:] = 0.0  # row by row: the values then fall into lines that are in the cache
        gene = np.uint64(0)
        for k in range(np.uint64(start[b]), np.uint64(start[b] + entries[b])):
            gene += np.uint64(gap[k])
            if gene > n_genes:
                return b
            if gap[k] > 0:
                row[gene - _ONE] = count[k]  # a stepping stone writes 0 over 0
            else:
                value = _value_until(gap, count, start[b], k)
                if value < 0:
                    return b
                row[gene - _ONE] = value
    return -1


@compiled
def _decode_dense_norm(gap, count, start, entries, scale, out):  # type: ignore[no-untyped-def]
    n_genes = np.uint64(out.shape[1])
    # Results for the counts below 256 of one cell, calculated when first met; -1: not yet.
    known = np.empty(256, np.float32)
    for b in range(len(start)):
        if _outside(gap, start[b], entries[b]):
            return b
        row = out[b]
        row[:] = 0.0
        known[:] = -1.0
        gene = np.uint64(0)
        for k in range(np.uint64(start[b]), np.uint64(start[b] + entries[b])):
            gene += np.uint64(gap[k])
            if gene > n_genes:
                return b
            if gap[k] > 0:
                if known[count[k]] < 0.0:
                    known[count[k]] = math.log1p(count[k] * scale[b])
                row[gene - _ONE] = known[count[k]]
            else:
                value = _value_until(gap, count, start[b], k)
                if value < 0:
                    return b
                row[gene - _ONE] = math.log1p(value * scale[b])
    return -1
