"""Proof that the values of a matrix are raw counts, or the reason why they are not.

Raw counts are finite, not negative, below 2^32 and whole up to float noise (1e-6). Anything else is
named for what it looks like (`not_counts.py`): a damaged file is an error, a normalised,
log-transformed or scaled matrix is `UnusableError`. Only where the manifest asks for it, log1p of
scaled counts is undone, with a proof for each cell (`invert.py`), and corrected counts are rounded
(`rounding.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.counts.not_counts import check_finite, describe
from data_prep.counts.option import ROUND
from data_prep.source.source import UnusableError

MAX_COUNT = 2**32 - 1
WHOLE_TOLERANCE = 1e-6
"""Largest distance from a whole number: tables written by R carry 0.999999999999997 for 1."""
_MOSTLY = 0.9


def exact_counts(block: sparse.csr_matrix, *, where: str) -> sparse.csr_matrix:
    """Return the block as whole numbers, or say why its values are not raw counts.

    Args:
        block: (cells, genes) of any real type.
        where: Name of the matrix, for the message.

    Returns:
        The same matrix as int64, canonical (sorted columns, no repeats, no stored zeros). Each
        stored value is proven first; values of one place are then added in int64, whatever type
        they are stored in.

    Raises:
        UnusableError: Well-formed values that are not counts (log-normalised, scaled, TPM,
            fractions, true/false).
        ValueError: Damaged values: NaN, infinite, negative counts, 2^32 and more (added up, too),
            columns out of range, floats too large to tell neighbouring whole numbers apart.
    """
    block.check_format(full_check=True)
    values = block.data
    # Nearly every block is found to be counts by the first look; only others need all the checks.
    whole = _whole_numbers(values)
    if whole is None:
        _check_values(block, where)
        whole = (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int64)
    counts = sparse.csr_matrix((whole, block.indices, block.indptr), shape=block.shape)
    if not block.has_canonical_format:
        # In place: the arrays of the block are not ours.
        counts = counts.copy()
        counts.sum_duplicates()
        if counts.nnz and counts.data.max() > MAX_COUNT:
            raise ValueError(
                f"{where} holds values of one cell and gene that add up to {counts.data.max()}; "
                "counts must be below 2^32"
            )
    counts.has_canonical_format = True
    if not whole.all():
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts


def _whole_numbers(values: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Return values as int64 if all are plainly counts, without any rounding; else None."""
    if values.dtype.kind not in "iuf":
        return None
    if not values.size:
        return values.astype(np.int64)
    exact_up_to = MAX_COUNT
    if values.dtype.kind == "f":
        exact_up_to = min(MAX_COUNT, 2 ** (np.finfo(values.dtype).nmant + 1))
    # NaN passes no comparison.
    if not (values.min() >= 0 and values.max() <= exact_up_to):
        return None
    whole = values.astype(np.int64)
    return whole if values.dtype.kind != "f" or bool((whole == values).all()) else None


def _check_values(block: sparse.csr_matrix, where: str) -> None:
    """Raise what is wrong with the values of a block; nothing may be."""
    values = block.data
    if values.dtype == np.bool_:
        raise UnusableError(f"{where} holds true/false, not counts")
    if values.dtype.kind not in "iuf":
        raise ValueError(
            f"{where} holds values of type {values.dtype}; counts are integers or floats"
        )
    if values.dtype.kind == "f":
        _check_floats(block, where)
    elif values.dtype.kind == "i" and values.size and values.min() < 0:
        raise ValueError(f"{where} holds the negative count {values.min()}; counts are 0 or more")
    if values.size and values.max() > MAX_COUNT:
        raise ValueError(f"{where} holds {values.max():.0f}; counts must be below 2^32")


def _check_floats(block: sparse.csr_matrix, where: str) -> None:
    values = block.data
    if not values.size:
        return
    check_finite(values, where)
    distance = np.abs(values - np.rint(values))
    whole = float(np.mean(distance <= WHOLE_TOLERANCE))
    if values.min() < 0:
        if whole > _MOSTLY:
            n_negative = int(np.count_nonzero(values < 0))
            raise ValueError(
                f"{where} holds {n_negative} negative values among whole numbers "
                f"(smallest {values.min():g})"
            )
        raise UnusableError(
            f"{where} looks scaled, not counts "
            f"(values from {values.min():.3g} to {values.max():.3g})"
        )
    if whole < 1:
        fraction = values[distance > WHOLE_TOLERANCE][0]
        found = describe(block)
        advice = (
            "; if they are corrected or estimated counts (SoupX, CellBender, alevin), take the "
            f"uncorrected ones, or write counts = {ROUND}:{where} (--counts) for the nearest whole "
            "numbers"
        )
        raise UnusableError(
            f"{where} {found.text} (first fraction {fraction:.6g}){advice * found.corrected}"
        )
    exact_up_to = 2 ** (np.finfo(values.dtype).nmant + 1)
    if values.max() > exact_up_to:
        raise ValueError(
            f"{where} holds {values.max():.0f} as {values.dtype}, which is exact up to "
            f"{exact_up_to} only; the count may have been rounded"
        )
