"""FAVOR+ attention: one operator, computed by fused Triton kernels on a GPU or by plain torch.

    out = favor_attention(q, k, v, features)                # (B, N, H, K) each
    out = favor_attention_packed(qkv, features)             # (B, N, 3, H, K), gradient in one piece
    out = favor_attention_kv(q, kv, features)               # (B, P, H, K) and (B, N, 2, H, K)
    out = favor_attention(q, k, v, features, cu_seqlens=c)  # (T, H, K): cells of different lengths

What it computes is defined in `kernels/reference.py`; `kernels/favor_torch.py` is the torch
backend. The Triton backend is the operator `sclong_ds::favor_attention`: torch.compile takes it as
one node, activation checkpointing runs it again, and it keeps q, k, v, the sums A and c, and 10
bytes per query and head. It accumulates in float32; bfloat16 inputs are multiplied in bfloat16,
float32 inputs as three TF32 products (error about 1e-6). float16 cannot hold the features and is
not supported. The same call gives the same bits, whatever else is in the batch.

Shapes: B cells, N tokens, P queries, T tokens and Q queries of all cells, H heads, K head width, M
random features.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels import favor_torch, reference
from kernels.favor_torch import Scope
from kernels.reference import EPS, MaxGrad

Backend = Literal["auto", "triton", "torch"]
HEAD_WIDTHS = (16, 32, 64, 128)
"""Head widths K of the Triton kernels."""
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
    backend: Backend = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Compute FAVOR+ attention.

    Args:
        q: Queries (B, N, H, K), any strides; with `cu_seqlens` (T, H, K).
        k: Keys, shaped like q.
        v: Values, shaped like q.
        features: Random features (M, K), shared by the heads; no gradient.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima (`exact`) or stop (`detach`).
        backend: `triton`, `torch`, or `auto`: Triton for CUDA tensors that it supports.
        cu_seqlens: int32 (B + 1,), rising from 0 to T: cell b has the rows from cu_seqlens[b] up to
            cu_seqlens[b + 1]. Cells do not see each other.
        max_seqlen: At least the longest cell's tokens; read from cu_seqlens, which makes a GPU wait
            for the host, if None. Both are checked on the CPU alone, so that no GPU waits.

    Returns:
        Shaped like q, contiguous, in its dtype.

    Raises:
        ValueError: Shapes, dtypes or cells do not fit, there is no such scope or max_grad, eps is
            below 0, or `backend` is `triton` where it cannot run.
    """
    if q.shape != k.shape or q.shape != v.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must agree in shape and dtype: got {tuple(q.shape)} {q.dtype}, "
            f"{tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype}"
        )
    longest = _check(q, features, cu_seqlens, max_seqlen)
    setting = _Call(*favor_torch.checked(scope, eps, max_grad), backend, longest, longest)
    return _attention(q, k, v, features, cu_seqlens, None, setting)


