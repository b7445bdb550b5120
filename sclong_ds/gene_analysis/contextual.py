"""Contextual gene vectors: mean representation of each gene over the cells that express it.

Sums are streamed: memory holds one batch of cells and a table for each group of cells.

Shapes: B cells, G genes, C base width, K groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.opening import model_inputs
from sclong_ds.model.sclong import ScLong
from sclong_ds.progress import count_progress

MOST_BYTES = 8 * 2**30
"""Of the sums of all groups."""


@dataclass(frozen=True, slots=True)
class Contextual:
    """Mean vectors of the genes, over all cells and by group."""

    vectors: np.ndarray
    """(K, G, C) float32; zero for a gene that no cell of the group expresses."""
    n_cells: np.ndarray
    """(K, G) int64, cells of the group that express the gene."""

    def together(self) -> np.ndarray:
        """Return the mean (G, C) over all cells."""
        n = self.n_cells.sum(axis=0)
        total = np.zeros(self.vectors.shape[1:])
        for vectors, count in zip(self.vectors, self.n_cells, strict=True):
            total += vectors * count[:, None]
        return (total / np.maximum(n, 1)[:, None]).astype(np.float32)


def contextual_vectors(
    model: ScLong, cells: Cells, groups: np.ndarray, *, n_groups: int, batch_size: int
) -> Contextual:
    """Return the mean representations of the genes, by group of cells.

    Args:
        model: From `load_model`.
        cells: From `open_cells`.
        groups: (B,) int, group of each cell; -1: the cell is left out.
        n_groups: K.
        batch_size: Cells at a time.

    Raises:
        ValueError: More groups than memory is meant for.
    """
    shape = (n_groups, model.n_genes, model.config.base_dim)
    if int(np.prod(shape)) * 4 > MOST_BYTES:
        raise ValueError(
            f"--by: {n_groups} groups of {shape[1]} genes and width {shape[2]} are more than "
            f"{MOST_BYTES // 2**30} GiB; name a column with fewer values"
        )
    device = next(model.parameters()).device
    sums = torch.zeros(shape, dtype=torch.float32, device=device)
    n_cells = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    with torch.inference_mode(), count_progress("genes", len(cells.obs), "cells") as on_cells:
        for x, hidden, place in model_inputs(model, cells, batch_size=batch_size):
            expressed = x > 0 if hidden is None else (x > 0) & ~hidden
            found = model.encode(x, unmeasured=hidden, genes="all").float()
            for row, group in enumerate(groups[place]):
                if group >= 0:
                    known = expressed[row]
                    sums[group] += torch.where(known[:, None], found[row], 0.0)
                    n_cells[group] += known
            on_cells(len(x))
    means = sums / n_cells.clamp(min=1)[:, :, None]
    return Contextual(means.cpu().numpy(), n_cells.cpu().numpy())
