"""Accelerators: memory and peak rates, for `plan` and for the utilisation of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

USABLE_SHARE = 0.92
"""Share of the device memory that a run may plan with; the rest is lost to fragmentation."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one rank's share of a CPU machine."""

    memory_gib: float
    """Memory that the driver offers, GiB."""
    bf16_tflops: float
    """Peak of dense bf16 matrix products, TFLOP/s."""
    fp32_tflops: float
    """Peak in fp32 (not TF32, which torch leaves off), TFLOP/s."""
    reserve_gib: float = 2.0
    """Taken by the CUDA context, NCCL and cuBLAS, GiB."""

    def flops_per_s(self, precision: str) -> float:
        """Return the peak, FLOP/s, in `engine.precision`."""
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops) * 1e12

    def usable_bytes(self) -> int:
        """Return the memory that tensors may fill."""
        return int((self.memory_gib * USABLE_SHARE - self.reserve_gib) * GIB)


DEVICES: Mapping[str, Device] = {
    "a100": Device(79.1, 312, 19.5),
    "a100_40gb": Device(39.4, 312, 19.5),
    "b200": Device(178.3, 2250, 75),
    "h100": Device(79.1, 989, 67),
    "h100_pcie": Device(79.1, 756, 51),
    "h200": Device(139.7, 989, 67),
    "l40s": Device(44.4, 362, 91.6),
    "rtx4090": Device(23.5, 165, 82.6),
}
"""Accelerators, SXM form unless named otherwise; peaks from NVIDIA's data sheets."""


def find_device(name: str, *, ranks_per_node: int) -> Device:
    """Return a known device; `cpu` is this machine, divided among the ranks of a node.

    A CPU core counts as 32 fp32 FLOP per cycle (two AVX2 multiply-adds) at 3 GHz, and as a fifth of
    that in bf16.

    Args:
        name: Key of `DEVICES` or `cpu`.
        ranks_per_node: Ranks on one node.

    Raises:
        ValueError: Unknown name.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        tflops = 0.096 * len(os.sched_getaffinity(0)) / ranks_per_node
        return Device(memory / ranks_per_node, tflops / 5, tflops, reserve_gib=0.7)
    if name not in DEVICES:
        raise ValueError(f"--device {name}: unknown; known devices are {', '.join(DEVICES)}, cpu")
    return DEVICES[name]


def device_of_name(name: str) -> Device | None:
    """Return the device that CUDA calls by a name such as `NVIDIA H100 80GB HBM3`, if known.

    Args:
        name: `torch.cuda.get_device_name()`.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if "pcie" in words and "h100" in words:
        return DEVICES["h100_pcie"]
    if {"rtx", "4090"} <= words:
        return DEVICES["rtx4090"]
    return next(
        (DEVICES[key] for key in ("a100", "b200", "h100", "h200", "l40s") if key in words), None
    )
