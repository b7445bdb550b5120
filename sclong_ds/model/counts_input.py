"""From raw counts of cells to what a model reads of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from sclong_ds.corpus.transform import log1p_normalise


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
