"""Names what a matrix holds that is not raw counts: log-transformed, normalised, TPM, scaled, ...

The message is for the person who has to find the raw counts; nothing is taken over on the strength
of it. Telling signs: cells that add up to the same total, before or after the logarithm is undone,
and cells whose values are whole multiples of their smallest one (counts times a factor per cell;
gene lengths, as in TPM and FPKM, break that). Corrected and estimated counts (SoupX, CellBender,
alevin) have neither sign; `rounding.py` takes them where the manifest asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

_EQUAL_SUMS = 0.02
LARGEST_LOG = 25.0
"""No count has a larger natural logarithm (7e10); larger values are not logarithms."""
_WHOLE = 1e-3
"""Distance of a multiple from a whole number, relative to it: tables are printed with few digits.
Only for the message; the proof of restored counts is stricter (`invert.py`)."""
_LARGEST_TOLD = 100.0
"""Of larger values that tolerance makes too many whole."""
_MOSTLY_WHOLE = 0.5
"""Logarithms of counts, and counts times a factor, are whole by chance only."""
_MOST_CELLS = 0.9
_FEWEST_VALUES = 5
FEWEST_CELLS = 20
_DESCRIBED_VALUES = 2**20
_SAME_SUM = 1e-3
_SAME_LOG_SUM = 1e-5
"""float32 values add up to their total within 1e-6."""
_NOISE = 1e-6
_SCALED_SHARE = 0.1
"""Share of the cells that must add up to one total; by chance it is a few in a thousand."""
FEWEST_COUNTS = 500
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a matrix of fractions most likely is."""

    text: str
    """The end of a sentence that begins with the name of the matrix."""
    corrected: bool = False
    """Whether they may be corrected or estimated counts, which can be rounded."""


def describe(block: sparse.csr_matrix) -> Description:
    """Say what a matrix of fractions most likely is.

    Args:
        block: (cells, genes) finite, no value negative, some not whole. Only cells with a fraction
            are looked at: others say nothing about those.
    """
    block = _with_fractions(block)
    if block.nnz > _DESCRIBED_VALUES:
        block = block[: max(2, int(np.searchsorted(block.indptr, _DESCRIBED_VALUES)))]
    values = block.astype(np.float64)
    values.eliminate_zeros()
    undone = {"": values} | _without_logs(values)
    # Small values are nearly their own logarithm: the transform that makes the sums most equal is
    # the one.
    sums = {name: _sum_and_spread(matrix) for name, matrix in undone.items()}
    best = min(sums, key=lambda name: sums[name][1])
    whole = float(np.mean(_are_whole(values.data)))
    # 2**x - 1 of a whole x is whole: a logarithm is found by what is not whole, if that is most.
    if sums[best][1] <= _EQUAL_SUMS and (not best or whole <= _MOSTLY_WHOLE):
        name = _scaled_name(best, sums[best][0], _are_multiples(values))
        return Description(text=f"is {name}, not counts")
    fractions = ~_are_whole(values.data)
    for name, matrix in undone.items():
        if name and _mostly_whole(matrix.data[fractions]):
            return Description(text=f"is {name} of raw counts, not counts")
    if whole > _MOSTLY_WHOLE:
        text = f"holds estimated counts ({1 - whole:.1%} of the values are not whole), not counts"
        return Description(text=text, corrected=True)
    for name, matrix in undone.items():
        if _are_multiples(matrix):
            scaled = "counts scaled by a factor per cell (size factors)"
            return Description(text=f"is {f'{name} of ' if name else ''}{scaled}, not counts")
    if len(undone) > 1:
        text = f"looks log-transformed, not counts (largest value {values.data.max():.3g})"
        return Description(text=text, corrected=True)
    text = (
        "holds fractions that are no multiples of a smallest value (TPM, FPKM or RPKM, or "
        f"estimated or corrected counts; cells add up to about {sums[''][0]:.3g}), not counts"
    )
    return Description(text=text, corrected=True)


