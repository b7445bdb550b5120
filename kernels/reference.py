"""FAVOR+ random-feature attention in plain torch: specification, CPU path and test oracle.

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

A cell is computed on its own, so its result does not depend, to the bit, on its batch mates. Its
features exist for a block of heads and tokens at a time, small enough for a core's cache on a CPU,
and are recomputed in the backward pass, which keeps nothing but the inputs.

Shapes: B cells, N tokens, T tokens of all cells, H heads, K head width, M random features.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Scope = Literal["sample", "head", "tensor"]
MaxGrad = Literal["exact", "detach"]
FeatureKind = Literal["orthogonal", "orthogonal_qr", "gaussian"]
EPS = 1e-4
_BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**30}
"""Features in work at a time: what a core's second-level cache holds; on a GPU, few launches."""
_BLOCK_HEADS = 8
"""Heads of a block at least: they lie side by side, so that memory is read in runs."""


def random_features(
    n_features: int, dim: int, *, generator: torch.Generator, kind: FeatureKind = "orthogonal"
) -> Tensor:
    """Draw random features: Gaussian directions, block-orthogonal or independent.

    Args:
        n_features: Number of features M.
        dim: Head width K.
        generator: CPU generator; the result is a function of its state alone.
        kind: `orthogonal`: blocks of K orthogonal rows, uniform over rotations, with the norms of
            Gaussian vectors; `orthogonal_qr`: the same with the signs that QR leaves (the released
            scLong code); `gaussian`: independent rows.

    Returns:
        (M, K) float32 on the CPU.

    Source: arXiv:2009.14794, section 2.4 and appendix B.
    """
    if kind == "gaussian":
        return torch.randn(n_features, dim, generator=generator, device="cpu", dtype=torch.float32)
    blocks = []
    for start in range(0, n_features, dim):
        gaussian = torch.randn(dim, dim, generator=generator, device="cpu", dtype=torch.float32)
        q, r = torch.linalg.qr(gaussian)
        # LAPACK fixes the signs of Q, which makes every feature lean to one side and the estimate
        # of softmax biased; with the signs of R's diagonal Q is uniform over all rotations.
        signs = r.diagonal().sign() if kind == "orthogonal" else 1.0
        blocks.append((q * signs).T[: n_features - start])
    norms = torch.randn(n_features, dim, generator=generator, device="cpu", dtype=torch.float32)
    return norms.norm(dim=1, keepdim=True) * torch.cat(blocks)


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
    return _FavorAttention.apply(q, k, v, features, cu_seqlens, scope, eps, max_grad == "exact")


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
    return _FavorAttention.apply(qkv, None, None, features, cu_seqlens, scope, eps, exact)


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


class _Summary(NamedTuple):
    """What the queries of one cell read of its keys and values, and where the key maximum is."""

    mean: Tensor
    """mu, mean of v (H, 1, K)."""
    a: Tensor
    """A (H, M, K)."""
    c: Tensor
    """c (H, M, 1)."""
    a_sum: Tensor
    """a (H, 1, K)."""
    c_sum: Tensor
    """C (H, 1, 1)."""
    peak: Tensor
    """K, the maximum that the features are relative to (H, 1, 1)."""
    own_peak: Tensor
    """Maximum of each head (H,)."""
    arg: Tensor
    """Its flat index, token M + feature (H,)."""


class _FavorAttention(torch.autograd.Function):
    """Forward and backward of the centred formulas, one cell at a time.

    q holds queries, keys and values, (..., 3, H, K), if k and v are None.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        features: Tensor,
        cu_seqlens: Tensor | None,
        scope: Scope,
        eps: float,
        exact: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, features, cu_seqlens)
        ctx.scope, ctx.eps, ctx.exact = scope, eps, exact
        queries, keys, values = _separate(q, k, v)
        out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
        w = _scaled(features, q)
        cells = _cells(cu_seqlens, queries, keys, values, out)
        peak = _batch_peak(cells, w) if scope == "tensor" else None
        for qc, kc, vc, oc in cells:
            _query_forward(qc, w, _key_forward(kc, vc, w, scope, eps, peak), eps, oc)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, features, cu_seqlens = ctx.saved_tensors
        scope, eps = ctx.scope, ctx.eps
        queries, keys, values = _separate(q, k, v)
        grads = torch.empty(
            *queries.shape[:-2], 3, *queries.shape[-2:], dtype=q.dtype, device=q.device
        )
        w = _scaled(features, q)
        cells = _cells(cu_seqlens, queries, keys, values, grad, *grads.unbind(-3))
        peak = _batch_peak(cells, w) if scope == "tensor" else None
        winners = []  # per cell: weight and place of the key maximum
        for qc, kc, vc, gc, dq, dk, dv in cells:
            summary = _key_forward(kc, vc, w, scope, eps, peak)
            da, dc = _query_backward(qc, gc, w, summary, eps, ctx.exact, dq)
            # The sum of p over a head in closed form: summed from p it would be lost in rounding.
            flow = -eps * kc.shape[1] * dc.sum((1, 2))
            pull = _key_max_pull(flow, summary, scope) if ctx.exact else None
            _key_backward(kc, vc, w, summary, da, dc, eps, pull, dk, dv)
            winners.append((flow.sum(), summary))
        if ctx.exact and scope == "tensor":
            _add_batch_max_gradient([c[5] for c in cells], winners, w)
        one_piece = k is None
        rest = (None,) * 5
        return (grads, None, None, *rest) if one_piece else (*grads.unbind(-3), *rest)


def _separate(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return (q, k, v) if k is not None and v is not None else q.unbind(-3)


def _scaled(features: Tensor, q: Tensor) -> Tensor:
    """Return s w in the dtype of the computation, at least float32."""
    return features.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.25


def _cells(cu_seqlens: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return for each cell with tokens its part (H, N, K) of every tensor."""
    if cu_seqlens is None:
        per_cell = [tuple(t[b] for t in tensors) for b in range(tensors[0].shape[0])]
    else:
        ends = cu_seqlens.tolist()
        per_cell = [tuple(t[lo:hi] for t in tensors) for lo, hi in itertools.pairwise(ends)]
    return [tuple(t.transpose(0, 1) for t in cell) for cell in per_cell if cell[0].shape[0]]


