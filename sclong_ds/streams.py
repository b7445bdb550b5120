"""The byte code of a cell: two byte streams, `gap` and `count`, hold its counts losslessly.

A cell is a run of entries; entry k is the pair (gap[k], count[k]). Reading a cell from its first
entry:

    gene = -1                       before the first entry
    gene += gap                     the gene that the entry is about
    gap >= 1: value = count         low byte of the gene's count
    gap == 0: value += count << 8k  k-th continuation of the same gene (k = 1, 2, 3)

A gene whose whole value is 0 is only a stepping stone, written as (255, 0), that covers a distance
above 255: readers drop it.

Genes come in increasing order, so a cell has one encoding and equal bytes mean equal cells. About
99.97% of the entries of UMI data need neither a continuation nor a stepping stone, hence about two
bytes a non-zero before compression.

All functions work on many cells at once and have no Python loop over cells or values. numpy only;
`sclong_ds.store` puts the streams on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

MAX_COUNT = 2**32 - 1
_STEP = 255


@dataclass(frozen=True, slots=True)
class PackedCells:
    """Encoded cells, one after the other."""

    gap: NDArray[np.uint8]
    """(entries,) gene index minus the one before; 0 continues a count."""
    count: NDArray[np.uint8]
    """(entries,) byte of a count."""
    row_entries: NDArray[np.uint32]
    """(cells,) number of entries of each cell."""
    row_nnz: NDArray[np.uint32]
    """(cells,) number of genes with a count."""
    row_total: NDArray[np.int64]
    """(cells,) sum of the counts."""


def encode(matrix: csr_matrix) -> PackedCells:
    """Encode the rows of a count matrix.

    Args:
        matrix: (cells, genes) CSR of an integer type, column indices increasing in each row; stored
            zeros are skipped.

    Returns:
        The encoded cells.

    Raises:
        ValueError: Not integers, a negative count or one above 2^32 - 1, or unsorted or repeated
            column indices.
    """
    indices, data, indptr = _checked(matrix)
    n_rows = len(indptr) - 1
    row_nnz = np.diff(indptr)
    row_of = np.repeat(np.arange(n_rows), row_nnz)
    step = _row_steps(indices, indptr, row_of)
    stones = (step - 1) // _STEP
    more = (data > 0xFF).astype(np.int64) + (data > 0xFFFF) + (data > 0xFFFFFF)
    end = np.cumsum(1 + stones + more)
    main = end - 1 - more
    n_entries = int(end[-1]) if len(end) else 0
    gap = np.zeros(n_entries, np.uint8)
    count = np.zeros(n_entries, np.uint8)
    gap[main] = step - _STEP * stones
    count[main] = data & 0xFF
    far = np.flatnonzero(stones)
    gap[slices_to_index(main[far] - stones[far], stones[far])] = _STEP
    for k in (1, 2, 3):
        large = np.flatnonzero(more >= k)
        count[main[large] + k] = (data[large] >> (8 * k)) & 0xFF
    row_entries = np.diff(np.concatenate(([0], end))[indptr])
    # Differences of a running total are exact, and rows without entries need no special case.
    row_total = np.diff(np.concatenate(([0], np.cumsum(data)))[indptr])
    return PackedCells(
        gap, count, row_entries.astype(np.uint32), row_nnz.astype(np.uint32), row_total
    )


def decode(
    gap: NDArray[np.uint8], count: NDArray[np.uint8], row_entries: NDArray[np.integer], n_genes: int
) -> csr_matrix:
    """Decode cells that lie one after the other.

    Args:
        gap: (entries,) gap stream.
        count: (entries,) count stream.
        row_entries: (cells,) entries of each cell; they add up to the length of the streams.
        n_genes: Number of columns of the result.

    Returns:
        (cells, n_genes) CSR of uint32 counts with sorted indices.

    Raises:
        ValueError: The streams are not an encoding of cells with n_genes genes.
    """
    bounds = np.concatenate(([0], np.cumsum(row_entries, dtype=np.int64)))
    if bounds[-1] != len(gap) or len(gap) != len(count):
        raise ValueError(
            f"damaged cells: {len(gap)} gaps and {len(count)} counts for {bounds[-1]} entries"
        )
    # A continuation at the start of a cell would be added to the cell before.
    if np.any(gap[bounds[:-1][np.diff(bounds) > 0]] == 0):
        raise ValueError("damaged cells: a cell begins with a continued count")
    position = np.concatenate(([0], np.cumsum(gap, dtype=np.int64)))
    gene = position[1:] - np.repeat(position[bounds[:-1]], np.diff(bounds)) - 1
    value = count.astype(np.uint32)
    _add_continuations(gap, count, value)
    keep = value > 0
    indptr = np.concatenate(([0], np.cumsum(keep)))[bounds]
    indices, data = gene[keep].astype(np.int32), value[keep]
    if len(indices) and int(indices.max()) >= n_genes:
        raise ValueError(
            f"damaged cells: gene index {int(indices.max())}, the corpus has {n_genes} genes"
        )
    if indptr[-1] < 2**31:
        indptr = indptr.astype(np.int32)
    result = csr_matrix((data, indices, indptr), shape=(len(row_entries), n_genes))
    result.has_canonical_format = True
    return result


def slices_to_index(starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the positions of many slices, one slice after the other.

    Args:
        starts: (n,) first position of each slice.
        lengths: (n,) length of each slice.

    Returns:
        (sum of lengths,) positions, for instance to gather the entries of chosen cells from a
        stream.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    return np.repeat(np.asarray(starts, dtype=np.int64) - before, lengths) + np.arange(
        int(lengths.sum())
    )


def _checked(matrix: csr_matrix) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return indices, counts and row bounds as int64 without stored zeros."""
    if matrix.data.dtype.kind not in "iu":
        raise ValueError(
            f"counts of type {matrix.data.dtype}: cells are stored as integers, "
            "round and cast them first"
        )
    data = matrix.data
    if len(data) and (data.min() < 0 or data.max() > MAX_COUNT):
        raise ValueError(f"counts from {data.min()} to {data.max()}: allowed are 0 to {MAX_COUNT}")
    indptr = matrix.indptr.astype(np.int64)
    indices = matrix.indices.astype(np.int64)
    data = data.astype(np.int64)
    if not data.all():
        stored = data > 0
        indptr = np.concatenate(([0], np.cumsum(stored)))[indptr]
        indices, data = indices[stored], data[stored]
    return indices, data, indptr


def _row_steps(
    indices: NDArray[np.int64], indptr: NDArray[np.int64], row_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return each column index minus the one before in its row (-1 before the first)."""
    step = np.diff(indices, prepend=-1)
    first = indptr[:-1][np.diff(indptr) > 0]
    step[first] = indices[first] + 1
    wrong = np.flatnonzero(step < 1)
    if len(wrong):
        raise ValueError(
            f"row {row_of[wrong[0]]}: column indices are not increasing; "
            "call sum_duplicates() on the matrix first"
        )
    return step


def _add_continuations(
    gap: NDArray[np.uint8], count: NDArray[np.uint8], value: NDArray[np.uint32]
) -> None:
    """Move the bytes of continuation entries into the value of their gene, in place."""
    more = np.flatnonzero(gap == 0)
    value[more] = 0
    depth = 1
    while len(more):
        if depth > 3:
            raise ValueError("damaged cells: a count of more than four bytes")
        # `more` holds the entries at least `depth` entries behind their gene's first one.
        direct = gap[more - depth] > 0
        here = more[direct]
        value[here - depth] += count[here].astype(np.uint32) << np.uint32(8 * depth)
        more = more[~direct]
        depth += 1
