"""FAVOR+ attention in plain torch, cell by cell and block by block, forward and backward.

The formulas and names are those of `kernels/reference.py`. A cell is computed on its own, so its
result does not depend, to the bit, on its batch mates. Its features exist for a block of heads and
tokens at a time, small enough for a core's cache on a CPU, and are recomputed in the backward pass,
which keeps the inputs and the sums over the keys. Exponents are in base 2: torch computes exp2 on a
CPU about three times as fast as exp.

Shapes: B cells, P queries and N keys of a cell, H heads, K head width, M random features.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scope = Literal["sample", "head", "tensor"]
SCOPES, MAX_GRADS = get_args(Scope), ("exact", "detach")
_BLOCK_BYTES = {"cpu": 2**20, "cuda": 2**30}
"""Features in work at a time: what a core's second-level cache holds; on a GPU, few launches."""
_BLOCK_HEADS = 8
"""Heads of a block at least: they lie side by side, so that memory is read in runs."""
_LOG2E = math.log2(math.e)


class Summary(NamedTuple):
    """What the queries of a cell read of its keys and values, and where the key maximum is.

    `forward` returns those of all cells, with a dimension (B, ...) in front; a cell without keys
    has zeros.
    """

    mean: Tensor
    """mu, mean of v (H, 1, K)."""
    a: Tensor
    """A (H, M, K)."""
    c: Tensor
    """c (H, 1, M)."""
    peak: Tensor
    """K, the maximum that the features are relative to (H, 1, 1), in base 2."""
    own_peak: Tensor
    """Maximum of each head (H,), in base 2."""
    block: Tensor
    """First token of the block that holds it (H,), int64."""


class _Features(NamedTuple):
    """The random features as the blocks read them, in the dtype of the computation."""

    w: Tensor
    """s w (M, K)."""
    base2: Tensor
    """s w log2(e) (M, K)."""


