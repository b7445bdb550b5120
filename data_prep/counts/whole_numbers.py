"""Names whole numbers that are no raw counts: rounded TPM, rounded logarithms, detected or not, ...

A block may hold cells of several studies, one of them processed: cells are also judged one by one,
and what is found in 20 of them (where it is no chance in any) is found. Telling signs:

- no value above 1 in a cell of so many genes that some should have a second count;
- a small number that a cell lacks though it has more genes of the next ones: scaling by 1.2 and
  more skips numbers, and counts skip none;
- only multiples of a number;
- totals of a million, nearly; those of counts that were sampled down are equal;
- in a cell without large values, fewer genes of 1 than of 2 or 3: rounded logarithms.

Nothing tells cells that were scaled by less and rounded from raw counts for sure; that their totals
agree is a warning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.counts.not_counts import (
    FEWEST_CELLS,
    FEWEST_COUNTS,
    LARGEST_LOG,
)

_MILLION = 2e-3
_BESIDE = 1e-2
"""Totals this near a million, and not nearer, are those to expect of raw counts there."""
_SIMILAR_TOTALS = 0.15
_WITHOUT_ONE = 0.25
_MANY_GENES = 200
"""Rounding scaled cells moves their totals apart by 1 to 10 %. Simulated counts may come as close,
so that it also takes cells of many genes without any 1: scaling by 1.5 and more leaves none, and
hardly a cell of raw counts lacks one."""
_NEXT_GENES = 20
"""Genes with a count of n + 1, from which on it cannot be chance that none has n."""
_RARE_ONES = 0.5
_FEWEST_ONES = 1000
_FEWEST_GENES = 50
"""Genes a cell on average, from which on it cannot be chance that no value is above 1."""
_FEWEST_REPEATS = 14
"""Pairs of counts of one gene to expect in a cell; the chance that there is none is 1e-6."""
_GENES_OF_MULTIPLES = 10
_LARGEST_SHARE = 0.01
"""Of a cell's counts its commonest transcript makes more than this."""
_NEAR_POWER = (0.9, 1.02)
"""Rounding takes up to a tenth off the totals of scaled cells. Those of half of the cells of raw
counts are further apart."""
_PILE = 3
_EXAMPLES = 3


class _Cells:
    """The cells of a block that are not empty, and what each holds; arrays of one element a cell.

    Args:
        counts: (cells, genes) int64 without stored zeros.
        first: Number of its first cell in the matrix.
    """

    def __init__(self, counts: sparse.csr_matrix, first: int) -> None:
        lengths = np.diff(counts.indptr)
        self.counts, self.first = counts, first
        self.rows = np.flatnonzero(lengths)
        self.n_genes = lengths[self.rows]
        self._starts = counts.indptr[:-1][self.rows]
        self.totals = np.add.reduceat(counts.data, self._starts) if len(self.rows) else lengths[:0]

    def largest(self) -> npt.NDArray[np.int64]:
        """Return the largest value of each cell."""
        found: npt.NDArray[np.int64] = np.maximum.reduceat(self.counts.data, self._starts)
        return found

    def genes_with(self, value: int) -> npt.NDArray[np.int32]:
        """Return how many genes of each cell have a value."""
        there = (self.counts.data == value).view(np.int8)
        found: npt.NDArray[np.int32] = np.add.reduceat(there, self._starts, dtype=np.int32)
        return found

    def of(self, some: npt.NDArray[np.bool_]) -> sparse.csr_matrix:
        """Return the counts of some cells."""
        if some.sum() == self.counts.shape[0]:
            return self.counts
        return self.counts[self.rows[some]]

    def where(self, some: npt.NDArray[np.bool_]) -> str:
        """Return ' in N of M cells (rows ...)', '' where it is all of them."""
        rows = self.rows[some] + self.first
        if len(rows) == len(self.rows):
            return ""
        more = ", ..." if len(rows) > _EXAMPLES else ""
        named = ", ".join(map(str, rows[:_EXAMPLES].tolist()))
        return f" in {len(rows)} of {len(self.rows)} cells (rows {named}{more})"


