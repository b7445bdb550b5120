"""FAVOR+ attention in plain torch, cell by cell and block by block, forward and backward.

The formulas and names are those of `kernels/reference.py`. A cell is computed on its own, so its
result does not depend, to the bit, on its batch mates. Its features exist for a block of heads and
tokens at a time, small enough for a core's cache on a CPU, and are recomputed in the backward pass,
which keeps nothing but the inputs.

Shapes: B cells, P queries and N keys of a cell, H heads, K head width, M random features.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scope = Literal["sample", "head", "tensor"]
_BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**30}
"""Features in work at a time: what a core's second-level cache holds; on a GPU, few launches."""
_BLOCK_HEADS = 8
"""Heads of a block at least: they lie side by side, so that memory is read in runs."""


class _Summary(NamedTuple):
    """What the queries of one cell read of its keys and values, and where the key maximum is."""

    mean: Tensor
    """mu, mean of v (H, 1, K)."""
    a: Tensor
    """A (H, M, K)."""
    c: Tensor
    """c (H, 1, M)."""
    a_sum: Tensor
    """a (H, 1, K)."""
    c_sum: Tensor
    """C (H, 1, 1)."""
    peak: Tensor
    """K, the maximum that the features are relative to (H, 1, 1)."""
    own_peak: Tensor
    """Maximum of each head (H,)."""
    arg: Tensor
    """Its flat index, token M + feature (H,); zeros where nobody asked for it."""


