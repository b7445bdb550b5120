"""From raw counts of cells to what a model reads of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sclong_ds.corpus.transform import log1p_normalise

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_ROUNDING = 1.01
"""Of a value by bfloat16, at most."""


def model_input(
    counts: csr_matrix,
    *,
    target_sum: float,
    unmeasured: NDArray[np.bool_] | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Return the values of cells (B, G) float32, and which of them stand for nothing measured.

    Args:
        counts: (B, G) raw counts in the model's gene order.
        target_sum: Counts of a cell after scaling, of the model's transform.
        unmeasured: (B, G) genes that are not measured, for a model that reads them as unknown; None
            takes all others for zeros.
        device: Where the model is.

    Returns:
        Values, and `unmeasured` or None, on the device.
    """
    values = torch.from_numpy(log1p_normalise(counts, target_sum=target_sum)).to(device)
    return values, None if unmeasured is None else torch.from_numpy(unmeasured).to(device)


def check_input(model: Any, x: Tensor, mask: Tensor | None, unmeasured: Tensor | None) -> None:
    """Check the shape of a model's input; on the CPU, of a loaded model, its values as well.

    A GPU would wait for the values, and a model that trains is given what the objective made.

    Args:
        model: The model, a `ScLong`.
        x: (B, G) what it is given.
        mask: (B, G) hidden values, which may be any; or None.
        unmeasured: (B, G) the same of genes that are not measured.

    Raises:
        ValueError: Another shape, or values that no cell has.
    """
    if x.dim() != 2 or x.shape[1] != model.n_genes:
        raise ValueError(
            f"x {tuple(x.shape)}: must be (cells, {model.n_genes}), the genes of the model in its "
            "order; sclong_ds.align(cells, model) puts them so"
        )
    if torch.compiler.is_compiling() or model.training or not hasattr(model, "transform"):
        return
    if type(x) is not Tensor or not x.is_cpu or not x.numel():
        return
    most = math.log1p(model.transform.target_sum)
    for hidden in (None, mask, unmeasured):
        x = x.detach() if hidden is None else x.detach().masked_fill(hidden, 0.0)
        low, high = (float(end) for end in x.aminmax())
        if 0 <= low <= high <= _ROUNDING * most:
            return
    raise ValueError(
        f"x has values from {low:g} to {high:g}: model(x) takes log1p values of counts scaled to "
        f"{model.transform.target_sum:g}, from 0 to {most:.2f}; give raw counts to "
        'sclong_ds.embed, or take layers["model_input"] of sclong_ds.align(cells, model)'
    )
