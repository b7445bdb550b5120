"""The head: from representations to values, and how a cell's depth enters them.

Shapes: B cells, G genes, P wanted genes, C base width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sclong_ds.config.sections import COUNT_OFFSETS, POISSON_COUNTS
from sclong_ds.model.values.cell_vector import CellStart, fill_columns

Output = Literal["value", "log_level", "log_dispersion", "eta"]
"""What is said of a gene: its value, given that it is expressed; the log of its mean before log1p;
the log of the dispersion of its counts; what the zero head says (`zero_head.py`)."""
DISPERSIONS = (-4.0, 7.0)
"""Logs of dispersions: from far beyond a Poisson distribution's variance to one like it."""
_LOG_DISPERSION = 2.3
"""At the start: a variance of mean + mean^2 / 10."""
_LARGE_RATE = 40.0
_LARGE_RATE_OF_WIDE = 8.0
"""Of a negative binomial distribution, whose counts reach further."""


class ValueHead(nn.Module):
    """Predicts a gene's value from its representation.

    Args:
        dim: Base width C.
        kind: `mlp` or `linear`.
        mean: Initial prediction: one number, or one per gene (G,), which makes a learned bias per
            gene; None starts weights and bias as torch.nn.Linear does.
        offset: `model.cell_offset`; other than `none` with a bias per gene alone.
        cell_genes: Genes G that read the cell's vector; 0: none do.
        start: Where their weights start; None: at 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: str,
        mean: float | np.ndarray | None,
        offset: str = "none",
        cell_genes: int = 0,
        start: CellStart | None = None,
    ) -> None:
        super().__init__()
        self.offset = offset
        self.body = (
            nn.Sequential(nn.Linear(dim, dim), nn.GELU()) if kind == "mlp" else nn.Identity()
        )
        if mean is None:
            self.weight = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))
            self.bias = nn.Parameter(torch.empty(1).uniform_(-(dim**-0.5), dim**-0.5))
        else:
            self.weight = nn.Parameter(torch.zeros(dim))
            self.bias = nn.Parameter(torch.tensor(np.atleast_1d(mean), dtype=torch.float32))
        n_dispersions = self.bias.numel() if offset == "negative_binomial" else 0
        self.dispersion = (
            nn.Parameter(torch.full((n_dispersions,), _LOG_DISPERSION)) if n_dispersions else None
        )
        self.cell_weight = nn.Parameter(torch.zeros(cell_genes, dim)) if cell_genes else None
        if self.cell_weight is not None:
            fill_columns(self.cell_weight, start)

    def forward(
        self,
        h: Tensor,
        positions: Tensor | None = None,
        *,
        x: Tensor | None = None,
        visible: Tensor | None = None,
        cell: Tensor | None = None,
        outputs: Sequence[Output] = ("value",),
    ) -> Tensor:
        """Return predicted values (B, G) for representations (B, G, C) and vectors of cells (B, C).

        With `positions` (B, P) int64, predict (B, P) from the representations (B, P, C) there. The
        cell's offset needs the cells' values x (B, G) and which of them count, `visible` (B, G);
        predictions are float32 at least then, and with vectors of cells. With other `outputs` than
        the value return (Q, B, P), one after the other.
        """
        bias: Tensor = self.bias
        if positions is not None and len(bias) > 1:
            # By indexing: its backward pass adds up in a fixed order on a GPU too.
            bias = bias[positions]
        found = self.body(h) @ self.weight
        if self.offset != "none" or cell is not None:
            # What is added to it is float32, and a gene's bias is most of its prediction.
            found = found.to(torch.promote_types(found.dtype, torch.float32))
        predicted = found + bias
        if self.cell_weight is not None:
            assert cell is not None
            weight: Tensor = self.cell_weight
            if positions is None:
                weight = weight.to(cell.dtype).expand(len(h), -1, -1)
            else:
                weight = weight[positions].to(cell.dtype)
            predicted = predicted + torch.bmm(weight, cell[..., None])[..., 0]
        dispersion = None
        if self.dispersion is not None:
            dispersion = self.dispersion.to(predicted.dtype).clamp(*DISPERSIONS)
            dispersion = (
                dispersion.expand_as(predicted) if positions is None else dispersion[positions]
            )
        found = {"log_level": predicted, "log_dispersion": dispersion}
        if "value" in outputs:
            found["value"] = self._value(predicted, dispersion, x, visible)
        if len(outputs) > 1:
            return torch.stack([found[name] for name in outputs])
        return found[outputs[0]]

    def _value(
        self, level: Tensor, dispersion: Tensor | None, x: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        """Return the values (B, P) for what was predicted, with the cell's offset."""
        if self.offset == "none":
            return level
        assert x is not None
        assert visible is not None
        if self.offset in COUNT_OFFSETS:
            return expected_value(level, one_count(x, visible), dispersion)
        return level + cell_offset(x, visible, self.bias)


