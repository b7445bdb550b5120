"""Masked-value reconstruction on the device: model input, targets and the loss.

The loader draws the targets (`sclong_ds.masking`); `masked_batch` brings a micro-batch and its
targets to the device, where the model predicts the values at their positions only. The loss is the
mean squared error over all targets of the global batch.

Shapes: B cells, G genes, P target places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.device_batch import unpack
from sclong_ds.masking import Targets


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Model input and targets of one micro-batch, on its device.

    Attributes:
        x: (B, G) float32 transformed expression, hidden values included.
        hidden: (B, G) bool, values the model must not see.
        positions: (B, P) int64 gene index of each target; 0 at padding.
        valid: (B, P) bool, False at padding.
        true: (B, P) float32 value of `x` at `positions`; 0 for a target that is a zero gene.
        unmeasured: (B, G) bool, genes that the cell's dataset does not measure; None: of all genes
            the value is known.
    """

    x: Tensor
    hidden: Tensor
    positions: Tensor
    valid: Tensor
    true: Tensor
    unmeasured: Tensor | None = None


def masked_batch(
    cells: PackedCells,
    targets: Targets,
    *,
    n_genes: int,
    target_sum: float,
    device: torch.device,
    unmeasured: NDArray[np.bool_] | None = None,
) -> MaskedBatch:
    """Decode and transform a micro-batch on its device and put the targets in place.

    Nothing waits for the device.

    Args:
        cells: The B cells.
        targets: Their targets.
        n_genes: Genes of the corpus.
        target_sum: `data.target_sum`.
        device: The rank's device.
        unmeasured: (B, G) genes that the cells' datasets do not measure, or None.
    """
    x = unpack(cells, n_genes=n_genes, target_sum=target_sum, device=device)
    positions, hide, valid = (
        torch.from_numpy(a).to(device, non_blocking=True)
        for a in (targets.positions, targets.hidden, targets.valid)
    )
    # Padding points at gene 0, which may be a target: adding its 0 leaves that one alone, in any
    # order. uint8, for bool has no addition on every device.
    hidden = torch.zeros(x.shape, dtype=torch.uint8, device=device)
    hidden.scatter_add_(1, positions, hide.to(torch.uint8))
    unknown = None
    if unmeasured is not None:
        unknown = torch.from_numpy(unmeasured).to(device, non_blocking=True)
    return MaskedBatch(x, hidden.bool(), positions, valid, x.gather(1, positions), unknown)


def masked_squared_error(predicted: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """Return the sum of squared errors over the targets.

    Args:
        predicted: (B, P).
        true: (B, P) true values.
        valid: (B, P) bool, False at padding.

    Returns:
        float32 scalar (float64 for float64 input); the caller divides by the number of targets of
        the global batch.
    """
    kind = torch.promote_types(predicted.dtype, torch.float32)
    # A product with the mask and not a selection: a selection would make a GPU wait for the count.
    return ((predicted.to(kind) - true.to(kind)).square() * valid).sum()
