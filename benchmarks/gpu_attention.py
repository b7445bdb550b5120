"""Stages of `benchmarks/gpu_check.py` about the attention kernels: ceilings, resources, results.

Each stage yields rows: a `case` and its figures. On the CPU the torch backend stands in for the
kernels, and what only a compiled kernel can show is left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.favor_literal import literal_attention
from kernels.favor_attention import favor_attention_kv, favor_attention_packed
from kernels.reference import favor_attention_oracle, random_features
from kernels.reference import favor_attention_packed as torch_attention

Row = dict[str, Any]
BF16_OUT, BF16_GRADIENT = 5e-3, 1e-2
WORKERS = 8
"""Processes that compile kernels at the same time."""


def backend(args: argparse.Namespace) -> str:
    """Return the backend that the stages measure."""
    return "triton" if args.device == "cuda" else "torch"


def make(
    device: str, *, b: int, n: int, h: int, m: int, k: int = 64, dtype: str = "bfloat16",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return qkv (B, N, 3, H, K), features (M, K) and the output's gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    qkv = torch.randn(b, n, 3, h, k, **options) * 3**-0.5
    qkv[:, :, 2] += 0.5
    w = random_features(m, k, generator=torch.Generator().manual_seed(seed)).to(device)
    kind = getattr(torch, dtype)
    return qkv.to(kind), w, torch.randn(b, n, h, k, **options).to(kind)


def median_us(work: Callable[[], Any], args: argparse.Namespace) -> float:
    """Return the median time of a call.

    On a GPU with cold caches, and as one CUDA graph: the kernels alone, without the time in which
    Python starts them, which a training step hides behind the kernels before.
    """
    if args.device == "cuda":
        from triton.testing import do_bench

        return 1e3 * do_bench(captured(work).replay, return_mode="median", warmup=10, rep=60)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def captured(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a call as a CUDA graph, after calls that compile what it needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A forward and backward pass whose kernels are looked at."""

    m: int
    """Number of features M."""
    n: int = 4096
    """Tokens N."""
    h: int = 32
    """Heads H."""
    k: int = 64
    """Head width K."""
    dtype: str = "bfloat16"
    exact: bool = True
    packed_cells: bool = False
    plan: Any = None
    """Block sizes; None: those that the operator takes."""

    def __str__(self) -> str:
        """Return the call as readable text."""
        names = {"detached maxima": not self.exact, "packed cells": self.packed_cells}
        sizes = f"{self.dtype} m={self.m} k={self.k}"
        return " ".join([sizes, *(name for name, is_on in names.items() if is_on)])


CALLS = [
    *(Call(m=m, packed_cells=packed) for m in (256, 266) for packed in (False, True)),
    Call(m=256, exact=False),
    Call(m=266, dtype="float32"),
    Call(m=110, k=32),
    Call(m=256, k=128),
]
"""What the other stages launch, compiled ahead of them."""


def recorded(call: Call, device: str = "cuda") -> list[tuple[str, Callable[[], Any], Any]]:
    """Run forward and backward once; return (name, launch again, compiled) of every kernel."""
    from kernels.favor_launch import Setting, backward, forward, launch
    from kernels.favor_plan import default_plan

    qkv, w, grad = make(device, b=1, n=call.n, h=call.h, m=call.m, k=call.k, dtype=call.dtype)
    cu_seqlens = None
    if call.packed_cells:
        qkv, grad = qkv[0], grad[0]
        cu_seqlens = torch.tensor([0, call.n], dtype=torch.int32, device=device)
    q, k, v = qkv.unbind(-3)
    calls = []

    def run(kernel: Any, grid: Any, block: Any, **arguments: Any) -> None:
        again = partial(launch, kernel, grid, block, **arguments)
        calls.append((kernel.__name__, again, again()))

    setting = Setting(eps=1e-4, per_head=False, exact=call.exact, max_seqlen=call.n)
    on_gpu = device == "cuda"
    capability = torch.cuda.get_device_capability() if on_gpu else (9, 0)
    plan = call.plan or default_plan(call.m, call.k, q.dtype, capability)
    out, saved = forward(q, k, v, w, cu_seqlens, setting, plan, save=True, run=run)
    backward(grad, q, k, v, call.m, cu_seqlens, saved, setting, plan, run=run)
    assert out.isfinite().all()
    return calls


def compile_ahead(calls: Iterable[Call]) -> Iterator[list[Row]]:
    """Compile the kernels of calls in several processes, into Triton's cache on disk.

    Yields each call's resources; none where the GPU has too little for its blocks.
    """
    pool = ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_resources_of, calls)
    finally:
        pool.shutdown(cancel_futures=True)


