"""Zero head: how probable it is that a cell shows a gene at all.

The other head says what a gene's value is, given that the gene is expressed. Whether it is, is read
from the cell's vector and its depth alone,

    P(expressed) = 1 - exp(-exp(eta)),  eta_g = b_g - s_g log(one) + u_g . v,

with v the cell's vector (`cell_vector.py`) and one what a single count is in the cell's units, so
that -log(one) is the log of its depth. A zero and a hidden value add the same to v, nothing: so the
head may be asked about genes with zero counts, though it learns from hidden ones. b at the log of
the gene's mean share of counts, s = 1 and u = 0 make it, before training, the chance of a Poisson
count above 0 (complementary log-log regression with a log offset: McCullagh and Nelder, Generalized
Linear Models, 1989, section 4.3; zeros as a part of their own: Mullahy, J. Econometrics 33, 1986).
Not in scLong.

Shapes: B cells, G genes, P wanted genes, C base width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

_LEAST, _MOST = -15.0, 8.0
"""Of eta: one count in 3 million cells, and 3,000 counts in one."""


class ZeroHead(nn.Module):
    """Predicts the log of a gene's expected number of counts, as zeros tell it.

    Args:
        dim: Base width C.
        log_level: (G,) log of the mean, in units of the values before log1p.
    """

    def __init__(self, dim: int, log_level: np.ndarray) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(log_level, dtype=torch.float32))
        self.slope = nn.Parameter(torch.ones(len(log_level)))
        self.weight = nn.Parameter(torch.zeros(len(log_level), dim))

    def forward(self, cell: Tensor, one: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return eta (B, G), or (B, P), in the precision of the cell's vectors.

        Args:
            cell: (B, C) vectors of the cells.
            one: (B, 1) what a single count is in these units; 0 in a cell that shows nothing.
            positions: (B, P) int64 genes; None: all.
        """
        kind = cell.dtype
        if positions is None:
            bias, slope = self.bias.to(kind), self.slope.to(kind)
            weight = self.weight.to(kind).expand(len(cell), -1, -1)
        else:
            bias, slope = self.bias[positions].to(kind), self.slope[positions].to(kind)
            weight = self.weight[positions].to(kind)
        depth = one.to(kind).clamp(min=1e-6).log()
        return bias - slope * depth + torch.bmm(weight, cell[..., None])[..., 0]


def expressed_chance(eta: Tensor) -> Tensor:
    """Return P(expressed) for eta."""
    return -torch.expm1(-eta.clamp(max=_MOST).exp())


def log_chances(eta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logs of P(expressed) and of P(not expressed), finite for every eta."""
    rate = eta.clamp(_LEAST, _MOST).exp()
    # log(1 - exp(-r)): by expm1 where r is small, by log1p where it is not.
    small, large = rate.clamp(max=1.0), rate.clamp(min=1.0)
    expressed = torch.where(
        rate < 1, torch.log(-torch.expm1(-small)), torch.log1p(-torch.exp(-large))
    )
    return expressed, -rate