def describe_whole(counts: sparse.csr_matrix, *, first: int = 0) -> str:
    """Say what a matrix of whole numbers is where it, or a part of its cells, is no raw counts.

    Args:
        counts: (cells, genes) int64 without stored zeros.
        first: Number of its first cell in the matrix, for the message.

    Returns:
        The end of a sentence that begins with the name of the matrix; '' if nothing speaks
        against counts. Too few cells prove nothing, unless they have no other values than
        multiples of a number.
    """
    cells = _Cells(counts, first)
    totals = cells.totals
    if not len(totals):
        return ""
    # A few bulk samples are enough: rounding leaves sums near a million, subsampling equal ones.
    near = np.abs(totals / 1e6 - 1) < _MILLION
    if len(totals) > 1 and near.any() and totals[near].min() < totals[near].max():
        n_beside = int(np.count_nonzero(np.abs(totals / 1e6 - 1) < _BESIDE)) - int(near.sum())
        if near.all() or near.sum() >= max(FEWEST_CELLS, _PILE * n_beside):
            return (
                f"looks like TPM or CPM, rounded{cells.where(near)}, not counts (rows add up to "
                f"{totals[near].min()} to {totals[near].max()})"
            )
    ones = cells.genes_with(1)
    found = _only_multiples(cells, ones)
    if found or len(totals) < FEWEST_CELLS:
        return found
    return _detected(cells, ones) or _rounded_logs(cells, ones) or _skipping(cells, ones)


def _only_multiples(cells: _Cells, ones: npt.NDArray[np.int32]) -> str:
    """Say of which number the values of cells are multiples, '' if of none."""
    without = (ones == 0) & (cells.n_genes >= _GENES_OF_MULTIPLES)
    if cells.n_genes[without].sum() < _FEWEST_ONES:
        return ""
    divisor = int(np.gcd.reduce(cells.of(without).data))
    if divisor == 1:
        return ""
    return (
        f"holds only multiples of {divisor}{cells.where(without)}: scaled values, not counts "
        f"(divide them by {divisor})"
    )


def _detected(cells: _Cells, ones: npt.NDArray[np.int32]) -> str:
    """Say where cells of many genes have no value above 1."""
    n_genes, counts = cells.n_genes, cells.counts
    text = "holds no other value than 1 (detected / not detected)"
    if counts.nnz >= _FEWEST_ONES and n_genes.mean() >= _FEWEST_GENES and ones.sum() == counts.nnz:
        return f"{text}, not counts"
    many = n_genes >= _FEWEST_GENES
    single = many & (ones == n_genes)
    if single.sum() < FEWEST_CELLS:
        return ""
    if 2 * single.sum() <= many.sum():
        # These cells alone: others may have a gene that makes half of their counts.
        shares = np.bincount(cells.of(single).indices) / n_genes[single].sum()
        single &= n_genes.astype(float) ** 2 / 2 * (shares**2).sum() >= _FEWEST_REPEATS
    return f"{text}{cells.where(single)}, not counts" if single.sum() >= FEWEST_CELLS else ""


def _rounded_logs(cells: _Cells, ones: npt.NDArray[np.int32]) -> str:
    """Say where cells without large values have rarely a 1."""
    everything = np.ones(len(ones), dtype=bool)
    part = (cells.n_genes >= _FEWEST_GENES) & (cells.largest() <= LARGEST_LOG)
    if part.sum() >= FEWEST_CELLS:
        part &= ones < _RARE_ONES * np.maximum(cells.genes_with(2), cells.genes_with(3))
    for some in (everything, part):
        counts = cells.of(some)
        sparse_enough = _FEWEST_ONES <= counts.nnz < counts.shape[0] * counts.shape[1] / 2
        if some.sum() < FEWEST_CELLS or not sparse_enough or counts.data.max() > LARGEST_LOG:
            continue
        numbers = np.bincount(counts.data)
        commonest = int(numbers[1:].argmax()) + 1
        if numbers[1] < _RARE_ONES * numbers[commonest]:
            return (
                f"looks like rounded logarithms{cells.where(some)}, not counts (no value above "
                f"{len(numbers) - 1}; {commonest} is commoner than 1, and 0 than both)"
            )
    return ""