def cell_offset(x: Tensor, visible: Tensor, bias: Tensor) -> Tensor:
    """Return (B, 1), the mean of value minus bias over a cell's visible genes; 0 without any.

    Args:
        x: (B, G) values.
        visible: (B, G) bool, the values that count.
        bias: (G,).
    """
    above = torch.where(visible, x - bias.to(x.dtype), 0.0)
    return pairwise_sum(above) / visible.sum(1, keepdim=True).clamp(min=1)


def one_count(x: Tensor, visible: Tensor) -> Tensor:
    """Return (B, 1), what a single count is before log1p: that of a cell's smallest visible value.

    0 for a cell without a visible value. Arguments as `cell_offset`.
    """
    smallest = torch.where(visible, x, torch.inf).amin(1, keepdim=True)
    return torch.where(visible.any(1, keepdim=True), smallest, 0.0).expm1()


def expected_value(log_level: Tensor, one: Tensor, log_dispersion: Tensor | None = None) -> Tensor:
    """Return the expected log1p value of a count that is known to be 1 or more.

    Rates above `_LARGE_RATE` counts have the expansion to second order of the mean; those above
    `_LARGE_RATE_OF_WIDE` of a negative binomial distribution the mean of the log of a gamma
    distribution, for values far above log1p(0). float32 at least.

    Args:
        log_level: (B, P) log of the mean, in units of the values before log1p.
        one: (B, 1) what a single count is in these units; 0: as if counts had no noise.
        log_dispersion: (B, P) log of r, with the variance mean + mean^2 / r; None: Poisson.
    """
    log_level = log_level.to(torch.promote_types(log_level.dtype, torch.float32))
    log_rate = log_level - one.clamp(min=1e-6).log()
    k = torch.arange(1, POISSON_COUNTS + 1, dtype=log_level.dtype, device=log_level.device)
    if log_dispersion is None:
        border = math.log(_LARGE_RATE)
        up = log_level.sigmoid()
        large = nn.functional.softplus(log_level) - 0.5 * one * up * (1 - up)
        few = log_rate.clamp(max=border)[..., None]
        logs = k * few - torch.lgamma(k + 1)
    else:
        border = math.log(_LARGE_RATE_OF_WIDE)
        log_r = log_dispersion.to(log_level.dtype)
        r = log_r.exp()
        large = nn.functional.softplus(log_level + torch.digamma(r) - log_r)
        few, r = log_rate.clamp(max=border)[..., None], r[..., None]
        logs = torch.lgamma(k + r) - torch.lgamma(k + 1) - k * nn.functional.softplus(r.log() - few)
    chance = logs.softmax(-1)
    small = (chance * torch.log1p(k * one[..., None])).sum(-1)
    return torch.where(log_rate > border, large, small)


def pairwise_sum(values: Tensor) -> Tensor:
    """Return the sums (B, 1) of values (B, G), the same bits in a batch of any size.

    torch chooses the order of a sum by the shape; here halves are added to each other.
    """
    n = 1 << (values.shape[1] - 1).bit_length()
    values = nn.functional.pad(values, (0, n - values.shape[1]))
    while n > 1:
        n //= 2
        values = values[:, :n] + values[:, n:]
    return values
