"""Baselines that see a sample of training cells, beyond what the linear baseline predicts.

A cell is described by its residuals: visible value minus what the linear depth baseline predicts
there, a sparse vector over genes.

- `nearest`: a cell's neighbours are the NEIGHBOURS cells of the sample with the highest cosine of
  residuals. The prediction for a gene is the linear one plus the mean of the neighbours' residuals
  of that gene, shrunk: their sum over the number of neighbours that express the gene plus
  SHRINKAGE.
- `principal`: imputation by principal components, which on small corpora is hard to beat. The
  sample's residuals, 0 where a gene is not expressed, have principal directions; a cell's
  coordinates in them are those that come nearest to its visible residuals, by least squares with a
  penalty on their length. The prediction is the linear one plus what the coordinates say.

Shapes: B cells, M sampled training cells, G genes, P target places.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.model.values.cell_vector import principal_directions

NEIGHBOURS = 30
SHRINKAGE = 3.0
"""Neighbours with a residual of 0 that are added to those that express a gene."""
DIRECTIONS = 32
PENALTY = 0.1
"""On the squared length of the coordinates; 1 would halve them where every gene is visible."""


class NearestCells:
    """The sampled training cells.

    Args:
        residuals: (M, G) float32, stored where a cell expresses a gene; about 8 bytes a value, 25
            MB for 2,048 cells of 1,500 genes.
    """

    def __init__(self, residuals: csr_matrix) -> None:
        self._residuals = residuals
        self._by_gene = _normalised(residuals).T.tocsr()

    def predict(self, residuals: csr_matrix, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what the neighbours add to the linear prediction at the targets.

        Args:
            residuals: (B, G) of the cells' visible values alone.
            positions: (B, P) genes of the targets.

        Returns:
            (B, P); 0 where no neighbour expresses the gene, and without sampled cells.
        """
        found = np.zeros(positions.shape)
        count = min(NEIGHBOURS, self._residuals.shape[0])
        if count == 0:
            return found
        cosines = (_normalised(residuals) @ self._by_gene).toarray()
        # Stable: of equals the earlier cell, whatever the number of ranks.
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        n_genes = self._residuals.shape[1]
        for place, (rows, genes) in enumerate(zip(nearest, positions, strict=True)):
            cells = self._residuals[rows]
            total = np.bincount(cells.indices, cells.data, minlength=n_genes)
            expressing = np.bincount(cells.indices, minlength=n_genes)
            found[place] = total[genes] / (expressing[genes] + SHRINKAGE)
        return found


class PrincipalResiduals:
    """The directions.

    Args:
        residuals: (M, G) float32, stored where a cell expresses a gene.
    """

    def __init__(self, residuals: csr_matrix) -> None:
        self._directions = principal_directions(residuals, DIRECTIONS).astype(np.float64)

    def predict(self, residuals: csr_matrix, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what the directions add to the linear prediction at the targets.

        Args:
            residuals: (B, G) of the cells' visible values alone.
            positions: (B, P) genes of the targets.

        Returns:
            (B, P); 0 without sampled cells.
        """
        found = np.zeros(positions.shape)
        penalty = PENALTY * np.eye(self._directions.shape[1])
        for place, genes in enumerate(positions):
            own = residuals[place]
            visible = self._directions[own.indices]
            coordinates = np.linalg.solve(visible.T @ visible + penalty, visible.T @ own.data)
            found[place] = self._directions[genes] @ coordinates
        return found


def _normalised(residuals: csr_matrix) -> csr_matrix:
    """Return float64 rows of length 1; a row of zeros stays."""
    cells = csr_matrix(residuals, dtype=np.float64)
    sizes = np.sqrt(np.asarray(cells.multiply(cells).sum(axis=1)).ravel())
    scale = np.repeat(1 / np.where(sizes > 0, sizes, 1.0), np.diff(cells.indptr))
    return csr_matrix((cells.data * scale, cells.indices, cells.indptr), shape=cells.shape)
