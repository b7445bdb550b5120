"""Raw counts back from log1p of scaled cells, with a proof for every cell.

A stored value is v = log1p(T * c / N): T the total that every cell was scaled to, c the count, N
the cell's sum of counts. expm1(v) is c times a factor of the cell, and the smallest value of a cell
stands for one count. A cell is proven if

- all its values are whole multiples of that smallest value, each within what rounding of the stored
  floats can cause (`_relative_error`, at most 0.25: a wider margin proves nothing),
- it has at least `FEWEST_VALUES` values (a handful of numbers are soon multiples of one another),
- its total agrees with T: its values add up to T, or, where genes were removed after scaling, T is
  a whole number of counts and no fewer than those that are left.

T is the sum that all cells of the first block share, or one of `USUAL_TARGETS`. What the values
cannot tell: a cell whose counts all have a common divisor; among more than a few values that does
not happen. Cells that are not proven are dropped and counted; a dataset with more than
`MOST_UNPROVEN` of them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.counts.not_counts import LARGEST_LOG, check_finite
from data_prep.counts.rounding import Rounded
from data_prep.source.source import UnusableError

USUAL_TARGETS = (1e4, 1e6, 1e5, 1e3)
FEWEST_VALUES = 10
MOST_UNPROVEN = 0.01
"""Largest share of a dataset's cells that may be dropped as not proven."""
_FEWEST_CELLS = 5
_WIDEST = 0.25
_EQUAL_SUMS = 1e-4
"""float32 cells add up to their total within 1e-6; stored text has fewer digits."""
_ROUNDINGS = 4 * 2.0**-23
"""Four times the spacing of float32 at 1: scaling, logarithm and storage round once each. float64
is held to the same, since most were computed in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """Counts of a block and which of its cells are proven."""

    counts: sparse.csr_matrix
    """(cells, genes) int64, canonical; cells that are not proven are empty."""
    proven: npt.NDArray[np.bool_]
    """(cells,); a cell without any value counts as proven."""
    largest_residual: float
    """Largest distance of a proven multiple from its whole number."""
    rounded: Rounded | None = None
    """What rounding changed, where corrected counts are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Multiples:
    """A block as multiples of one count per cell; arrays are (cells,) except those of values."""

    whole: npt.NDArray[np.float64]
    """(values,) nearest whole numbers."""
    residual: npt.NDArray[np.float64]
    """(values,) distance from them."""
    fits: npt.NDArray[np.bool_]
    """Every value of the cell is whole within rounding."""
    sums: npt.NDArray[np.float64]
    """Sum of the scaled values."""
    one: npt.NDArray[np.float64]
    """What one count was scaled to; 1 for cells without values."""
    n_counts: npt.NDArray[np.float64]
    """Sum of the whole numbers."""


def find_target(block: sparse.csr_matrix, *, where: str) -> float:
    """Return the total that the cells of a log1p-normalised matrix were scaled to.

    Args:
        block: (cells, genes) values of the matrix, of cells enough to judge.
        where: Name of the matrix, for messages.

    Returns:
        The total, such as 10000.

    Raises:
        UnusableError: The values are not log1p of counts scaled to one total.
        ValueError: Negative or non-finite values.
    """
    cells = _multiples(_checked(block, where))
    used = cells.sums > 0
    if not used.any():
        raise ValueError(f"{where} holds no values to restore counts from")
    sums = cells.sums[used]
    median = float(np.median(sums))
    if np.mean(np.abs(sums - median) <= _EQUAL_SUMS * median) > 1 - MOST_UNPROVEN:
        return (
            float(round(median)) if abs(median - round(median)) <= _EQUAL_SUMS * median else median
        )
    for target in USUAL_TARGETS:
        agrees = (cells.fits & _agrees(cells, target))[used]
        if agrees.sum() >= _FEWEST_CELLS and agrees.mean() >= 1 - MOST_UNPROVEN:
            return target
    usual = ", ".join(f"{target:g}" for target in USUAL_TARGETS)
    raise UnusableError(
        f"{where} is not log1p of counts scaled to one total: after expm1 the cells add up to "
        f"{sums.min():.5g} to {sums.max():.5g}, and none of {usual} makes their totals whole"
    )


