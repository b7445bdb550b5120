"""Proof that the values of a matrix are raw counts, or the reason why they are not.

Raw counts are finite, not negative, below 2^32 and whole up to float noise (1e-6). Anything else is
named for what it looks like: a damaged file is an error, a normalised, log-transformed or scaled
matrix is `UnusableError`, because counts cannot be had from it without a guess.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.source import Matrix, UnusableError

MAX_COUNT = 2**32 - 1
WHOLE_TOLERANCE = 1e-6
"""Largest distance from a whole number: tables written by R carry 0.999999999999997 for 1."""
COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "umi_counts", "UMI")
"""Layer names tried for raw counts when the manifest says `auto`, in this order."""
_MOSTLY = 0.9
_EQUAL_SUMS = 0.02
_LARGEST_LOG = 25.0


def exact_counts(block: sparse.csr_matrix, *, where: str) -> sparse.csr_matrix:
    """Return the block as whole numbers, or say why its values are not raw counts.

    Args:
        block: (cells, genes) of any real type.
        where: Name of the matrix, for the message.

    Returns:
        The same matrix as int64, canonical (sorted columns, no repeats, no stored zeros).

    Raises:
        UnusableError: Well-formed values that are not counts (log-normalised, scaled, TPM,
            fractions, true/false).
        ValueError: Damaged values: NaN, infinite, negative counts, 2^32 and more, columns out of
            range.
    """
    block.check_format(full_check=True)
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
    whole = np.rint(values) if values.dtype.kind == "f" else values
    counts = sparse.csr_matrix(
        (whole.astype(np.int64), block.indices, block.indptr), shape=block.shape, copy=True
    )
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def choose_matrix(matrices: Sequence[Matrix], wanted: str) -> Matrix:
    """Pick the matrix that holds the raw counts.

    Args:
        matrices: All matrices of a dataset.
        wanted: `auto`, or the name of one (X, raw.X, layers/NAME). `auto` takes the first whose
            first block passes `exact_counts`, in the order raw.X, the layers of COUNT_LAYERS, X.

    Returns:
        The matrix; only its first block has been looked at.

    Raises:
        UnusableError: `auto`, and none holds counts; the message says what each one looks like.
        ValueError: There is no matrix of that name, or it is damaged.
    """
    named = {matrix.name: matrix for matrix in matrices}
    if wanted != "auto":
        if wanted not in named:
            raise ValueError(f"there is no matrix '{wanted}'; the file holds {', '.join(named)}")
        return named[wanted]
    order = ["raw.X", *(f"layers/{name}" for name in COUNT_LAYERS), "X"]
    candidates = [named[name] for name in order if name in named]
    reasons: dict[str, ValueError] = {}
    for matrix in candidates:
        try:
            for block in matrix.blocks():
                exact_counts(block, where=matrix.name)
                break
        except ValueError as error:
            reasons[matrix.name] = error
        else:
            return matrix
    text = "; ".join(str(error) for error in reasons.values())
    # A damaged matrix is the more useful report: the dataset may be fine at its source.
    if all(isinstance(error, UnusableError) for error in reasons.values()):
        raise UnusableError(f"no raw counts: {text}")
    raise ValueError(text or "the file holds no matrix")


def _check_floats(block: sparse.csr_matrix, where: str) -> None:
    values = block.data
    if not values.size:
        return
    n_bad = int(np.count_nonzero(~np.isfinite(values)))
    if n_bad:
        kind = "NaN" if np.isnan(values).any() else "infinite"
        raise ValueError(f"{where} holds {n_bad} values that are {kind}; counts are finite")
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
        raise UnusableError(f"{where} {_describe(block)} (first fraction {fraction:.6g})")


def _describe(block: sparse.csr_matrix) -> str:
    """Say what a matrix of fractions most likely is."""
    largest = float(block.data.max())
    back = block.astype(np.float64)
    if largest <= _LARGEST_LOG:
        back.data = np.expm1(back.data)
        total = _equal_sums(np.asarray(back.sum(axis=1)).ravel())
        if total is not None:
            return f"is log1p of cells scaled to {total:.6g}, not counts"
        return f"looks log-transformed, not counts (largest value {largest:.3g})"
    total = _equal_sums(np.asarray(back.sum(axis=1)).ravel())
    if total is not None:
        name = (
            "TPM or CPM"
            if abs(total / 1e6 - 1) < _EQUAL_SUMS
            else f"normalised to about {total:.3g} a cell"
        )
        return f"is {name}, not counts"
    return "holds fractions, not counts"


def _equal_sums(sums: npt.NDArray[np.float64]) -> float | None:
    """Return the median cell sum if (nearly) all cells have it, else None."""
    sums = sums[sums > 0]
    if len(sums) < 2:
        return None
    median = float(np.median(sums))
    low, high = np.quantile(sums, [0.05, 0.95])
    return median if high - low <= _EQUAL_SUMS * median else None
