"""Stages of `benchmarks/gpu_check.py` about time: the kernels, what they replace, block sizes.

FLOPs: a dot is 2 K M per token and head, 4 of them forward and 10 backward. Bytes: the forward pass
reads q, k and v and writes the output; the backward pass reads q and the output's gradient twice,
k and v once, and writes three gradients.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.favor_literal import literal_attention
from benchmarks.gpu_attention import Call, backend, compile_ahead, make, median_us, recorded
from kernels.favor_attention import favor_attention_packed

Row = dict[str, Any]
Attention = Callable[[Tensor], Tensor]
LAYERS = {"large": (32, 4096), "mini": (8, 23_778), "decoder": (8, 27_874)}
"""Heads H and tokens N of the published configuration's layers."""
K = 64
PARTS = {"forward": (4, 4), "backward": (10, 9)}
"""Dots, and tensors of a layer's size that are read or written."""


def _forward_backward(
    function: Attention, qkv: Tensor, grad: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Return the median times of the forward pass alone, and of the backward pass."""
    leaf = qkv.detach().clone().requires_grad_()
    forward_us = median_us(lambda: function(leaf), args)
    # Not `backward`: a graph may not keep gradients in a leaf of the stream before it.
    both_us = median_us(lambda: torch.autograd.grad(function(leaf), leaf, grad), args)
    return {"forward": forward_us, "backward": both_us - forward_us}


def timing(args: argparse.Namespace) -> Iterator[Row]:
    """Yield times of the operator per layer and batch, of the alternatives, of each kernel."""
    layers = {"tiny": (2, 64)} if args.tiny else LAYERS
    first = next(iter(layers))
    for layer, (h, n) in layers.items():
        for m in (256, 266):
            yield from _operator_rows(args, layer, b=1, n=n, h=h, m=m)
    for layer, (h, n) in layers.items():
        qkv, w, grad = make(args.device, b=1, n=n, h=h, m=266)
        for way, function in alternatives(args, w).items():
            yield from _alternative_rows(args, layer, way, function, qkv, grad)
    if args.device == "cuda":
        for m in (256, 266):
            for kernel, again, _ in recorded(Call(m=m)):
                yield {"case": f"kernel large m={m} {kernel}", "us": median_us(again, args)}
    for layer, (h, n) in layers.items():
        for b in (2,) if args.tiny else (4, 8) if layer == "large" else (4,):
            yield from _operator_rows(args, layer, b=b, n=n, h=h, m=266)
    # Last, since the compiler takes long.
    h, n = layers[first]
    qkv, w, grad = make(args.device, b=1, n=n, h=h, m=266)
    options = {} if args.device == "cuda" else {"backend": "eager"}
    compiled = torch.compile(alternatives(args, w)["literal code"], **options)
    yield from _alternative_rows(args, first, "literal code, torch.compile", compiled, qkv, grad)


def _operator_rows(
    args: argparse.Namespace, layer: str, *, b: int, n: int, h: int, m: int
) -> Iterator[Row]:
    """Yield the operator's times with what it computes and moves."""
    qkv, w, grad = make(args.device, b=b, n=n, h=h, m=m)
    times = _forward_backward(
        lambda x: favor_attention_packed(x, w, backend=backend(args)), qkv, grad, args
    )
    for part, us in times.items():
        dots, tensors = PARTS[part]
        gflop = dots * 2 * b * n * h * K * m / 1e9
        mb = tensors * b * n * h * K * qkv.element_size() / 1e6
        yield _row(layer, b, m, "kernels", part, us) | {
            "gflop": gflop, "mb": mb, "tflops": gflop / us * 1e3, "tb_per_s": mb / us,
        }  # fmt: skip


def _row(layer: str, b: int, m: int, way: str, part: str, us: float) -> Row:
    key = {"layer": layer, "b": b, "m": m, "way": way, "part": part}
    return {"case": f"{layer} b={b} m={m} {way} {part}"} | key | {"us": us}


def _alternative_rows(
    args: argparse.Namespace, layer: str, way: str, function: Attention, qkv: Tensor, grad: Tensor
) -> Iterator[Row]:
    """Yield the times of another way for one cell; its failure is no failure of the kernels."""
    try:
        times = _forward_backward(function, qkv, grad, args)
    except RuntimeError as error:
        yield {"case": f"{layer} b=1 m=266 {way}", "failed": str(error).strip().splitlines()[:1]}
        return
    for part, us in times.items():
        yield _row(layer, 1, 266, way, part, us)


def alternatives(args: argparse.Namespace, w: Tensor) -> dict[str, Attention]:
    """Return what the kernels replace, by name: literal code and exact attention."""

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(args.device, dtype=torch.bfloat16):
            return literal_attention(x, w).to(x.dtype)

    def exact(x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    if args.device == "cpu":
        return {"literal code": autocast, "softmax": exact}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(kernel: SDPBackend) -> Attention:
        def attention(x: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return exact(x)

        return attention

    return {
        "literal code": autocast,
        "softmax, flash": forced(SDPBackend.FLASH_ATTENTION),
        "softmax, cudnn": forced(SDPBackend.CUDNN_ATTENTION),
    }


WIDE = ("key_pass", "summary_gradient")
"""Kernels that hold sums of many features while they go through the tokens."""
TILED = ("query_pass", "query_gradient", "key_gradient")
"""Kernels that hold a tile of tokens while they go through the features."""


def sweep(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the three fastest block sizes of each kernel at the large layer, next to the chosen."""
    if args.device == "cpu":
        yield {"case": "sweep", "skipped": "there are no compiled kernels on a CPU"}
        return
    from kernels.favor_plan import default_plan

    m = 266
    chosen = default_plan(m, K, torch.bfloat16, torch.cuda.get_device_capability())
    plans = [(name, plan) for name in TILED + WIDE for plan in trial_plans(name, m, chosen)]
    compiled = compile_ahead(Call(m=m, plan=plan) for _, plan in plans)
    trials = zip(plans, compiled, strict=True)
    for name, group in itertools.groupby(trials, key=lambda trial: trial[0][0]):
        times = {}
        for (_, plan), resources in group:
            if resources and time.monotonic() < args.deadline - 5:
                calls = recorded(Call(m=m, plan=plan))
                again = next(again for kernel, again, _ in calls if kernel == name)
                times[getattr(plan, name)] = median_us(again, args)
        own = getattr(chosen, name)
        for block in dict.fromkeys([own, *sorted(times, key=times.__getitem__)[:3]]):
            if block in times:
                mark = "chosen" if block == own else "best"
                yield {"case": f"{name} {mark} {_sizes(block)}", "us": times[block]}


def trial_plans(name: str, m: int, chosen: Any) -> list[Any]:
    """Return the chosen plan, and plans with another block of one kernel."""
    from kernels.favor_plan import feature_split, tiles_of_rows

    wide = name in WIDE
    plans = [chosen]
    for rows in (32, 64, 128) if wide else (64, 128):
        for size in (128, 256) if wide else (32, 64):
            features, tail = feature_split(m, size) if wide else tiles_of_rows(m, size).values()
            for warps, stages in itertools.product((4, 8), (1, 2, 3)):
                block = replace(
                    getattr(chosen, name),
                    rows=rows,
                    features=features,
                    tail=tail,
                    warps=warps,
                    stages=stages,
                )
                plans.append(replace(chosen, **{name: block}))
    return list(dict.fromkeys(plans))


def _sizes(block: Any) -> str:
    features = f"{block.features}+{block.tail}" if block.tail else block.features
    return f"rows={block.rows} features={features} warps={block.warps} stages={block.stages}"