def _resources_of(call: Call) -> list[Row]:
    from triton.runtime.errors import OutOfResources

    try:
        found = recorded(call)
    except OutOfResources:
        return []
    return [
        {
            "case": f"{call} {name}",
            "registers": compiled.n_regs,
            "spills": compiled.n_spills,
            "shared": compiled.metadata.shared,
        }
        for name, _, compiled in found
    ]


def resources(args: argparse.Namespace) -> Iterator[Row]:
    """Yield registers, spilled registers and shared memory of every kernel."""
    if args.device == "cpu":
        yield {"case": "resources", "skipped": "there are no compiled kernels on a CPU"}
        return
    for rows in compile_ahead(CALLS):
        yield from rows


def correctness(args: argparse.Namespace) -> Iterator[Row]:
    """Yield errors against float64 of output and gradients, and whether they are small enough."""
    # Also fills new memory with NaN: an element that no kernel writes is found.
    torch.use_deterministic_algorithms(True, warn_only=True)
    lengths = (1, 33) if args.tiny else (1, 100, 1000, 4096)
    draw = partial(make, args.device, b=2, h=4)
    for m in (256, 266):
        for n in lengths:
            yield _compared(args, draw(n=n, m=m), f"m={m} n={n}", {})
    n = lengths[-1] // 4
    small = draw(n=n, m=256)
    for options in ({"scope": "head"}, {"max_grad": "detach"}):
        yield _compared(args, small, str(options), options)
    for sizes in ({"m": 110, "k": 32}, {"m": 256, "k": 128}):
        yield _compared(args, draw(n=n, **sizes), f"m={sizes['m']} k={sizes['k']}", {})
    qkv, w, grad = small
    long = qkv.clone()
    long[:, :, :2] *= 30 / qkv[:, :, :2].float().norm(dim=-1, keepdim=True).to(qkv.dtype)
    yield _compared(args, (long, w, grad), "|q| = |k| = 30", {}, absolute=True)
    fp32 = draw(n=n, m=266, dtype="float32")
    yield _compared(args, fp32, "float32", {}, out_limit=1e-5, gradient_limit=2e-5)
    yield from _same_bits(args, draw(n=n, m=266))
    yield _compared(args, make(args.device, b=1, n=n, h=32, m=256), "32 heads", {})
    yield _compared_kv(args, draw(n=n, m=266))


def _compared_kv(args: argparse.Namespace, case: tuple[Tensor, Tensor, Tensor]) -> Row:
    """Return errors where few queries attend to all keys, as in the last decoder layer."""
    qkv, w, grad = case
    n = qkv.shape[1]
    few = slice(n // 3, n // 2)
    found = []
    for run in ("own", "exact"):
        whole = qkv if run == "own" else qkv.double()
        q, kv = (t.detach().clone().requires_grad_() for t in (whole[:, few, 0], whole[:, :, 1:]))
        if run == "own":
            out = favor_attention_kv(q, kv, w, backend=backend(args))
        else:
            rounded = w.to(qkv.dtype) if backend(args) == "triton" else w
            out = favor_attention_oracle(q, *kv.unbind(2), rounded.double())
        out.backward(grad[:, few].to(out.dtype))
        found.append((out.detach(), q.grad, kv.grad))
    pairs = zip(("out", "dq", "dkv"), *found, strict=True)
    errors = {part: _error(got, want) for part, got, want in pairs}
    correct = errors["out"] < BF16_OUT and max(errors["dq"], errors["dkv"]) < BF16_GRADIENT
    return {"case": "few queries, all keys", "correct": correct, **errors}


def _same_bits(args: argparse.Namespace, case: tuple[Tensor, Tensor, Tensor]) -> Iterator[Row]:
    """Yield whether a cell has the same bits twice, alone, packed, and with fewer queries."""
    qkv, w, grad = case
    n = qkv.shape[1]
    whole = _run(qkv, w, grad, backend=backend(args))
    alone = _run(qkv[1:], w, grad[1:], backend=backend(args))

    def row(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> Row:
        same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        return {"case": f"the same bits {name}", "correct": same}

    yield row("twice", _run(qkv, w, grad, backend=backend(args)), whole)
    yield row("alone and in a batch", tuple(t[1:] for t in whole), alone)
    # One cell of a token, one of none, and the second cell of the batch.
    ends = torch.tensor([0, 1, 1, n + 1], dtype=torch.int32, device=args.device)
    tokens, gradients = (torch.cat([t[0, :1], t[1]]) for t in (qkv, grad))
    packed = _run(tokens, w, gradients, backend=backend(args), cu_seqlens=ends, max_seqlen=n)
    yield row("alone and packed", tuple(t[None, 1:] for t in packed), alone)
    few = slice(n // 3, n // 2)
    q, kv = qkv[:, few, 0], qkv[:, :, 1:]
    out = favor_attention_kv(q, kv, w, backend=backend(args))
    yield row("for fewer queries", (out,), (whole[0][:, few],))


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
