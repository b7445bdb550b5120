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

from sclong_ds.config.sections import COUNT_OFFSETS, POISSON_COUNTS, ModelConfig, PerformerConfig
from sclong_ds.planning.costs import (
    FAVOR_BLOCK,
    Products,
    parameter_shapes,
    read_tokens,
    rounds,
    stacks,
    top_genes,
)


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
    products: Products = "precision"
    """`engine.linear_products`."""


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
            products=setup.products,
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


def activation_bytes(
    model: ModelConfig,
    n_genes: int,
    *,
    element_bytes: int,
    recompute: bool,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
    products: Products = "precision",
) -> dict[str, int]:
    """Return what autograd keeps of one cell from forward to backward, by part.

    Per token of a layer: inputs of both norms (W each), of the linear layers (W, I, W, F)
    and of GELU (F), q, k and v (3 I), and two fp32 statistics per norm; softmax attention also
    keeps the logarithm of each row's sum (H, fp32), FAVOR+ sums over the keys. With recompute the
    layer's input alone (W). With products in fewer bits linear layers keep their inputs in bf16.
    The last decoder layer counts as if all tokens were wanted.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.
        n_expressed: Expected number of expressed genes of a cell.
        n_wanted: Predicted genes P; None: all.
        products: `engine.linear_products`.

    Returns:
        Bytes per cell; the split between cells is exact in fp32 for micro-batches above 1.
    """
    e, c, top = element_bytes, model.base_dim, top_genes(model, n_expressed)
    wanted, stats = n_genes if n_wanted is None else n_wanted, 8
    n, some = read_tokens(model, n_genes, n_expressed), model.zero_genes is not None
    given = n if some else n_genes + model.pad_token
    parts = {
        # The values and the mask as the model reads them; the error and its weights.
        "batch_and_loss": (4 + 1) * given + (4 + 1) * wanted + (2 * n if e == 2 else 0),
        "expression_encoder": n * (model.expression_hidden * e + c * e + stats),
        "norm": n * (c * e + stats),
        "head": _head_bytes(model, n_genes, n_wanted, e),
    }
    parts, packed = parts | _cell_parts(model, n_genes, wanted, e), model.routing == "expressed"
    if model.contextual_encoder != "mini":
        # Two int64 permutations, the top genes that to_large reads: of packed cells a view.
        view = packed and model.contextual_encoder == "large"
        parts["order"] = given * 16 + (n if view else top) * c * e
        parts["to_large"] = top * (model.large_dim * e + stats)
        parts["from_large"] = top * ((model.large_dim + c) * e + stats)
    for name, (stack, width, tokens) in stacks(model, n_genes, n_expressed).items():
        layer, sums = width * e, 0
        if not recompute:
            layer = _layer_bytes(model, name, stack, width, e, products)
            sums = _favor_sums_bytes(model, stack)
        parts[name] = stack.depth * (tokens * layer + sums)
    if some:
        parts["read_genes"] = 8 * (n + wanted)  # each token's gene, the token of a wanted gene
    if model.contextual_encoder == "dual" and not packed:
        # The first input of the mini encoder is a view of the ordered cells, kept whole.
        parts["order"] += top * c * e
    return parts


def _head_bytes(model: ModelConfig, n_genes: int, n_wanted: int | None, e: int) -> int:
    """Return what the head keeps of a cell, bytes."""
    wanted, c = n_genes if n_wanted is None else n_wanted, model.base_dim
    kept = wanted * c * e * (3 if model.head == "mlp" else 1)
    if model.cell_vector != "none" and n_wanted is not None:
        kept += wanted * c * max(e, 4)  # a copy of the weights of these genes, in fp32
    if model.cell_vector == "residuals" and n_wanted is None:
        kept -= wanted * max(e, 4)  # the level is the bias itself
    return kept + _offset_bytes(model, n_genes, wanted)


def _offset_bytes(model: ModelConfig, n_genes: int, wanted: int) -> int:
    """Return what `model.cell_offset` keeps of a cell, bytes, in fp32 at least."""
    if model.cell_offset == "visible":
        return n_genes + 8  # which values are visible, and their number
    if model.cell_offset in COUNT_OFFSETS:
        # Of a negative binomial count also what the gamma functions and the dispersion need.
        counts = 4 * POISSON_COUNTS * (1 if model.cell_offset == "poisson" else 3)
        # The chance of each count, and what else the expected value needs; of the cell the values
        # of counts, and half a count's.
        return wanted * (counts + 5 * 4 + 1) + counts + 4
    return 0


def _cell_parts(model: ModelConfig, n_genes: int, wanted: int, e: int) -> dict[str, int]:
    """Return what the parts that read the cell as a whole keep of it, bytes."""
    parts = {}
    if model.cell_vector != "none":
        parts["cell_vector"] = _cell_vector_bytes(model, n_genes, e)
    if model.zero_head:
        # In fp32 a copy of the weights and slopes of these genes, and the log depth.
        parts["zero_head"] = wanted * (model.base_dim + 1) * 4 + 4
    return parts


