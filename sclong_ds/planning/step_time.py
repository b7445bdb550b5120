"""Predicted time of a step: what a rank computes, what its host starts, what its links carry.

A GPU waits for Python where starting a layer takes longer than running it, and for its links where
gathering weights does. The three run side by side, so the longest counts; what DeepSpeed does not
overlap is added. Products in fewer bits (`engine.linear_products`) save what matrix products of
that size take less of, and cost what rounding their factors moves through memory. A prediction:
nothing here was measured on a GPU.

On a CPU the cores of a rank do all of it, one after the other, and what lies between the matrix
products counts: at small widths it takes most of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sclong_ds.planning.costs import Products, Rounded
from sclong_ds.planning.devices import Device
from sclong_ds.planning.memory import Zero

HOST_MS_PER_LAYER: Mapping[tuple[bool, bool], float] = {
    (False, False): 1.7,
    (False, True): 2.4,
    (True, False): 2.9,
    (True, True): 4.0,
}
"""CPU milliseconds that forward and backward of a Performer layer take of one thread, by (ZeRO-3,
recomputed): `python -m benchmarks.host_time`, 46 layers without arithmetic, on a 2-core Xeon."""

LINK_SHARE = 0.8
"""Share of a link's peak that collectives reach."""
HOST_MEMORY_GB_PER_S = 200.0
"""Of a node, for optimizer steps on its CPUs."""
GEMM_SHARE = 0.65
"""Share of its peak that a matrix product of the large encoder reaches; assumed."""
CPU_PASSES = 55
"""Times that a CPU moves what autograd keeps of a cell, besides matrix products: fitted between a
step of the demo, 0.46 s of a core for 4 cells of `sclong_tiny` (0.41 s predicted), and one at the
widths of `sclong_1b` (`benchmarks/results/cpu_step.json`; 1.7 times as long predicted)."""
ADAM_BYTES = 28
"""That an optimizer step on a CPU moves per parameter: gradient, weight and moments, in fp32."""


class Rounding(NamedTuple):
    """How often a step with products in fewer bits touches what `costs.Rounded` counts."""

    products: int
    """Of the three of a linear layer (output, gradients of input and weight), in fewer bits."""
    element_bytes: int
    """Moved to round the inputs and the outputs' gradients, for each input and output."""
    weight_bytes: int
    """Moved to round the weights, in both passes, and their gradients."""


def rounding(products: Products, *, compiled: bool) -> Rounding:
    """Return how often, and how much of it, factors are rounded.

    Counted from `kernels/linear_products.py`: in bf16 a copy of each factor and result there and
    back (6 bytes each); in fp8 of a bf16 model, operator by operator, the largest of each row,
    scaling, clamping and rounding (21 bytes), which a compiled layer does in two passes (5 bytes).

    Args:
        products: `engine.linear_products`.
        compiled: `engine.compile_layers`.
    """
    if products == "bf16":
        return Rounding(3, 12, 18)
    once = 5 if compiled else 21
    return Rounding(2, once, 2 * once)


