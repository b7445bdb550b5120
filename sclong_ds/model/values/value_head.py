"""The head: from representations to values, and how a cell's depth enters them.

Shapes: B cells, G genes, P wanted genes, C base width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sclong_ds.config.sections import COUNT_OFFSETS
from sclong_ds.model.values.cell_vector import CellStart, fill_columns
from sclong_ds.model.values.depth import cell_offset, expected_value, one_count

Output = Literal["value", "log_level", "log_dispersion", "eta"]
"""What is said of a gene: its value, given that it is expressed; the log of its mean before log1p;
the log of the dispersion of its counts; what the zero head says (`zero_head.py`)."""
DISPERSIONS = (-4.0, 7.0)
"""Logs of dispersions: from far beyond a Poisson distribution's variance to one like it."""
_LOG_DISPERSION = 2.3
"""At the start: a variance of mean + mean^2 / 10."""


class ValueHead(nn.Module):
    """Predicts a gene's value from its representation.

    Args:
        dim: Base width C.
        kind: `mlp` or `linear`.
        mean: Initial prediction: one number, or one per gene (G,), which makes a learned bias per
            gene; None starts weights and bias as torch.nn.Linear does.
        offset: `model.cell_offset`; other than `none` with a bias per gene alone.
        cell_genes: Genes G that read the cell's vector; 0: none do.
        direct: What is read from representations and cells is added to the value, and not to the
            level of which the offset makes one.
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
        direct: bool = False,
        start: CellStart | None = None,
    ) -> None:
        super().__init__()
        self.offset, self.direct = offset, direct
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
            fill_columns(self.cell_weight, start, 1.0 if start is None else start.scale)

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
        level = bias.expand_as(found) if self.direct else found + bias
        if self.cell_weight is not None:
            assert cell is not None
            weight: Tensor = self.cell_weight
            if positions is None:
                weight = weight.to(cell.dtype).expand(len(h), -1, -1)
            else:
                weight = weight[positions].to(cell.dtype)
            own = torch.bmm(weight, cell[..., None])[..., 0]
            if self.direct:
                found = found + own
            else:
                level = level + own
        dispersion = None
        if self.dispersion is not None:
            dispersion = self.dispersion.to(level.dtype).clamp(*DISPERSIONS)
            dispersion = dispersion.expand_as(level) if positions is None else dispersion[positions]
        assert not (self.direct and "log_level" in outputs), "values are no levels alone"
        said: dict[str, Any] = {"log_level": level, "log_dispersion": dispersion}
        if "value" in outputs:
            value = self._value(level, dispersion, x, visible)
            said["value"] = value + found if self.direct else value
        if len(outputs) > 1:
            return torch.stack([said[name] for name in outputs])
        return said[outputs[0]]

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