def find_scaled_cells(block: sparse.csr_matrix) -> str:
    """Say which cells are normalised or log-transformed, even if they are few among others.

    Args:
        block: (cells, genes) finite, no value negative.

    Returns:
        The end of a sentence that begins with the name of the matrix; '' if no total is shared by
        a tenth of the cells with fractions (20 at least), or, where a logarithm is undone, by 20
        cells nearly exactly.
    """
    values = _with_fractions(block).astype(np.float64)
    values.eliminate_zeros()
    values = values[np.flatnonzero(np.diff(values.indptr) >= _FEWEST_VALUES)]
    found = _shared_total(values, within=_SAME_SUM, share=_SCALED_SHARE, least=0)
    if found:
        return f"holds {_scaled_name('', found, False)}, not counts"
    for name, matrix in _without_logs(_maybe_logs(values)).items():
        matrix = matrix[np.flatnonzero(~_carried_by_one(matrix))]
        found = _shared_total(matrix, within=_SAME_LOG_SUM, share=0, least=FEWEST_COUNTS)
        found = found or _shared_total(matrix, within=_SAME_SUM, share=_SCALED_SHARE, least=0)
        if found:
            return f"holds {_scaled_name(name, found, False)}, not counts"
    return ""


def _maybe_logs(values: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the cells whose values may be logarithms: none large, and most not whole."""
    if not values.nnz:
        return values
    first = values.indptr[:-1]
    small = np.maximum.reduceat(values.data, first) <= LARGEST_LOG
    n_whole = np.add.reduceat(_are_whole(values.data), first, dtype=np.int64)
    return values[np.flatnonzero(small & (n_whole <= _MOSTLY_WHOLE * np.diff(values.indptr)))]


def _carried_by_one(values: sparse.csr_matrix) -> npt.NDArray[np.bool_]:
    """Return which cells have most of their total in one value: others share it by chance."""
    if not values.nnz:
        return np.zeros(values.shape[0], dtype=bool)
    totals = np.asarray(values.sum(axis=1)).ravel()
    found: npt.NDArray[np.bool_] = np.maximum.reduceat(values.data, values.indptr[:-1]) > totals / 2
    return found


def _shared_total(values: sparse.csr_matrix, *, within: float, share: float, least: float) -> float:
    """Return a total that 20 cells and a share of them have, 0 if there is none.

    Args:
        values: (cells, genes).
        within: Relative distance of totals that count as one.
        share: Smallest share of the cells, 0 to 1.
        least: Smaller totals are not looked at: shallow cells have them by chance.
    """
    sums = np.sort(np.asarray(values.sum(axis=1)).ravel())
    n_needed = max(FEWEST_CELLS, int(share * len(sums)))
    sums = sums[sums >= least]
    if len(sums) < n_needed:
        return 0.0
    first, last = sums[: len(sums) - n_needed + 1], sums[n_needed - 1 :]
    same = np.flatnonzero(last <= first * (1 + within))
    return float(first[same[0]]) if len(same) else 0.0


def _with_fractions(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return the cells that have a value that is not whole."""
    cells = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    return block[np.unique(cells[~_are_whole(block.data)])]


def _without_logs(values: sparse.csr_matrix) -> dict[str, sparse.csr_matrix]:
    """Return values with each logarithm undone, by its name; none if they are too large for one."""
    if not values.nnz or values.data.max() > LARGEST_LOG:
        return {}
    return {name: _mapped(values, undo) for name, undo in _LOGS.items()}


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


def _are_whole(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return which values are whole except for float noise."""
    whole: npt.NDArray[np.bool_] = np.abs(values - np.rint(values)) <= _NOISE
    return whole


def _mostly_whole(values: npt.NDArray[np.float64]) -> bool:
    """Return whether values are whole as far as they can be told; large ones say nothing."""
    told = values[values <= _LARGEST_TOLD]
    off = np.abs(told - np.rint(told))
    return bool(len(told) and np.mean(off <= _WHOLE * told) > _MOST_CELLS)


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
