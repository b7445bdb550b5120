"""Accelerators: memory and peak rates, for `plan` and for the utilisation of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sclong_ds.config.sections import ModelConfig
from sclong_ds.files.cores import usable_cores

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
    memory_gb_per_s: float
    """Of its own memory, GB/s."""
    fp8_tflops: float = 0.0
    """Peak of dense products of 8-bit floats, TFLOP/s; 0: it has no units for them."""
    reserve_gib: float = 2.0
    """Taken by the CUDA context, NCCL and cuBLAS, GiB."""

    def flops_per_s(self, precision: str) -> float:
        """Return the peak, FLOP/s, in `engine.precision`, or in fp8."""
        peaks = {"fp32": self.fp32_tflops, "bf16": self.bf16_tflops, "fp8": self.fp8_tflops}
        return peaks[precision] * 1e12

    def usable_bytes(self) -> int:
        """Return the memory that tensors may fill."""
        return max(0, int((self.memory_gib * USABLE_SHARE - self.reserve_gib) * GIB))


PCIE_4, PCIE_5 = 32.0, 64.0
"""GB/s of 16 lanes in one direction."""

DEVICES: Mapping[str, Device] = {
    "a100": Device(79.1, 312, 19.5, 300, PCIE_4, 2039),
    "a100_40gb": Device(39.4, 312, 19.5, 300, PCIE_4, 1555),
    "b200": Device(178.3, 2250, 75, 900, PCIE_5, 8000, fp8_tflops=4500),
    "h100": Device(79.1, 989, 67, 450, PCIE_5, 3350, fp8_tflops=1979),
    "h100_pcie": Device(79.1, 756, 51, PCIE_5, PCIE_5, 2000, fp8_tflops=1513),
    "h200": Device(139.7, 989, 67, 450, PCIE_5, 4800, fp8_tflops=1979),
    "l40s": Device(44.4, 362, 91.6, PCIE_4, PCIE_4, 864, fp8_tflops=733),
    "rtx4090": Device(23.5, 165, 82.6, PCIE_4, PCIE_4, 1008, fp8_tflops=330),
    "rtx5090": Device(31.4, 209.5, 104.8, PCIE_5, PCIE_5, 1792, fp8_tflops=419),
    "rtx_pro_6000": Device(95.0, 503.8, 126, PCIE_5, PCIE_5, 1792, fp8_tflops=1007.6),
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
"""Between processes of one machine, through its memory; also what a core reads and writes."""

FP8_CAPABILITY = (8, 9)
"""Compute capability from which torch multiplies 8-bit floats that are scaled row by row."""
FP8_WIDTH = 16
"""Divides the widths of such products on a GPU."""


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
        cores = usable_cores()
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
    return Device(memory_gib, bf16, tflops, link, link, link * cores, reserve_gib=0.7)


def check_products(
    products: str, *, device: str, on_cpu: bool, has_fp8: bool, model: ModelConfig
) -> None:
    """Check that a device can multiply as `engine.linear_products` tells.

    Args:
        products: `engine.linear_products`.
        device: Its name, for the message.
        on_cpu: Whether it is this machine's CPU.
        has_fp8: Whether it is a GPU with units for 8-bit floats.
        model: The `model` section.

    Raises:
        ValueError: It cannot, or no layer would multiply so.
    """
    if products == "bf16" and not (on_cpu and multiplies_bf16()):
        raise ValueError(
            f"engine.linear_products=bf16 is for CPUs with AVX512_BF16 or AMX: this is {device}; "
            "set it to precision"
        )
    if products != "fp8":
        return
    if model.contextual_encoder == "mini":
        raise ValueError(
            "engine.linear_products=fp8 is of the large encoder, which this model lacks: set it to "
            "precision"
        )
    if on_cpu:  # emulated
        return
    if not has_fp8:
        raise ValueError(
            "engine.linear_products=fp8 needs a GPU of compute capability "
            f"{'.'.join(map(str, FP8_CAPABILITY))} or newer: this is {device}; set it to precision"
        )
    large = model.large_encoder
    widths = {model.large_dim, large.heads * large.dim_head, large.ff_mult * model.large_dim}
    if odd := sorted(width for width in widths if width % FP8_WIDTH):
        raise ValueError(
            f"engine.linear_products=fp8 needs widths that {FP8_WIDTH} divides: the large "
            f"encoder has {', '.join(map(str, odd))}; set it to precision"
        )


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
