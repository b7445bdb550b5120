"""FAVOR+ random-feature attention in plain torch: specification, CPU path and test oracle.

`favor_attention` is the operator the model calls; `favor_attention_oracle` is the same function
written literally, for tests. Source: Choromanski et al., Rethinking Attention with Performers
(arXiv:2009.14794), section 2.3 and 2.4, with the stabilisers of the published scLong model.

For one cell and one head, with queries q_i, keys k_j, values v_j, random features w_m and
s = d^-1/4:

    x_im = s q_i.w_m     M_i = max_m x_im     E_im = exp(x_im - s^2 |q_i|^2 / 2 - M_i)
    y_jm = s k_j.w_m     K   = max y          F_jm = exp(y_jm - s^2 |k_j|^2 / 2 - K)
    out_i = sum_m (E_im + eps) sum_j (F_jm + eps) v_j / sum_m (E_im + eps) sum_j (F_jm + eps)

The maxima are of x and y without the squared norms, and gradients flow through both. The scope of K
is one cell (`sample`), one head of one cell (`head`) or the whole tensor (`tensor`, which couples
the cells of a batch: for comparison with the released code only). eps does not cancel, so the scope
changes the result.

Values are centred on their mean, which takes the eps terms out of the sums: with mu = mean_j v_j
and V_j = v_j - mu,

    z_m = sum_j F_jm   A_m = sum_j F_jm V_j   c_m = z_m + eps N   a = sum_m A_m   C = sum_m c_m
    den_i = sum_m E_im c_m + eps C                 out_i = mu + (sum_m E_im A_m + eps a) / den_i

A cell is computed on its own, so its result does not depend, to the bit, on its batch mates;
features are recomputed in the backward pass, so memory is one cell's (H, N, M) and not the batch's
times the layers'.

Shapes: B cells, N tokens, H heads, K head width, M random features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Scope = Literal["sample", "head", "tensor"]
EPS = 1e-4


def orthogonal_features(n_features: int, dim: int, *, generator: torch.Generator) -> Tensor:
    """Draw block-orthogonal random features whose row norms are those of Gaussian vectors.

    Args:
        n_features: Number of features M.
        dim: Head width K.
        generator: CPU generator; the result is a function of its state alone.

    Returns:
        (M, K) float32 on the CPU.

    Source: arXiv:2009.14794, section 2.4 and appendix B.
    """
    blocks = []
    for start in range(0, n_features, dim):
        gaussian = torch.randn(dim, dim, generator=generator, device="cpu", dtype=torch.float32)
        q, r = torch.linalg.qr(gaussian)
        # LAPACK fixes the signs of Q, which makes every feature lean to one side and the estimate
        # of softmax biased; with the signs of R's diagonal Q is uniform over all rotations.
        basis = (q * r.diagonal().sign()).T
        blocks.append(basis[: n_features - start])
    norms = torch.randn(n_features, dim, generator=generator, device="cpu", dtype=torch.float32)
    return norms.norm(dim=1, keepdim=True) * torch.cat(blocks)


def favor_attention(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, *, scope: Scope = "sample", eps: float = EPS
) -> Tensor:
    """Compute FAVOR+ attention, batch-invariant, with features recomputed in the backward pass.

    Args:
        q: Queries (B, N, H, K), any strides.
        k: Keys (B, N, H, K).
        v: Values (B, N, H, K).
        features: Random features (M, K), shared by the heads; no gradient.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.

    Returns:
        (B, N, H, K) in the dtype of `q`; exponentials and sums are at least float32.
    """
    return _FavorAttention.apply(q, k, v, features, scope, eps)


def favor_attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, *, scope: Scope = "sample", eps: float = EPS
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

    Returns:
        (B, N, H, K).
    """
    scale = q.shape[-1] ** -0.25
    x = torch.einsum("bnhk,mk->bhnm", q * scale, features)
    y = torch.einsum("bnhk,mk->bhnm", k * scale, features)
    half_q = (q * scale).square().sum(-1).permute(0, 2, 1)[..., None] / 2
    half_k = (k * scale).square().sum(-1).permute(0, 2, 1)[..., None] / 2
    dims = {"head": (2, 3), "sample": (1, 2, 3), "tensor": (0, 1, 2, 3)}[scope]
    phi_q = torch.exp(x - half_q - x.amax(-1, keepdim=True)) + eps
    phi_k = torch.exp(y - half_k - y.amax(dims, keepdim=True)) + eps
    weights = torch.einsum("bhim,bhjm->bhij", phi_q, phi_k)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhk->bihk", weights, v)


