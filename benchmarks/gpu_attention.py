"""Stages of `benchmarks/gpu_check.py` about the attention kernels.

Each stage yields rows: a `case` and its figures. On the CPU the torch backend stands in for the
kernels, and what only a compiled kernel can show is left out.

FLOPs: a dot is 2 K M per token and head, 4 of them forward and 10 backward. Targets are for one
cell on an H100, in microseconds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.favor_literal import literal_attention
from kernels.favor_attention import favor_attention_packed
from kernels.reference import favor_attention_oracle, random_features
from kernels.reference import favor_attention_packed as torch_attention

Row = dict[str, Any]
LAYERS = {"large": (32, 4096), "mini": (8, 23_778), "decoder": (8, 27_874)}
"""Heads H and tokens N of the published configuration's layers."""
TARGET_US = {"large": (60, 110), "decoder": (100, 190)}
"""Forward and backward at batch 1."""
BF16_OUT, BF16_GRADIENT = 5e-3, 1e-2


def backend(args: argparse.Namespace) -> str:
    """Return the backend that the stages measure."""
    return "triton" if args.device == "cuda" else "torch"


def make(
    args: argparse.Namespace, *, b: int, n: int, h: int, m: int, k: int = 64,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return qkv (B, N, 3, H, K), features (M, K) and the output's gradient."""
    generator = torch.Generator(args.device).manual_seed(seed)
    options = {"generator": generator, "device": args.device}
    qkv = torch.randn(b, n, 3, h, k, **options) * 3**-0.5
    qkv[:, :, 2] += 0.5
    w = random_features(m, k, generator=torch.Generator().manual_seed(seed)).to(args.device)
    return qkv.to(dtype), w, torch.randn(b, n, h, k, **options).to(dtype)


def median_us(work: Callable[[], Any], args: argparse.Namespace) -> float:
    """Return the median time of a call; on a GPU with cold caches."""
    if args.device == "cuda":
        from triton.testing import do_bench

        return 1e3 * do_bench(work, return_mode="median", warmup=10, rep=60)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def device(args: argparse.Namespace) -> Iterator[Row]:
    """Yield what ran, and the two ceilings."""
    versions = {name: version(name) for name in ("torch", "triton", "numpy")}
    row: Row = {"case": "machine", "python": platform.python_version(), **versions}
    if args.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        capability = f"{found.major}.{found.minor}"
        row |= {"gpu": found.name, "processors": found.multi_processor_count}
        row |= {"capability": capability, "memory_gib": found.total_memory / 2**30}
    yield row
    size = 2**20 if args.tiny else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=args.device).random_()
    target = torch.empty_like(source)
    us = median_us(lambda: target.copy_(source), args)
    yield {"case": "copy", "us": us, "tb_per_s": 2 * size / us / 1e6}
    n = 256 if args.tiny else 8192
    a, b = (torch.randn(n, n, device=args.device).bfloat16() for _ in range(2))
    us = median_us(lambda: a @ b, args)
    yield {"case": "bf16 matrix product", "us": us, "tflops": 2 * n**3 / us / 1e6}


def _recorded(args: argparse.Namespace, m: int, **sizes: int) -> list[tuple[Any, ...]]:
    """Run forward and backward once; return (name, launch again, compiled) of every kernel."""
    from kernels.favor_launch import Setting, backward, default_plan, forward, launch

    qkv, w, grad = make(args, m=m, **sizes)
    q, k, v = qkv.unbind(2)
    calls: list[tuple[Any, ...]] = []

    def run(kernel: Any, grid: Any, block: Any, **arguments: Any) -> None:
        compiled = launch(kernel, grid, block, **arguments)
        again = lambda: launch(kernel, grid, block, **arguments)  # noqa: E731
        calls.append((kernel.__name__, again, compiled))

    setting = Setting(eps=1e-4, per_head=False, exact=True, max_seqlen=0)
    plan = getattr(args, "plan", None) or default_plan(
        m, q.shape[-1], q.dtype, torch.cuda.get_device_capability()
    )
    out, saved = forward(q, k, v, w, None, setting, plan, save=True, run=run)
    backward(grad, q, k, v, m, None, saved, setting, plan, run=run)
    assert out.isfinite().all()
    return calls


def resources(args: argparse.Namespace) -> Iterator[Row]:
    """Yield registers, spilled registers and shared memory of every kernel."""
    if args.device == "cpu":
        yield {"case": "resources", "skipped": "there are no compiled kernels on a CPU"}
        return
    for m in (256, 266):
        for name, _, compiled in _recorded(args, m, b=1, n=4096, h=32):
            figures = {"registers": compiled.n_regs, "spills": compiled.n_spills}
            yield {"case": f"m={m} {name}", **figures, "shared": compiled.metadata.shared}


