"""How the Triton kernels of FAVOR+ attention are called: block sizes, workspaces, grids.

`forward` and `backward` are plain functions on tensors; `kernels/favor_attention.py` makes an
operator of them. A `Residuals` is kept between the two passes; all other workspaces are freed at
once. Block sizes were chosen from the compiled code (no spilled registers, wgmma on sm_90).

Shapes as in `kernels/favor_forward.py`; WIDTH is M padded to whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable
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

Launcher = Callable[..., Any]
_TILE = 32
"""Features per program of the kernels that combine splits."""
_PROGRAMS = 128
"""Programs per cell that `splits` aims at: just under the 132 processors of an H100 or H200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one program of a kernel works on, and with what."""

    rows: int
    """Tokens per tile."""
    features: int
    """Features per tile."""
    tail: int = 0
    """Further features of the same program (`key_pass`, `summary_gradient`)."""
    warps: int = 4
    stages: int = 3
    """Depth of the software pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Block sizes of the kernels."""

    key_pass: Block
    query_pass: Block
    query_gradient: Block
    summary_gradient: Block
    key_gradient: Block


class Residuals(NamedTuple):
    """What the backward pass needs besides the inputs."""

    rows: Tensor
    """Exponent offset and denominator of every query, float32 (2, H, T)."""
    arg: Tensor
    """Feature of every query's maximum, int16 (H, T); empty for detached maxima."""
    winner: Tensor
    """Entry of the key maximum, int32 (scopes, 3): head, token, feature; empty when detached."""
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


