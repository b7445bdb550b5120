"""Time and memory of FAVOR+ attention on a CPU: `kernels/reference.py` against literal code.

    python -m benchmarks.favor_cpu [--heads N] [--tokens N] [--rounds N] [--threads N] [--json OUT]

One layer of the large encoder, forward and backward, float32, one cell. Each measurement is a
process of its own, the two contenders in turn; medians over the rounds. Memory is what the call
takes at its highest point beyond its inputs, output and gradients, from the process's peak
resident size; the whole process is shown too. Both results are compared first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.environment import write_result
from benchmarks.favor_literal import literal_attention
from kernels.reference import favor_attention_packed, random_features

CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "literal": literal_attention,
    "ours": lambda qkv, w: favor_attention_packed(qkv, w),
}


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return qkv (1, N, 3, H, K), features (M, K) and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.tokens, 3, args.heads, args.width)
    qkv = torch.randn(shape, generator=generator).mul_(3**-0.5)
    w = random_features(args.features, args.width, generator=generator)
    return qkv, w, torch.randn(1, args.tokens, args.heads, args.width, generator=generator)


def run(contender: str, qkv: Tensor, w: Tensor, grad: Tensor) -> tuple[float, float, list[Tensor]]:
    """Return seconds of forward and backward, and output and gradient."""
    leaf = qkv.requires_grad_()
    leaf.grad = None
    started = time.perf_counter()
    out = CONTENDERS[contender](leaf, w)
    between = time.perf_counter()
    out.backward(grad)
    done = time.perf_counter()
    assert leaf.grad is not None
    return between - started, done - between, [out.detach(), leaf.grad]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Measure one contender in this process."""
    torch.set_num_threads(args.threads)
    # Threads, memory pools and code of the libraries come with the first call.
    small = argparse.Namespace(**(vars(args) | {"tokens": 64}))
    run(args.contender, *inputs(small))
    given = inputs(args)
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would hide what the call takes
    before = psutil.Process().memory_info().rss
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    forward_s, backward_s, results = run(args.contender, *given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak > peak_before, "the call did not raise the process's peak: take more tokens"
    own = peak - before - sum(t.nbytes for t in results)
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "total_s": forward_s + backward_s,
        "working_mib": own / 2**20,
        "process_peak_mib": peak / 2**20,
    }


def measure_apart(contender: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one contender in a new process."""
    sizes = ("heads", "tokens", "width", "features", "threads")
    options = [f"--{name}={getattr(args, name)}" for name in sizes]
    command = [sys.executable, "-m", "benchmarks.favor_cpu", "--contender", contender, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def difference(args: argparse.Namespace) -> float:
    """Return the largest relative difference of output and gradient, in norm."""
    few = argparse.Namespace(**(vars(args) | {"tokens": min(args.tokens, 256)}))
    given = inputs(few)
    results = [run(contender, *given)[2] for contender in CONTENDERS]
    pairs = list(zip(*results, strict=True))
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("heads", 32), ("tokens", 4096), ("width", 64), ("features", 266)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        return
    torch.set_num_threads(args.threads)
    gap = difference(args)
    assert gap < 1e-4, f"the two differ by {gap}"
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, found in rounds.items():
            found.append(measure_apart(name, args))
    median: dict[str, Any] = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for name, found in rounds.items()
    }
    print(f"{'':18}{'literal':>12}{'ours':>12}{'literal/ours':>14}")
    ratios = {}
    for key, literal in median["literal"].items():
        ratios[key] = literal / median["ours"][key]
        print(f"{key:18}{literal:12.2f}{median['ours'][key]:12.2f}{ratios[key]:14.2f}")
    if args.json:
        names = ("heads", "tokens", "width", "features", "threads")
        sizes = {name: getattr(args, name) for name in names}
        result = {"sizes": sizes, "relative_difference": gap, "median": median, "ratio": ratios}
        write_result(args.json, "favor_cpu", result | {"rounds": rounds})


if __name__ == "__main__":
    main()
