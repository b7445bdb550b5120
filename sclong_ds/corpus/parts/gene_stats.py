"""Per-gene statistics of training cells; those of a corpus of parts are sums over the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GeneStats:
    """Per-gene statistics of the training cells.

    A value is log1p(target_sum * count / total of the cell).
    """

    n_expressing: NDArray[np.int64]
    """(G,) training cells with a count."""
    total_counts: NDArray[np.int64]
    """(G,) sum of the counts."""
    mean_expressed: NDArray[np.float64]
    """(G,) mean value over the cells with a count; mean_expressed_all for genes that no training
    cell expresses."""
    mean_expressed_all: float
    """Mean over all non-zero values."""
    var_expressed_all: float
    """Population variance of all non-zero values."""
    target_sum: float
    """Total to which a cell is scaled."""
    n_measuring: NDArray[np.int64] | None = None
    """(G,) training cells whose dataset measures the gene; None in corpora of earlier versions,
    which take every cell for measuring all."""
    counts_measuring: NDArray[np.int64] | None = None
    """(G,) sum of all counts of those cells."""

    def share(self) -> NDArray[np.float64]:
        """Return (G,) the share of each gene in the counts of the cells that measure it."""
        of = self.total_counts.sum() if self.counts_measuring is None else self.counts_measuring
        return self.total_counts / np.maximum(of, 1)


def joined_statistics(parts: Sequence[GeneStats]) -> GeneStats:
    """Return the statistics of the cells of all parts together.

    Numbers and sums of counts are exact; means and the variance are those of all cells at once up
    to rounding.

    Args:
        parts: Of cells with the same genes, at least one.

    Raises:
        ValueError: Statistics of values scaled to different totals.
    """
    totals = sorted({part.target_sum for part in parts})
    if len(totals) > 1:
        raise ValueError(f"parts with values scaled to different totals: {totals}")
    n_expressing = _sum([part.n_expressing for part in parts])
    sums = np.sum([part.mean_expressed * part.n_expressing for part in parts], axis=0)
    n_values, mean, squares = 0, 0.0, 0.0
    for part in parts:
        n = int(part.n_expressing.sum())
        if n:
            # Chan's update: sums of squares lose digits over 10^11 values.
            delta = part.mean_expressed_all - mean
            squares += part.var_expressed_all * n + delta**2 * n_values * n / (n_values + n)
            n_values += n
            mean += delta * n / n_values
    measuring = [p.n_measuring for p in parts if p.n_measuring is not None]
    counts = [p.counts_measuring for p in parts if p.counts_measuring is not None]
    seen = n_expressing > 0
    mean_expressed = np.full(len(seen), mean)
    mean_expressed[seen] = sums[seen] / n_expressing[seen]
    return GeneStats(
        n_expressing=n_expressing,
        total_counts=_sum([part.total_counts for part in parts]),
        mean_expressed=mean_expressed,
        mean_expressed_all=mean,
        var_expressed_all=squares / n_values if n_values else 0.0,
        target_sum=totals[0],
        n_measuring=_sum(measuring) if len(measuring) == len(parts) else None,
        counts_measuring=_sum(counts) if len(counts) == len(parts) else None,
    )


def _sum(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.asarray(np.sum(arrays, axis=0), np.int64)
