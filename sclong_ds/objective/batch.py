"""Masked-value reconstruction on the device: model input, targets and the loss.

The loader draws the targets (`sclong_ds.objective.targets`); `masked_batch` brings a micro-batch
and its targets to the device, where the model predicts the values at their positions only. The loss
is the mean squared error over all targets of the global batch.

Shapes: B cells, G genes, P target places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.transform import scale_of
from sclong_ds.objective.targets import Targets

_AHEAD = 3
"""Entries that may continue a count."""


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
        # `prepare` has refused counts there: this keeps all that reads x from depending on it.
        x = x.masked_fill(unknown, 0.0)
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


def unpack(
    cells: PackedCells, *, n_genes: int, target_sum: float | None, device: torch.device | str
) -> Tensor:
    """Decode cells on a device.

    The arrays may lie anywhere, be read-only or parts of one block. They are copied here into one
    buffer, which is pinned for a CUDA device and goes there in one copy; so they may be written to
    again as soon as this returns, though the device may not have started.

    The result is the same, bit for bit, at each call: no operation depends on an order of
    additions or writes. The codes are trusted, since the checksum of their chunk was right; a gene
    index above G is an error of torch, on CUDA a device-side assertion.

    Args:
        cells: The B cells.
        n_genes: G.
        target_sum: Counts of a cell after scaling; None for raw counts.
        device: Where the result is.

    Returns:
        (B, G) float32: the counts, those above 2^24 rounded, or log1p(target_sum * count / total of
        the cell), calculated in float64.

    Raises:
        ValueError: Arrays that do not fit together.
    """
    n_cells, n_entries = len(cells.row_entries), len(cells.gap)
    needed = int(cells.row_entries.sum(dtype=np.int64))
    if not n_entries == len(cells.count) == needed:
        raise ValueError(
            f"{n_entries} gaps and {len(cells.count)} counts for cells of {needed} entries"
        )
    device = torch.device(device)
    scale, entries, gap, count = _sent(cells, target_sum, device)

    ends = entries.cumsum(0)
    cell = torch.arange(n_cells, device=device).repeat_interleave(entries, output_size=n_entries)
    position = gap[:n_entries].cumsum(0, dtype=torch.int64)
    gene = position - pad(position, (1, 0))[ends - entries][cell] - 1
    value = _values(gap, count)
    # Continuations go to a row behind the last cell, which is cut off again.
    row = torch.where(gap[:n_entries] > 0, cell, n_cells)
    if target_sum is None:
        value = value.float()
    else:
        value = (value * scale[cell]).log1p().float()
    x = torch.zeros(n_cells + 1, n_genes, device=device)
    return x.index_put_((row, gene), value)[:n_cells]


def _sent(
    cells: PackedCells, target_sum: float | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bring everything to the device in one copy.

    Returns:
        (B,) float64 factor of each cell's counts, (B,) int64 its entries, and (E + 3,) uint8 gap
        and count with plain entries of count 0 at the end.
    """
    n_cells = len(cells.row_entries)
    sizes = [8 * n_cells] * 2 + [len(cells.gap) + _AHEAD] * 2
    # Pinned memory that torch hands out is not handed out again before the copy has ended.
    block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    scale, entries, gap, count = np.split(block.numpy(), np.cumsum(sizes)[:-1])
    scale.view(np.float64)[:] = scale_of(cells.row_total, target_sum or 1.0)
    entries.view(np.int64)[:] = cells.row_entries
    gap[:-_AHEAD], gap[-_AHEAD:] = cells.gap, 1
    count[:-_AHEAD], count[-_AHEAD:] = cells.count, 0
    sent = block.to(device, non_blocking=True).split(sizes)
    return sent[0].view(torch.float64), sent[1].view(torch.int64), sent[2], sent[3]


def _values(gap: Tensor, count: Tensor) -> Tensor:
    """Return (E,) int64 the count that begins at each entry.

    Args:
        gap: (E + 3,) uint8, the last three are not 0.
        count: (E + 3,) uint8.
    """
    size = len(gap) - _AHEAD
    value = count[:size].long()
    continued = torch.ones_like(value, dtype=torch.bool)
    for depth in range(1, _AHEAD + 1):
        continued &= gap[depth : size + depth] == 0
        value += (count[depth : size + depth].long() << (8 * depth)) * continued
    return value
