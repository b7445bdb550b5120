"""What a micro-batch needs before it goes to its device; made in the loader's thread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.config.sections import RunConfig
from sclong_ds.corpus.byte_code import PackedCells, decode
from sclong_ds.loader.batches import CellBatch
from sclong_ds.masking import Targets, draw_targets
from sclong_ds.measured import MeasuredGenes


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What is drawn and counted for the cells of a micro-batch."""

    targets: Targets
    """Which values are targets."""
    unmeasured: NDArray[np.bool_] | None
    """(B, G) genes that the cells' datasets do not measure, with data.unmeasured=mask; else
    None."""
    lengths: list[int] | None
    """(B,) genes of each cell for the large encoder with model.routing=expressed, else None. The
    host must know them: to ask a GPU would make it wait."""


def prepare(
    batch: CellBatch, *, config: RunConfig, n_genes: int, measured: MeasuredGenes | None = None
) -> Prepared:
    """Draw the targets of a micro-batch and count the genes of its cells.

    Args:
        batch: Packed cells; damaged ones have no values and therefore no targets.
        config: The run's configuration.
        n_genes: Genes of the corpus.
        measured: Of all cells of the corpus, with data.unmeasured=mask; None reads the genes that a
            dataset does not measure as zeros.

    Raises:
        ValueError: A cell has counts of a gene that its dataset does not measure.
    """
    cells = batch.counts
    assert isinstance(cells, PackedCells)
    counts = decode(cells.gap, cells.count, cells.row_entries, n_genes)
    unmeasured = None if measured is None else measured.of(batch.cell_ids).unmeasured()
    if unmeasured is not None:
        _check_measured(counts, unmeasured, batch.cell_ids)
    targets = draw_targets(
        counts.indptr,
        counts.indices,
        cell_ids=batch.cell_ids,
        epochs=batch.epochs,
        passes=batch.passes,
        objective=config.objective,
        seed=config.run.seed,
        n_genes=n_genes,
        unmeasured=unmeasured,
    )
    lengths = None
    if config.model.routing == "expressed":
        candidates = np.diff(counts.indptr) + hidden_zeros(counts.indptr, counts.indices, targets)
        lengths = np.minimum(candidates, config.model.top_seq_len).tolist()
    return Prepared(targets, unmeasured, lengths)


def _check_measured(
    counts: csr_matrix, unmeasured: NDArray[np.bool_], cell_ids: NDArray[np.int64]
) -> None:
    """Refuse counts of genes that are not measured: the table of them is of another corpus."""
    cell = np.repeat(np.arange(len(cell_ids)), np.diff(counts.indptr))
    wrong = np.flatnonzero(unmeasured[cell, counts.indices])
    if len(wrong):
        raise ValueError(
            f"cell {cell_ids[cell[wrong[0]]]} has counts of gene {counts.indices[wrong[0]]}, which "
            "its dataset does not measure by measured_genes.npy; run: python -m data_prep verify"
        )


def hidden_zeros(
    indptr: NDArray[np.integer], indices: NDArray[np.integer], targets: Targets
) -> NDArray[np.int64]:
    """Return (B,) how many of a cell's hidden targets are genes without a count.

    Args:
        indptr: (B + 1,) bounds of each cell in `indices`, as in a CSR matrix.
        indices: (values,) genes with a count.
        targets: The targets of the cells.
    """
    return np.array(
        [
            np.isin(genes[hidden], indices[start:stop], invert=True).sum()
            for start, stop, genes, hidden in zip(
                indptr[:-1], indptr[1:], targets.positions, targets.hidden, strict=True
            )
        ],
        dtype=np.int64,
    )
