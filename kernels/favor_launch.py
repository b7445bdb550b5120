"""How the Triton kernels of FAVOR+ attention are called: block sizes, workspaces, grids.

`forward` and `backward` are plain functions on tensors; `kernels/favor_attention.py` makes an
operator of them. A `Residuals` is kept between the two passes; all other workspaces are freed at
once. Block sizes are those of `kernels/favor_plan.py`.

Shapes as in `kernels/favor_forward.py`; WIDTH is M padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.favor_backward import (
    combine_gradients,
    key_gradient,
    query_gradient,
    summary_gradient,
)
from kernels.favor_forward import combine_keys, find_key_max, key_pass, query_pass
from kernels.favor_plan import Block, Plan, padded, power_of_two, splits, tiles

Launcher = Callable[..., Any]
_TILE = 32
"""Features per program of the kernels that combine splits."""
_PARTIAL_BYTES = 36 * 2**20
"""Partial sums in work at a time: the second-level cache of an H100 has 50 MB."""


class Residuals(NamedTuple):
    """What the backward pass needs besides the inputs."""

    rows: Tensor
    """Exponent offset and denominator of every query, float32 (2, H, T)."""
    arg: Tensor
    """Feature of every query's maximum, int16 (H, T); empty for detached maxima."""
    peak: Tensor
    """Maximum of each feature in each split of the keys, float32 (BH, splits, partial width); empty
    when detached."""
    tops: Tensor
    """Maximum of each program over the keys, float32 (BH, splits, parts); empty when detached."""
    w: Tensor
    """Random features in the dtype of the inputs, zero-padded (WIDTH, K)."""
    a: Tensor
    """A in the dtype of the inputs (BH, WIDTH, K)."""
    c: Tensor
    """c, float32 (BH, WIDTH)."""
    a_sum: Tensor
    """Sums of A over tiles of features, float32 (BH, TILES, K)."""
    c_sum: Tensor
    """Sums of c over tiles of features, float32 (BH, TILES)."""
    mean: Tensor
    """Mean of v, float32 (BH, K)."""
    top: Tensor
    """Key maximum in base 2, float32 (BH,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a call computes, besides its tensors."""

    eps: float
    per_head: bool
    """Whether the key maximum is taken per head rather than per cell."""
    exact: bool
    """Whether gradients flow through the maxima."""
    max_seqlen: int
    """Keys of the longest cell; only read for packed cells."""
    max_queries: int | None = None
    """Queries of the cell with most; None: as many as keys."""


