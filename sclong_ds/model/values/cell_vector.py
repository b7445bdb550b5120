"""Cell vector: one vector of a cell, made of all its visible values, that every prediction reads.

Attention must find out what cell it looks at from tokens that say one value each. Here it is said
at once: the visible values, less what is usual for the gene, are summed with one learned vector
per gene, and a small MLP is added to the sum,

    z = sum_j (x_j - u_j) r_j,  v = z + MLP(LayerNorm(z)),

and the head adds w_g . v to what it predicts for gene g (`value_head.py`). With r and w at the
principal directions of training cells the model starts as a principal component imputation, whose
error the rest of the model then lowers. The vector is trained to summarise the cell: it predicts
what was hidden. Not in scLong.

What is usual is a learned value of the gene, u_j = c_j; or, of `residuals`, the value that a
Poisson count of the learned level c_j leads to expect at the cell's depth. Then z knows nothing of
the depth, which the head's offset adds already, and all that the head reads is added to the value
that this offset gives, where otherwise it is added to the level before.

In float32 at least, also where the weights are bf16: a sum over thousands of genes that every
prediction reads would carry its rounding into all of them.

Shapes: B cells, G genes, C base width, n cells that a start is made from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sclong_ds.model.values.depth import expected_values, one_count

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

STARTING_SD = 0.02
"""Of the genes' vectors that no training cells gave."""
_CELLS_AT_ONCE = 64


class CellStart(NamedTuple):
    """What a cell vector starts from."""

    centre: NDArray[np.floating]
    """(G,) usual value of each gene where it is expressed; of `residuals` its log level."""
    directions: NDArray[np.floating] | None
    """(G, K) orthonormal columns, the first of C; None: random vectors."""
    scale: float = 1.0
    """What the head's weights are of them: hidden values are missing in the sum."""


class _WideNorm(nn.LayerNorm):
    """Layer norm in the precision of its input, whatever that of its weights is."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _WideLinear(nn.Linear):
    """Linear layer in the precision of its input, whatever that of its weights is."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CellVector(nn.Module):
    """Reads the vector of a cell from its visible values.

    Args:
        n_genes: Number of genes G.
        dim: Base width C.
        kind: `model.cell_vector`.
        start: Centre and directions; None: zeros, for weights that will be set, and random vectors.
    """

    def __init__(
        self, n_genes: int, dim: int, kind: str = "random", *, start: CellStart | None = None
    ) -> None:
        super().__init__()
        self.residuals = kind == "residuals"
        self.centre = nn.Parameter(torch.zeros(n_genes))
        self.vectors = nn.Parameter(torch.randn(n_genes, dim) * STARTING_SD)
        self.norm = _WideNorm(dim)
        self.body = nn.Sequential(_WideLinear(dim, 2 * dim), nn.GELU())
        # As the head, what is added starts at nothing. Parameters of this module: those of a layer
        # are divided among the ranks as soon as it is made, and can be set no more.
        self.down = nn.Parameter(torch.zeros(dim, 2 * dim))
        self.shift = nn.Parameter(torch.zeros(dim))
        if start is not None:
            with torch.no_grad():
                self.centre.copy_(torch.tensor(start.centre))
                fill_columns(self.vectors, start)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return the vectors (B, C), float32 at least; of a cell that shows nothing, of nothing.

        Args:
            x: (B, G) values.
            visible: (B, G) bool, the values that count.
        """
        kind = torch.promote_types(self.centre.dtype, torch.float32)
        x, usual = x.to(kind), self.centre.to(kind)
        if self.residuals:
            usual = expected_values(usual, one_count(x, visible))
        above = torch.where(visible, x - usual, 0.0)
        z = above @ self.vectors.to(kind)
        wide = self.body(self.norm(z))
        return z + nn.functional.linear(wide, self.down.to(kind), self.shift.to(kind))

    def of_all_values(self, x: Tensor) -> Tensor:
        """Return sum_j x_j r_j (B, C), float32 at least, of values x (B, G) with their zeros."""
        kind = torch.promote_types(self.centre.dtype, torch.float32)
        return x.to(kind) @ self.vectors.to(kind)


def fill_columns(weight: Tensor, start: CellStart | None, scale: float = 1.0) -> None:
    """Set the first columns of a weight (G, C) to the directions of a start, if it has any.

    Args:
        weight: Is changed.
        start: Of K directions; those beyond C are left out, columns beyond K stay.
        scale: The directions are multiplied by it.
    """
    if start is None or start.directions is None:
        return
    given = torch.as_tensor(np.asarray(start.directions, dtype=np.float32))[:, : weight.shape[1]]
    with torch.no_grad():
        weight[:, : given.shape[1]].copy_(scale * given)


def above_centre(values: csr_matrix, centre: NDArray[np.floating]) -> csr_matrix:
    """Return values (n, G) less their genes' centres (G,) where they are stored, float64."""
    centred = values.astype(np.float64)
    centred.data -= np.asarray(centre, dtype=np.float64)[centred.indices]
    return centred


def above_depth(values: csr_matrix, log_level: NDArray[np.floating]) -> csr_matrix:
    """Return values (n, G) less what is expected at each cell's depth where they are stored.

    Args:
        values: (n, G) values of cells, stored where above 0.
        log_level: (G,) as `expected_values`.

    Returns:
        float64.
    """
    levels, left = torch.tensor(log_level, dtype=torch.float32), values.astype(np.float64)
    for first in range(0, values.shape[0], _CELLS_AT_ONCE):
        cells = values[first : first + _CELLS_AT_ONCE].astype(np.float32)
        x = torch.from_numpy(cells.toarray())
        usual = expected_values(levels, one_count(x, x > 0)).numpy()
        rows, genes = np.repeat(np.arange(cells.shape[0]), np.diff(cells.indptr)), cells.indices
        begin = values.indptr[first]
        left.data[begin : begin + len(genes)] -= usual[rows, genes]
    return left


def principal_directions(centred: csr_matrix, k: int) -> NDArray[np.float32]:
    """Return the right singular vectors of what of cells' values is not usual.

    Args:
        centred: (n, G), stored where a gene is expressed.
        k: How many; fewer where cells or genes are not more than k.

    Returns:
        (G, K) orthonormal columns by falling singular value, signs so that each column's sum is
        not negative: the same on every machine, up to rounding. K is 0 without cells.
    """
    from scipy.sparse.linalg import svds  # models are made on machines without scipy, too

    centred = centred.astype(np.float64)
    k = min(k, min(centred.shape) - 1)
    if k < 1 or not np.any(centred.data):
        return np.zeros((centred.shape[1], 0), dtype=np.float32)
    first = np.random.default_rng(0).standard_normal(min(centred.shape))
    _, sizes, rows = svds(centred, k=k, v0=first)
    order = np.argsort(-sizes, kind="stable")
    columns = rows[order].T
    columns = columns * np.where(columns.sum(axis=0) < 0, -1.0, 1.0)
    kept = sizes[order] > 1e-9 * sizes.max()
    return columns[:, kept].astype(np.float32)
