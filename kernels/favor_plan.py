"""Block sizes of the Triton kernels of FAVOR+ attention, by size, dtype and GPU generation.

They were chosen from the compiled code: no spilled registers, and on sm_90 products by wgmma that
ptxas does not serialise. `python -m benchmarks.favor_compiled` shows what they compile to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    """Features of a last, smaller tile; in `key_pass` and `summary_gradient`, of every program."""
    warps: int = 4
    stages: int = 3
    """Depth of the software pipeline."""

    def reach(self, m: int) -> int:
        """Return how many features a kernel that walks over M features in these tiles touches."""
        return (
            m // self.features * self.features + self.tail
            if self.tail
            else padded(m, self.features)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Block sizes of the kernels."""

    key_pass: Block
    query_pass: Block
    query_gradient: Block
    summary_gradient: Block
    key_gradient: Block


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
        programs = tiles(m, sum(option))
        # Every program reads all tokens, which costs about as much as 64 features.
        return programs * (option[0] + 1.5 * option[1] + 64), programs

    return min(options, key=cost)


def tiles_of_rows(m: int, largest: int) -> dict[str, int]:
    """Return `features` and `tail` of a kernel that walks over M features in tiles.

    The tail is a tile of 16 or more where a whole one would be mostly padding: 266 features are
    four tiles of 64 and one of 16, not nine of 32.
    """
    rest = m % largest
    tail = max(16, power_of_two(rest)) if rest else 0
    return {"features": largest, "tail": tail if tail < min(largest, m) else 0}


ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities whose plans are compiled in the tests; others take that of the next lower
one. Programs of 8.6, 8.9 and 12.0 have 99 KB of shared memory, of 8.0 163, of the others 227."""


def architecture(capability: tuple[int, int]) -> tuple[int, int]:
    """Return the entry of `ARCHITECTURES` whose plan a GPU takes."""
    return max((a for a in ARCHITECTURES if a <= capability), default=ARCHITECTURES[0])


def default_plan(m: int, head_width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Plan:
    """Return the block sizes for a size, dtype and GPU generation.

    Args:
        m: Number of features M.
        head_width: K.
        dtype: bfloat16 or float32.
        capability: CUDA compute capability.
    """
    if dtype == torch.float32:
        return _plan_in_float32(m)
    chip = architecture(capability)
    if chip in ((9, 0), (10, 0)):
        return _hopper_plan(m, head_width)
    # The accumulators of 256 features and of a tail do not fit in the registers of one program.
    main, tail = feature_split(m, 128)
    of_keys = Block(
        rows=32, features=main, tail=tail, warps=8 if main * head_width > 4096 else 4, stages=2
    )
    row_warps = 4 if head_width <= 64 else 8
    of_rows = Block(rows=64, **tiles_of_rows(m, 32), warps=row_warps, stages=2)
    return Plan(
        key_pass=of_keys,
        query_pass=of_rows,
        query_gradient=of_rows,
        summary_gradient=of_keys,
        key_gradient=of_rows,
    )


def _plan_in_float32(m: int) -> Plan:
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


def _hopper_plan(m: int, head_width: int) -> Plan:
    """Return the block sizes where wgmma takes 64 rows a group of four warps.

    `key_pass` has one stage: with more, ptxas ends a group of products after each (C7515). Kernels
    over rows take 128 of them, so that W and A are read from the second-level cache half as often.
    """
    main, tail = feature_split(m, 256 if head_width <= 64 else 128)
    warps = 8 if main * head_width > 64 * 64 else 4
    narrow = head_width <= 64
    return Plan(
        key_pass=Block(rows=64, features=main, tail=tail, warps=warps, stages=1),
        query_pass=Block(rows=128, **tiles_of_rows(m, 64 if narrow else 32), warps=8),
        query_gradient=Block(rows=128 if narrow else 64, **tiles_of_rows(m, 32), warps=8),
        summary_gradient=Block(
            rows=64 if tail == 0 else 32, features=main, tail=tail, warps=warps, stages=2
        ),
        key_gradient=Block(rows=128 if narrow else 64, **tiles_of_rows(m, 32), warps=8),
    )


def tiles(n: int, size: int) -> int:
    """Return how many tiles of `size` hold n."""
    return -(-n // size)


def padded(n: int, multiple: int) -> int:
    """Return the least multiple that holds n."""
    return tiles(n, multiple) * multiple


def power_of_two(n: int) -> int:
    """Return the least power of two that holds n."""
    return 1 << (n - 1).bit_length()