def checked(scope: str, eps: float, max_grad: str) -> tuple[Any, float, bool]:
    """Return the scope, eps, and whether gradients flow through the maxima.

    Raises:
        ValueError: There is no such scope or max_grad, or eps is no finite number of 0 or more.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: allowed are {', '.join(SCOPES)}")
    if max_grad not in MAX_GRADS:
        raise ValueError(f"max_grad {max_grad!r}: allowed are {', '.join(MAX_GRADS)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps {eps}: must be a finite number of 0 or more")
    return scope, eps, max_grad == "exact"


def check_cells(cu_seqlens: Tensor, tokens: int, longest: int | None) -> None:
    """Check where cells start and end, of a tensor on the CPU: a GPU would be waited for.

    Raises:
        ValueError: They do not rise from 0 to the number of tokens, or a cell has more than said.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        shown = ", ".join(map(str, ends[:8])) + (", ..." if len(ends) > 8 else "")
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, all tokens: got {shown}")
    most = max(b - a for a, b in itertools.pairwise(ends))
    if longest is not None and longest < most:
        raise ValueError(f"max_seqlen {longest}: a cell has {most} tokens; give {most} or more")


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
) -> tuple[Tensor, Summary]:
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
        The output, shaped like the queries, and what `backward` needs besides the arguments.
    """
    queries, keys, values = separate(q, k, v)
    out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
    w = _scaled(features, q)
    kept = new_summary(q, k, v, features, cu_seqlens)
    of_keys = (keys, values)
    cells = _cells(cu_seqlens, query_cu_seqlens, (queries, out), of_keys, kept)
    peak = _batch_peak([c[2] for c in cells], w) if scope == "tensor" else None
    for qc, oc, kc, vc, summary in cells:
        _key_forward(kc, vc, w, scope, eps, peak, summary)
        _query_forward(qc, w, summary, eps, oc)
    return out, kept


def new_summary(
    q: Tensor, k: Tensor | None, v: Tensor | None, features: Tensor, cu_seqlens: Tensor | None
) -> Summary:
    """Return the tensors that `forward` keeps, of zeros."""
    keys = separate(q, k, v)[1]
    n_cells = keys.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    (heads, width), m = keys.shape[-2:], features.shape[0]
    zeros = functools.partial(q.new_zeros, dtype=_computed_in(q))
    return Summary(
        zeros((n_cells, heads, 1, width)),
        zeros((n_cells, heads, m, width)),
        zeros((n_cells, heads, 1, m)),
        zeros((n_cells, heads, 1, 1)),
        zeros((n_cells, heads)),
        zeros((n_cells, heads), dtype=torch.int64),
    )


def backward(
    grad: Tensor,
    kept: Summary,
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
    """Compute the gradients; arguments as `forward`, after the output's gradient and its summary.

    Returns:
        dqkv (..., 3, H, K) in one piece; dq and dkv (..., 2, H, K) if v alone is None.
    """
    queries, keys, values = separate(q, k, v)
    gradients = new_gradients(q, k, v)
    parts = separate(*gradients, *[None] * (3 - len(gradients)))
    w = _scaled(features, q)
    of_queries = (queries, grad, parts[0])
    of_keys = (keys, values, *parts[1:])
    cells = _cells(cu_seqlens, query_cu_seqlens, of_queries, of_keys, kept)
    flows = []
    for qc, gc, dq, kc, vc, dk, dv, summary in cells:
        da, dc = _query_backward(qc, gc, w, summary, eps, exact, dq)
        # The sum of p over a head in closed form: summed from p it would be lost in rounding.
        flow = -eps * kc.shape[1] * dc.sum((1, 2))
        pull = _key_max_pull(flow, summary, scope) if exact else None
        _key_backward(kc, vc, w, summary, da, dc, eps, pull, dk, dv)
        flows.append(flow.sum())
    if exact and scope == "tensor":
        _add_batch_max_gradient(cells, torch.stack(flows).sum(), w)
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


def _computed_in(q: Tensor) -> torch.dtype:
    """Return the dtype of features and sums, at least float32."""
    return torch.promote_types(q.dtype, torch.float32)


def _scaled(features: Tensor, q: Tensor) -> _Features:
    w = features.to(_computed_in(q)) * q.shape[-1] ** -0.25
    return _Features(w, w * _LOG2E)


def _cells(
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    of_queries: tuple[Tensor, ...],
    of_keys: tuple[Tensor, ...],
    kept: Summary,
) -> list[tuple[Any, ...]]:
    """Return for each cell with keys its part (H, N, K) of every tensor, and its summary.

    Raises:
        ValueError: A cell has queries and no keys.
    """
    query_ends = cu_seqlens if query_cu_seqlens is None else query_cu_seqlens
    parts = _parts(query_ends, of_queries), _parts(cu_seqlens, of_keys), zip(*kept, strict=True)
    cells: list[tuple[Any, ...]] = [
        (*of, *keys, Summary(*own)) for of, keys, own in zip(*parts, strict=True)
    ]
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


def _blocks(x: Tensor, w: _Features) -> tuple[list[slice], list[slice]]:
    """Return blocks of heads and of tokens of a cell (H, N, K).

    They follow from the cell's own size, so that its bits do not depend on its batch.
    """
    n_heads, n, _ = x.shape
    row_bytes = w.w.shape[0] * w.w.element_size()
    budget = _BLOCK_BYTES.get(x.device.type, 2**20)
    heads = min(n_heads, _BLOCK_HEADS)
    rows = max(1, min(n, max(16, budget // (heads * row_bytes))))
    heads = min(n_heads, max(heads, budget // (rows * row_bytes)))
    return _spans(n_heads, heads), _spans(n, rows)


def _spans(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def _squared(x: Tensor) -> Tensor:
    """Return s^2 |x|^2 / 2 in base 2, as (H, N, 1)."""
    return x.square().sum(-1, keepdim=True) * (0.5 * _LOG2E * x.shape[-1] ** -0.5)


def _key_forward(
    k: Tensor,
    v: Tensor,
    w: _Features,
    scope: Scope,
    eps: float,
    batch_peak: Tensor | None,
    out: Summary,
) -> None:
    """Write the summary of one cell's keys and values (H, N, K).

    The maximum of the scope is known after the last block only: each block is taken relative to the
    highest value of its head so far, and the sums are scaled when that rises.
    """
    n_heads, n, _ = k.shape
    mean, a, c, peak, own_peak, block = out
    mean.copy_(v.mean(1, keepdim=True, dtype=w.w.dtype))
    own_peak.fill_(-torch.inf)
    heads, tokens = _blocks(k, w)
    for h in heads:
        for rows in tokens:
            kb, vb = k[h, rows].to(w.w.dtype), v[h, rows].to(w.w.dtype)
            y = torch.matmul(kb, w.base2.T)
            top = y.flatten(1).amax(-1)
            block[h] = torch.where(top > own_peak[h], rows.start, block[h])
            new = torch.maximum(own_peak[h], top)
            decay = (own_peak[h] - new).exp2()[:, None, None]
            own_peak[h] = new
            f = y.sub_(_squared(kb) + new[:, None, None]).exp2_()
            c[h] = c[h] * decay + f.sum(1, keepdim=True)
            torch.baddbmm(a[h] * decay, f.transpose(1, 2), vb - mean[h], out=a[h])
    of_scope = {"sample": own_peak.max(), "head": own_peak, "tensor": batch_peak}[scope]
    assert of_scope is not None
    peak.copy_(of_scope.expand(n_heads)[:, None, None])
    factor = (own_peak[:, None, None] - peak).exp2()
    a *= factor
    c.mul_(factor).add_(eps * n)


def _sums(summary: Summary) -> tuple[Tensor, Tensor]:
    """Return a (H, 1, K) and C (H, 1, 1): A and c, summed over the features."""
    return summary.a.sum(1, keepdim=True), summary.c.sum(2, keepdim=True)


def _query_forward(q: Tensor, w: _Features, summary: Summary, eps: float, out: Tensor) -> None:
    """Write the output (H, N, K) of one cell."""
    a_sum, c_sum = _sums(summary)
    heads, tokens = _blocks(q, w)
    for h in heads:
        for rows in tokens:
            e, _ = _query_features(q[h, rows].to(w.w.dtype), w, find=False)
            den = _row_sums(e, summary.c[h]) + eps * c_sum[h]
            num = torch.bmm(e, summary.a[h]) + eps * a_sum[h]
            out[h, rows] = (summary.mean[h] + num / den).to(out.dtype)


def _query_features(q: Tensor, w: _Features, *, find: bool) -> tuple[Tensor, Tensor | None]:
    """Return E (H, N, M) and, if `find`, the feature of each row's maximum (H, N)."""
    x = torch.matmul(q, w.base2.T)
    arg = None
    if find:
        top, arg = x.max(-1)
    else:
        top = x.amax(-1)
    return x.sub_(top[..., None] + _squared(q)).exp2_(), arg


