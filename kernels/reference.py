"""FAVOR+ random-feature attention in plain torch: specification, entries and test oracle.

`favor_attention` is the torch backend of `kernels/favor_attention.py`; `favor_attention_oracle` is
the same function written literally, for tests. Source: Choromanski et al., Rethinking Attention
with Performers (arXiv:2009.14794), section 2.3 and 2.4, with the stabilisers of the published
scLong model.

For one cell and one head, with queries q_i, keys k_j, values v_j, random features w_m and
s = d^-1/4:

    x_im = s q_i.w_m     M_i = max_m x_im     E_im = exp(x_im - s^2 |q_i|^2 / 2 - M_i)
    y_jm = s k_j.w_m     K   = max y          F_jm = exp(y_jm - s^2 |k_j|^2 / 2 - K)
    out_i = sum_m (E_im + eps) sum_j (F_jm + eps) v_j / sum_m (E_im + eps) sum_j (F_jm + eps)

The maxima are of x and y without the squared norms; gradients flow through both (`exact`) or stop
there (`detach`), which differs because of eps. The scope of K is one cell (`sample`), one head of
one cell (`head`) or the whole tensor (`tensor`, which couples the cells of a batch: for comparison
with the released code only). eps does not cancel, so the scope changes the result.

Values are centred on their mean, which takes the eps terms out of the sums: with mu = mean_j v_j
and V_j = v_j - mu,

    z_m = sum_j F_jm   A_m = sum_j F_jm V_j   c_m = z_m + eps N   a = sum_m A_m   C = sum_m c_m
    den_i = sum_m E_im c_m + eps C                 out_i = mu + (sum_m E_im A_m + eps a) / den_i

`kernels/favor_torch.py` computes this. There may be fewer queries than keys: nothing above couples
their numbers; N is that of the keys.

Shapes: B cells, N tokens, T tokens of all cells, H heads, K head width, M random features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels import favor_torch
from kernels.favor_torch import Scope

MaxGrad = Literal["exact", "detach"]
FeatureKind = Literal["orthogonal", "orthogonal_qr", "gaussian"]
EPS = 1e-4


def random_features(
    n_features: int, dim: int, *, generator: torch.Generator, kind: FeatureKind = "orthogonal"
) -> Tensor:
    """Draw random features: Gaussian directions, block-orthogonal or independent.

    Args:
        n_features: Number of features M.
        dim: Head width K.
        generator: CPU generator; the result is a function of its state alone, whatever the number
            of threads and, for all kinds but `orthogonal_qr`, the kind of CPU.
        kind: `orthogonal`: blocks of K orthogonal rows, uniform over rotations, with the norms of
            Gaussian vectors; `orthogonal_qr`: the same with the signs that QR leaves (the released
            scLong code); `gaussian`: independent rows.

    Returns:
        (M, K) float32 on the CPU.

    Source: arXiv:2009.14794, section 2.4 and appendix B.
    """
    # The last bits of a float32 draw and of a QR depend on the CPU: float64 is rounded at the end.
    # What the released code draws, in float32, is another sequence.
    dtype = torch.float32 if kind == "orthogonal_qr" else torch.float64

    def gaussian(rows: int) -> Tensor:
        draw = torch.randn(rows, dim, generator=generator, device="cpu", dtype=dtype)
        return draw.double()

    if kind == "gaussian":
        return gaussian(n_features).float()
    blocks = []
    for start in range(0, n_features, dim):
        q, r = _qr_on_one_thread(gaussian(dim))
        # LAPACK fixes the signs of Q, which makes every feature lean to one side and the estimate
        # of softmax biased; with the signs of R's diagonal Q is uniform over all rotations.
        signs = r.diagonal().sign() if kind == "orthogonal" else 1.0
        blocks.append((q * signs).T[: n_features - start])
    norms = gaussian(n_features).norm(dim=1, keepdim=True)
    return (norms * torch.cat(blocks)).float()


def _qr_on_one_thread(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R; LAPACK's last bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, r = torch.linalg.qr(square)
    finally:
        torch.set_num_threads(threads)
    return q, r


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute FAVOR+ attention, batch-invariant, with features recomputed in the backward pass.

    Args:
        q: Queries (B, N, H, K), any strides; with `cu_seqlens` (T, H, K).
        k: Keys, shaped like q.
        v: Values, shaped like q.
        features: Random features (M, K), shared by the heads; no gradient.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima (`exact`) or stop (`detach`).
        cu_seqlens: int (B + 1,): cell b has the rows from cu_seqlens[b] up to cu_seqlens[b + 1].

    Returns:
        Shaped like q, in its dtype; exponentials and sums are at least float32.
    """
    exact = max_grad == "exact"
    return attention(q, k, v, features, cu_seqlens, None, scope, eps, exact)


