"""Which genes of a cell the model and its large encoder read, and where they lie when packed.

With `model.routing: top` every cell sends its top_seq_len highest genes, so cells stay rectangular
and `expression_order` says all. With `expressed` a cell sends its candidates, the expressed and the
hidden genes, top_seq_len at most: `route` lays the tokens of all cells on one axis, first what the
large encoder reads, cell by cell, then what is left for the mini encoder, cell by cell. Nothing
of this makes a GPU wait for the host if the lengths are given. With `model.zero_genes` a cell is
its candidates and some of its zeros alone: `read_genes`, for which a GPU waits.

Shapes: B cells, N tokens of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sclong_ds.model.performer import CellSpans


def unknown_genes(
    mask: Tensor | None, unmeasured: Tensor | None, *, routing: Literal["top", "expressed"]
) -> Tensor | None:
    """Return which genes are routed as hidden values are.

    With `top` those that are not measured are: they come last. With `expressed` hidden values are
    candidates of the large encoder, and of genes that are not measured there are thousands: they
    stay with the zeros.

    Args:
        mask: (B, G) bool, True where the value is hidden, or None.
        unmeasured: (B, G) bool, True where the gene is not measured, or None.
        routing: `model.routing`.
    """
    if unmeasured is None or routing == "expressed":
        return mask
    return unmeasured if mask is None else mask | unmeasured


def expression_order(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the genes of each cell by falling value; hidden values last, ties by lower gene index.

    Args:
        x: Transformed expression (B, G), >= 0.
        mask: (B, G) bool, True where the value is hidden, or None.

    Returns:
        (B, G) int64 gene indices.
    """
    keys = x if mask is None else x.masked_fill(mask, -1.0)
    return torch.sort(keys, dim=1, descending=True, stable=True).indices


