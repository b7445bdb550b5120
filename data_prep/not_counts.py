"""Names what a matrix holds that is not raw counts: log-transformed, normalised, TPM, scaled, ...

The message is for the person who has to find the raw counts; nothing is taken over on the strength
of it. Telling signs: cells that add up to the same total, before or after the logarithm is undone,
and cells whose values are whole multiples of their smallest one (counts times a factor per cell;
gene lengths, as in TPM and FPKM, break that).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import sparse

_EQUAL_SUMS = 0.02
LARGEST_LOG = 25.0
"""No count has a larger natural logarithm (7e10); larger values are not logarithms."""
_WHOLE = 1e-3
"""Distance of a multiple from a whole number, relative to it: tables are printed with few digits.
Only for the message; the proof of restored counts is stricter (`invert.py`)."""
_MOST_CELLS = 0.9
_FEWEST_VALUES = 5
_SIMILAR_TOTALS = 0.15
_WITHOUT_ONE = 0.25
_MANY_GENES = 200
"""Rounding scaled cells moves their totals apart by 1 to 10 %. Simulated counts may come as close,
so that it also takes cells of many genes without any 1: scaling by 1.5 and more leaves none, and
hardly a cell of raw counts lacks one."""
_FEWEST_CELLS = 20
_FEWEST_ONES = 1000
_DESCRIBED_VALUES = 2**20
_LOGS: dict[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "log1p": np.expm1,
    "log2(1 + x)": lambda x: np.exp2(x) - 1,
    "log10(1 + x)": lambda x: 10**x - 1,
}


def check_finite(values: npt.NDArray[np.generic], where: str) -> None:
    """Refuse NaN and infinite values.

    Args:
        values: Floats.
        where: Name of the matrix, for the message.

    Raises:
        ValueError: There are some; the message counts them.
    """
    n_bad = int(np.count_nonzero(~np.isfinite(values)))
    if n_bad:
        n_nan = int(np.count_nonzero(np.isnan(values)))
        kind = "NaN" if n_nan == n_bad else "infinite" if not n_nan else "NaN or infinite"
        raise ValueError(f"{where} holds {n_bad} values that are {kind}; counts are finite")


def describe(block: sparse.csr_matrix) -> str:
    """Say what a matrix of fractions most likely is.

    Args:
        block: (cells, genes) finite, no value negative, some not whole.

    Returns:
        The end of a sentence that begins with the name of the matrix.
    """
    if block.nnz > _DESCRIBED_VALUES:
        block = block[: max(2, int(np.searchsorted(block.indptr, _DESCRIBED_VALUES)))]
    values = block.astype(np.float64)
    undone = {"": values}
    if values.data.max() <= LARGEST_LOG:
        undone |= {name: _mapped(values, undo) for name, undo in _LOGS.items()}
    # Small values are nearly their own logarithm: the transform that makes the sums most equal is
    # the one.
    sums = {name: _sum_and_spread(matrix) for name, matrix in undone.items()}
    best = min(sums, key=lambda name: sums[name][1])
    if sums[best][1] <= _EQUAL_SUMS:
        return f"is {_scaled_name(best, sums[best][0], _are_multiples(values))}, not counts"
    for name, matrix in undone.items():
        if name and _mostly_whole(matrix):
            return f"is {name} of raw counts, not counts"
        if _are_multiples(matrix):
            scaled = "counts scaled by a factor per cell (size factors)"
            return f"is {f'{name} of ' if name else ''}{scaled}, not counts"
    if len(undone) > 1:
        return f"looks log-transformed, not counts (largest value {values.data.max():.3g})"
    return (
        "holds fractions that are no multiples of a smallest value (TPM, FPKM or RPKM, or "
        f"estimated or corrected counts; cells add up to about {sums[''][0]:.3g}), not counts"
    )


def describe_whole(counts: sparse.csr_matrix) -> str:
    """Say what a matrix of whole numbers is where it plainly holds no raw counts.

    Args:
        counts: (cells, genes) int64 without stored zeros.

    Returns:
        The end of a sentence that begins with the name of the matrix; '' if nothing speaks
        against counts. Too few cells prove nothing.
    """
    totals = np.asarray(counts.sum(axis=1)).ravel()
    totals = totals[totals > 0]
    if len(totals) < _FEWEST_CELLS:
        return ""
    if counts.nnz >= _FEWEST_ONES and counts.data.max() == 1:
        return "holds no other value than 1 (detected / not detected), not counts"
    similar = _sum_and_spread(counts)[1] < _SIMILAR_TOTALS
    many = np.median(np.diff(counts.indptr)) >= _MANY_GENES
    if similar and many and _share_without_one(counts) > _WITHOUT_ONE:
        return (
            f"looks normalised and rounded, not counts (cells add up to {totals.min()} to "
            f"{totals.max()})"
        )
    return ""


def _share_without_one(counts: sparse.csr_matrix) -> float:
    """Return the share of cells with values, none of which is 1."""
    cells = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    return 1 - len(np.unique(cells[counts.data == 1])) / max(1, len(np.unique(cells)))


def _mapped(
    values: sparse.csr_matrix, undo: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> sparse.csr_matrix:
    return sparse.csr_matrix((undo(values.data), values.indices, values.indptr), values.shape)


def _scaled_name(log: str, total: float, multiples: bool) -> str:
    if log:
        return f"{log} of cells scaled to {total:.6g}"
    if abs(total / 1e6 - 1) < _EQUAL_SUMS:
        return f"{'CPM' if multiples else 'TPM'} (cells add up to a million)"
    return f"normalised to about {total:.3g} a cell"


def _sum_and_spread(values: sparse.csr_matrix) -> tuple[float, float]:
    """Return the median cell sum and how far the cells spread around it, as a share of it."""
    sums = np.asarray(values.sum(axis=1)).ravel()
    sums = sums[sums > 0]
    if len(sums) < 2:
        return float(sums.sum()), np.inf
    median = float(np.median(sums))
    low, high = np.quantile(sums, [0.05, 0.95])
    return median, float(high - low) / median


def _mostly_whole(values: sparse.csr_matrix) -> bool:
    off = np.abs(values.data - np.rint(values.data))
    return bool(np.mean(off <= _WHOLE * values.data) > _MOST_CELLS)


def _are_multiples(values: sparse.csr_matrix) -> bool:
    """Return whether the values of (nearly) every cell are whole multiples of its smallest one."""
    lengths = np.diff(values.indptr)
    rows = np.flatnonzero(lengths >= _FEWEST_VALUES)
    if not len(rows):
        return False
    whole = 0
    for row in rows:
        cell = values.data[values.indptr[row] : values.indptr[row + 1]]
        cell = cell[cell > 0]
        if len(cell) and cell.max() > cell.min():
            ratio = cell / cell.min()
            whole += bool((np.abs(ratio - np.rint(ratio)) <= _WHOLE * ratio).all())
    return whole > _MOST_CELLS * len(rows)