def favor_attention_packed(
    qkv: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute `favor_attention` of one tensor; its gradient is written in one piece.

    Args:
        qkv: (B, N, 3, H, K), or (T, 3, H, K) with `cu_seqlens`: queries, keys, values.
        features: As in `favor_attention`, like all that follow.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima.
        cu_seqlens: Where each cell's rows start and end.

    Returns:
        (B, N, H, K) or (T, H, K).
    """
    exact = max_grad == "exact"
    return attention(qkv, None, None, features, cu_seqlens, None, scope, eps, exact)


def favor_attention_kv(
    q: Tensor,
    kv: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
    cu_seqlens: Tensor | None = None,
    query_cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute `favor_attention` of queries that are fewer, or more, than the keys.

    Args:
        q: Queries (B, P, H, K), or (Q, H, K) with `cu_seqlens`.
        kv: Keys and values (B, N, 2, H, K) or (T, 2, H, K); their gradient is one piece.
        features: As in `favor_attention`, like all that follow.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima.
        cu_seqlens: Where each cell's keys start and end.
        query_cu_seqlens: Where its queries do; given with `cu_seqlens`.

    Returns:
        Shaped like q.
    """
    exact = max_grad == "exact"
    return attention(q, kv, None, features, cu_seqlens, query_cu_seqlens, scope, eps, exact)


def favor_attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
) -> Tensor:
    """Compute the same function as `favor_attention` by its definition.

    Autograd gives the gradients.

    Args:
        q: Queries (B, N, H, K).
        k: Keys (B, N, H, K).
        v: Values (B, N, H, K).
        features: Random features (M, K).
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima.

    Returns:
        (B, N, H, K).
    """
    scale = q.shape[-1] ** -0.25
    x = torch.einsum("bnhk,mk->bhnm", q * scale, features)
    y = torch.einsum("bnhk,mk->bhnm", k * scale, features)
    half_q = (q * scale).square().sum(-1).permute(0, 2, 1)[..., None] / 2
    half_k = (k * scale).square().sum(-1).permute(0, 2, 1)[..., None] / 2
    dims = {"head": (2, 3), "sample": (1, 2, 3), "tensor": (0, 1, 2, 3)}[scope]
    top_q, top_k = x.amax(-1, keepdim=True), y.amax(dims, keepdim=True)
    if max_grad == "detach":
        top_q, top_k = top_q.detach(), top_k.detach()
    phi_q = torch.exp(x - half_q - top_q) + eps
    phi_k = torch.exp(y - half_k - top_k) + eps
    weights = torch.einsum("bhim,bhjm->bhij", phi_q, phi_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhk->bihk", weights, v)


class _FavorAttention(torch.autograd.Function):
    """`kernels/favor_torch.py` for autograd; keeps the inputs and the sums over the keys."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, kept = favor_torch.forward(*arguments)
        ctx.save_for_backward(*arguments[:6], *kept)
        ctx.setting = arguments[6:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once only: checkpointing computes them when they are read
        kept = favor_torch.Summary(*saved[6:])
        gradients = favor_torch.backward(grad, kept, *saved[:6], *ctx.setting)
        return *favor_torch.by_argument(gradients, *saved[:3]), *(None,) * 6


def attention(*arguments: Any) -> Tensor:
    """Compute attention; arguments as `kernels.favor_torch.forward`, returns its output."""
    return _FavorAttention.apply(*arguments)
