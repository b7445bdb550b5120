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
        mask_max_norm: Largest norm of the mask vector; None: no limit.
    """

    def __init__(self, hidden: int, dim: int, *, mask_max_norm: float | None = None) -> None:
        super().__init__()
        self.mask_max_norm = mask_max_norm
        self.mlp = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.mask_vector = nn.Parameter(torch.randn(dim))
        if mask_max_norm is not None:
            vector = self.mask_vector.data
            vector.mul_((mask_max_norm / vector.norm()).clamp(max=1.0))
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
            encoded = torch.where(mask[..., None], self._mask_vector(), encoded)
        return self.norm(encoded)

    def _mask_vector(self) -> Tensor:
        """Return the mask vector (C,), cut to the largest norm; its gradient ignores the cut."""
        vector = self.mask_vector
        if self.mask_max_norm is None:
            return vector
        # The 1e-7 is that of torch.nn.Embedding(max_norm=...), the released model's way.
        kind = torch.promote_types(vector.dtype, torch.float32)
        norm = vector.detach().to(kind).norm()
        cut = torch.where(norm > self.mask_max_norm, self.mask_max_norm / (norm + 1e-7), 1.0)
        return (vector * cut.to(vector.dtype)).detach() + (vector - vector.detach())