def candidate_order(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the genes of each cell: expressed ones by falling value, hidden ones, zeros.

    Ties go to the lower gene index. Arguments and result as `expression_order`.
    """
    keys = x.masked_fill(x <= 0, -2.0)
    if mask is not None:
        keys = keys.masked_fill(mask, -1.0)
    return torch.sort(keys, dim=1, descending=True, stable=True).indices


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of each permutation (..., N) int64: where each element lies in it.

    By a scatter, each place written once; a second sort takes longer.
    """
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the tokens of cells (B, N) lie on one axis (B N,)."""

    order: Tensor
    """(B N,) int64: flat index b N + gene of the token at each place of the axis."""
    places: Tensor
    """(B N,) int64, the inverse: place of each cell's each gene."""
    high: CellSpans
    """Cells of the large encoder, at the start of the axis."""
    low: CellSpans
    """Cells of the mini encoder, behind."""


def route(
    x: Tensor, mask: Tensor | None, *, top_seq_len: int, lengths: Sequence[int] | None
) -> Routes:
    """Divide each cell's tokens between the encoders by `model.routing: expressed`.

    Args:
        x: Transformed expression (B, N), >= 0.
        mask: (B, N) bool, True where the value is hidden, or None.
        top_seq_len: Most tokens of a cell that the large encoder reads.
        lengths: (B,) per cell min(candidates, top_seq_len), known to the host; None counts them,
            for which a GPU waits.

    Raises:
        ValueError: On a CPU: the lengths are not those of the cells. On a GPU, which does not wait
            for a comparison, a wrong sum stops the process with a device-side assertion.
    """
    b, n = x.shape
    order = candidate_order(x, mask)
    candidates = x > 0 if mask is None else (x > 0) | mask
    counts = candidates.sum(1).clamp(max=top_seq_len)
    if lengths is None or x.device.type == "cpu":
        counted = counts.tolist()
        if lengths is not None and list(lengths) != counted:
            raise ValueError(
                f"lengths: got {list(lengths)}, the cells have {counted} expressed or hidden genes "
                f"of at most {top_seq_len}"
            )
        lengths = counted
    total = sum(lengths)
    torch._assert_async(counts.sum() == total, "lengths are not those of the cells")
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    low_ends = torch.arange(0, (b + 1) * n, n, device=x.device) - ends
    rank = torch.arange(n, device=x.device)
    high_places = ends[:-1, None] + rank
    low_places = total + low_ends[:-1, None] + rank - counts[:, None]
    by_rank = torch.where(rank < counts[:, None], high_places, low_places)
    rows = order + torch.arange(0, b * n, n, device=x.device)[:, None]
    # Both scatter a permutation: each element is written once.
    return Routes(
        torch.empty_like(rows.view(-1)).scatter_(0, by_rank.view(-1), rows.view(-1)),
        torch.empty_like(rows).scatter_(1, order, by_rank).view(-1),
        CellSpans(ends.int(), top_seq_len, tuple(lengths)),
        CellSpans(low_ends.int(), n, tuple(n - length for length in lengths)),
    )


@dataclass(frozen=True, slots=True)
class ReadGenes:
    """Where the genes that are read of cells (B, N) lie on one axis (T,), cell by cell."""

    rows: Tensor
    """(T,) int64: flat index b N + gene of each place; a cell's candidates first."""
    places: Tensor
    """(B, N) int64: place of each cell's each gene; T for a gene that is not read."""
    cells: CellSpans
    """The cells on the axis."""
    order: Tensor
    """(T,) int64: the places, those of the large encoder before those of the mini encoder."""
    high: CellSpans
    """Cells of the large encoder, in this order."""
    low: CellSpans
    """Cells of the mini encoder, behind."""


def read_genes(
    x: Tensor,
    mask: Tensor | None,
    unmeasured: Tensor | None,
    *,
    top_seq_len: int,
    zero_genes: int,
) -> ReadGenes:
    """Choose the genes of each cell that are read, and divide them between the encoders.

    Read are the candidates, expressed and hidden genes, and `zero_genes` of the others that are
    measured. Which ones is a hash of the gene and of the cell's visible genes: the same whatever
    cells lie beside it, and others at each visit in training, when others are hidden.

    Args:
        x: Transformed expression (B, N), >= 0.
        mask: (B, N) bool, True where the value is hidden, or None.
        unmeasured: (B, N) bool, True where nothing is known of the gene, or None.
        top_seq_len: Most tokens of a cell that the large encoder reads.
        zero_genes: Most unexpressed genes of a cell that are read.
    """
    b, n = x.shape
    candidates = x > 0 if mask is None else (x > 0) | mask
    zeros = ~candidates if unmeasured is None else ~(candidates | unmeasured)
    # By falling key: visible values, hidden ones, zeros in hashed order, what is not measured.
    # In float32 at least: bfloat16 has 64 numbers for all hashes.
    kind = torch.promote_types(x.dtype, torch.float32)
    keys = torch.where(zeros, -2.0 - _hashes(x, mask), -4.0).to(kind)
    values = x if mask is None else x.masked_fill(mask, -1.0)
    keys = torch.where(candidates, values.to(kind), keys)
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices
    n_candidates = candidates.sum(1)
    n_read = n_candidates + zeros.sum(1).clamp(max=zero_genes)
    n_high = n_candidates.clamp(max=top_seq_len)
    rank = torch.arange(n, device=x.device)
    is_read = rank < n_read[:, None]
    rows = (order + torch.arange(0, b * n, n, device=x.device)[:, None])[is_read]
    places = torch.full((b * n,), len(rows), device=x.device)
    places[rows] = torch.arange(len(rows), device=x.device)
    is_high = (rank < n_high[:, None])[is_read]
    return ReadGenes(
        rows,
        places.view(b, n),
        _spans(n_read),
        torch.cat([is_high.nonzero(), (~is_high).nonzero()]).squeeze(1),
        _spans(n_high),
        _spans(n_read - n_high),
    )


def _spans(lengths: Tensor) -> CellSpans:
    """Return the spans of cells (B,) that lie one behind the other."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    known = tuple(lengths.tolist())
    return CellSpans(ends.int(), max(known), known)


def _hashes(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, N) numbers in [0, 1), a function of the gene and of the cell's visible genes."""
    visible = x > 0 if mask is None else (x > 0) & ~mask
    gene = torch.arange(1, x.shape[1] + 1, device=x.device)
    cell = (visible * _mixed(gene)).sum(1, keepdim=True)
    return (_mixed(cell + gene * 0x9E3779B1) & 0x7FFFFF).double() / 0x800000


def _mixed(numbers: Tensor) -> Tensor:
    """Return int64 numbers below 2^31, scattered: every bit depends on all bits below 2^31."""
    for _ in range(2):
        numbers = numbers & 0x7FFFFFFF
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B
    return ((numbers & 0x7FFFFFFF) >> 16) ^ (numbers & 0x7FFFFFFF)
