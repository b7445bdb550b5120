"""Principal directions of all values of cells, zeros as zeros, in blocks of the base width.

Those that the cell's vector starts from (`cell_vector.py`) leave out what is not expressed, and are
few: each adds to every prediction. An embedding predicts nothing, and what few directions of one
tissue leave out tells the cells of another apart (docs/explain/recipe.md).

Shapes: n cells, G genes, C base width, K directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SIZES = (128, 256)
"""Numbers of directions K that are offered."""


def direction_counts(*, n_cells: int, n_genes: int, wanted: int = 0) -> list[int]:
    """Return the numbers of directions K to offer, ascending.

    Args:
        n_cells: Cells n, which have n - 1 directions.
        n_genes: Genes G.
        wanted: So many directions; 0: `SIZES`, or as many as there are.

    Raises:
        ValueError: More are wanted than these cells and genes have.
    """
    most = max(0, min(n_cells, n_genes) - 1)
    if wanted > most:
        raise ValueError(
            f"{wanted} principal directions: {n_cells} training cells of {n_genes} genes have "
            f"{most} that can be taken"
        )
    sizes = (wanted,) if wanted else SIZES
    return sorted({min(size, most) for size in sizes} - {0})


def kept_columns(n: int, n_blocks: int, width: int) -> Tensor:
    """Return which columns of blocks are the first n of all, bool (n_blocks, 1, C)."""
    return (torch.arange(n_blocks * width) < n).reshape(n_blocks, 1, width)


def principal_blocks(values: csr_matrix, n_directions: int, width: int) -> Tensor:
    """Return the first principal directions of values.

    Args:
        values: (n, G) values of cells, 0 where not expressed.
        n_directions: K, as `direction_counts` allows.
        width: Base width C.

    Returns:
        (blocks, G, C) float32, rounded to float16 as a model folder keeps them: orthonormal
        columns by falling variance, signs so that each sum is not negative; zeros where the cells
        have no more directions, and behind the first K in the last block.
    """
    from scipy.linalg import eigh  # models are read on machines without scipy, too

    x = values.astype(np.float64)
    n, k, n_blocks = x.shape[0], n_directions, -(-n_directions // width)
    products = (x @ x.T).toarray()
    mean = products.mean(axis=0)
    products += products.mean() - mean[:, None] - mean[None, :]
    sizes, cells = eigh(products, subset_by_index=(n - k, n - 1))
    sizes, cells = sizes[::-1], cells[:, ::-1]
    # The cells' vectors add up to 0, as those of centred cells do: no mean is to be taken off.
    columns = np.asarray(x.T @ (cells - cells.mean(axis=0)))
    kept = sizes > 1e-9 * max(sizes[0], 1e-300)
    columns = np.where(kept, columns / np.sqrt(np.where(kept, sizes, 1.0)), 0.0)
    columns *= np.where(columns.sum(axis=0) < 0, -1.0, 1.0)
    columns = np.pad(columns, ((0, 0), (0, n_blocks * width - k)))
    blocks = columns.reshape(-1, n_blocks, width).transpose(1, 0, 2)
    return torch.from_numpy(blocks.astype(np.float16).astype(np.float32))


def random_blocks(like: Tensor, seed: int) -> Tensor:
    """Return orthonormal random directions of a shape (blocks, G, C): what no training makes."""
    n_blocks, n_genes, width = like.shape
    drawn = torch.randn(n_genes, n_blocks * width, generator=torch.Generator().manual_seed(seed))
    columns = torch.linalg.qr(drawn)[0]
    return columns.reshape(n_genes, n_blocks, width).permute(1, 0, 2).contiguous()
