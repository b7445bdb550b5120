"""Per-gene statistics of the training cells: the predictor to beat and the start of the bias.

A value is log1p(target_sum * count / total of the cell), as the loader computes it.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from data_prep.passes.dedup import Progress
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import GeneStats
from sclong_ds.files.atomic import write_atomic
from sclong_ds.files.npz import npz_bytes, read_npz

TARGET_SUM = 1.0e4
_OF_GENES = ("n_expressing", "total_counts", "values")
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
    sums = GeneSums.none(store.n_genes)
    for chunk in range(len(store.chunk_rows) - 1):
        first, last = int(store.chunk_rows[chunk]), int(store.chunk_rows[chunk + 1])
        if first < rows.start or last > rows.stop:
            continue
        sums.add(store.read_chunk(chunk), store.row_total[first:last], target_sum=target_sum)
        if progress:
            progress("statistics", last - rows.start, len(rows))
    of = None if measured is None else of_measuring_cells(store, rows, measured)
    return sums.statistics(of, target_sum=target_sum)


@dataclass(kw_only=True)
class GeneSums:
    """Sums over cells, from which their statistics follow; sums of some and of others add up."""

    n_expressing: NDArray[np.int64]
    """(G,) cells with a count."""
    total_counts: NDArray[np.int64]
    """(G,) sum of the counts."""
    values: NDArray[np.float64]
    """(G,) sum of the values."""
    n_values: int = 0
    """Values of all genes."""
    mean: float = 0.0
    """Of all values."""
    squares: float = 0.0
    """Sum of the squared distances of all values from it."""

    @classmethod
    def none(cls, n_genes: int) -> GeneSums:
        """Return the sums over no cells."""
        return cls(
            n_expressing=np.zeros(n_genes, np.int64),
            total_counts=np.zeros(n_genes, np.int64),
            values=np.zeros(n_genes, np.float64),
        )

    def add(
        self, cells: csr_matrix, totals: NDArray[np.int64], *, target_sum: float = TARGET_SUM
    ) -> None:
        """Add cells.

        Args:
            cells: (cells, G) counts.
            totals: (cells,) sum of the counts of each.
            target_sum: Total to which a cell is scaled.
        """
        values = _values(cells, totals, target_sum)
        n_expressing, total_counts, sums = _of_genes(cells, values)
        here = GeneSums(n_expressing=n_expressing, total_counts=total_counts, values=sums)
        if len(values):
            here.n_values, here.mean = len(values), float(values.mean())
            here.squares = float(np.square(values - here.mean, out=values).sum())
        self.join(here)

    def join(self, other: GeneSums) -> None:
        """Add the sums over other cells."""
        for name in _OF_GENES:
            getattr(self, name)[:] += getattr(other, name)
        n_new = other.n_values
        if n_new:
            # Chan's update: sums of squares lose digits over 10^11 values.
            delta = other.mean - self.mean
            self.squares += other.squares
            self.squares += delta**2 * self.n_values * n_new / (self.n_values + n_new)
            self.n_values += n_new
            self.mean += delta * n_new / self.n_values

    def statistics(
        self,
        measuring: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
        *,
        target_sum: float = TARGET_SUM,
    ) -> GeneStats:
        """Return the statistics of the cells that were added.

        Args:
            measuring: Of `of_measuring_cells`; None where it is not known.
            target_sum: Total to which a cell was scaled.
        """
        seen = self.n_expressing > 0
        mean_expressed = np.full(len(seen), self.mean)
        mean_expressed[seen] = self.values[seen] / self.n_expressing[seen]
        return GeneStats(
            n_expressing=self.n_expressing,
            total_counts=self.total_counts,
            mean_expressed=mean_expressed,
            mean_expressed_all=self.mean,
            var_expressed_all=self.squares / self.n_values if self.n_values else 0.0,
            target_sum=target_sum,
            n_measuring=measuring[0] if measuring else None,
            counts_measuring=measuring[1] if measuring else None,
        )


def write_sums(path: Path, sums: GeneSums) -> None:
    """Write sums, whole or not at all."""
    write_atomic(path, npz_bytes(**asdict(sums)))


def read_sums(path: Path) -> GeneSums:
    """Return what `write_sums` wrote.

    Raises:
        ValueError: A damaged file.
    """
    found = read_npz(path, cure="run finalize again")
    n_expressing, total_counts, values = (found[name] for name in _OF_GENES)
    return GeneSums(
        n_expressing=n_expressing,
        total_counts=total_counts,
        values=values,
        n_values=int(found["n_values"]),
        mean=float(found["mean"]),
        squares=float(found["squares"]),
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
    counts = (here + more).astype(np.int64)
    return here.astype(np.int64), counts, np.asarray(sums, np.float64)


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