def launch(kernel: Any, grid: tuple[int, ...], block: Block, **arguments: Any) -> Any:
    """Run a kernel; returns its compiled form."""
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
    return kernel[grid](**arguments, **options)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    cu_seqlens: Tensor | None,
    setting: Setting,
    plan: Plan,
    *,
    save: bool,
    query_cu_seqlens: Tensor | None = None,
    run: Launcher | None = launch,
) -> tuple[Tensor, Residuals]:
    """Compute attention, and what its backward pass needs.

    Args:
        q: Queries (B, P, H, K), or (Q, H, K) with `cu_seqlens`; last stride 1.
        k: Keys (B, N, H, K) or (T, H, K), likewise.
        v: Values, shaped like k.
        features: Random features (M, K).
        cu_seqlens: int32 (B + 1,): where each cell's keys start and end.
        setting: Stabiliser, eps, gradients.
        plan: Block sizes.
        save: Whether a backward pass follows; if not, the per-query residuals are empty.
        query_cu_seqlens: Where each cell's queries start and end; None: as its keys.
        run: Runs a kernel (`launch`), or looks at its call; None: only the results are allocated.

    Returns:
        The output, contiguous, and the residuals.
    """
    sizes = _Sizes.of(q, k, features.shape[0], cu_seqlens, setting)
    block, m, bh = plan.key_pass, sizes.m, sizes.bh
    parts = tiles(m, block.features + block.tail)
    partial = parts * (block.features + block.tail)
    other = plan.summary_gradient.features + plan.summary_gradient.tail
    walks = [plan.query_pass, plan.query_gradient, plan.key_gradient]
    width = padded(max(partial, padded(m, other), *(t.reach(m) for t in walks)), _TILE)
    n_tiles, n_splits = width // _TILE, splits(sizes.heads)
    w = _padded_features(features, width, q.dtype)
    kept = save and setting.exact
    peak, tops = _f32(q, bh, n_splits, partial), _f32(q, bh, n_splits, parts)
    of_peaks = (peak, tops) if kept else (_f32(q, 0), _f32(q, 0))
    a = torch.empty(bh, width, sizes.k, dtype=q.dtype, device=q.device)
    c, a_sum, c_sum = _f32(q, bh, width), _f32(q, bh, n_tiles, sizes.k), _f32(q, bh, n_tiles)
    mean, largest = _f32(q, bh, sizes.k), _f32(q, bh)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = _f32(q, 2, sizes.heads, sizes.total if save else 0)
    arg = torch.empty(sizes.heads, sizes.total if kept else 0, dtype=torch.int16, device=q.device)
    residuals = Residuals(rows, arg, *of_peaks, w, a, c, a_sum, c_sum, mean, largest)
    if run is None:
        return out, residuals
    scale, varlen = sizes.k**-0.25, cu_seqlens is not None
    shared = {"K": sizes.k, "VARLEN": varlen}
    for cells, some in sizes.groups(4 * partial * n_splits * (sizes.k + 1)):
        given = {"k": k if varlen else k[cells], "v": v if varlen else v[cells]}
        ends = None if cu_seqlens is None else cu_seqlens[cells.start : cells.stop + 1]
        here, n_here = sizes.where(ends, sizes.n), some.stop - some.start
        sums, z = _f32(q, n_here, n_splits, partial, sizes.k), _f32(q, n_here, n_splits, partial)
        v_sum = _f32(q, n_here, n_splits, sizes.k)
        sums_of = {"sums_ptr": sums, "z_ptr": z, "v_sum_ptr": v_sum}
        sums_of |= {"peak_ptr": peak[some], "top_ptr": tops[some]}
        run(
            key_pass, (n_here, n_splits, parts), block, k_ptr=given["k"], v_ptr=given["v"], w_ptr=w,
            **here, **sums_of, **_strides(**given), scale=scale, M=m, MAIN=block.features,
            TAIL=block.tail, BLOCK_N=block.rows, **shared,
        )  # fmt: skip
        run(
            combine_keys, (n_here, n_tiles), _COMBINE, **sums_of, **here, a_ptr=a[some],
            c_ptr=c[some], mean_ptr=mean[some], max_ptr=largest[some], a_sum_ptr=a_sum[some],
            c_sum_ptr=c_sum[some], splits=n_splits, parts=parts, scope_heads=sizes.scope_heads,
            eps=setting.eps, M=m, WIDTH=width, PARTIAL_WIDTH=partial, SPLIT_ROWS=block.rows,
            BLOCK_M=_TILE, **shared,
        )  # fmt: skip
    queries = sizes.where(
        cu_seqlens if query_cu_seqlens is None else query_cu_seqlens, sizes.n_queries
    )
    block = plan.query_pass
    run(
        query_pass, (bh, tiles(sizes.queries, block.rows)), block, q_ptr=q, w_ptr=w, a_ptr=a,
        c_ptr=c, mean_ptr=mean, a_sum_ptr=a_sum, c_sum_ptr=c_sum, **queries, out_ptr=out,
        rows_ptr=rows, arg_ptr=arg, total=sizes.total, **_strides(q=q), scale=scale,
        eps=setting.eps, M=m, K=sizes.k, WIDTH=width, TILES=n_tiles,
        TILES_PADDED=power_of_two(n_tiles), BLOCK_N=block.rows, BLOCK_M=block.features,
        TAIL=block.tail, SAVE=save, EXACT=setting.exact, VARLEN=varlen,
    )  # fmt: skip
    return out, residuals


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_features: int,
    cu_seqlens: Tensor | None,
    residuals: Residuals,
    setting: Setting,
    plan: Plan,
    *,
    query_cu_seqlens: Tensor | None = None,
    apart: bool = False,
    run: Launcher | None = launch,
) -> list[Tensor]:
    """Compute the gradients of q, k and v.

    Args:
        grad: Gradient of the output, shaped like q; last stride 1.
        q: As in `forward`.
        k: As in `forward`.
        v: As in `forward`.
        n_features: Number of features M.
        cu_seqlens: As in `forward`.
        residuals: What `forward` returned, with `save`.
        setting: As in `forward`.
        plan: As in `forward`.
        query_cu_seqlens: As in `forward`.
        apart: Whether dq gets a tensor of its own, as it must if queries and keys differ in number.
        run: As in `forward`.

    Returns:
        One contiguous tensor (B, N, 3, H, K), or (T, 3, H, K): dq, dk, dv; if `apart` dq, shaped
        like q, and (B, N, 2, H, K), or (T, 2, H, K).
    """
    sizes = _Sizes.of(q, k, n_features, cu_seqlens, setting)
    head = q.shape[-2:]
    shapes = [q.shape, (*k.shape[:-2], 2, *head)] if apart else [(*q.shape[:-2], 3, *head)]
    gradients = [torch.empty(s, dtype=q.dtype, device=q.device) for s in shapes]
    if run is None:
        return gradients
    dq, dkv = gradients if apart else (gradients[0], gradients[0].select(-3, 1))
    query_ends = cu_seqlens if query_cu_seqlens is None else query_cu_seqlens
    of_keys, of_queries = sizes.where(cu_seqlens, sizes.n), sizes.where(query_ends, sizes.n_queries)
    saved, width, n_tiles = residuals, residuals.c.shape[1], residuals.c_sum.shape[1]
    of_sums = {"WIDTH": width, "TILES": n_tiles, "TILES_PADDED": power_of_two(n_tiles)}
    shared = {"M": sizes.m, "K": sizes.k, "VARLEN": cu_seqlens is not None}
    scale = sizes.k**-0.25
    delta = _f32(q, sizes.heads, sizes.total)
    block = plan.query_gradient
    run(
        query_gradient, (sizes.bh, tiles(sizes.queries, block.rows)), block, q_ptr=q,
        grad_ptr=grad, w_ptr=saved.w, a_ptr=saved.a, c_ptr=saved.c, a_sum_ptr=saved.a_sum,
        c_sum_ptr=saved.c_sum, rows_ptr=saved.rows, arg_ptr=saved.arg, **of_queries, dq_ptr=dq,
        delta_ptr=delta, total=sizes.total, **_strides(q=q, g=grad), scale=scale, eps=setting.eps,
        **of_sums, BLOCK_N=block.rows, BLOCK_M=block.features, TAIL=block.tail,
        PARTS=1 if apart else 3, EXACT=setting.exact, **shared,
    )  # fmt: skip
    da, dc, da_sum, dc_sum = _summary_gradients(
        q, grad, query_ends, delta, saved, sizes, setting, plan, run
    )
    found = _key_max(k, cu_seqlens, saved, sizes, plan, run) if setting.exact else {
        "winner_ptr": saved.peak, "value_ptr": saved.tops, "chunks": 0,
    }  # fmt: skip
    block = plan.key_gradient
    run(
        key_gradient, (sizes.bh, tiles(sizes.longest, block.rows)), block, k_ptr=k, v_ptr=v,
        w_ptr=saved.w, da_ptr=da, dc_ptr=dc, da_sum_ptr=da_sum, dc_sum_ptr=dc_sum,
        mean_ptr=saved.mean, max_ptr=saved.top, **found, **of_keys, dkv_ptr=dkv,
        scope_heads=sizes.scope_heads, **_strides(k=k, v=v), scale=scale, eps=setting.eps,
        **of_sums, BLOCK_N=block.rows, BLOCK_M=block.features, TAIL=block.tail,
        PARTS=2 if apart else 3, EXACT=setting.exact, **shared,
    )  # fmt: skip
    return gradients


