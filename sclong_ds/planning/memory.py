"""Predicted memory of one rank: model states by ZeRO stage, DeepSpeed's buffers, activations.

Model states follow Rajbhandari et al., arXiv:1910.02054, section 3, with Adam and the sums of
gradients in fp32; the buffers are those that DeepSpeed 0.19 allocates. The peak is the backward
pass of a micro-batch, or the step of the optimizer with its fp32 gradients if that is higher. A
prediction: nothing here was measured on a GPU. `python -m sclong_ds plan` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sclong_ds.config.sections import ModelConfig
from sclong_ds.planning.costs import parameter_shapes, peak_activation_bytes, stacks


@dataclass(frozen=True, slots=True)
class Zero:
    """What memory depends on in a DeepSpeed JSON; sizes in elements."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    reduce_bucket: int
    overlap: bool
    contiguous: bool
    persistence_threshold: int
    prefetch_bucket: int
    reuse_distance: int
    sub_group: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Predicted memory of one rank, bytes."""

    weights: int
    gradients: int
    master_weights: int
    adam_moments: int
    reduce_buckets: int
    gathered_layers: int
    batch_constants: int
    activations: int
    optimizer_step: int
    """Temporary gradients of the optimizer step, when activations and gathered layers are gone."""
    offloaded: int
    """In the host's memory."""

    def states(self) -> int:
        """Return the bytes of weights, gradients, master weights and moments."""
        return self.weights + self.gradients + self.master_weights + self.adam_moments

    def peak(self) -> int:
        """Return the highest of backward pass and optimizer step, bytes."""
        layers = self.gathered_layers + self.batch_constants + self.activations
        return self.states() + max(self.reduce_buckets + layers, self.optimizer_step)

    def filled(self, *, on_cpu: bool) -> int:
        """Return the bytes of a rank's device at the peak: a CPU's holds what is offloaded too.

        Args:
            on_cpu: Whether the device is the host itself.
        """
        return self.peak() + on_cpu * self.offloaded


@dataclass(frozen=True, slots=True)
class Setup:
    """On what a run is planned."""

    world_size: int
    on_cpu: bool
    n_genes: int
    n_edges: int
    n_expressed: int | None = None
    """Expected number of expressed genes of a cell (`model.routing: expressed`)."""
    n_wanted: int | None = None
    """Predicted genes of a cell; None: all."""