def restore_counts(block: sparse.csr_matrix, *, target: float, where: str) -> Restored:
    """Return the counts that log1p-normalised values were made of.

    Args:
        block: (cells, genes) values log1p(target * count / cell total), all genes of the file.
        target: See `find_target`.
        where: Name of the matrix, for messages.

    Raises:
        ValueError: Negative or non-finite values.
    """
    block = _checked(block, where)
    cells = _multiples(block)
    lengths = np.diff(block.indptr)
    proven = (lengths >= FEWEST_VALUES) & cells.fits & _agrees(cells, target)
    proven |= lengths == 0
    of_proven = np.repeat(proven, lengths)
    counts = sparse.csr_matrix(
        (np.where(of_proven, cells.whole, 0).astype(np.int64), block.indices, block.indptr),
        shape=block.shape,
    )
    counts.eliminate_zeros()
    residual = cells.residual[of_proven]
    return Restored(
        counts=counts,
        proven=proven,
        largest_residual=float(residual.max()) if residual.size else 0.0,
    )


def _checked(block: sparse.csr_matrix, where: str) -> sparse.csr_matrix:
    """Return a canonical float64 copy without stored zeros; its values are proper log1p values."""
    block.check_format(full_check=True)
    if block.dtype.kind not in "iuf":
        raise UnusableError(f"{where} holds values of type {block.dtype}, not log1p of counts")
    values = block.astype(np.float64, copy=True)
    check_finite(values.data, where)
    if values.nnz and values.data.min() < 0:
        raise UnusableError(
            f"{where} holds negative values (smallest {values.data.min():.3g}): not log1p of counts"
        )
    if values.nnz and (values.data == np.rint(values.data)).all():
        raise ValueError(f"{where} holds whole numbers, not log1p values; write counts {where}")
    if values.nnz and values.data.max() > LARGEST_LOG:
        raise UnusableError(f"{where} holds {values.data.max():.5g}: too large for a logarithm")
    values.eliminate_zeros()
    n_values = values.nnz
    values.sum_duplicates()
    if values.nnz < n_values:
        raise ValueError(
            f"{where} holds {n_values - values.nnz} values more than places; logarithms of one "
            "cell and gene cannot be added up"
        )
    return values


def _multiples(values: sparse.csr_matrix) -> _Multiples:
    n_cells = values.shape[0]
    lengths = np.diff(values.indptr)
    rows = np.repeat(np.arange(n_cells), lengths)
    scaled = np.expm1(values.data)
    one = np.ones(n_cells)
    filled = np.flatnonzero(lengths)
    if len(filled):
        one[filled] = np.minimum.reduceat(scaled, values.indptr[filled])
    whole = np.rint(scaled / one[rows])
    sums = np.bincount(rows, weights=scaled, minlength=n_cells).astype(np.float64)
    n_counts = np.bincount(rows, weights=whole, minlength=n_cells).astype(np.float64)
    # All values together say more precisely than the smallest one what a single count became.
    one[filled] = sums[filled] / n_counts[filled]
    ratio = scaled / one[rows]
    residual = np.abs(ratio - whole)
    margin = whole * (_relative_error(scaled) + _relative_error(one)[rows])
    misfit = (residual > margin) | (margin > _WIDEST)
    fits = np.bincount(rows[misfit], minlength=n_cells) == 0
    return _Multiples(
        whole=whole, residual=residual, fits=fits, sums=sums, one=one, n_counts=n_counts
    )


def _relative_error(scaled: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how far expm1 of a rounded logarithm can be off, as a share of it."""
    return _ROUNDINGS * (2 + (1 + scaled) * np.log1p(scaled) / scaled)


def _agrees(cells: _Multiples, target: float) -> npt.NDArray[np.bool_]:
    """Return (cells,) whether the total of each cell fits the target."""
    added_up = np.abs(cells.sums - target) <= _EQUAL_SUMS * target
    total = target / cells.one
    margin = total * _relative_error(cells.one)
    whole = (np.abs(total - np.rint(total)) <= margin) & (margin <= _WIDEST)
    return added_up | (whole & (total >= cells.n_counts - margin))