def _row_sums(e: Tensor, weights: Tensor) -> Tensor:
    """Return sums over features (H, N, 1); a product with one column is several times slower."""
    return (e * weights).sum(-1, keepdim=True)


def _query_backward(
    q: Tensor, grad: Tensor, w: _Features, summary: Summary, eps: float, exact: bool, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Write dq (H, N, K); return the gradients of A (H, M, K) and c (H, 1, M)."""
    da, dc = torch.zeros_like(summary.a), torch.zeros_like(summary.c)
    a_sums, c_sums = _sums(summary)
    heads, tokens = _blocks(q, w)
    for h in heads:
        a, c = summary.a[h], summary.c[h]
        a_sum, c_sum = a_sums[h], c_sums[h]
        for rows in tokens:
            qb = q[h, rows].to(w.w.dtype)
            e, arg = _query_features(qb, w, find=exact)
            den = _row_sums(e, c) + eps * c_sum
            g = grad[h, rows].to(w.w.dtype) / den
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
                pulled = pulled + w.w[arg]
            dq[h, rows] = (torch.matmul(p, w.w) - flow * pulled).to(dq.dtype)
    return da, dc


def _key_max_pull(flow: Tensor, summary: Summary, scope: Scope) -> Tensor | None:
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


def _key_maxima(k: Tensor, w: _Features, summary: Summary) -> tuple[Tensor, Tensor]:
    """Return each head's highest entry among keys (H, N, K): its token and its feature, (H,).

    Its block is known, so that no pass over all features need look for it.
    """
    n = k.shape[1]
    rows = _blocks(k, w)[1][0].stop
    tokens = (summary.block[:, None] + torch.arange(rows, device=k.device)).clamp_(max=n - 1)
    # By row: `gather` takes an index for every number.
    heads = torch.arange(len(k), device=k.device)[:, None]
    block = k[heads, tokens].to(w.w.dtype)
    best = torch.matmul(block, w.base2.T).flatten(1).argmax(-1)
    m = w.w.shape[0]
    return tokens.gather(1, (best // m)[:, None])[:, 0], best % m


def _key_backward(
    k: Tensor,
    v: Tensor,
    w: _Features,
    summary: Summary,
    da: Tensor,
    dc: Tensor,
    eps: float,
    pull: Tensor | None,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dk and dv (H, N, K); `pull` as `_key_max_pull` returns it, None without that part."""
    da_sum = eps * da.sum(1, keepdim=True)
    token, feature = _key_maxima(k, w, summary) if pull is not None else (None, None)
    heads, tokens = _blocks(k, w)
    for h in heads:
        for rows in tokens:
            kb, vb = k[h, rows].to(w.w.dtype), v[h, rows].to(w.w.dtype)
            f = torch.matmul(kb, w.base2.T).sub_(_squared(kb) + summary.peak[h]).exp2_()
            dv[h, rows] = (torch.bmm(f, da[h]) + da_sum[h]).to(dv.dtype)
            p = torch.bmm(vb - summary.mean[h], da[h].transpose(1, 2))
            p.add_(dc[h]).mul_(f)
            pulled = p.sum(-1, keepdim=True) * kb * k.shape[-1] ** -0.5
            block = torch.matmul(p, w.w) - pulled
            if pull is not None and token is not None and feature is not None:
                # Before rounding, since the parts can cancel; by a mask, since an index would make
                # a GPU wait for the host.
                place = torch.arange(rows.start, rows.stop, device=k.device)
                here = (place == token[h, None]) * pull[h, None]
                block -= here[..., None] * w.w[feature[h]][:, None]
            dk[h, rows] = block.to(dk.dtype)


def _batch_peak(keys: list[Tensor], w: _Features) -> Tensor:
    """Return the maximum of all cells' keys (H, N, K) in base 2 (scope `tensor`)."""
    peaks = []
    for k in keys:
        heads, tokens = _blocks(k, w)
        peaks += [
            torch.matmul(k[h, rows].to(w.w.dtype), w.base2.T).amax()
            for h in heads
            for rows in tokens
        ]
    return torch.stack(peaks).max()


def _add_batch_max_gradient(cells: list[tuple[Any, ...]], flow: Tensor, w: _Features) -> None:
    """Add the gradient of the whole-tensor maximum (scope `tensor`) to the row that attains it."""
    peaks = torch.stack([summary.own_peak for *_, summary in cells])
    cell, head = divmod(int(peaks.argmax()), peaks.shape[1])
    *_, k, _, dk, _, summary = cells[cell]
    token, feature = (int(found[head]) for found in _key_maxima(k, w, summary))
    dk[head, token] -= (flow * w.w[feature]).to(dk.dtype)
