"""Per-gene statistics of the training cells: the predictor to beat and the start of the bias.

A value is log1p(target_sum * count / total of the cell), as the loader computes it.
"""

from __future__ import annotations

import io
from dataclasses import fields
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
    measured: NDArray[np.bool_] | None,
    *,
    target_sum: float = TARGET_SUM,
    progress: Progress | None = None,
) -> GeneStats:
    """Compute the statistics of a range of cells, chunk by chunk.

    Args:
        store: Cells.
        rows: The training cells; they begin and end at chunk borders.
        measured: (datasets, G) genes that each dataset measures; the table `dataset` of the store
            tells that of a cell. None where it is not known.
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
        n_here, counts_here, sums_here = _of_genes(cells, values)
        n_expressing += n_here
        total_counts += counts_here
        sums += sums_here
        if len(values):
            # Chan's update: sums of squares lose digits over 10^11 values.
            mean_here, n_new = float(values.mean()), len(values)
            delta = mean_here - mean
            squares += float(np.square(values - mean_here, out=values).sum())
            squares += delta**2 * n_values * n_new / (n_values + n_new)
            n_values += n_new
            mean += delta * n_new / n_values
        if progress:
            progress("statistics", last - rows.start, len(rows))
    seen = n_expressing > 0
    mean_expressed = np.full(n_genes, mean)
    mean_expressed[seen] = sums[seen] / n_expressing[seen]
    of = (None, None) if measured is None else of_measuring_cells(store, rows, measured)
    return GeneStats(
        n_expressing=n_expressing,
        total_counts=total_counts,
        mean_expressed=mean_expressed,
        mean_expressed_all=mean,
        var_expressed_all=squares / n_values if n_values else 0.0,
        target_sum=target_sum,
        n_measuring=of[0],
        counts_measuring=of[1],
    )


def _of_genes(
    cells: csr_matrix, values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return (G,) the cells with a count of each gene, and the sums of counts and values."""
    # Converted once: bincount does it for every call.
    genes, n_genes = cells.indices.astype(np.intp), cells.shape[1]
    here = np.bincount(genes, minlength=n_genes)
    # Most counts are 1. float64 weights are exact: a chunk's counts add up to less than 2^53.
    above = np.flatnonzero(cells.data > 1)
    more = np.bincount(genes[above], weights=cells.data[above] - 1.0, minlength=n_genes)
    sums = np.bincount(genes, weights=values, minlength=n_genes)
    return here, here + more.astype(np.int64), sums


def of_measuring_cells(
    store: CellStore, rows: range, measured: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (G,) how many of the cells measure each gene, and the sum of all their counts.

    Args:
        store: Cells with the table `dataset`.
        rows: Which of them.
        measured: (datasets, G) genes that each dataset measures.
    """
    here = slice(rows.start, rows.stop)
    datasets, totals = store.table("dataset")[here], store.row_total[here]
    n_cells = np.bincount(datasets, minlength=len(measured))
    n_genes = measured.shape[1]
    cells, counts = np.zeros(n_genes, np.int64), np.zeros(n_genes, np.int64)
    order = np.argsort(datasets, kind="stable")
    ends = np.cumsum(n_cells)
    for genes, stop, n in zip(measured, ends.tolist(), n_cells.tolist(), strict=True):
        cells[genes] += n
        # Summed as whole numbers: bincount would sum them as float64.
        counts[genes] += int(totals[order[stop - n : stop]].sum())
    return cells, counts


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
    found = {field.name: getattr(stats, field.name) for field in fields(stats)}
    np.savez(content, **{name: value for name, value in found.items() if value is not None})
    write_atomic(path, content.getvalue())