def favor_attention_packed(
    qkv: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
    backend: Backend = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Compute FAVOR+ attention of what one projection made.

    The gradient of `qkv` is written in one piece: nothing is stacked or copied before the
    projection's backward pass.

    Args:
        qkv: (B, N, 3, H, K), or (T, 3, H, K) with `cu_seqlens`: queries, keys, values.
        features: As in `favor_attention`, like all that follow.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima.
        backend: `triton`, `torch` or `auto`.
        cu_seqlens: Where each cell's rows start and end.
        max_seqlen: At least the longest cell's tokens.

    Returns:
        (B, N, H, K) or (T, H, K), contiguous.

    Raises:
        ValueError: As `favor_attention`.
    """
    if qkv.dim() < 4 or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, K) or (T, 3, H, K): got {tuple(qkv.shape)}")
    longest = _check(qkv.select(-3, 0), features, cu_seqlens, max_seqlen)
    setting = _Call(*favor_torch.checked(scope, eps, max_grad), backend, longest, longest)
    return _attention(qkv, None, None, features, cu_seqlens, None, setting)


def favor_attention_kv(
    q: Tensor,
    kv: Tensor,
    features: Tensor,
    *,
    scope: Scope = "sample",
    eps: float = EPS,
    max_grad: MaxGrad = "exact",
    backend: Backend = "auto",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    query_cu_seqlens: Tensor | None = None,
    max_queries: int | None = None,
) -> Tensor:
    """Compute FAVOR+ attention of queries that differ in number from the keys.

    Args:
        q: Queries (B, P, H, K), or (Q, H, K) with `cu_seqlens`.
        kv: (B, N, 2, H, K) or (T, 2, H, K): keys and values, whose gradient is one piece.
        features: As in `favor_attention`, like all that follow.
        scope: Over what the key stabiliser takes its maximum.
        eps: Constant added to every feature.
        max_grad: Whether gradients flow through the maxima.
        backend: `triton`, `torch` or `auto`.
        cu_seqlens: Where each cell's keys start and end.
        max_seqlen: At least the longest cell's keys.
        query_cu_seqlens: Where each cell's queries start and end; given with `cu_seqlens`. A cell
            with queries must have keys: without, its output is not a number or an error.
        max_queries: At least the queries of the cell with most.

    Returns:
        Shaped like q, contiguous.

    Raises:
        ValueError: As `favor_attention`.
    """
    if kv.dim() < 4 or kv.shape[-3] != 2 or kv.shape[-2:] != q.shape[-2:] or kv.dtype != q.dtype:
        raise ValueError(
            f"q and kv must be (B, P, H, K) and (B, N, 2, H, K), or (Q, H, K) and (T, 2, H, K), of "
            f"one dtype: got {tuple(q.shape)} {q.dtype} and {tuple(kv.shape)} {kv.dtype}"
        )
    if (cu_seqlens is None) != (query_cu_seqlens is None):
        raise ValueError("cu_seqlens and query_cu_seqlens go together: give both or none")
    keys = kv.select(-3, 0)
    longest = _check(keys, features, cu_seqlens, max_seqlen)
    most = _check(q, features, query_cu_seqlens, max_queries)
    ends = q, keys
    if cu_seqlens is not None and query_cu_seqlens is not None:
        ends = query_cu_seqlens, cu_seqlens
    if len(ends[0]) != len(ends[1]):
        raise ValueError(
            f"queries and keys must be of the same cells: got {tuple(ends[0].shape)} and "
            f"{tuple(ends[1].shape)}"
        )
    setting = _Call(*favor_torch.checked(scope, eps, max_grad), backend, longest, most)
    return _attention(q, kv, None, features, cu_seqlens, query_cu_seqlens, setting)


class _Call(NamedTuple):
    """What a call computes, besides its tensors."""

    scope: Scope
    eps: float
    exact: bool
    backend: Backend
    max_seqlen: int
    max_queries: int


def _attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    call: _Call,
) -> Tensor:
    """Compute attention by the backend of the call.

    q holds queries, keys and values if k and v are None; k keys and values if v is None.
    """
    tensors = (q, k, v, features, cu_seqlens, query_cu_seqlens)
    queries = q if k is not None else q.select(-3, 0)
    if _use_triton(queries, features, call.scope, call.backend):
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v))
        per_head = call.scope == "head"
        return _operator(
            *tensors, call.max_seqlen, call.max_queries, per_head, call.eps, call.exact, save
        )[0]
    if torch.compiler.is_compiling():
        return _torch_operator(*tensors, call.scope, call.eps, call.exact)[0]
    return reference.attention(*tensors, call.scope, call.eps, call.exact)


def _check(q: Tensor, features: Tensor, cu_seqlens: Tensor | None, longest: int | None) -> int:
    """Check the shapes; return the tokens of the longest cell, 0 for cells of equal length."""
    dims = 4 if cu_seqlens is None else 3
    if q.dim() != dims:
        wanted = "(B, N, H, K)" if cu_seqlens is None else "(T, H, K), as cu_seqlens is given"
        raise ValueError(f"queries must be {wanted}: got {tuple(q.shape)}")
    if features.dim() != 2 or features.shape[1] != q.shape[-1]:
        raise ValueError(
            f"features must be (M, {q.shape[-1]}), the head width: got {tuple(features.shape)}"
        )
    if cu_seqlens is None:
        if longest is not None:
            raise ValueError("max_seqlen has a meaning with cu_seqlens only: leave it out")
        return 0
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be int32 (B + 1,): got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if type(cu_seqlens) is Tensor and cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        favor_torch.check_cells(cu_seqlens, len(q), longest)
    return int(cu_seqlens.diff().max()) if longest is None else longest


def _use_triton(q: Tensor, features: Tensor, scope: Scope, backend: Backend) -> bool:
    """Return whether the Triton backend computes this call.

    Raises:
        ValueError: `backend` is unknown, or is `triton` where it cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be auto, triton or torch: got {backend!r}")
    if backend == "torch":
        return False
    obstacle = triton_obstacle(q, features, scope)
    if obstacle and backend == "triton":
        raise ValueError(f"backend=triton: {obstacle}; use backend=torch or auto")
    return obstacle is None


def triton_obstacle(q: Tensor, features: Tensor, scope: Scope) -> str | None:
    """Return why the Triton backend cannot compute this call, or None.

    Args:
        q: Queries, any shape with the head width last.
        features: Random features (M, K).
        scope: Over what the key stabiliser takes its maximum.
    """
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device.type}, not on a CUDA GPU"
    if q.device.type == "cuda" and torch.cuda.get_device_properties(q.device).major < 8:
        return "the GPU is older than compute capability 8.0"
    if q.dtype not in (torch.bfloat16, torch.float32):
        return f"the dtype is {q.dtype}, not bfloat16 or float32"
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"the head width is {q.shape[-1]}, not one of {HEAD_WIDTHS}"
    if features.shape[0] >= 2**15:
        return f"there are {features.shape[0]} random features, more than {2**15 - 1}"
    if scope == "tensor":
        return "scope=tensor, which couples the cells of a batch, is not built in"
    return None if q.numel() else "the tensors are empty"


Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]
"""The output and the eleven tensors of `kernels.favor_launch.Residuals`."""


