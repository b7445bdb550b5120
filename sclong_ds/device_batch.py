"""From packed cells to a dense batch on a device: torch operations only.

Two bytes a non-zero value cross to the device instead of four bytes a gene; there the byte code of
`sclong_ds.corpus.byte_code` is read by prefix sums. Everything whose size depends on the data is sized by
what the host knows, so no operation makes the host wait for the device.

Shapes: B cells, G genes, E entries of all cells.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sclong_ds.corpus.byte_code import PackedCells

_AHEAD = 3
"""Entries that may continue a count."""


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
    # As in `decoding.to_dense_norm`.
    scale.view(np.float64)[:] = (target_sum or 1.0) / np.maximum(cells.row_total, 1)
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
