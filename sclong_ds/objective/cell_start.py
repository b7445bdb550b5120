"""What `model.cell_vector` starts from: the gene means, and principal directions of training cells.

Every rank computes it from the same cells; DeepSpeed then hands the first rank's weights to all.
"""

from __future__ import annotations

import logging

import numpy as np
from scipy.sparse import csr_matrix, vstack

from sclong_ds.config.sections import ModelConfig
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import sample
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.model.values.cell_vector import CellStart, principal_directions

START_CELLS = 2048
"""Training cells that are read, those of `sample`."""
_CELLS_PER_READ = 64

log = logging.getLogger(__name__)


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
    rows = sample(corpus, "train", START_CELLS)
    parts = [csr_matrix((0, corpus.n_genes), dtype=np.float32)]
    for start in range(0, len(rows), _CELLS_PER_READ):
        try:
            counts = corpus.rows(rows[start : start + _CELLS_PER_READ])
        except DamagedChunk as damage:
            log.warning("the start of the cell's vector is made without some cells: %s", damage)
            continue
        parts.append(csr_matrix(log1p_normalise(counts, target_sum=stats.target_sum)))
    values = vstack(parts, format="csr")
    found = principal_directions(values, stats.mean_expressed, model.base_dim)
    log.info(
        "cell vector: starts at %d principal directions of %d training cells",
        found.shape[1],
        values.shape[0],
    )
    return CellStart(stats.mean_expressed, found)