def by_argument(
    gradients: list[Tensor], q: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments q, k and v from those that `backward` returns."""
    if v is not None:
        return gradients[0].unbind(-3)
    return gradients[0], None if k is None else gradients[1], None


def forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    scope: Scope,
    eps: float,
    exact: bool,
) -> Tensor:
    """Compute the centred formulas, one cell at a time.

    Args:
        q: Queries; all three, (..., 3, H, K), if k and v are None.
        k: Keys; with the values, (..., 2, H, K), if v is None.
        v: Values.
        features: As in `favor_attention`.
        cu_seqlens: Where each cell's keys start and end.
        query_cu_seqlens: Where its queries do; None: like the keys.
        scope: As in `favor_attention`.
        eps: As in `favor_attention`.
        exact: Whether gradients flow through the maxima; ignored here.

    Returns:
        Shaped like the queries.
    """
    queries, keys, values = separate(q, k, v)
    out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
    w = _scaled(features, q)
    cells = _cells(cu_seqlens, query_cu_seqlens, (queries, out), (keys, values))
    peak = _batch_peak([c[2] for c in cells], w) if scope == "tensor" else None
    for qc, oc, kc, vc in cells:
        _query_forward(qc, w, _key_forward(kc, vc, w, scope, eps, peak, find=False), eps, oc)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    scope: Scope,
    eps: float,
    exact: bool,
) -> list[Tensor]:
    """Compute the gradients; arguments as `forward`, after the gradient of the output.

    Returns:
        dqkv (..., 3, H, K) in one piece; dq and dkv (..., 2, H, K) if v alone is None.
    """
    queries, keys, values = separate(q, k, v)
    gradients = new_gradients(q, k, v)
    parts = separate(*gradients, *[None] * (3 - len(gradients)))
    w = _scaled(features, q)
    of_queries = (queries, grad, parts[0])
    cells = _cells(cu_seqlens, query_cu_seqlens, of_queries, (keys, values, *parts[1:]))
    peak = _batch_peak([c[3] for c in cells], w) if scope == "tensor" else None
    winners = []  # per cell: weight and place of the key maximum
    for qc, gc, dq, kc, vc, dk, dv in cells:
        summary = _key_forward(kc, vc, w, scope, eps, peak, find=exact)
        da, dc = _query_backward(qc, gc, w, summary, eps, exact, dq)
        # The sum of p over a head in closed form: summed from p it would be lost in rounding.
        flow = -eps * kc.shape[1] * dc.sum((1, 2))
        pull = _key_max_pull(flow, summary, scope) if exact else None
        _key_backward(kc, vc, w, summary, da, dc, eps, pull, dk, dv)
        winners.append((flow.sum(), summary))
    if exact and scope == "tensor":
        _add_batch_max_gradient([c[5] for c in cells], winners, w)
    return gradients


def new_gradients(q: Tensor, k: Tensor | None, v: Tensor | None) -> list[Tensor]:
    """Return the tensors that `backward` fills."""
    if k is not None and v is None:
        return [q.new_empty(q.shape), k.new_empty(k.shape)]
    return [q.new_empty(q.shape if k is None else (*q.shape[:-2], 3, *q.shape[-2:]))]


def separate(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values from the arguments of `forward`."""
    if k is None:
        queries, keys, values = q.unbind(-3)
        return queries, keys, values
    if v is None:
        keys, values = k.unbind(-3)
        return q, keys, values
    return q, k, v


def _scaled(features: Tensor, q: Tensor) -> Tensor:
    """Return s w in the dtype of the computation, at least float32."""
    return features.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.25


def _cells(
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    of_queries: tuple[Tensor, ...],
    of_keys: tuple[Tensor, ...],
) -> list[tuple[Tensor, ...]]:
    """Return for each cell with keys its part (H, N, K) of every tensor.

    Raises:
        ValueError: A cell has queries and no keys.
    """
    query_ends = cu_seqlens if query_cu_seqlens is None else query_cu_seqlens
    parts = zip(_parts(query_ends, of_queries), _parts(cu_seqlens, of_keys), strict=True)
    cells = [(*of_cell, *keys) for of_cell, keys in parts]
    keys = len(of_queries)
    for b, cell in enumerate(cells):
        if cell[0].shape[1] and not cell[keys].shape[1]:
            raise ValueError(f"cell {b} has {cell[0].shape[1]} queries and no keys")
    return [cell for cell in cells if cell[keys].shape[1]]


def _parts(ends: Tensor | None, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    if ends is None:
        per_cell = [[t[b] for t in tensors] for b in range(tensors[0].shape[0])]
    else:
        per_cell = [[t[lo:hi] for t in tensors] for lo, hi in itertools.pairwise(ends.tolist())]
    return [tuple(t.transpose(0, 1) for t in cell) for cell in per_cell]


def _blocks(x: Tensor, w: Tensor) -> tuple[list[slice], list[slice]]:
    """Return blocks of heads and of tokens of a cell (H, N, K).

    They follow from the cell's own size, so that its bits do not depend on its batch.
    """
    n_heads, n, _ = x.shape
    row_bytes = w.shape[0] * w.element_size()
    budget = _BLOCK_BYTES.get(x.device.type, 2**20)
    heads = min(n_heads, _BLOCK_HEADS)
    rows = max(1, min(n, max(16, budget // (heads * row_bytes))))
    heads = min(n_heads, max(heads, budget // (rows * row_bytes)))
    return _spans(n_heads, heads), _spans(n, rows)


def _spans(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _squared(x: Tensor) -> Tensor:
    """Return s^2 |x|^2 / 2 as (H, N, 1)."""
    return x.square().sum(-1, keepdim=True) * (0.5 * x.shape[-1] ** -0.5)


def _key_forward(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    scope: Scope,
    eps: float,
    batch_peak: Tensor | None,
    *,
    find: bool,
) -> _Summary:
    """Return the summary of one cell's keys and values (H, N, K).

    The maximum of the scope is known after the last block only: each block is taken relative to the
    highest value of its head so far, and the sums are scaled when that rises. Where each head's
    maximum is takes as long as its features, so it is looked for if `find` alone.
    """
    n_heads, n, width = k.shape
    mean = v.mean(1, keepdim=True, dtype=w.dtype)
    a = w.new_zeros(n_heads, w.shape[0], width)
    z = w.new_zeros(n_heads, 1, w.shape[0])
    own_peak = w.new_full((n_heads,), -torch.inf)
    arg = torch.zeros(n_heads, dtype=torch.int64, device=w.device)
    heads, tokens = _blocks(k, w)
    for h in heads:
        for rows in tokens:
            kb, vb = k[h, rows].to(w.dtype), v[h, rows].to(w.dtype)
            y = torch.matmul(kb, w.T)
            if find:
                top, where = y.flatten(1).max(-1)
                arg[h] = torch.where(top > own_peak[h], where + rows.start * w.shape[0], arg[h])
            else:
                top = y.flatten(1).amax(-1)
            new = torch.maximum(own_peak[h], top)
            decay = (own_peak[h] - new).exp()[:, None, None]
            own_peak[h] = new
            f = y.sub_(_squared(kb) + new[:, None, None]).exp_()
            z[h] = z[h] * decay + f.sum(1, keepdim=True)
            torch.baddbmm(a[h] * decay, f.transpose(1, 2), vb - mean[h], out=a[h])
    peak = {"sample": own_peak.max(), "head": own_peak, "tensor": batch_peak}[scope]
    assert peak is not None
    factor = (own_peak - peak).exp()[:, None, None]
    a *= factor
    c = z * factor + eps * n
    sums = a.sum(1, keepdim=True), c.sum(2, keepdim=True)
    return _Summary(mean, a, c, *sums, peak.expand(n_heads)[:, None, None], own_peak, arg)


def _query_forward(q: Tensor, w: Tensor, summary: _Summary, eps: float, out: Tensor) -> None:
    """Write the output (H, N, K) of one cell."""
    heads, tokens = _blocks(q, w)
    for h in heads:
        for rows in tokens:
            e, _ = _query_features(q[h, rows].to(w.dtype), w, find=False)
            den = _row_sums(e, summary.c[h]) + eps * summary.c_sum[h]
            num = torch.bmm(e, summary.a[h]) + eps * summary.a_sum[h]
            out[h, rows] = (summary.mean[h] + num / den).to(out.dtype)


def _query_features(q: Tensor, w: Tensor, *, find: bool) -> tuple[Tensor, Tensor | None]:
    """Return E (H, N, M) and, if `find`, the feature of each row's maximum (H, N)."""
    x = torch.matmul(q, w.T)
    arg = None
    if find:
        top, arg = x.max(-1)
    else:
        top = x.amax(-1)
    return x.sub_(top[..., None] + _squared(q)).exp_(), arg


def _row_sums(e: Tensor, weights: Tensor) -> Tensor:
    """Return sums over features (H, N, 1); a product with one column is several times slower."""
    return (e * weights).sum(-1, keepdim=True)


def _query_backward(
    q: Tensor, grad: Tensor, w: Tensor, summary: _Summary, eps: float, exact: bool, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Write dq (H, N, K); return the gradients of A (H, M, K) and c (H, 1, M)."""
    da, dc = torch.zeros_like(summary.a), torch.zeros_like(summary.c)
    heads, tokens = _blocks(q, w)
    for h in heads:
        a, c = summary.a[h], summary.c[h]
        a_sum, c_sum = summary.a_sum[h], summary.c_sum[h]
        for rows in tokens:
            qb = q[h, rows].to(w.dtype)
            e, arg = _query_features(qb, w, find=exact)
            den = _row_sums(e, c) + eps * c_sum
            g = grad[h, rows].to(w.dtype) / den
            u = torch.bmm(g, a.transpose(1, 2))
            # delta = g . (out - mu), from the same products as the gradient.
            g_a = (g * a_sum).sum(-1, keepdim=True)
            delta = (_row_sums(e, u) + eps * g_a) / den
            torch.baddbmm(da[h] + eps * g.sum(1, keepdim=True), e.transpose(1, 2), g, out=da[h])
            dc[h] -= torch.bmm(delta.transpose(1, 2), e) + eps * delta.sum(1, keepdim=True)
            # Gradient of the exponent, then through what is subtracted from it: the squared norm
            # and the row maximum. Their common weight, the row sum of p, has this closed form.
            p = u.addcmul_(delta, c, value=-1).mul_(e)
            flow = eps * (delta * c_sum - g_a)
            pulled = qb * q.shape[-1] ** -0.5
            if arg is not None:
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
            p.add_(dc[h]).mul_(f)
            block = torch.matmul(p, w) - p.sum(-1, keepdim=True) * kb * k.shape[-1] ** -0.5
            if pull is not None:
                # Before rounding, since the parts can cancel; by a mask, since an index would make
                # a GPU wait for the host.
                place = torch.arange(rows.start, rows.stop, device=k.device)
                here = (place == (summary.arg[h] // m)[:, None]) * pull[h, None]
                block -= here[..., None] * w[summary.arg[h] % m][:, None]
            dk[h, rows] = block.to(dk.dtype)


def _batch_peak(keys: list[Tensor], w: Tensor) -> Tensor:
    """Return the maximum of all cells' keys (H, N, K) (scope `tensor`)."""
    peaks = []
    for k in keys:
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