def zero_settings(ds_config: Mapping[str, Any]) -> Zero:
    """Read what memory depends on from a DeepSpeed configuration, with DeepSpeed's defaults.

    Args:
        ds_config: What `engine.resolve_ds_config` returns.

    Raises:
        ValueError: A stage other than 1, 2 or 3.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage: got {stage}, allowed here: 1, 2, 3")

    def offloads(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    return Zero(
        stage=stage,
        offload_optimizer=offloads("offload_optimizer"),
        offload_param=offloads("offload_param"),
        reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
        overlap=zero.get("overlap_comm", stage == 3),
        contiguous=zero.get("contiguous_gradients", True),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
        sub_group=int(zero.get("sub_group_size", 1e9)),
    )


def memory_per_rank(
    model: ModelConfig,
    zero: Zero,
    setup: Setup,
    *,
    micro_batch: int,
    element_bytes: int,
    recompute: bool,
) -> Memory:
    """Predict the memory of one rank.

    Args:
        model: The `model` section.
        zero: ZeRO stage, offload and buffer sizes.
        setup: Ranks, genes and edges.
        micro_batch: Cells per forward pass.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.
    """
    e, third = element_bytes, zero.stage == 3
    sizes = [
        math.prod(shape)
        for shapes in parameter_shapes(model, setup.n_genes).values()
        for shape in shapes
    ]
    total = sum(sizes)
    share = math.ceil(total / setup.world_size)
    resident = sum(n for n in sizes if n <= zero.persistence_threshold)
    to_host, params_to_host = zero.offload_optimizer, zero.offload_param and third
    # A CPU gives untouched pages no memory; a GPU gives a bucket its whole size.
    bucket = min(zero.reduce_bucket, total) if setup.on_cpu else zero.reduce_bucket
    group = min(share, zero.sub_group) if third else share
    # Micro-steps add up in fp32, whatever the model's precision; in stage 1 in the model's.
    gradients = 4 * share
    return Memory(
        weights=e * ((0 if params_to_host else share) + resident if third else total),
        gradients=e * total if zero.stage == 1 else 0 if to_host else gradients,
        # Stage 3 in fp32 updates the weights themselves; the other stages copy them.
        master_weights=0 if to_host or (third and e == 4) else 4 * share,
        adam_moments=0 if to_host else 8 * share,
        reduce_buckets=e * bucket * (2 if zero.overlap and not third else 1)
        if zero.contiguous
        else 0,
        gathered_layers=e * _gathered(model, zero, setup, sum(sizes) - resident) if third else 0,
        batch_constants=_batch_constants(model, setup, e),
        activations=peak_activation_bytes(
            model,
            setup.n_genes,
            micro_batch=micro_batch,
            element_bytes=e,
            recompute=recompute,
            n_expressed=setup.n_expressed,
            n_wanted=setup.n_wanted,
        ),
        # One group's gradients in fp32, flattened, and in stage 1 those in the model's precision.
        optimizer_step=0 if to_host else (6 if zero.stage == 1 and e == 2 else 4) * group,
        offloaded=(to_host * (12 + 4) * share) + to_host * gradients + params_to_host * e * share,
    )


def _gathered(model: ModelConfig, zero: Zero, setup: Setup, partitioned: int) -> int:
    """Return the most parameters that ZeRO-3 holds gathered at once.

    A layer stays gathered when it is needed again within the reuse distance; between forward and
    backward that keeps the last layers, half the distance in parameters. The next bucket and the
    matrices of the layer at work, which are gathered at once, come on top.
    """
    if setup.world_size == 1 and not zero.offload_param:
        return 0
    layer = max(
        2 * width * width * stack.ff_mult + 4 * width * stack.heads * stack.dim_head
        for stack, width, _ in stacks(model, setup.n_genes).values()
    )
    arriving = zero.prefetch_bucket + layer
    copied = min(partitioned, arriving) if setup.on_cpu else 0
    return min(partitioned, zero.reuse_distance // 2 + arriving) + copied


def _batch_constants(model: ModelConfig, setup: Setup, e: int) -> int:
    """Return the bytes that a micro-batch of any size needs.

    Gene encoder, random features, the genes' vectors of `model.cell_vector` in fp32.
    """
    size = adjacency = features = 0
    if model.gene_encoder != "none":
        size = (setup.n_genes + model.pad_token) * model.base_dim
    if setup.n_edges:
        # The matrix and its transpose: a column and a weight per edge, an end per row.
        adjacency = 2 * (8 * setup.n_edges + 4 * (setup.n_genes + model.pad_token + 1))
    for s, _, _ in stacks(model, setup.n_genes).values():
        if model.attention_of(s) == "favor":
            features += 4 * s.depth * s.features() * s.dim_head
    wide = 4 * setup.n_genes * model.base_dim if model.cell_vector != "none" and e < 4 else 0
    encoder = size * (e * (2 * model.gene_encoder_layers - 1) + 2 * 4)
    return encoder + adjacency + features + wide


def largest_micro_batch(
    model: ModelConfig,
    zero: Zero,
    setup: Setup,
    *,
    usable_bytes: int,
    element_bytes: int,
    recompute: bool,
) -> int:
    """Return the largest micro-batch whose predicted peak fits, 0 when none does.

    Args:
        model: The `model` section.
        zero: ZeRO stage, offload and buffer sizes.
        setup: Ranks, genes and edges.
        usable_bytes: Memory that tensors may fill.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.
    """

    def fits(cells: int) -> bool:
        memory = memory_per_rank(
            model, zero, setup, micro_batch=cells, element_bytes=element_bytes, recompute=recompute
        )
        return memory.filled(on_cpu=setup.on_cpu) <= usable_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