@torch.library.custom_op("sclong_ds::favor_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    max_seqlen: int,
    max_queries: int,
    per_head: bool,
    eps: float,
    exact: bool,
    save: bool,
) -> Outputs:
    setting = _setting(max_seqlen, max_queries, per_head, eps, exact)
    return _forward(q, k, v, features, cu_seqlens, query_cu_seqlens, setting, save=save)


@_operator.register_fake
def _(*arguments: Any) -> Outputs:
    q, k, v, features, cells, query_cells, *setting, save = arguments
    setting = _setting(*setting)
    return _forward(q, k, v, features, cells, query_cells, setting, save=save, run=None)


@torch.library.custom_op("sclong_ds::favor_attention_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    residuals: list[Tensor],
    max_seqlen: int,
    max_queries: int,
    per_head: bool,
    eps: float,
    exact: bool,
) -> list[Tensor]:
    setting = _setting(max_seqlen, max_queries, per_head, eps, exact)
    return _backward(grad, q, k, v, features, cu_seqlens, query_cu_seqlens, residuals, setting)


@_backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    grad, q, k, v, features, cells, query_cells, residuals, *setting = arguments
    tensors = (grad, q, k, v, features, cells, query_cells, residuals)
    return _backward(*tensors, _setting(*setting), run=None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *setting, save = inputs[6:]
    assert save, "called for a backward pass without its residuals"
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.setting = setting
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    gradients = _backward_operator(grad, *saved[:6], list(saved[6:]), *ctx.setting)
    return *favor_torch.by_argument(gradients, *saved[:3]), *(None,) * 9


_operator.register_autograd(_autograd_backward, setup_context=_setup_context)


@torch.library.custom_op("sclong_ds::favor_attention_torch", mutates_args=())
def _torch_operator(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    scope: str,
    eps: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute by the torch backend: one node for torch.compile, which would trace its loops."""
    tensors = (q, k, v, features, cu_seqlens, query_cu_seqlens)
    out, kept = favor_torch.forward(*tensors, scope, eps, exact)  # type: ignore[arg-type]
    return out, *kept


@_torch_operator.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, features: Tensor, cells: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = favor_torch.new_summary(q, k, v, features, cells)
    return q.new_empty(favor_torch.separate(q, k, v)[0].shape), *kept


@torch.library.custom_op("sclong_ds::favor_attention_torch_backward", mutates_args=())
def _torch_backward_operator(
    grad: Tensor,
    kept: list[Tensor],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    scope: str,
    eps: float,
    exact: bool,
) -> list[Tensor]:
    tensors = (q, k, v, features, cu_seqlens, query_cu_seqlens)
    setting: Any = scope, eps, exact
    return favor_torch.backward(grad, favor_torch.Summary(*kept), *tensors, *setting)


@_torch_backward_operator.register_fake
def _(
    grad: Tensor, kept: list[Tensor], q: Tensor, k: Tensor | None, v: Tensor | None, *_: Any
) -> list[Tensor]:
    return favor_torch.new_gradients(q, k, v)


def _torch_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.setting = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _torch_autograd_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    gradients = _torch_backward_operator(grad, list(saved[6:]), *saved[:6], *ctx.setting)
    return *favor_torch.by_argument(gradients, *saved[:3]), *(None,) * 6


_torch_operator.register_autograd(_torch_autograd_backward, setup_context=_torch_setup_context)


def _setting(max_seqlen: int, max_queries: int, per_head: bool, eps: float, exact: bool) -> Any:
    from kernels.favor_launch import Setting

    return Setting(
        eps=eps, per_head=per_head, exact=exact, max_seqlen=max_seqlen, max_queries=max_queries
    )


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    setting: Any,
    **options: Any,
) -> Outputs:
    from kernels.favor_launch import forward

    parts = _unpacked(q, k, v)
    plan = _plan(parts[0], features)
    options |= {"query_cu_seqlens": query_cu_seqlens}
    with torch.cuda.device_of(q):
        out, saved = forward(*parts, features, cu_seqlens, setting, plan, **options)
    return out, *saved


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    features: Tensor,
    cu_seqlens: Tensor | None,
    query_cu_seqlens: Tensor | None,
    residuals: list[Tensor],
    setting: Any,
    **options: Any,
) -> list[Tensor]:
    from kernels.favor_launch import Residuals, backward

    parts = _unpacked(q, k, v)
    plan, saved = _plan(parts[0], features), Residuals(*residuals)
    options |= {"query_cu_seqlens": query_cu_seqlens, "apart": k is not None and v is None}
    m, grad = features.shape[0], _readable(grad)
    with torch.cuda.device_of(q):
        return backward(grad, *parts, m, cu_seqlens, saved, setting, plan, **options)


def _unpacked(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as the kernels can read them."""
    parts = favor_torch.separate(q, k, v)
    return _readable(parts[0]), _readable(parts[1]), _readable(parts[2])


def _readable(x: Tensor) -> Tensor:
    """Return x, copied if its heads do not lie in one piece: the kernels take any other stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _plan(q: Tensor, features: Tensor) -> Any:
    from kernels.favor_plan import default_plan

    on_gpu = q.device.type == "cuda"
    capability = torch.cuda.get_device_capability(q.device) if on_gpu else (9, 0)
    return default_plan(features.shape[0], q.shape[-1], q.dtype, capability)