@dataclass(frozen=True, slots=True, kw_only=True)
class FewerBits:
    """Linear layers whose products are in fewer bits than the rest."""

    products: Literal["bf16", "fp8"]
    sizes: Rounded
    compiled: bool
    """`engine.compile_layers`."""

    def saves_s(
        self, device: Device, *, precision: str, mfu: float, micro_batch: int, forwards: int
    ) -> float:
        """Return the seconds that they save of a micro-batch; below 0, they cost them.

        Args:
            device: A rank's; one without units for 8-bit floats multiplies them as `precision`.
            precision: `engine.precision`.
            mfu: Utilisation while a rank computes.
            micro_batch: Cells of a forward pass.
            forwards: 2 where the forward pass is repeated, else 1.
        """
        how, sizes = rounding(self.products, compiled=self.compiled), self.sizes
        peak = device.flops_per_s(precision)
        fewer = device.flops_per_s(self.products) or peak
        flops = micro_batch * sizes.flops * (how.products + forwards - 1)
        again = 1 + (forwards - 1) / 2
        moved = again * (
            micro_batch * sizes.elements * how.element_bytes + sizes.weights * how.weight_bytes
        )
        faster = flops * (1 / peak - 1 / fewer) / max(mfu, GEMM_SHARE)
        return faster - moved / (device.memory_gb_per_s * 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run is planned."""

    nodes: int
    gpus_per_node: int
    device: str
    """Key of `DEVICES` or `cpu`."""
    mfu: float
    """Model FLOP/s utilisation that a rank reaches while it computes and recomputes nothing: share
    of the peak. Recomputing and waiting lower it."""
    network_gbit: float
    """To the other nodes, Gbit/s of a node in one direction."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step is made of."""

    parameters: int
    layers: int
    """Performer layers."""
    element_bytes: int
    training_flops: float
    """Of forward and backward of a cell, without what is recomputed."""
    recompute_flops: float
    """That activation checkpointing repeats of a cell; 0 without it."""
    kept_bytes: int = 0
    """That autograd keeps of a cell without activation checkpointing."""
    fewer_bits: FewerBits | None = None
    """None: all products are in `engine.precision`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Predicted seconds of a rank; those of a micro-batch side by side."""

    compute_s: float
    host_s: float
    links_s: float
    overlapped: bool
    """Whether the links are busy while the rank computes."""
    alone: bool = False
    """Whether the same cores compute, run Python and copy, one after the other: a CPU."""
    accumulated: int
    """Micro-batches of a step."""
    update_s: float
    """Once a step: gradients, weights and the optimizer."""
    training_flops: float
    """Of forward and backward of a cell, without what is recomputed."""

    @property
    def micro_batch_s(self) -> float:
        """Seconds of a micro-batch."""
        if self.alone:
            return self.compute_s + self.host_s + self.links_s
        if self.overlapped:
            return max(self.compute_s, self.host_s, self.links_s)
        return max(self.compute_s, self.host_s) + self.links_s

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.accumulated * self.micro_batch_s + self.update_s

    @property
    def bound_by(self) -> Literal["arithmetic", "Python", "links"]:
        """What a micro-batch takes longest for."""
        times = {"arithmetic": self.compute_s, "Python": self.host_s, "links": self.links_s}
        return max(("arithmetic", "Python", "links"), key=lambda name: times[name])


def step_time(
    work: Work, zero: Zero, device: Device, site: Site, *, precision: str, step_cells: int,
    micro_batch: int,
) -> StepTime:  # fmt: skip
    """Predict the time of a step.

    ZeRO-3 gathers the weights twice a micro-batch and scatters the gradients once; ZeRO-2 scatters
    them each micro-batch, ZeRO-1 once a step; both gather the new weights once a step. Offloaded
    states are gradients down, weights up and an optimizer step on the host.

    Args:
        work: Parameters, layers and FLOPs.
        zero: Stage and offloading.
        device: A rank's.
        site: Nodes, ranks, utilisation and network.
        precision: `engine.precision`.
        step_cells: Cells of an optimizer step, over all ranks.
        micro_batch: Cells of a rank's forward pass.
    """
    world, e, third = site.world_size, work.element_bytes, zero.stage == 3
    recomputed = work.recompute_flops > 0
    flops = micro_batch * (work.training_flops + work.recompute_flops)
    compute_s = flops / (device.flops_per_s(precision) * site.mfu)
    on_cpu = site.device == "cpu"
    if on_cpu:
        moved = micro_batch * work.kept_bytes * CPU_PASSES
        compute_s += moved / (device.memory_gb_per_s * 1e9)
    if work.fewer_bits is not None:
        compute_s -= work.fewer_bits.saves_s(
            device, precision=precision, mfu=site.mfu, micro_batch=micro_batch,
            forwards=1 + recomputed,
        )  # fmt: skip
    whole = collective_s(e * work.parameters, device, site)
    share = work.parameters / world
    to_host = device.host_gb_per_s * 1e9 * LINK_SHARE
    links = {1: 0.0, 2: 1.0, 3: 3.0}[zero.stage] * whole
    if zero.offload_param and third:
        links += 2 * e * share / to_host
    update = {1: 2.0, 2: 1.0, 3: 0.0}[zero.stage] * whole
    if zero.offload_optimizer:
        of_node = share * site.gpus_per_node * ADAM_BYTES / (HOST_MEMORY_GB_PER_S * 1e9)
        update += share * (4 + e) / to_host + of_node
    elif on_cpu:
        update += share * ADAM_BYTES / (device.memory_gb_per_s * 1e9)
    return StepTime(
        compute_s=compute_s,
        host_s=work.layers * HOST_MS_PER_LAYER[third, recomputed] / 1e3,
        links_s=links,
        overlapped=zero.overlap,
        alone=on_cpu,
        accumulated=step_cells // (micro_batch * world),
        update_s=update,
        training_flops=work.training_flops,
    )


def collective_s(size: float, device: Device, site: Site) -> float:
    """Return the seconds in which all ranks gather or scatter `size` bytes between them.

    Within a node each rank receives what it has not; between nodes each node does, once.

    Args:
        size: Bytes of the whole.
        device: A rank's.
        site: Nodes, ranks and network.
    """
    world, nodes = site.world_size, site.nodes
    within = size * (world - 1) / world / (device.link_gb_per_s * 1e9)
    between = size * (nodes - 1) / nodes / (site.network_gbit / 8 * 1e9)
    return max(within if site.gpus_per_node > 1 else 0.0, between) / LINK_SHARE