class _FavorAttention(torch.autograd.Function):
    """Forward and backward of the centred formulas, one cell at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: Tensor, scope: Scope, eps: float
    ) -> Tensor:
        kind = torch.promote_types(q.dtype, torch.float32)
        w = features.to(kind) * q.shape[-1] ** -0.25
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        top = _batch_key_max(k, w, kind) if scope == "tensor" else None
        for b in range(q.shape[0]):
            qb, kb, vb = (t[b].transpose(0, 1).to(kind) for t in (q, k, v))
            _, _, summary = _key_side(kb, vb, w, scope, eps, top)
            e, _ = _query_features(qb, w)
            den, num = _query_side(e, summary, eps)
            out[b] = (summary[0] + num / den).to(q.dtype).transpose(0, 1)
        ctx.save_for_backward(q, k, v, features)
        ctx.scope, ctx.eps = scope, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, features = ctx.saved_tensors
        scope, eps = ctx.scope, ctx.eps
        kind = torch.promote_types(q.dtype, torch.float32)
        w = features.to(kind) * q.shape[-1] ** -0.25
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        top = _batch_key_max(k, w, kind) if scope == "tensor" else None
        key_flow = []
        for b in range(q.shape[0]):
            qb, kb, vb, gb = (t[b].transpose(0, 1).to(kind) for t in (q, k, v, grad))
            f, arg, summary = _key_side(kb, vb, w, scope, eps, top)
            dqb, d_summary = _query_backward(qb, gb, w, summary, eps)
            dkb, dvb, flow = _key_backward(kb, vb, f, w, summary, d_summary, eps)
            if scope != "tensor":
                _add_key_max_gradient(dkb, flow, arg, w, scope)
            key_flow.append(flow)
            dq[b], dk[b], dv[b] = (g.to(q.dtype).transpose(0, 1) for g in (dqb, dkb, dvb))
        if scope == "tensor":
            _add_batch_max_gradient(dk, k, w, torch.stack(key_flow).sum(), kind)
        return dq, dk, dv, None, None, None


Summary = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _squared(x: Tensor) -> Tensor:
    """Return s^2 |x|^2 / 2 as (H, N, 1)."""
    return x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)


def _query_features(q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return E (H, N, M) and the index of each row's maximum (H, N, 1)."""
    x = q @ w.T
    top, arg = x.max(-1, keepdim=True)
    return x.sub_(top + _squared(q)).exp_(), arg


def _key_side(
    k: Tensor, v: Tensor, w: Tensor, scope: Scope, eps: float, top: Tensor | None
) -> tuple[Tensor, Tensor, Summary]:
    """Return F (H, N, M), the flat index of the key maximum, and (mu, A, c, a, C) of one cell."""
    y = k @ w.T
    if scope == "head":
        peak, arg = y.flatten(1).max(-1)
        peak = peak[:, None, None]
    else:
        peak, arg = y.flatten().max(0)
        peak = peak if top is None else top
    f = y.sub_(_squared(k) + peak).exp_()
    mu = v.mean(1, keepdim=True)
    a = f.transpose(1, 2) @ (v - mu)
    c = f.sum(1) + eps * k.shape[1]
    return f, arg, (mu, a, c, a.sum(1, keepdim=True), c.sum(1)[:, None, None])


def _query_side(e: Tensor, summary: Summary, eps: float) -> tuple[Tensor, Tensor]:
    """Return the denominator (H, N, 1) and the centred numerator (H, N, K)."""
    _, a, c, a_total, c_total = summary
    return e @ c[..., None] + eps * c_total, e @ a + eps * a_total


def _query_backward(
    q: Tensor, grad: Tensor, w: Tensor, summary: Summary, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return dq (H, N, K) and the gradients of A (H, M, K) and c (H, M)."""
    _, a, c, a_total, c_total = summary
    e, arg = _query_features(q, w)
    den, num = _query_side(e, summary, eps)
    g = grad / den
    delta = (g * num).sum(-1, keepdim=True) / den
    d_a = e.transpose(1, 2) @ g + eps * g.sum(1, keepdim=True)
    d_c = -((e.transpose(1, 2) @ delta)[..., 0] + eps * delta.sum(1))
    # Gradient of the exponent, then through the two terms that are subtracted from it: the squared
    # norm and the row maximum. Their common weight, the row sum of p, has this closed form.
    p = e.mul_((g @ a.transpose(1, 2)).addcmul_(delta, c[:, None, :], value=-1))
    flow = eps * (delta * c_total - (g * a_total).sum(-1, keepdim=True))
    dq = p @ w - flow * (w[arg[..., 0]] + q * q.shape[-1] ** -0.5)
    return dq, (d_a, d_c)


def _key_backward(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    w: Tensor,
    summary: Summary,
    d_summary: tuple[Tensor, Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dk without the maximum's part, dv and the maximum's weight per head.

    Shapes: (H, N, K), (H, N, K) and (H,).
    """
    mu = summary[0]
    d_a, d_c = d_summary
    dv = f @ d_a + eps * d_a.sum(1, keepdim=True)
    p = f.mul_(((v - mu) @ d_a.transpose(1, 2)).add_(d_c[:, None, :]))
    row = p.sum(-1, keepdim=True)
    dk = p @ w - row * k * k.shape[-1] ** -0.5
    # The sum of p over a head in closed form: summed from p it would be lost in rounding.
    flow = -eps * k.shape[1] * d_c.sum(1)
    return dk, dv, flow


def _add_key_max_gradient(dk: Tensor, flow: Tensor, arg: Tensor, w: Tensor, scope: Scope) -> None:
    """Add the gradient of the key maximum to the one row (per head or per cell) that attains it."""
    n_heads, n, _ = dk.shape
    m = w.shape[0]
    if scope == "head":
        heads = torch.arange(n_heads, device=dk.device)
        dk[heads, arg // m] -= flow[:, None] * w[arg % m]
    else:
        # Indexed by a tensor of one element: a scalar index would make a GPU wait for the host.
        one = arg.view(1)
        dk.view(n_heads * n, -1).index_add_(0, one // m, -flow.sum() * w[one % m])


def _batch_key_max(k: Tensor, w: Tensor, kind: torch.dtype) -> Tensor:
    return torch.stack([(kb.to(kind) @ w.T).max() for kb in k]).max()


def _add_batch_max_gradient(
    dk: Tensor, k: Tensor, w: Tensor, flow: Tensor, kind: torch.dtype
) -> None:
    """Add the gradient of the whole-tensor maximum (scope `tensor`) to the row that attains it."""
    y = torch.stack([kb.to(kind) @ w.T for kb in k])
    row, m = divmod(int(y.argmax()), w.shape[0])
    dk.view(-1, dk.shape[-1])[row] -= (flow * w[m]).to(dk.dtype)
