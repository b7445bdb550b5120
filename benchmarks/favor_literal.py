"""FAVOR+ attention written operator by operator, as released Performer code does.

The baseline of the benchmarks: features of all heads in memory, autograd for the gradients. Same
function as `kernels/reference.py` with the key maximum over the cell for one cell, over the whole
tensor for several. Source: arXiv:2009.14794, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import EPS


def literal_attention(qkv: Tensor, features: Tensor, *, eps: float = EPS) -> Tensor:
    """Return attention (B, N, H, K) of queries, keys and values (B, N, 3, H, K)."""
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    features = features.to(q.dtype)
    phi_q = _feature_map(q, features, eps, is_query=True)
    phi_k = _feature_map(k, features, eps, is_query=False)
    weight = 1.0 / torch.einsum("bhnm,bhm->bhn", phi_q, phi_k.sum(-2))
    context = torch.einsum("bhnm,bhnk->bhmk", phi_k, v)
    return torch.einsum("bhmk,bhnm,bhn->bhnk", context, phi_q, weight).transpose(1, 2)


def _feature_map(x: Tensor, features: Tensor, eps: float, *, is_query: bool) -> Tensor:
    """Return phi(x) (B, H, N, M)."""
    scale = x.shape[-1] ** -0.25
    projected = torch.einsum("bhnk,mk->bhnm", x * scale, features)
    norm = x.square().sum(-1, keepdim=True) / 2 * scale**2
    top = projected.amax(-1, keepdim=True) if is_query else projected.amax()
    return features.shape[0] ** -0.5 * (torch.exp(projected - norm - top) + eps)
