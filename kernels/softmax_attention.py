"""Exact softmax attention, by torch's scaled_dot_product_attention; quadratic in the tokens.

    out = softmax_attention(q, k, v)               # (B, P, H, K) of (B, N, H, K) each
    out = softmax_attention_packed(qkv, lengths)   # (T, H, K) of (T, 3, H, K)

torch computes it in blocks and keeps no (N, N) matrix. Packed cells are computed one by one, so no
cell is padded and each call is the one that the cell alone would make. On a CPU output and gradient
of a cell have the same bits alone, beside others and packed, as those of FAVOR+ have. On a GPU
packed cells should have the same output bits (a test tells where there is one); for rectangular
batches and for gradients (a flash kernel may add up in any order) torch promises none, so a resumed
run equals a straight one to rounding.

Shapes: B cells, N tokens, P queries, T tokens of all cells, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute exact attention of rectangular cells.

    Args:
        q: Queries (B, P, H, K), any strides.
        k: Keys (B, N, H, K).
        v: Values, shaped like the keys.

    Returns:
        Shaped like the queries.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def softmax_attention_packed(qkv: Tensor, lengths: Sequence[int]) -> Tensor:
    """Compute exact attention of cells of different lengths; they do not see each other.

    Args:
        qkv: (T, 3, H, K): queries, keys, values.
        lengths: (B,) tokens of each cell, known to the host; their sum is T.

    Returns:
        (T, H, K).
    """
    cells = (cell[None].unbind(2) for cell in qkv.split(lengths))
    return torch.cat([softmax_attention(*cell)[0] for cell in cells])