def splits(n_heads: int) -> int:
    """Return over how many programs the tokens of a head are split.

    A function of the heads alone, so that a cell's bits do not depend on its batch or on the GPU.
    """
    return max(1, min(16, _PROGRAMS // n_heads))


def feature_split(m: int, largest: int, tails: tuple[int, ...] = (0, 16, 32)) -> tuple[int, int]:
    """Return (main, tail), powers of two or 0: the cheapest cover of M features by equal programs.

    Args:
        m: Number of features M.
        largest: Largest main block.
        tails: Allowed sizes of the tail, which runs off the wide tensor-core path.
    """
    mains = [2**i for i in range(4, largest.bit_length())]
    options = [(main, tail) for main in mains for tail in tails if tail < main]

    def cost(option: tuple[int, int]) -> tuple[float, int]:
        programs = _tiles(m, sum(option))
        # Every program reads all tokens, which costs about as much as 64 features.
        return programs * (option[0] + 1.5 * option[1] + 64), programs

    return min(options, key=cost)


def default_plan(m: int, head_width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Plan:
    """Return the block sizes for a size, dtype and GPU generation.

    Args:
        m: Number of features M.
        head_width: K.
        dtype: bfloat16 or float32.
        capability: CUDA compute capability.
    """
    if dtype == torch.float32:
        main, tail = feature_split(m, 64, tails=(0,))
        wide = Block(rows=32, features=main, tail=tail, warps=4, stages=2)
        small = Block(rows=32, features=32, warps=4, stages=2)
        return Plan(
            key_pass=wide,
            query_pass=small,
            query_gradient=small,
            summary_gradient=wide,
            key_gradient=small,
        )
    hopper = capability >= (9, 0)
    # Before Hopper the accumulators of 256 features and of a tail do not fit in the registers.
    tails = (0, 16, 32) if hopper else (0,)
    main, tail = feature_split(m, 256 if head_width <= 64 else 128, tails)
    warps = 8 if main * head_width > 64 * 64 else 4
    row_warps = 4 if head_width <= 64 else 8
    tile = 64 if hopper and m % 64 == 0 else 32
    stages = 3 if hopper else 2
    rows = 64 if hopper else 32
    return Plan(
        key_pass=Block(rows=rows, features=main, tail=tail, warps=warps, stages=stages),
        query_pass=Block(rows=64, features=tile, warps=row_warps, stages=stages),
        query_gradient=Block(rows=64, features=32, warps=row_warps, stages=stages),
        summary_gradient=Block(
            rows=rows if tail == 0 else 32, features=main, tail=tail, warps=warps, stages=2
        ),
        key_gradient=Block(rows=64, features=32, warps=row_warps, stages=stages),
    )


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
    run: Launcher = launch,
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
        run: Runs a kernel (`launch`), or looks at its call.

    Returns:
        The output, contiguous, and the residuals.
    """
    sizes = _Sizes.of(q, k, features.shape[0], cu_seqlens, setting)
    block, m, bh = plan.key_pass, sizes.m, sizes.bh
    parts = _tiles(m, block.features + block.tail)
    partial = parts * (block.features + block.tail)
    tiles = [plan.query_pass, plan.query_gradient, plan.key_gradient]
    other = plan.summary_gradient.features + plan.summary_gradient.tail
    reach = max(partial, _padded(m, other), *(_padded(m, t.features) for t in tiles))
    width = _padded(reach, _TILE)
    w = _padded_features(features, width, q.dtype)
    n_splits = splits(sizes.heads)
    sums = _f32(q, bh, n_splits, partial, sizes.k)
    z, peak = _f32(q, bh, n_splits, partial), _f32(q, bh, n_splits, partial)
    top, v_sum = _f32(q, bh, n_splits, parts), _f32(q, bh, n_splits, sizes.k)
    of_keys, of_queries = sizes.cells(cu_seqlens, query_cu_seqlens)
    varlen = cu_seqlens is not None
    scale = sizes.k**-0.25
    run(
        key_pass, (bh, n_splits, parts), block, k_ptr=k, v_ptr=v, w_ptr=w, **of_keys,
        sums_ptr=sums, z_ptr=z, peak_ptr=peak, top_ptr=top, v_sum_ptr=v_sum,
        **_strides(k=k, v=v), scale=scale, M=m, K=sizes.k, MAIN=block.features, TAIL=block.tail,
        BLOCK_N=block.rows, VARLEN=varlen,
    )  # fmt: skip
    n_tiles = width // _TILE
    a = torch.empty(bh, width, sizes.k, dtype=q.dtype, device=q.device)
    c, a_sum, c_sum = _f32(q, bh, width), _f32(q, bh, n_tiles, sizes.k), _f32(q, bh, n_tiles)
    mean, largest = _f32(q, bh, sizes.k), _f32(q, bh)
    scope = {"splits": n_splits, "parts": parts, "scope_heads": sizes.scope_heads}
    run(
        combine_keys, (bh, n_tiles), _COMBINE, sums_ptr=sums, z_ptr=z, peak_ptr=peak, top_ptr=top,
        v_sum_ptr=v_sum, **of_keys, a_ptr=a, c_ptr=c, mean_ptr=mean, max_ptr=largest,
        a_sum_ptr=a_sum, c_sum_ptr=c_sum, **scope, eps=setting.eps, M=m, K=sizes.k, WIDTH=width,
        PARTIAL_WIDTH=partial, SPLIT_ROWS=block.rows, BLOCK_M=_TILE, VARLEN=varlen,
    )  # fmt: skip
    kept = save and setting.exact
    scopes = bh // sizes.scope_heads if kept else 0
    winner = torch.empty(scopes, 3, dtype=torch.int32, device=q.device)
    if kept:
        run(
            find_key_max, (scopes,), _SCAN, k_ptr=k, w_ptr=w, top_ptr=top,
            peak_ptr=peak, **of_keys, winner_ptr=winner, **scope, **_strides(k=k), K=sizes.k,
            PARTIAL_WIDTH=partial, SPLIT_ROWS=block.rows, BLOCK_N=_SCAN.rows, VARLEN=varlen,
        )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = _f32(q, 2, sizes.heads, sizes.total if save else 0)
    arg = torch.empty(sizes.heads, sizes.total if kept else 0, dtype=torch.int16, device=q.device)
    block = plan.query_pass
    run(
        query_pass, (bh, _tiles(sizes.queries, block.rows)), block, q_ptr=q, w_ptr=w, a_ptr=a,
        c_ptr=c, mean_ptr=mean, a_sum_ptr=a_sum, c_sum_ptr=c_sum, **of_queries, out_ptr=out,
        rows_ptr=rows, arg_ptr=arg, total=sizes.total, **_strides(q=q), scale=scale,
        eps=setting.eps, M=m, K=sizes.k, WIDTH=width, TILES=n_tiles,
        TILES_PADDED=_power_of_two(n_tiles), BLOCK_N=block.rows, BLOCK_M=block.features,
        SAVE=save, EXACT=setting.exact, VARLEN=varlen,
    )  # fmt: skip
    return out, Residuals(rows, arg, winner, w, a, c, a_sum, c_sum, mean, largest)


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
    run: Launcher = launch,
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
    saved, m, bh = residuals, sizes.m, sizes.bh
    width, n_tiles = saved.c.shape[1], saved.c_sum.shape[1]
    of_keys, of_queries = sizes.cells(cu_seqlens, query_cu_seqlens)
    of_sums = {"WIDTH": width, "TILES": n_tiles, "TILES_PADDED": _power_of_two(n_tiles)}
    varlen = cu_seqlens is not None
    scale = sizes.k**-0.25
    head = q.shape[-2:]
    shapes = [q.shape, (*k.shape[:-2], 2, *head)] if apart else [(*q.shape[:-2], 3, *head)]
    gradients = [torch.empty(s, dtype=q.dtype, device=q.device) for s in shapes]
    dq, dkv = gradients if apart else (gradients[0], gradients[0].select(-3, 1))
    delta = _f32(q, sizes.heads, sizes.total)
    block = plan.query_gradient
    run(
        query_gradient, (bh, _tiles(sizes.queries, block.rows)), block, q_ptr=q, grad_ptr=grad,
        w_ptr=saved.w, a_ptr=saved.a, c_ptr=saved.c, a_sum_ptr=saved.a_sum, c_sum_ptr=saved.c_sum,
        rows_ptr=saved.rows, arg_ptr=saved.arg, **of_queries, dq_ptr=dq, delta_ptr=delta,
        total=sizes.total, **_strides(q=q, g=grad), scale=scale, eps=setting.eps, M=m, K=sizes.k,
        **of_sums, BLOCK_N=block.rows, BLOCK_M=block.features, PARTS=1 if apart else 3,
        EXACT=setting.exact, VARLEN=varlen,
    )  # fmt: skip
    block = plan.summary_gradient
    parts = _tiles(m, block.features + block.tail)
    partial = parts * (block.features + block.tail)
    n_splits = splits(sizes.heads)
    da_part, dc_part = _f32(q, bh, n_splits, partial, sizes.k), _f32(q, bh, n_splits, partial)
    g_sum, delta_sum = _f32(q, bh, n_splits, sizes.k), _f32(q, bh, n_splits)
    run(
        summary_gradient, (bh, n_splits, parts), block, q_ptr=q, grad_ptr=grad, w_ptr=saved.w,
        rows_ptr=saved.rows, delta_ptr=delta, **of_queries, da_ptr=da_part, dc_ptr=dc_part,
        g_sum_ptr=g_sum, delta_sum_ptr=delta_sum, total=sizes.total, **_strides(q=q, g=grad),
        scale=scale, K=sizes.k, MAIN=block.features, TAIL=block.tail, BLOCK_N=block.rows,
        VARLEN=varlen,
    )  # fmt: skip
    da, dc = torch.empty_like(saved.a), torch.empty_like(saved.c)
    da_sum, dc_sum = torch.empty_like(saved.a_sum), torch.empty_like(saved.c_sum)
    run(
        combine_gradients, (bh, n_tiles), _COMBINE, da_part_ptr=da_part, dc_part_ptr=dc_part,
        g_sum_ptr=g_sum, delta_sum_ptr=delta_sum, da_ptr=da, dc_ptr=dc, da_sum_ptr=da_sum,
        dc_sum_ptr=dc_sum, **of_queries, splits=n_splits, eps=setting.eps, M=m, K=sizes.k,
        WIDTH=width, PARTIAL_WIDTH=partial, SPLIT_ROWS=block.rows, BLOCK_M=_TILE, VARLEN=varlen,
    )  # fmt: skip
    block = plan.key_gradient
    run(
        key_gradient, (bh, _tiles(sizes.longest, block.rows)), block, k_ptr=k, v_ptr=v,
        w_ptr=saved.w, da_ptr=da, dc_ptr=dc, da_sum_ptr=da_sum, dc_sum_ptr=dc_sum,
        mean_ptr=saved.mean, max_ptr=saved.top, winner_ptr=saved.winner, **of_keys, dkv_ptr=dkv,
        scope_heads=sizes.scope_heads, **_strides(k=k, v=v), scale=scale, eps=setting.eps, M=m,
        K=sizes.k, **of_sums, BLOCK_N=block.rows, BLOCK_M=block.features, PARTS=2 if apart else 3,
        EXACT=setting.exact, VARLEN=varlen,
    )  # fmt: skip
    return gradients


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

    def cells(
        self, cu_seqlens: Tensor | None, query_cu_seqlens: Tensor | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what tells a kernel over keys, and one over queries, where its cells lie."""
        query_ends = cu_seqlens if query_cu_seqlens is None else query_cu_seqlens
        return (
            {"cu_seqlens_ptr": cu_seqlens, "n_tokens": self.n, "n_heads": self.heads},
            {"cu_seqlens_ptr": query_ends, "n_tokens": self.n_queries, "n_heads": self.heads},
        )


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


def _tiles(n: int, size: int) -> int:
    return -(-n // size)


def _padded(n: int, multiple: int) -> int:
    return _tiles(n, multiple) * multiple


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
