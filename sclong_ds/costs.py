"""What follows from the shapes of `ScLong`: parameters, FLOPs, bytes that a step keeps of a cell.

Parameters and FLOPs are exact for the plain torch kernels (`kernels/reference.py`). FLOPs are those
of matrix products, 2 m n k each; backward is 2 x forward for linear layers. FAVOR+ has, per token
and head, 4 dots of 2 K M in forward and 10 in backward (2 recompute features, 2 recompute sums, 6
are gradients), plus products with one column: 1 and 2 of 2 M. Bytes are exact for what autograd
keeps, and a prediction for the working memory of the backward pass.

Shapes: G genes, T top genes, C base width, D large width, N tokens and W width of a stack, I = H K
heads times head width, M random features, F feed-forward width, E edges.
"""

from __future__ import annotations

import math

from sclong_ds.config import ModelConfig, PerformerConfig


def _stacks(model: ModelConfig, n_genes: int) -> dict[str, tuple[PerformerConfig, int, int]]:
    """Return sizes, width W and tokens N of each Performer stack."""
    top = model.top_seq_len
    return {
        "large_encoder": (model.large_encoder, model.large_dim, top),
        "mini_encoder": (model.mini_encoder, model.base_dim, n_genes - top),
        "decoder": (model.decoder, model.base_dim, n_genes),
    }