def _blocks(x: Tensor, w: Tensor) -> tuple[list[slice], list[slice]]:
    """Return blocks of heads and of tokens of a cell (H, N, K).

    They follow from the cell's own size, so that its bits do not depend on its batch.
    """
    n_heads, n, _ = x.shape
    row_bytes = w.shape[0] * w.element_size()
    budget = _BLOCK_BYTES.get(x.device.type, 2**20)
    heads = min(n_heads, _BLOCK_HEADS)
    rows = min(n, max(16, budget // (heads * row_bytes)))
    heads = min(n_heads, max(heads, budget // (rows * row_bytes)))
    return _spans(n_heads, heads), _spans(n, rows)


def _spans(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _squared(x: Tensor) -> Tensor:
    """Return s^2 |x|^2 / 2 as (H, N, 1)."""
    return x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)


def _key_forward(
    k: Tensor, v: Tensor, w: Tensor, scope: Scope, eps: float, batch_peak: Tensor | None
) -> _Summary:
    """Return the summary of one cell's keys and values (H, N, K).

    The maximum of the scope is known after the last block only: each block is taken relative to the
    highest value of its head so far, and the sums are scaled when that rises.
    """
    n_heads, n, width = k.shape
    mean = v.mean(1, keepdim=True, dtype=w.dtype)
    a = w.new_zeros(n_heads, w.shape[0], width)
    z = w.new_zeros(n_heads, w.shape[0], 1)
    own_peak = w.new_full((n_heads,), -torch.inf)
    arg = torch.zeros(n_heads, dtype=torch.int64, device=w.device)
    heads, tokens = _blocks(k, w)
    for h in heads:
        for rows in tokens:
            kb, vb = k[h, rows].to(w.dtype), v[h, rows].to(w.dtype)
            y = torch.matmul(kb, w.T)
            top, where = y.flatten(1).max(-1)
            new = torch.maximum(own_peak[h], top)
            arg[h] = torch.where(top > own_peak[h], where + rows.start * w.shape[0], arg[h])
            decay = (own_peak[h] - new).exp()[:, None, None]
            own_peak[h] = new
            f = y.sub_(_squared(kb) + new[:, None, None]).exp_()
            z[h] = z[h] * decay + f.sum(1)[..., None]
            torch.baddbmm(a[h] * decay, f.transpose(1, 2), vb - mean[h], out=a[h])
    peak = {"sample": own_peak.max(), "head": own_peak, "tensor": batch_peak}[scope]
    assert peak is not None
    factor = (own_peak - peak).exp()[:, None, None]
    a *= factor
    c = z * factor + eps * n
    sums = a.sum(1, keepdim=True), c.sum(1, keepdim=True)
    return _Summary(mean, a, c, *sums, peak.expand(n_heads)[:, None, None], own_peak, arg)


def _query_forward(q: Tensor, w: Tensor, summary: _Summary, eps: float, out: Tensor) -> None:
    """Write the output (H, N, K) of one cell."""
    heads, tokens = _blocks(q, w)
    for h in heads:
        for rows in tokens:
            e, _ = _query_features(q[h, rows].to(w.dtype), w)
            den = torch.bmm(e, summary.c[h]) + eps * summary.c_sum[h]
            num = torch.bmm(e, summary.a[h]) + eps * summary.a_sum[h]
            out[h, rows] = (summary.mean[h] + num / den).to(out.dtype)


def _query_features(q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return E (H, N, M) and the feature of each row's maximum (H, N)."""
    x = torch.matmul(q, w.T)
    top, arg = x.max(-1, keepdim=True)
    return x.sub_(top + _squared(q)).exp_(), arg[..., 0]


def _query_backward(
    q: Tensor, grad: Tensor, w: Tensor, summary: _Summary, eps: float, exact: bool, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Write dq (H, N, K); return the gradients of A (H, M, K) and c (H, M, 1)."""
    da, dc = torch.zeros_like(summary.a), torch.zeros_like(summary.c)
    heads, tokens = _blocks(q, w)
    for h in heads:
        a, c = summary.a[h], summary.c[h]
        a_sum, c_sum = summary.a_sum[h], summary.c_sum[h]
        for rows in tokens:
            qb = q[h, rows].to(w.dtype)
            e, arg = _query_features(qb, w)
            den = torch.bmm(e, c) + eps * c_sum
            g = grad[h, rows].to(w.dtype) / den
            u = torch.bmm(g, a.transpose(1, 2))
            # delta = g . (out - mu), from the same products as the gradient.
            g_a = (g * a_sum).sum(-1, keepdim=True)
            delta = ((e * u).sum(-1, keepdim=True) + eps * g_a) / den
            torch.baddbmm(da[h] + eps * g.sum(1, keepdim=True), e.transpose(1, 2), g, out=da[h])
            dc[h] -= torch.bmm(e.transpose(1, 2), delta) + eps * delta.sum(1, keepdim=True)
            # Gradient of the exponent, then through what is subtracted from it: the squared norm
            # and the row maximum. Their common weight, the row sum of p, has this closed form.
            p = u.addcmul_(delta, c.transpose(1, 2), value=-1).mul_(e)
            flow = eps * (delta * c_sum - g_a)
            pulled = qb * q.shape[-1] ** -0.5
            if exact:
                pulled = pulled + w[arg]
            dq[h, rows] = (torch.matmul(p, w) - flow * pulled).to(dq.dtype)
    return da, dc


def _key_max_pull(flow: Tensor, summary: _Summary, scope: Scope) -> Tensor | None:
    """Return the weight (H,) of the maximum's gradient in each head's highest entry.

    Args:
        flow: Sum of the gradients of the exponents over each head (H,).
        summary: The cell's.
        scope: `tensor` gives None: its maximum is one entry of all cells.
    """
    if scope == "head":
        return flow
    if scope == "tensor":
        return None
    heads = torch.arange(len(flow), device=flow.device)
    return flow.sum() * (heads == summary.own_peak.argmax())


def _key_backward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    summary: _Summary,
    da: Tensor,
    dc: Tensor,
    eps: float,
    pull: Tensor | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dk and dv (H, N, K); `pull` as `_key_max_pull` returns it, None without that part."""
    da_sum = eps * da.sum(1, keepdim=True)
    m = w.shape[0]
    heads, tokens = _blocks(k, w)
    for h in heads:
        for rows in tokens:
            kb, vb = k[h, rows].to(w.dtype), v[h, rows].to(w.dtype)
            f = torch.matmul(kb, w.T).sub_(_squared(kb) + summary.peak[h]).exp_()
            dv[h, rows] = (torch.bmm(f, da[h]) + da_sum[h]).to(dv.dtype)
            p = torch.bmm(vb - summary.mean[h], da[h].transpose(1, 2))
            p.add_(dc[h].transpose(1, 2)).mul_(f)
            block = torch.matmul(p, w) - p.sum(-1, keepdim=True) * kb * k.shape[-1] ** -0.5
            if pull is not None:
                # Before rounding, since the parts can cancel; by a mask, since an index would make
                # a GPU wait for the host.
                place = torch.arange(rows.start, rows.stop, device=k.device)
                here = (place == (summary.arg[h] // m)[:, None]) * pull[h, None]
                block -= here[..., None] * w[summary.arg[h] % m][:, None]
            dk[h, rows] = block.to(dk.dtype)


def _batch_peak(cells: list[tuple[Tensor, ...]], w: Tensor) -> Tensor:
    """Return the key maximum of the whole tensor (scope `tensor`)."""
    peaks = []
    for _, k, *_ in cells:
        heads, tokens = _blocks(k, w)
        peaks += [
            torch.matmul(k[h, rows].to(w.dtype), w.T).amax() for h in heads for rows in tokens
        ]
    return torch.stack(peaks).max()


def _add_batch_max_gradient(
    dk: list[Tensor], winners: list[tuple[Tensor, _Summary]], w: Tensor
) -> None:
    """Add the gradient of the whole-tensor maximum (scope `tensor`) to the row that attains it."""
    flow = torch.stack([flow for flow, _ in winners]).sum()
    peaks = torch.stack([summary.own_peak for _, summary in winners])
    cell, head = divmod(int(peaks.argmax()), peaks.shape[1])
    row, m = divmod(int(winners[cell][1].arg[head]), w.shape[0])
    dk[cell][head, row] -= (flow * w[m]).to(dk[cell].dtype)
