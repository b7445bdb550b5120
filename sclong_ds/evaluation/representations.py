"""The ladder of a model: its embedding of the scored cells, and every row beside it.

Used by `python -m sclong_ds evaluate` and by `sclong_ds.evaluate`.

Shapes: n cells, C base width, W width of an embedding.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack

from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.embed import embed_counts
from sclong_ds.evaluation.ladder import (
    corrected_rows,
    gene_vector_means,
    plain_rows,
    untrained_model,
)
from sclong_ds.evaluation.scored_cells import ScoredCells
from sclong_ds.model.pooling import Recipe, scaling_maps
from sclong_ds.model.sclong import ScLong
from sclong_ds.model.values.principal import kept_columns, random_blocks
from sclong_ds.progress import count_progress

_BLOCK_CELLS = 512


def representations(
    model: ScLong, scored: ScoredCells, *, embedded: np.ndarray, batch_size: int, seed: int
) -> dict[str, np.ndarray]:
    """Return the model's embedding and every row of the ladder, (n, width) by name.

    Args:
        model: The model.
        scored: The cells that are scored.
        embedded: (n, W) their embeddings by the model.
        batch_size: Cells embedded at a time.
        seed: Of the untrained weights, the projection and the eigensolver's start.
    """
    values = normalise(scored.counts, target_sum=model.transform.target_sum)
    found = {
        "sclong": embedded,
        "untrained": _untrained(model, scored, batch_size=batch_size, seed=seed),
        "gene_vectors": gene_vector_means(model, scored.counts),
    }
    if model.control is not None:
        what = "gene vectors by the recipe"
        found["gene_vectors_recipe"] = _embedded_by(
            model, model.control, scored, batch_size=batch_size, what=what
        )
    found |= plain_rows(scored.counts, values, seed=seed)
    if scored.batches is not None:
        found |= corrected_rows(scored.counts, found["pca"], scored.batches, seed=seed)
    return found


def _untrained(model: ScLong, scored: ScoredCells, *, batch_size: int, seed: int) -> np.ndarray:
    """Return the embeddings of fresh weights by the model's recipe.

    They have no training cells: the parts are centred and scaled by the scored cells, and in place
    of principal directions stand random ones.
    """
    fresh, recipe = untrained_model(model, seed=seed), model.recipe
    directions = recipe.directions
    if directions is not None:
        n_blocks, _, width = directions.shape
        kept = kept_columns(recipe.n_directions, n_blocks, width)
        directions = random_blocks(directions, seed) * kept
    plain, what = Recipe(recipe.parts, directions=directions), "embed, untrained weights"
    found = _embedded_by(fresh, plain, scored, batch_size=batch_size, what=what)
    if recipe.scaling == "none":
        return found
    parts = torch.from_numpy(found).chunk(len(recipe.parts), dim=1)
    centres, maps = scaling_maps(parts, recipe.scaling)
    own = replace(recipe, centres=centres, maps=maps)
    return own.apply(parts).numpy()


def _embedded_by(
    model: ScLong, recipe: Recipe, scored: ScoredCells, *, batch_size: int, what: str
) -> np.ndarray:
    """Return the embeddings of the scored cells by another recipe than the model's."""
    kept, model.recipe = model.recipe, recipe
    try:
        return embed_scored(model, scored, batch_size=batch_size, what=what)
    finally:
        model.recipe = kept


def embed_scored(model: ScLong, scored: ScoredCells, *, batch_size: int, what: str) -> np.ndarray:
    """Return the embeddings (n, W) of the scored cells.

    Args:
        model: The model.
        scored: The cells.
        batch_size: Cells embedded at a time.
        what: Name of the work, for the progress.
    """
    with count_progress(what, len(scored.rows), "cells") as on_cells:
        return embed_counts(
            model,
            scored.counts,
            batch_size=batch_size,
            on_cells=on_cells,
            measured=scored.measured,
        )


def normalise(counts: csr_matrix, *, target_sum: float) -> csr_matrix:
    """Return the model's transform of counts (n, G), log1p of scaled counts, as float32 CSR."""
    parts = [
        counts[start : start + _BLOCK_CELLS] for start in range(0, counts.shape[0], _BLOCK_CELLS)
    ]
    return vstack(
        [csr_matrix(log1p_normalise(part, target_sum=target_sum)) for part in parts], format="csr"
    )
