"""Where training starts: the head at what genes have, the cell's vector at principal directions.

Every rank computes it from the same cells; DeepSpeed then hands the first rank's weights to all.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from sclong_ds.config.sections import COUNT_OFFSETS, ModelConfig
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus, GeneStats
from sclong_ds.corpus.parts.views import sample
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.model.values.cell_vector import (
    CellStart,
    above_centre,
    above_depth,
    principal_directions,
)

START_CELLS = 2048
"""Training cells that are read, those of `sample`."""
RESIDUALS_SCALE = 1.5
"""Of the head's weights of `residuals`: with it the start is best (docs/explain/recipe.md)."""
LEAST_SHARE = 1e-9
"""Of a gene without counts."""
_CELLS_PER_READ = 64

log = logging.getLogger(__name__)


def first_output(model: ModelConfig, stats: GeneStats) -> float | NDArray[np.float64]:
    """Return the head's first output, one number or one per gene (G,).

    The mean value; where `model.cell_offset` names a distribution of counts the log of the mean
    share of the counts of a cell that measures the gene, scaled as values are.
    """
    if model.cell_offset in COUNT_OFFSETS:
        return np.log(stats.target_sum * np.maximum(stats.share(), LEAST_SHARE))
    return stats.mean_expressed if model.gene_bias else stats.mean_expressed_all


def cell_start(model: ModelConfig, corpus: Corpus) -> CellStart | None:
    """Return what the cell's vector starts from; None without one.

    Damaged cells are left out and named: what to do about them is decided where they are trained
    on.

    Args:
        model: The `model` section.
        corpus: The corpus, whose training cells and statistics count.
    """
    if model.cell_vector == "none":
        return None
    stats = corpus.gene_stats
    if model.cell_vector == "random":
        return CellStart(stats.mean_expressed, None)
    values = _some_cells(corpus)
    start = start_from(model, values, stats)
    log.info(
        "cell vector: starts at %d principal directions of %d training cells",
        0 if start.directions is None else start.directions.shape[1],
        values.shape[0],
    )
    return start


def start_from(model: ModelConfig, values: csr_matrix, stats: GeneStats) -> CellStart:
    """Return what the cell's vector of `svd` or `residuals` starts from.

    Args:
        model: The `model` section.
        values: (n, G) values of training cells.
        stats: Statistics of all training cells.
    """
    if model.cell_vector == "residuals":
        level = np.broadcast_to(first_output(model, stats), values.shape[1])
        found = principal_directions(above_depth(values, level), model.base_dim)
        return CellStart(level, found, RESIDUALS_SCALE)
    found = principal_directions(above_centre(values, stats.mean_expressed), model.base_dim)
    return CellStart(stats.mean_expressed, found)


def _some_cells(corpus: Corpus) -> csr_matrix:
    """Return the values (n, G) of the first of the sampled training cells that can be read."""
    rows = sample(corpus, "train", START_CELLS)
    parts = [csr_matrix((0, corpus.n_genes), dtype=np.float32)]
    for start in range(0, len(rows), _CELLS_PER_READ):
        try:
            counts = corpus.rows(rows[start : start + _CELLS_PER_READ])
        except DamagedChunk as damage:
            log.warning("the start of the cell's vector is made without some cells: %s", damage)
            continue
        values = log1p_normalise(counts, target_sum=corpus.gene_stats.target_sum)
        parts.append(csr_matrix(values))
    return vstack(parts, format="csr")
