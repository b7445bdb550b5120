"""Per-gene statistics of the training cells: the predictor to beat and the start of the bias.

A value is log1p(target_sum * count / total of the cell), as the loader computes it.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from data_prep.corpus.dedup import Progress
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import GeneStats
from sclong_ds.files.atomic import write_atomic

TARGET_SUM = 1.0e4
_SMALL_COUNTS = 32
"""98 % of the counts of droplet data are below."""


def gene_statistics(
    store: CellStore,
    rows: range,
    *,
    target_sum: float = TARGET_SUM,
    progress: Progress | None = None,
) -> GeneStats:
    """Compute the statistics of a range of cells, chunk by chunk.

    Args:
        store: Cells.
        rows: The training cells; they begin and end at chunk borders.
        target_sum: Total to which a cell is scaled.
        progress: Called after every chunk.

    Returns:
        The statistics; the same bytes for the same store.
    """
    n_genes = store.n_genes
    n_expressing, total_counts = np.zeros(n_genes, np.int64), np.zeros(n_genes, np.int64)
    sums = np.zeros(n_genes, np.float64)
    n_values, mean, squares = 0, 0.0, 0.0
    for chunk in range(len(store.chunk_rows) - 1):
        first, last = int(store.chunk_rows[chunk]), int(store.chunk_rows[chunk + 1])
        if first < rows.start or last > rows.stop:
            continue
        cells = store.read_chunk(chunk)
        values = _values(cells, store.row_total[first:last], target_sum)
        # Converted once: bincount does it for every call.
        genes = cells.indices.astype(np.intp)
        here = np.bincount(genes, minlength=n_genes)
        n_expressing += here
        # Most counts are 1. float64 weights are exact: a chunk's counts add up to less than 2^53.
        above = np.flatnonzero(cells.data > 1)
        more = np.bincount(genes[above], weights=cells.data[above] - 1.0, minlength=n_genes)
        total_counts += here + more.astype(np.int64)
        sums += np.bincount(genes, weights=values, minlength=n_genes)
        if len(values):
            # Chan's update: sums of squares lose digits over 10^11 values.
            mean_here, n_new = float(values.mean()), len(values)
            delta = mean_here - mean
            values -= mean_here
            squares += float(np.square(values, out=values).sum())
            squares += delta**2 * n_values * n_new / (n_values + n_new)
            n_values += n_new
            mean += delta * n_new / n_values
        if progress:
            progress("statistics", last - rows.start, len(rows))
    seen = n_expressing > 0
    mean_expressed = np.full(n_genes, mean)
    mean_expressed[seen] = sums[seen] / n_expressing[seen]
    return GeneStats(
        n_expressing=n_expressing,
        total_counts=total_counts,
        mean_expressed=mean_expressed,
        mean_expressed_all=mean,
        var_expressed_all=squares / n_values if n_values else 0.0,
        target_sum=target_sum,
    )


def _values(cells: csr_matrix, totals: NDArray[np.int64], target_sum: float) -> NDArray[np.float64]:
    """Return the value of every count, log1p(target_sum * count / total of the cell).

    A cell has few different counts: the logarithms of the small ones are taken once for each cell.
    """
    small = np.arange(_SMALL_COUNTS, dtype=np.uint32)
    table = np.log1p(target_sum * small / np.maximum(totals, 1)[:, None])
    place = np.repeat(np.arange(len(totals), dtype=np.intp) * _SMALL_COUNTS, np.diff(cells.indptr))
    large = np.flatnonzero(cells.data >= _SMALL_COUNTS)
    row = place[large] // _SMALL_COUNTS
    place += np.minimum(cells.data, np.uint32(_SMALL_COUNTS - 1))
    values = table.ravel()[place]
    values[large] = np.log1p(target_sum * cells.data[large] / totals[row])
    return values


def write_statistics(path: Path, stats: GeneStats) -> None:
    """Write statistics as the npz that `Corpus.gene_stats` reads, whole or not at all."""
    content = io.BytesIO()
    np.savez(
        content,
        n_expressing=stats.n_expressing,
        total_counts=stats.total_counts,
        mean_expressed=stats.mean_expressed,
        mean_expressed_all=stats.mean_expressed_all,
        var_expressed_all=stats.var_expressed_all,
        target_sum=stats.target_sum,
    )
    write_atomic(path, content.getvalue())
