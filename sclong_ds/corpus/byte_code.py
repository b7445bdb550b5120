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

All functions work on many cells at once; only `digest_cells` has a Python loop over cells. numpy
only; `sclong_ds.corpus.corpus` puts the streams on disk.
"""

from __future__ import annotations

import hashlib
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
    step = _row_steps(indices, indptr)
    # Gaps and counts above one byte are rare: the entries of all others are made first, theirs are
    # put between them. A cast to uint8 keeps the low byte.
    far, large = np.flatnonzero(step > _STEP), np.flatnonzero(data > 0xFF)
    stones = (step[far] - 1) // _STEP
    step[far] -= (_STEP * stones).astype(step.dtype)
    value = data[large].astype(np.int64)
    more = 1 + (value > 0xFFFF).astype(np.int64) + (value > 0xFFFFFF)
    byte = slices_to_index(np.ones(len(large), np.int64), more)
    # Of equal places the continuations of a gene come before the stones to the next one.
    place = np.concatenate((np.repeat(large + 1, more), np.repeat(far, stones)))
    order = np.argsort(place, kind="stable")
    n_stones = len(place) - len(byte)
    extra_gap = np.repeat(np.array([0, _STEP], np.uint8), [len(byte), n_stones])
    extra_count = np.zeros(len(place), np.uint8)
    extra_count[: len(byte)] = (np.repeat(value, more) >> (8 * byte)).astype(np.uint8)
    extra_of = np.sort(np.concatenate((np.repeat(large, more), np.repeat(far, stones))))
    row_nnz = np.diff(indptr)
    row_entries = row_nnz + np.diff(np.searchsorted(extra_of, indptr))
    place = place[order] + np.arange(len(place))
    main = np.ones(len(step) + len(place), dtype=bool)
    main[place] = False
    return PackedCells(
        _interleaved(main, step.astype(np.uint8), extra_gap[order]),
        _interleaved(main, data.astype(np.uint8), extra_count[order]),
        row_entries.astype(np.uint32),
        row_nnz.astype(np.uint32),
        _row_sums(data, indptr),
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
    bounds, genes = _entries(gap, count, row_entries)
    value = count.astype(np.uint32)
    _add_continuations(gap, count, value)
    indptr, indices, keep = _without(value == 0, bounds, genes, n_genes)
    data = value if keep is None else value[keep]
    result = csr_matrix((data, indices, indptr), shape=(len(row_entries), n_genes))
    result.has_canonical_format = True
    return result


def decode_genes(cells: PackedCells, n_genes: int) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """Decode which genes have a count, and no counts: what drawing targets needs.

    Args:
        cells: The cells.
        n_genes: Genes of the corpus.

    Returns:
        (cells + 1,) bounds of each cell in the indices, and (values,) its genes, increasing: those
        of the matrix that `decode` returns.

    Raises:
        ValueError: The streams are not an encoding of cells with n_genes genes.
    """
    gap, count = cells.gap, cells.count
    bounds, genes = _entries(gap, count, cells.row_entries)
    # A low byte of 0 is that of a gene where a continuation follows, else it is a stepping stone.
    stone = count == 0
    stone[:-1] &= gap[1:] > 0
    stone |= gap == 0
    indptr, indices, _ = _without(stone, bounds, genes, n_genes)
    return indptr, indices


def _entries(
    gap: NDArray[np.uint8], count: NDArray[np.uint8], row_entries: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return (cells + 1,) where each cell's entries begin, and (entries,) the gene of each."""
    bounds = np.concatenate(([0], np.cumsum(row_entries, dtype=np.int64)))
    if bounds[-1] != len(gap) or len(gap) != len(count):
        raise ValueError(
            f"damaged cells: {len(gap)} gaps and {len(count)} counts for {bounds[-1]} entries"
        )
    # A continuation at the start of a cell would be added to the cell before.
    if np.any(gap[bounds[:-1][np.diff(bounds) > 0]] == 0):
        raise ValueError("damaged cells: a cell begins with a continued count")
    # The position along all cells is at most _STEP times the entries.
    wide = np.int32 if _STEP * len(gap) < 2**31 else np.int64
    position = np.cumsum(gap, dtype=wide)
    before = np.concatenate((np.zeros(1, wide), position))[bounds[:-1]] + 1
    genes = position - np.repeat(before, np.diff(bounds))
    return bounds, genes.astype(np.int32, copy=False)