def parameter_shapes(model: ModelConfig, n_genes: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of all parameters, by part of `ScLong`.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
    """
    c, d, hidden = model.base_dim, model.large_dim, model.expression_hidden
    mlp_head: list[tuple[int, ...]] = [(c, c), (c,)] if model.head == "mlp" else []
    shapes: dict[str, list[tuple[int, ...]]] = {
        "gene_encoder": [(n_genes, c)] * 2 + [(c, c), (c,)] * model.gene_encoder_layers,
        "expression_encoder": [(hidden, 1), (hidden,), (c, hidden), (c,), (c,), (c,), (c,)],
        "to_large": [(d, c), (d,), (d,), (d,)],
        "large_encoder": [],
        "from_large": [(c, d), (c,), (c,), (c,)],
        "mini_encoder": [],
        "decoder": [],
        "norm": [(c,), (c,)],
        "head": [*mlp_head, (c,), (n_genes if model.gene_bias else 1,)],
    }
    for name, (stack, width, _) in _stacks(model, n_genes).items():
        inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
        layer: list[tuple[int, ...]] = [
            (3 * inner, width),
            (width, inner),
            (wide, width),
            (width, wide),
            (wide,),
        ]
        layer += [(width,)] * 6 + ([(3 * inner,)] if model.qkv_bias else [])
        shapes[name] = layer * stack.depth
    return shapes


def parameter_counts(model: ModelConfig, n_genes: int) -> dict[str, int]:
    """Return the number of parameters by part of `ScLong`, exactly.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
    """
    return {
        part: sum(map(math.prod, shapes))
        for part, shapes in parameter_shapes(model, n_genes).items()
    }


def flops_per_cell(model: ModelConfig, n_genes: int, n_edges: int = 0) -> dict[str, int]:
    """Return the FLOPs of one cell's forward pass by part, as the plain torch kernels do it.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        n_edges: Edges E of the gene graph.

    Returns:
        FLOPs of matrix products; `gene_encoder` runs once per micro-batch, not once per cell.
    """
    return {part: forward for part, (forward, _) in _flops(model, n_genes, n_edges).items()}


def backward_flops_per_cell(model: ModelConfig, n_genes: int, n_edges: int = 0) -> dict[str, int]:
    """Return the FLOPs of one cell's backward pass, layers recomputed by checkpointing left out.

    Arguments and result as `flops_per_cell`.
    """
    return {part: backward for part, (_, backward) in _flops(model, n_genes, n_edges).items()}


def training_flops_per_cell(
    model: ModelConfig, n_genes: int, n_edges: int = 0, *, micro_batch: int = 1
) -> float:
    """Return forward and backward FLOPs of one cell, with its share of the gene encoder.

    Layers recomputed by activation checkpointing do not count, so that the utilisation (MFU) of
    runs with and without it can be compared.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        n_edges: Edges E of the gene graph.
        micro_batch: Cells per forward pass.
    """
    parts = {part: sum(both) for part, both in _flops(model, n_genes, n_edges).items()}
    return sum(parts.values()) - parts["gene_encoder"] * (1 - 1 / micro_batch)


def recompute_flops_per_cell(model: ModelConfig, n_genes: int) -> int:
    """Return the extra FLOPs of activation checkpointing: every Performer layer once more."""
    forward = flops_per_cell(model, n_genes)
    return sum(forward[name] for name in _stacks(model, n_genes))


def _flops(model: ModelConfig, n_genes: int, n_edges: int) -> dict[str, tuple[int, int]]:
    """Return (forward, backward) FLOPs by part."""
    g, c, d, hidden = n_genes, model.base_dim, model.large_dim, model.expression_hidden
    sparse = 2 * n_edges * c * model.gene_encoder_layers
    graph = 2 * g * c * c * model.gene_encoder_layers
    lift, expand = 2 * g * hidden, 2 * g * hidden * c
    cross = 2 * model.top_seq_len * c * d
    mlp = 2 * g * c * c if model.head == "mlp" else 0
    flops = {
        # The adjacency has no gradient: its backward is one sparse product.
        "gene_encoder": (graph + sparse, 2 * graph + sparse),
        # The expression values have no gradient: the first layer's backward is the weight's alone.
        "expression_encoder": (lift + expand, lift + 2 * expand),
        "to_large": (cross, 2 * cross),
        "from_large": (cross, 2 * cross),
        # The last product is with a vector; its backward is one such product and an outer product.
        "head": (mlp + 2 * g * c, 2 * mlp + 2 * g * c),
    }
    for name, (stack, width, tokens) in _stacks(model, n_genes).items():
        inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
        linear = 2 * tokens * (4 * inner * width + 2 * wide * width)
        column = 2 * tokens * stack.heads * stack.features()
        dot = column * stack.dim_head
        flops[name] = (
            stack.depth * (linear + 4 * dot + column),
            stack.depth * (2 * linear + 10 * dot + 2 * column),
        )
    return flops


def activation_bytes(
    model: ModelConfig, n_genes: int, *, element_bytes: int, recompute: bool
) -> dict[str, int]:
    """Return what autograd keeps of one cell from forward to backward, by part.

    Per token of a Performer layer: inputs of both norms (W each), of the linear layers (W, I, W, F)
    and of GELU (F), q, k and v (3 I), and two fp32 statistics per norm; with recompute the layer's
    input alone (W).

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.

    Returns:
        Bytes per cell; the split between cells is exact in fp32 for micro-batches above 1.
    """
    e, g, c, top = element_bytes, n_genes, model.base_dim, model.top_seq_len
    stats = 8
    parts = {
        "batch_and_loss": (8 + 2) * g + (2 * g if e == 2 else 0),
        "expression_encoder": g * (model.expression_hidden * e + c * e + stats),
        # Cells in order of expression, two int64 permutations, the top genes that to_large reads.
        "order": g * (c * e + 16) + top * c * e,
        "to_large": top * (model.large_dim * e + stats),
        "from_large": top * ((model.large_dim + c) * e + stats),
        "norm": g * (c * e + stats),
        "head": g * c * e * (3 if model.head == "mlp" else 1),
    }
    for name, (stack, width, tokens) in _stacks(model, n_genes).items():
        layer = width * e if recompute else _layer_bytes(stack, width, e)
        # The first input of the mini encoder is a view of the ordered cells.
        shared = tokens * width * e if name == "mini_encoder" else 0
        parts[name] = stack.depth * tokens * layer - shared
    return parts


def _layer_bytes(stack: PerformerConfig, width: int, e: int) -> int:
    """Return what one token of one layer keeps without recompute, bytes."""
    inner = stack.heads * stack.dim_head
    return e * (4 * width + 4 * inner + 2 * stack.ff_mult * width) + 16


def peak_activation_bytes(
    model: ModelConfig, n_genes: int, *, micro_batch: int, element_bytes: int, recompute: bool
) -> int:
    """Predict the peak of activations and working memory in one pass with the plain torch kernels.

    Three moments can be the highest: the end of the forward pass; in the backward pass of a layer,
    its feed-forward block (gradients on both sides of GELU) or its attention (q, k, v and their
    gradients of all cells, and of one cell in fp32, with three times its features).

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        micro_batch: Cells per forward pass.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.

    Returns:
        Bytes.
    """
    e = element_bytes
    kept = activation_bytes(model, n_genes, element_bytes=e, recompute=recompute)
    stored = sum(kept.values())
    peak = micro_batch * stored
    for stack, width, tokens in _stacks(model, n_genes).values():
        inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
        # Freed before: the head. Counted anew: what this layer itself keeps, but for its input.
        own = 0 if recompute else tokens * (_layer_bytes(stack, width, e) - width * e)
        others = stored - kept["head"] - own
        feed_forward = e * tokens * (4 * width + 4 * inner + 3 * wide)
        attention = e * tokens * (3 * width + 7 * inner)
        one_cell = 4 * stack.heads * tokens * (3 * stack.features() + 8 * stack.dim_head)
        peak = max(
            peak,
            micro_batch * (others + feed_forward),
            micro_batch * (others + attention) + one_cell,
        )
    return peak
