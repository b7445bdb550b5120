"""The value transform from counts to model input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


def scale_of(totals: NDArray[Any], target_sum: float) -> NDArray[np.float64]:
    """Return what each cell's counts are multiplied with before log1p; of an empty cell any number.

    Args:
        totals: (B,) counts of each cell over the vocabulary's genes.
        target_sum: Counts of a cell after scaling.
    """
    return target_sum / np.maximum(totals, 1).astype(np.float64)


def log1p_normalise(counts: csr_matrix, *, target_sum: float) -> np.ndarray:
    """Return log1p(target_sum * count / total of the cell) as a dense matrix.

    Args:
        counts: (B, G) raw counts of the vocabulary's genes.
        target_sum: Counts of a cell after scaling (1.0e4 in scLong's data).

    Returns:
        (B, G) float32; a cell without counts is all zero.
    """
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    dense = np.zeros(counts.shape, dtype=np.float32)
    cell = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    # Only the values are transformed; log1p over the dense matrix costs 15 times as much.
    dense[cell, counts.indices] = np.log1p(counts.data * scale_of(totals, target_sum)[cell])
    return dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """From raw counts to model input: log1p(target_sum * count / total over the model's genes)."""

    name: str
    """Always log1p_total in this version."""
    target_sum: float
    """Counts of a cell after scaling."""
    unmeasured: Literal["zero", "mask"] = "zero"
    """`data.unmeasured` of the training: whether genes that an input does not name are zeros, or
    unknown (mask)."""
