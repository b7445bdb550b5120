"""Expression encoder: a gene's scalar value to a vector.

Hidden values become one learned mask vector.

Shapes: B cells, G genes, C base width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExpressionEncoder(nn.Module):
    """MLP on the scalar expression value, followed by a LayerNorm.

    Args:
        hidden: Hidden width of the MLP.
        dim: Base width C.
    """

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.mask_vector = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Encode the values.

        Args:
            x: Transformed expression (B, G), float.
            mask: (B, G) bool, True where the value is hidden; None hides nothing.

        Returns:
            (B, G, C).
        """
        encoded = self.mlp(x[..., None].to(self.mask_vector.dtype))
        if mask is not None:
            encoded = torch.where(mask[..., None], self.mask_vector, encoded)
        return self.norm(encoded)