def _without(
    dropped: NDArray[np.bool_], bounds: NDArray[np.int64], genes: NDArray[np.int32], n_genes: int
) -> tuple[NDArray[np.integer], NDArray[np.int32], NDArray[np.bool_] | None]:
    """Return bounds and genes without some entries, and which entries stay; None: all."""
    indptr: NDArray[np.integer] = bounds
    gone, keep = np.flatnonzero(dropped), None
    if len(gone):
        keep = ~dropped
        genes = genes[keep]
        indptr = bounds - np.searchsorted(gone, bounds)
    if len(genes) and int(genes.max()) >= n_genes:
        raise ValueError(
            f"damaged cells: gene index {int(genes.max())}, the corpus has {n_genes} genes"
        )
    return indptr.astype(np.int32) if indptr[-1] < 2**31 else indptr, genes, keep


def digest_cells(cells: PackedCells) -> NDArray[np.uint64]:
    """Return a (cells, 2) array with the 128-bit BLAKE2b digest of each cell's bytes."""
    gap, count = memoryview(cells.gap), memoryview(cells.count)  # type: ignore[arg-type]
    digests = bytearray()
    start = 0
    for stop in np.cumsum(cells.row_entries, dtype=np.int64).tolist():
        digest = hashlib.blake2b(gap[start:stop], digest_size=16)
        digest.update(count[start:stop])
        digests += digest.digest()
        start = stop
    return np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)


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


def _checked(
    matrix: csr_matrix,
) -> tuple[NDArray[np.signedinteger], NDArray[np.integer], NDArray[np.int64]]:
    """Return indices, counts and row bounds without stored zeros."""
    if matrix.data.dtype.kind not in "iu":
        raise ValueError(
            f"counts of type {matrix.data.dtype}: cells are stored as integers, "
            "round and cast them first"
        )
    data, indices = matrix.data, matrix.indices
    indptr = matrix.indptr.astype(np.int64)
    if len(data) and (data.min() < 0 or data.max() > MAX_COUNT):
        raise ValueError(f"counts from {data.min()} to {data.max()}: allowed are 0 to {MAX_COUNT}")
    if not data.all():
        stored = data > 0
        indptr = indptr - np.searchsorted(np.flatnonzero(~stored), indptr)
        indices, data = indices[stored], data[stored]
    return indices, data, indptr


def _row_steps(
    indices: NDArray[np.signedinteger], indptr: NDArray[np.int64]
) -> NDArray[np.signedinteger]:
    """Return each column index minus the one before in its row (-1 before the first)."""
    step = np.empty_like(indices)
    np.subtract(indices[1:], indices[:-1], out=step[1:])
    first = indptr[:-1][np.diff(indptr) > 0]
    step[first] = indices[first] + 1
    if len(step) and step.min() < 1:
        wrong = np.flatnonzero(step < 1)[0]
        raise ValueError(
            f"row {np.searchsorted(indptr, wrong, side='right') - 1}: column indices are not "
            "increasing; call sum_duplicates() on the matrix first"
        )
    return step


def _interleaved(
    main: NDArray[np.bool_], values: NDArray[np.uint8], others: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return `values` where `main` is True and `others` where it is not, each in order."""
    if not len(others):
        return values
    result = np.empty(len(main), np.uint8)
    result[main] = values
    result[~main] = others
    return result


def _row_sums(data: NDArray[np.integer], indptr: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of each row; reduceat takes no empty ones."""
    sums = np.zeros(len(indptr) - 1, np.int64)
    filled = np.flatnonzero(np.diff(indptr))
    if len(filled):
        sums[filled] = np.add.reduceat(data, indptr[filled], dtype=np.int64)
    return sums


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