def correctness(args: argparse.Namespace) -> Iterator[Row]:
    """Yield errors against float64 of output and gradients, and whether they are small enough."""
    lengths = (1, 33) if args.tiny else (1, 100, 1000, 4096)
    for m in (256, 266):
        for n in lengths:
            yield _compared(args, make(args, b=2, n=n, h=4, m=m), f"m={m} n={n}", {})
    small = make(args, b=2, n=lengths[-1] // 4, h=4, m=256)
    for options in ({"scope": "head"}, {"max_grad": "detach"}):
        yield _compared(args, small, str(options), options)
    qkv, w, grad = small
    long = qkv.clone()
    long[:, :, :2] *= 30 / qkv[:, :, :2].float().norm(dim=-1, keepdim=True).to(qkv.dtype)
    yield _compared(args, (long, w, grad), "|q| = |k| = 30", {}, absolute=True)
    fp32 = make(args, b=2, n=lengths[-1] // 4, h=4, m=266, dtype=torch.float32)
    yield _compared(args, fp32, "float32", {}, out_limit=1e-5, gradient_limit=2e-5)
    whole = _run(qkv, w, grad, backend=backend(args))
    again = _run(qkv, w, grad, backend=backend(args))
    alone = _run(qkv[1:], w, grad[1:], backend=backend(args))
    same = all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    yield {"case": "the same bits twice", "correct": same}
    same = all(torch.equal(a[1:], b) for a, b in zip(whole, alone, strict=True))
    yield {"case": "the same bits alone and in a batch", "correct": same}


def _run(qkv: Tensor, w: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().clone().requires_grad_()
    out = favor_attention_packed(leaf, w, **options)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def _compared(
    args: argparse.Namespace,
    case: tuple[Tensor, Tensor, Tensor],
    name: str,
    options: dict[str, Any],
    *,
    out_limit: float = BF16_OUT,
    gradient_limit: float = BF16_GRADIENT,
    absolute: bool = False,
) -> Row:
    """Return errors of one case; `absolute` where true gradients may vanish."""
    qkv, w, grad = case
    got = _run(qkv, w, grad, backend=backend(args), **options)
    # The kernels multiply by features in the dtype of the inputs, the torch backend by float32.
    exact_w = (w.to(qkv.dtype) if backend(args) == "triton" else w).double()
    leaf = qkv.double().requires_grad_()
    # The oracle's weights (N, N) are for short cells; the torch backend is tested against it.
    if qkv.shape[1] <= 1000:
        want = favor_attention_oracle(*leaf.unbind(2), exact_w, **options)
    else:
        want = torch_attention(leaf, exact_w, **options)
    want.backward(grad.double())
    assert leaf.grad is not None
    errors = {"out": _error(got[0], want.detach())}
    for i, part in enumerate(("dq", "dk", "dv")):
        true = leaf.grad[:, :, i]
        vanishes = absolute or qkv.shape[1] == 1
        scale = grad.double().norm() if vanishes else true.norm()
        errors[part] = ((got[1][:, :, i].double() - true).norm() / scale).item()
    correct = errors["out"] < out_limit and all(
        errors[part] < gradient_limit for part in ("dq", "dk", "dv")
    )
    row: Row = {"case": name, "correct": correct, **errors}
    if qkv.dtype == torch.bfloat16 and not options and qkv.shape[1] > 1 and not absolute:
        row |= {f"literal_{k}": v for k, v in _literal_errors(args, case, want, leaf.grad).items()}
    return row


def _literal_errors(
    args: argparse.Namespace, case: tuple[Tensor, Tensor, Tensor], want: Tensor, gradient: Tensor
) -> dict[str, float]:
    """Return the errors of literal code under bf16 autocast, for a batch of one cell."""
    qkv, w, grad = (case[0][:1], case[1], case[2][:1])
    leaf = qkv.detach().clone().requires_grad_()
    with torch.autocast(args.device, dtype=torch.bfloat16):
        out = literal_attention(leaf, w)
    out.backward(grad.to(out.dtype))
    assert leaf.grad is not None
    found = {"out": _error(out.detach(), want.detach()[:1])}
    for i, part in enumerate(("dq", "dk", "dv")):
        found[part] = _error(leaf.grad[:, :, i], gradient[:1, :, i])
    return found


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def _forward_backward(
    function: Callable[[Tensor], Tensor], qkv: Tensor, grad: Tensor, args: argparse.Namespace
) -> tuple[float, float]:
    """Return the medians of the forward pass alone, and of the backward pass."""
    leaf = qkv.detach().clone().requires_grad_()
    forward_us = median_us(lambda: function(leaf), args)

    def both() -> None:
        leaf.grad = None
        function(leaf).backward(grad)

    return forward_us, median_us(both, args) - forward_us


def timing(args: argparse.Namespace) -> Iterator[Row]:
    """Yield times of each kernel, of the operator per layer and batch, and of the alternatives."""
    layers = {"tiny": (2, 64)} if args.tiny else LAYERS
    for name, (h, n) in layers.items():
        for b in (1,) if args.tiny else (1, 4, 8) if name == "large" else (1, 4):
            yield from _operator_rows(args, name, b, n, h)
    if args.device == "cuda":
        for m in (256, 266):
            for kernel, again, _ in _recorded(args, m, b=1, n=4096, h=32):
                yield {"case": f"kernel large m={m} {kernel}", "us": median_us(again, args)}
    for name, (h, n) in layers.items():
        yield from _alternative_rows(args, name, n, h)


def _operator_rows(args: argparse.Namespace, name: str, b: int, n: int, h: int) -> Iterator[Row]:
    for m in (256, 266) if b == 1 else (266,):
        qkv, w, grad = make(args, b=b, n=n, h=h, m=m)
        times = _forward_backward(
            lambda x, w=w: favor_attention_packed(x, w, backend=backend(args)), qkv, grad, args
        )
        targets = TARGET_US.get(name, (None, None)) if b == 1 and m == 256 else (None, None)
        dot = 2 * b * n * h * 64 * m
        for part, us, dots, target in zip(
            ("forward", "backward"), times, (4, 10), targets, strict=True
        ):
            row: Row = {"case": f"{name} b={b} m={m} {part}", "us": us}
            row |= {"tflops": dots * dot / us / 1e6}
            yield row | ({"target_us": target} if target else {})


def _alternative_rows(args: argparse.Namespace, name: str, n: int, h: int) -> Iterator[Row]:
    """Yield the times of literal code, compiled literal code and exact attention, one cell."""
    qkv, w, grad = make(args, b=1, n=n, h=h, m=266)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(args.device, dtype=torch.bfloat16):
            return literal_attention(x, w).to(x.dtype)

    def exact(x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    choices = {"literal code, autocast": autocast}
    if args.device == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def flash(x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return exact(x)

        choices["softmax, flash"] = flash
    else:
        choices["softmax, scaled_dot_product_attention"] = exact
    if name in ("large", "tiny"):
        options = {} if args.device == "cuda" else {"backend": "eager"}
        choices["literal code, torch.compile"] = torch.compile(autocast, **options)
    for choice, function in choices.items():
        forward_us, backward_us = _forward_backward(function, qkv, grad, args)
        yield {"case": f"{name} b=1 {choice} forward", "us": forward_us}
        yield {"case": f"{name} b=1 {choice} backward", "us": backward_us}


def sweep(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the three fastest block sizes of each kernel at the large layer, next to the chosen."""
    if args.device == "cpu":
        yield {"case": "sweep", "skipped": "there are no compiled kernels on a CPU"}
        return
    from triton.runtime.errors import OutOfResources

    from kernels.favor_launch import default_plan

    chosen = default_plan(256, 64, torch.bfloat16, torch.cuda.get_device_capability())
    names = ("query_pass", "key_gradient", "query_gradient", "key_pass", "summary_gradient")
    for name in names:
        block = getattr(chosen, name)
        wide = name in ("key_pass", "summary_gradient")
        features = (128, 256) if wide else (32, 64)
        times = {}
        options = [
            replace(block, rows=rows, features=f, warps=warps, stages=stages)
            for rows in ((32, 64, 128) if wide else (64, 128))
            for f in features
            for warps in (4, 8)
            for stages in (2, 3, 4)
        ]
        for option in [block, *options]:
            plan = replace(chosen, **{name: option})
            trial = argparse.Namespace(**vars(args), plan=plan)
            try:
                calls = _recorded(trial, 256, b=1, n=4096, h=32)
            except OutOfResources:
                continue
            again = next(call[1] for call in calls if call[0] == name)
            times[option] = median_us(again, args)
        best = sorted(times, key=times.__getitem__)[:3]
        for option in dict.fromkeys([block, *best]):
            mark = "chosen" if option == block else "best"
            sizes = f"rows={option.rows} features={option.features}"
            shape = f"{sizes} warps={option.warps} stages={option.stages}"
            yield {"case": f"{name} {mark} {shape}", "us": times[option]}
