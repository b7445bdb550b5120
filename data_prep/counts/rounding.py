"""Whole numbers for corrected or estimated counts, with a record of what rounding changed.

SoupX, CellBender and alevin leave fractions: 0.93 for 1, or 0.5 where a read fits two genes. Where
the manifest asks for it (`counts = round:MATRIX`), each value becomes the nearest whole number,
halves the even one. Cells that share a total, before or after a logarithm is undone, are normalised
and refused: rounding makes no counts of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from data_prep.counts.not_counts import check_finite, find_scaled_cells
from data_prep.source.source import UnusableError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A block of whole numbers and what it was before."""

    counts: sparse.csr_matrix
    """(cells, genes) of whole numbers as float64, for `counts.exact_counts`."""
    n_values: int
    """Values other than 0 before."""
    n_rounded: int
    """Of them those that were not whole."""
    total: float
    """Sum before."""
    largest_distance: float
    """Largest change of a value."""


def round_counts(block: sparse.csr_matrix, *, where: str) -> Rounded:
    """Return the nearest whole numbers of a block.

    Args:
        block: (cells, genes) of any real type.
        where: Name of the matrix, for messages.

    Raises:
        UnusableError: Negative, normalised, log-transformed or true/false values.
        ValueError: NaN or infinite values, columns out of range.
    """
    block.check_format(full_check=True)
    if block.dtype.kind not in "iuf":
        raise UnusableError(f"{where} holds values of type {block.dtype}, not counts")
    values = block.astype(np.float64)
    check_finite(values.data, where)
    if values.nnz and values.data.min() < 0:
        raise UnusableError(
            f"{where} holds negative values (smallest {values.data.min():.3g}); corrected counts "
            "are 0 or more"
        )
    if not values.has_canonical_format:
        values = values.copy()
        values.sum_duplicates()
    reason = find_scaled_cells(values)
    if reason:
        raise UnusableError(f"{where} {reason}; rounding makes no counts of them")
    whole = np.rint(values.data)
    distance = np.abs(values.data - whole)
    return Rounded(
        counts=sparse.csr_matrix((whole, values.indices, values.indptr), shape=values.shape),
        n_values=int(np.count_nonzero(values.data)),
        n_rounded=int(np.count_nonzero(distance)),
        total=float(values.data.sum()),
        largest_distance=float(distance.max()) if distance.size else 0.0,
    )
