"""What follows from the shapes of `ScLong`: its parameters, and the FLOPs of a cell.

Parameters and FLOPs are exact for the plain torch kernels (`kernels/reference.py`). FLOPs are those
of matrix products, 2 m n k each; backward is 2 x forward for linear layers. FAVOR+ has, per token
and head, 4 dots of 2 K M in forward and 10 in backward (2 recompute features, 2 recompute sums, 6
are gradients), plus in backward one product with a row, 2 M. Softmax attention, which torch
computes in blocks, has 2 dots of 2 K N in forward and 5 in backward (1 recomputes scores).

With `model.zero_genes` a cell has n_expressed + zero_genes tokens, and the last decoder layer runs
at all of them; None stands for all genes, an upper bound. With `model.routing: expressed` the large
encoder reads n_expressed genes of a cell, the expected number of expressed ones, and top_seq_len at
most; None stands for top_seq_len, an upper bound. FLOPs are linear in it except for softmax
attention and cells above top_seq_len, so that those of a mean are the mean. n_wanted is the number
of genes that are predicted (`positions` of `ScLong.forward`); None: all.

A part that the configuration leaves out is in none of the results.

Shapes: G genes, T genes of the large encoder, P predicted genes, C base width, D large width, N
tokens and W width of a stack (of the model: N = G, or G + 1 with the pad token), I = H K heads
times head width, M random features, F feed-forward width, E edges.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from sclong_ds.config.sections import ModelConfig, PerformerConfig

FAVOR_BLOCK = 2**20
"""Bytes of features in work at a time in the torch backend of FAVOR+."""
Products = Literal["precision", "bf16", "fp8"]
"""`engine.linear_products`."""


class Rounded(NamedTuple):
    """Linear layers whose products are in fewer bits (`engine.linear_products`), of one cell."""

    flops: int
    """Of their forward pass."""
    elements: int
    """Of their inputs and outputs."""
    weights: int
    """Of a micro-batch, whatever its size."""


def top_genes(model: ModelConfig, n_expressed: int | None = None) -> int:
    """Return how many genes T of a cell the large encoder reads.

    Args:
        model: The `model` section.
        n_expressed: Expected number of expressed genes; only read with `model.routing: expressed`.
    """
    if model.contextual_encoder == "mini":
        return 0
    if model.routing == "top" or n_expressed is None:
        return model.top_seq_len
    return min(n_expressed, model.top_seq_len)


def read_tokens(model: ModelConfig, n_genes: int, n_expressed: int | None = None) -> int:
    """Return how many tokens of a cell are read.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        n_expressed: Expected number of expressed genes; only read with `model.zero_genes`.
    """
    if model.zero_genes is None or n_expressed is None:
        return n_genes + model.pad_token
    return min(n_expressed + model.zero_genes, n_genes)


def stacks(
    model: ModelConfig, n_genes: int, n_expressed: int | None = None
) -> dict[str, tuple[PerformerConfig, int, int]]:
    """Return sizes, width W and tokens N of each Performer stack that the model has, by name.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        n_expressed: Expected number of expressed genes of a cell.
    """
    tokens, top = read_tokens(model, n_genes, n_expressed), top_genes(model, n_expressed)
    found = {}
    if model.contextual_encoder != "mini":
        found["large_encoder"] = (model.large_encoder, model.large_dim, top)
    if model.contextual_encoder != "large":
        found["mini_encoder"] = (model.mini_encoder, model.base_dim, tokens - top)
    return found | {"decoder": (model.decoder, model.base_dim, tokens)}


def parameter_shapes(model: ModelConfig, n_genes: int) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of all parameters, by part of `ScLong`.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
    """
    c, d, hidden = model.base_dim, model.large_dim, model.expression_hidden
    tokens = n_genes + model.pad_token
    mlp_head: list[tuple[int, ...]] = [(c, c), (c,)] if model.head == "mlp" else []
    gene_vectors: list[tuple[int, ...]] = [(tokens, c)] if model.use_gene_vectors else []
    if model.gene_encoder != "none":
        gene_vectors += [(tokens, c), *[(c, c), (c,)] * model.gene_encoder_layers]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "gene_encoder": gene_vectors,
        "expression_encoder": [(hidden, 1), (hidden,), (c, hidden), (c,), (c,), (c,), (c,)],
    }
    if model.contextual_encoder != "mini":
        shapes["to_large"] = [(d, c), (d,), (d,), (d,)]
        shapes["large_encoder"] = []
        shapes["from_large"] = [(c, d), (c,), (c,), (c,)]
    for name, (stack, width, _) in stacks(model, n_genes).items():
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
    cell: dict[str, list[tuple[int, ...]]] = {}
    slopes: list[tuple[int, ...]] = []
    if model.cell_vector != "none":
        slopes = [(n_genes, c)]
        cell["cell_vector"] = [(n_genes,), (n_genes, c), (c,), (c,), (2 * c, c), (2 * c,)]
        cell["cell_vector"] += [(c, 2 * c), (c,)]
    if model.cell_offset == "negative_binomial":
        slopes = [(n_genes,), *slopes]
    zeros = {"zero_head": [(n_genes,), (n_genes,), (n_genes, c)]} if model.zero_head else {}
    return (
        shapes
        | {"norm": [(c,), (c,)]}
        | cell
        | {"head": [*mlp_head, (c,), (n_genes if model.gene_bias else 1,), *slopes]}
        | zeros
    )


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