def _skipping(cells: _Cells, ones: npt.NDArray[np.int32]) -> str:
    """Say where cells of many genes lack a small number, as scaled and rounded ones do."""
    totals, without_one = cells.totals, ones == 0
    low, middle, high = np.quantile(totals, [0.05, 0.5, 0.95])
    similar = high - low < _SIMILAR_TOTALS * middle
    many = np.median(cells.n_genes) >= _MANY_GENES
    if similar and many and without_one.mean() > _WITHOUT_ONE:
        return (
            f"looks normalised and rounded, not counts (cells add up to {totals.min()} to "
            f"{totals.max()})"
        )
    n_columns = cells.counts.shape[1]
    skipping = without_one & (cells.n_genes >= _MANY_GENES) & (cells.n_genes < n_columns / 2)
    threes = cells.genes_with(3)
    skipping |= (threes >= _NEXT_GENES) & (cells.genes_with(2) == 0)
    without_three = (threes == 0) & (cells.n_genes >= _FEWEST_GENES)
    if without_three.sum() >= FEWEST_CELLS:
        skipping |= without_three & (cells.genes_with(4) >= _NEXT_GENES)
    if skipping.sum() < FEWEST_CELLS:
        return ""
    found = totals[skipping]
    return (
        f"looks scaled and rounded{cells.where(skipping)}, not counts (a 1, 2 or 3 is missing "
        f"beside many larger values; cells add up to {found.min()} to {found.max()})"
    )


def describe_limits(counts: sparse.csr_matrix, *, dtype: np.dtype[Any]) -> str:
    """Say what is odd about the largest values of a matrix that is taken for counts.

    Args:
        counts: (cells, genes) int64 without stored zeros.
        dtype: Type that the values are stored in.

    Returns:
        The end of a sentence that begins with the name of the matrix; '' if nothing is.
    """
    totals = np.asarray(counts.sum(axis=1)).ravel()
    if np.count_nonzero(totals) < FEWEST_CELLS:
        return ""
    largest = int(counts.data.max())
    n_largest = int(np.count_nonzero(counts.data == largest))
    below = int(np.count_nonzero((counts.data >= 0.9 * largest) & (counts.data < largest)))
    if dtype.kind in "iu" and largest == int(np.iinfo(dtype).max):
        return (
            f"holds {largest} {n_largest} times, the largest number of its type {dtype}: larger "
            "counts may have been cut off"
        )
    if largest > 2 and n_largest >= max(FEWEST_CELLS, _PILE * (below + 1)):
        return f"holds its largest value {largest} {n_largest} times: counts may have been capped"
    total = float(np.median(totals[totals > 0]))
    if total >= FEWEST_COUNTS and largest <= LARGEST_LOG and largest <= _LARGEST_SHARE * total:
        return (
            f"holds no value above {largest} in cells of {total:.0f} counts: these may be rounded "
            "logarithms, bins or capped counts"
        )
    return _similar_totals(_Cells(counts, 0))


def _similar_totals(cells: _Cells) -> str:
    """Say where half of the cells add up to nearly, but not exactly, 10,000 or another power."""
    n_genes = cells.n_genes
    sparse_enough = (n_genes >= _MANY_GENES) & (n_genes < cells.counts.shape[1] / 2)
    totals = np.sort(cells.totals[sparse_enough])
    half = len(totals) // 2
    if 2 * half < FEWEST_CELLS:
        return ""
    place = int((totals[half:] / totals[: len(totals) - half]).argmin())
    found = totals[place : place + half + 1]
    power = 10 ** int(np.rint(np.log10(np.median(found))))
    near = found[0] >= _NEAR_POWER[0] * power and found[-1] <= _NEAR_POWER[1] * power
    if not near or len(np.unique(found)) < half / 2:
        return ""
    return (
        f"has half of its cells add up to {found[0]} to {found[-1]}, more alike than cells of raw "
        f"counts: these may be scaled to {power} and rounded"
    )
