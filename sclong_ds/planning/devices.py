"""Accelerators: memory and peak rates, for `plan` and for the utilisation of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    link_gb_per_s: float
    """To the other devices of its node, GB/s in one direction."""
    host_gb_per_s: float
    """To its host's memory, GB/s in one direction."""
    reserve_gib: float = 2.0
    """Taken by the CUDA context, NCCL and cuBLAS, GiB."""

    def flops_per_s(self, precision: str) -> float:
        """Return the peak, FLOP/s, in `engine.precision`."""
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops) * 1e12

    def usable_bytes(self) -> int:
        """Return the memory that tensors may fill."""
        return int((self.memory_gib * USABLE_SHARE - self.reserve_gib) * GIB)


PCIE_4, PCIE_5 = 32.0, 64.0
"""GB/s of 16 lanes in one direction."""

DEVICES: Mapping[str, Device] = {
    "a100": Device(79.1, 312, 19.5, 300, PCIE_4),
    "a100_40gb": Device(39.4, 312, 19.5, 300, PCIE_4),
    "b200": Device(178.3, 2250, 75, 900, PCIE_5),
    "h100": Device(79.1, 989, 67, 450, PCIE_5),
    "h100_pcie": Device(79.1, 756, 51, PCIE_5, PCIE_5),
    "h200": Device(139.7, 989, 67, 450, PCIE_5),
    "l40s": Device(44.4, 362, 91.6, PCIE_4, PCIE_4),
    "rtx4090": Device(23.5, 165, 82.6, PCIE_4, PCIE_4),
    "rtx5090": Device(31.4, 209.5, 104.8, PCIE_5, PCIE_5),
    "rtx_pro_6000": Device(95.0, 503.8, 126, PCIE_5, PCIE_5),
}
"""Accelerators, SXM form unless named otherwise; peaks from NVIDIA's data sheets, of products whose
sums are in fp32, dense. NVLink where the form has it, else PCIe."""

GEFORCE_AND_RTX: Mapping[str, frozenset[str]] = {
    "rtx4090": frozenset({"rtx", "4090"}),
    "rtx5090": frozenset({"rtx", "5090"}),
    "rtx_pro_6000": frozenset({"rtx", "pro", "6000", "blackwell"}),
}
"""Words that the name of a device has, where its key is not one of them."""

CPU_GHZ = 3.0
CPU_FLOP_PER_CYCLE = {"avx2": 32, "avx512f": 64}
"""fp32 FLOP per cycle and core, by instruction set: two multiply-adds of a vector."""
CPU_BF16_RATIO = {"avx512_bf16": 2.0, "amx_bf16": 8.0}
"""Peak in bf16 over that in fp32 where the CPU multiplies bf16; of the tiles of AMX half of the
data sheet's 16, since the clock falls."""
CPU_BF16_WITHOUT = 0.2
"""The same where it does not and each product is converted; measured on an AVX2 machine."""
CPU_LINK_GB_PER_S = 10.0
"""Between processes of one machine, through its memory."""


def find_device(name: str, *, ranks_per_node: int) -> Device:
    """Return a known device; `cpu` is this machine, divided among the ranks of a node.

    A core counts as `CPU_FLOP_PER_CYCLE` of what its instruction set allows, at `CPU_GHZ`.

    Args:
        name: Key of `DEVICES` or `cpu`.
        ranks_per_node: Ranks on one node.

    Raises:
        ValueError: Unknown name.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        cores = len(os.sched_getaffinity(0))
        return cpu_rank(_instruction_sets(), cores / ranks_per_node, memory / ranks_per_node)
    if name not in DEVICES:
        raise ValueError(f"--device {name}: unknown; known devices are {', '.join(DEVICES)}, cpu")
    return DEVICES[name]


def cpu_rank(instruction_sets: Collection[str], cores: float, memory_gib: float) -> Device:
    """Return a rank's share of a machine without an accelerator.

    Args:
        instruction_sets: Names of /proc/cpuinfo; unknown ones are passed over.
        cores: Of the rank.
        memory_gib: Of the rank.
    """
    known = [n for name, n in CPU_FLOP_PER_CYCLE.items() if name in instruction_sets]
    tflops = max(known, default=16) * CPU_GHZ * cores / 1e3
    ratios = [ratio for name, ratio in CPU_BF16_RATIO.items() if name in instruction_sets]
    bf16 = tflops * max(ratios, default=CPU_BF16_WITHOUT)
    link = CPU_LINK_GB_PER_S
    return Device(memory_gib, bf16, tflops, link, link, reserve_gib=0.7)


def multiplies_bf16() -> bool:
    """Return whether this machine's CPU multiplies bf16 (AVX512_BF16 or AMX)."""
    return not _instruction_sets().isdisjoint(CPU_BF16_RATIO)


def _instruction_sets() -> frozenset[str]:
    """Return the instruction sets that this machine's CPU names; none where it names none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()


def device_of_name(name: str) -> Device | None:
    """Return the device that CUDA calls by a name such as `NVIDIA H100 80GB HBM3`, if known.

    Args:
        name: `torch.cuda.get_device_name()`.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if "pcie" in words and "h100" in words:
        return DEVICES["h100_pcie"]
    for key, needed in GEFORCE_AND_RTX.items():
        if needed <= words:
            return DEVICES[key]
    return next(
        (DEVICES[key] for key in ("a100", "b200", "h100", "h200", "l40s") if key in words), None
    )