def _summary_gradients(
    q: Tensor,
    grad: Tensor,
    query_ends: Tensor | None,
    delta: Tensor,
    saved: Residuals,
    sizes: _Sizes,
    setting: Setting,
    plan: Plan,
    run: Launcher,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of A and c, and their sums over tiles of features."""
    found = tuple(torch.empty_like(t) for t in (saved.a, saved.c, saved.a_sum, saved.c_sum))
    block, width, n_tiles = plan.summary_gradient, saved.c.shape[1], saved.c_sum.shape[1]
    parts = tiles(sizes.m, block.features + block.tail)
    partial = parts * (block.features + block.tail)
    n_splits = splits(sizes.heads)
    varlen = query_ends is not None
    shared = {"K": sizes.k, "VARLEN": varlen}
    for cells, some in sizes.groups(4 * partial * n_splits * (sizes.k + 1)):
        ends = None if query_ends is None else query_ends[cells.start : cells.stop + 1]
        here, n_here = sizes.where(ends, sizes.n_queries), some.stop - some.start
        given = {"q": q if varlen else q[cells], "g": grad if varlen else grad[cells]}
        # Of packed cells every place counts from the start of the axis.
        first = 0 if varlen else cells.start * sizes.n_queries
        parts_of = {
            "da": _f32(q, n_here, n_splits, partial, sizes.k),
            "dc": _f32(q, n_here, n_splits, partial),
        }
        sums = {
            "g_sum_ptr": _f32(q, n_here, n_splits, sizes.k),
            "delta_sum_ptr": _f32(q, n_here, n_splits),
        }
        run(
            summary_gradient, (n_here, n_splits, parts), block, q_ptr=given["q"],
            grad_ptr=given["g"], w_ptr=saved.w, rows_ptr=saved.rows[:, :, first:],
            delta_ptr=delta[:, first:], **here, da_ptr=parts_of["da"], dc_ptr=parts_of["dc"],
            **sums, total=sizes.total, **_strides(**given), scale=sizes.k**-0.25,
            MAIN=block.features, TAIL=block.tail, BLOCK_N=block.rows, **shared,
        )  # fmt: skip
        da, dc, da_sum, dc_sum = (t[some] for t in found)
        run(
            combine_gradients, (n_here, n_tiles), _COMBINE, da_part_ptr=parts_of["da"],
            dc_part_ptr=parts_of["dc"], **sums, da_ptr=da, dc_ptr=dc, da_sum_ptr=da_sum,
            dc_sum_ptr=dc_sum, **here, splits=n_splits, eps=setting.eps, M=sizes.m, WIDTH=width,
            PARTIAL_WIDTH=partial, SPLIT_ROWS=block.rows, BLOCK_M=_TILE, **shared,
        )  # fmt: skip
    return found  # type: ignore[return-value]


def _key_max(
    k: Tensor,
    cu_seqlens: Tensor | None,
    saved: Residuals,
    sizes: _Sizes,
    plan: Plan,
    run: Launcher,
) -> dict[str, Any]:
    """Return the entry of each scope's key maximum, as `key_gradient` takes it."""
    n_splits, block = splits(sizes.heads), plan.key_pass
    # A split's tokens, in whole tiles of the key pass.
    in_split = padded(max(1, tiles(sizes.longest, n_splits)), block.rows)
    chunks, scopes = tiles(in_split, _SCAN.rows), sizes.bh // sizes.scope_heads
    winner = torch.empty(scopes, 2 + chunks, dtype=torch.int32, device=k.device)
    value = _f32(k, scopes, chunks)
    run(
        find_key_max, (scopes, chunks), _SCAN, k_ptr=k, w_ptr=saved.w, top_ptr=saved.tops,
        peak_ptr=saved.peak, **sizes.where(cu_seqlens, sizes.n), winner_ptr=winner,
        value_ptr=value, splits=n_splits, parts=saved.tops.shape[2], scope_heads=sizes.scope_heads,
        **_strides(k=k), K=sizes.k, PARTIAL_WIDTH=saved.peak.shape[2], SPLIT_ROWS=block.rows,
        BLOCK_N=_SCAN.rows, VARLEN=cu_seqlens is not None,
    )  # fmt: skip
    return {"winner_ptr": winner, "value_ptr": value, "chunks": chunks}


_COMBINE = Block(rows=0, features=_TILE, warps=4, stages=1)
_SCAN = Block(rows=128, features=0, warps=8, stages=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Sizes of a call."""

    n: int
    """Keys of each cell; 0 for packed cells."""
    n_queries: int
    """Queries of each cell; 0 for packed cells."""
    longest: int
    """Keys of the longest cell."""
    queries: int
    """Queries of the cell with most."""
    total: int
    """Queries of all cells."""
    heads: int
    k: int
    m: int
    bh: int
    scope_heads: int
    """Heads that share one key maximum."""

    @staticmethod
    def of(q: Tensor, k: Tensor, m: int, cu_seqlens: Tensor | None, setting: Setting) -> _Sizes:
        heads, width = q.shape[-2:]
        packed, most = cu_seqlens is not None, setting.max_queries
        cells = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        n, n_queries = (0, 0) if packed else (k.shape[1], q.shape[1])
        return _Sizes(
            n=n,
            n_queries=n_queries,
            longest=setting.max_seqlen if packed else n,
            queries=(setting.max_seqlen if most is None else most) if packed else n_queries,
            total=q.shape[0] if packed else cells * n_queries,
            heads=heads,
            k=width,
            m=m,
            bh=cells * heads,
            scope_heads=1 if setting.per_head else heads,
        )

    def where(self, ends: Tensor | None, n_tokens: int) -> dict[str, Any]:
        """Return what tells a kernel where its cells lie."""
        return {"cu_seqlens_ptr": ends, "n_tokens": n_tokens, "n_heads": self.heads}

    def groups(self, head_bytes: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the cells, and of their heads, whose partial sums are summed together.

        What one head's splits leave takes `head_bytes`: in a large batch that of all cells would
        not stay in the second-level cache. Slices begin at multiples of four cells, so that what
        they begin with is aligned to 16 bytes; a cell's bits do not depend on its group.
        """
        cells = self.bh // self.heads
        size = max(4, _PARTIAL_BYTES // (head_bytes * self.heads) // 4 * 4)
        for first in range(0, cells, size):
            last = min(first + size, cells)
            yield slice(first, last), slice(first * self.heads, last * self.heads)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Return stride_Xb, stride_Xn and stride_Xh of each tensor X, (B, N, H, K) or (T, H, K)."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        strides = tensor.stride()[:-1] if tensor.dim() == 4 else (0, *tensor.stride()[:-1])
        found |= {f"stride_{name}{axis}": s for axis, s in zip("bnh", strides, strict=True)}
    return found


def _padded_features(features: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the features (WIDTH, K) in `dtype`, with zeros behind the last one."""
    w = features.to(dtype).contiguous()
    missing = width - len(features)
    padded = torch.nn.functional.pad(w, (0, 0, 0, missing)) if missing else w
    # An operator may not return its own argument as a residual.
    return padded.clone() if padded is features else padded


def _f32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