def flops_per_cell(
    model: ModelConfig,
    n_genes: int,
    n_edges: int = 0,
    *,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
) -> dict[str, int]:
    """Return the FLOPs of one cell's forward pass by part, as the plain torch kernels do it.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        n_edges: Edges E of the gene graph.
        n_expressed: Expected number of expressed genes of a cell.
        n_wanted: Predicted genes P; None: all.

    Returns:
        FLOPs of matrix products; `gene_encoder` runs once per micro-batch, not once per cell.
    """
    both = _flops(model, n_genes, n_edges, n_expressed, n_wanted)
    return {part: forward for part, (forward, _) in both.items()}


def backward_flops_per_cell(
    model: ModelConfig,
    n_genes: int,
    n_edges: int = 0,
    *,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
) -> dict[str, int]:
    """Return the FLOPs of one cell's backward pass, layers recomputed by checkpointing left out.

    Arguments and result as `flops_per_cell`.
    """
    both = _flops(model, n_genes, n_edges, n_expressed, n_wanted)
    return {part: backward for part, (_, backward) in both.items()}


def training_flops_per_cell(
    model: ModelConfig,
    n_genes: int,
    n_edges: int = 0,
    *,
    micro_batch: int = 1,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
) -> float:
    """Return forward and backward FLOPs of one cell, with its share of the gene encoder.

    Layers recomputed by activation checkpointing do not count, so that the utilisation (MFU) of
    runs with and without it can be compared.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        n_edges: Edges E of the gene graph.
        micro_batch: Cells per run of the gene encoder.
        n_expressed: Expected number of expressed genes of a cell.
        n_wanted: Predicted genes P; None: all.
    """
    both = _flops(model, n_genes, n_edges, n_expressed, n_wanted)
    parts = {part: sum(ways) for part, ways in both.items()}
    return sum(parts.values()) - parts["gene_encoder"] * (1 - 1 / micro_batch)


def recompute_flops_per_cell(
    model: ModelConfig,
    n_genes: int,
    *,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
) -> int:
    """Return the extra FLOPs of activation checkpointing: every Performer layer once more."""
    forward = flops_per_cell(model, n_genes, n_expressed=n_expressed, n_wanted=n_wanted)
    return sum(forward[name] for name in stacks(model, n_genes))