def _cell_vector_bytes(model: ModelConfig, n_genes: int, e: int) -> int:
    """Return what `model.cell_vector` keeps of a cell, bytes."""
    # In fp32: which values are visible, unless the offset keeps it already; values less their
    # centres; the MLP's inputs and result, of which two are twice as wide.
    e = max(e, 4)
    kept = 0 if model.cell_offset == "visible" else n_genes
    if model.cell_vector == "residuals":
        # What the expected value of each gene needs: three numbers and a choice.
        kept += n_genes * (3 * e + 1) + e
    return kept + n_genes * e + 7 * model.base_dim * e + 8


def _layer_bytes(
    model: ModelConfig, name: str, stack: PerformerConfig, width: int, e: int, products: Products
) -> int:
    """Return what one token of one layer keeps without recompute, bytes."""
    inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
    exact, joined = model.attention_of(stack) == "softmax", _joined_width(model, name, stack)
    row_sums = 4 * stack.heads if exact else 0
    of_linears = e * (2 * width + inner + wide)
    if rounds(products, name):
        # In bf16; exact attention keeps its output too, which is not what is rounded.
        own = e * inner if exact and not joined and e > 2 else 0
        of_linears = 2 * (2 * width + inner + wide) + own
    return of_linears + e * (2 * width + 3 * inner + wide + joined) + 16 + row_sums


def _joined_width(model: ModelConfig, name: str, stack: PerformerConfig) -> int:
    """Return the width of the outputs of softmax attention where those of packed cells are joined.

    With `model.routing: expressed` the decoder's cells are packed only with `model.zero_genes`.
    """
    packed = model.routing == "expressed" and (name != "decoder" or model.zero_genes is not None)
    joined = packed and model.attention_of(stack) == "softmax"
    return stack.heads * stack.dim_head if joined else 0


def _favor_sums_bytes(model: ModelConfig, stack: PerformerConfig) -> int:
    """Return what the torch backend of FAVOR+ keeps of a cell's keys: `favor_torch.Summary`."""
    m, k = stack.features(), stack.dim_head
    return (
        0 if model.attention_of(stack) == "softmax" else stack.heads * (4 * (k + m * k + m + 2) + 8)
    )


def _favor_block_bytes(stack: PerformerConfig, tokens: int) -> int:
    """Return what the torch backend of FAVOR+ works in: a block of rows, and its heads' sums."""
    m, k = stack.features(), stack.dim_head
    rows = min(stack.heads * tokens, FAVOR_BLOCK // (4 * m))
    return 4 * (rows * (3 * m + 2 * k) + 2 * stack.heads * m * (k + 2))


def peak_activation_bytes(
    model: ModelConfig,
    n_genes: int,
    *,
    micro_batch: int,
    element_bytes: int,
    recompute: bool,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
    products: Products = "precision",
) -> int:
    """Predict the peak of activations and working memory in one pass with the plain torch kernels.

    Three moments can be the highest: the start of the backward pass; in that of a layer, its
    feed-forward block (gradients on both sides of GELU) or its attention (q, k, v and their
    gradients of all cells; for FAVOR+ also a block of rows in fp32, with three times its features).

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        micro_batch: Cells per forward pass.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.
        n_expressed: Expected number of expressed genes of a cell.
        n_wanted: Predicted genes P; None: all.
        products: `engine.linear_products`.
    """
    e = element_bytes
    kept = activation_bytes(
        model, n_genes, element_bytes=e, recompute=recompute, n_expressed=n_expressed,
        n_wanted=n_wanted, products=products,
    )  # fmt: skip
    stored = sum(kept.values())
    # The gradients of the predictions and of what they are made from: all else is still kept.
    wanted = n_genes if n_wanted is None else n_wanted
    counts = 2 * 4 * POISSON_COUNTS if model.cell_offset in COUNT_OFFSETS else 0
    peak = micro_batch * (stored + wanted * (4 + model.base_dim * e + counts))
    for name, (stack, width, tokens) in stacks(model, n_genes, n_expressed).items():
        inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
        # Freed before: the head. Counted again: what this layer itself keeps, except its input.
        joined = _joined_width(model, name, stack)
        layer = _layer_bytes(model, name, stack, width, e, products)
        own = 0 if recompute else tokens * (layer - width * e)
        others = stored - kept["head"] - own
        # Of 8 bits: a factor in fp32 over its scales, and in 8 bits. Compiled layers keep neither.
        rounded = 5 * tokens if products == "fp8" and rounds(products, name) else 0
        feed_forward = e * tokens * (4 * width + 4 * inner + joined + 3 * wide) + rounded * wide
        attention = e * tokens * (3 * width + 7 * inner + joined) + rounded * max(width, inner)
        favor = model.attention_of(stack) == "favor"
        one_block = _favor_block_bytes(stack, tokens) if favor else 0
        peak = max(
            peak,
            micro_batch * (others + feed_forward),
            micro_batch * (others + attention) + one_block,
        )
    return peak