def _flops(
    model: ModelConfig, n_genes: int, n_edges: int, n_expressed: int | None, n_wanted: int | None
) -> dict[str, tuple[int, int]]:
    """Return (forward, backward) FLOPs by part."""
    c, hidden = model.base_dim, model.expression_hidden
    tokens = n_genes + model.pad_token
    predicted = n_genes if n_wanted is None else n_wanted
    layers = 0 if model.gene_encoder == "none" else model.gene_encoder_layers
    sparse, graph = 2 * n_edges * c * layers, 2 * tokens * c * c * layers
    read = read_tokens(model, n_genes, n_expressed)
    lift, expand = 2 * read * hidden, 2 * read * hidden * c
    cross = 2 * top_genes(model, n_expressed) * c * model.large_dim
    mlp = 2 * predicted * c * c if model.head == "mlp" else 0
    vector = 2 * predicted * c
    flops = {
        # The adjacency has no gradient: its backward is one sparse product.
        "gene_encoder": (graph + sparse, 2 * graph + sparse),
        # The expression values have no gradient: the first layer's backward is the weight's alone.
        "expression_encoder": (lift + expand, lift + 2 * expand),
        # The last product is with a vector; its backward is one such product and an outer product.
        "head": (mlp + vector, 2 * mlp + vector),
    }
    if model.cell_vector != "none":
        # Values less their centres, whose gradient is wanted too, with a vector each; the MLP; and
        # at the head a product of each predicted gene's weights with the cell's vector.
        summed, body = 2 * n_genes * c, 2 * 2 * c * 2 * c
        flops["cell_vector"] = (summed + body, 2 * summed + 2 * body)
        flops["head"] = (mlp + 2 * vector, 2 * mlp + vector + 2 * vector)
    if model.zero_head:
        flops["zero_head"] = (vector, 2 * vector)
    if model.contextual_encoder != "mini":
        flops |= {"to_large": (cross, 2 * cross), "from_large": (cross, 2 * cross)}
    for name, (stack, width, n) in stacks(model, n_genes, n_expressed).items():
        rows = _last_rows(model, name, n, n_wanted)
        ways = zip(
            _layer_flops(model, stack, width, n, n),
            _layer_flops(model, stack, width, n, rows),
            strict=True,
        )
        forward, backward = ((stack.depth - 1) * layer + last for layer, last in ways)
        flops[name] = (forward, backward)
    return flops


def _last_rows(model: ModelConfig, name: str, n: int, n_wanted: int | None) -> int:
    """Return the tokens of n at which a stack's last layer computes all but keys and values."""
    at_targets = name == "decoder" and n_wanted is not None and model.zero_genes is None
    return n_wanted if at_targets and n_wanted is not None else n


def _layer_flops(
    model: ModelConfig, stack: PerformerConfig, width: int, n: int, rows: int
) -> tuple[int, int]:
    """Return (forward, backward) FLOPs of a layer with keys of n tokens and all else of `rows`."""
    inner = stack.heads * stack.dim_head
    linear = sum(2 * tokens * i * o for tokens, i, o in _linears(stack, width, n, rows))
    if model.attention_of(stack) == "softmax":
        dot = 2 * n * rows * inner
        return linear + 2 * dot, 2 * linear + 5 * dot
    row = 2 * rows * stack.heads * stack.features()
    of_key = 2 * inner * stack.features()
    keys, queries = n * of_key, row * stack.dim_head
    # The block of keys that holds each head's maximum, once more.
    maxima = min(n, max(16, FAVOR_BLOCK // (4 * min(stack.heads, 8) * stack.features()))) * of_key
    backward = 2 * linear + 4 * keys + maxima + 4 * queries + row
    return linear + 2 * keys + 2 * queries, backward


def _linears(stack: PerformerConfig, width: int, n: int, rows: int) -> list[tuple[int, int, int]]:
    """Return tokens, input and output width of a layer's linear parts, as `_layer_flops`."""
    inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
    of_rows = [(width, inner), (inner, width), (width, wide), (wide, width)]
    return [(n, width, 2 * inner), *((rows, i, o) for i, o in of_rows)]


def rounds(products: Products, stack_name: str) -> bool:
    """Return whether a stack's linear layers multiply in fewer bits than the model's precision."""
    return products == "bf16" or (products == "fp8" and stack_name == "large_encoder")


def rounded_sizes(
    model: ModelConfig,
    n_genes: int,
    products: Products,
    *,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
) -> Rounded:
    """Return the sizes of what is multiplied in fewer bits.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        products: `engine.linear_products`.
        n_expressed: Expected number of expressed genes of a cell.
        n_wanted: Predicted genes P; None: all.
    """
    parts = []
    for name, (stack, width, n) in stacks(model, n_genes, n_expressed).items():
        if rounds(products, name):
            rows = _last_rows(model, name, n, n_wanted)
            parts += _linears(stack, width, n, n) * (stack.depth - 1)
            parts += _linears(stack, width, n, rows)
    return Rounded(
        sum(2 * tokens * i * o for tokens, i, o in parts),
        sum(tokens * (i + o) for tokens, i, o in parts),
        sum(i * o for _, i, o in parts),
    )
