"""What follows from the shapes of `ScLong`: parameters, FLOPs, bytes that a step keeps of a cell.

Parameters and FLOPs are exact for the plain torch kernels (`kernels/reference.py`). FLOPs are those
of matrix products, 2 m n k each; backward is 2 x forward for linear layers. FAVOR+ has, per token
and head, 4 dots of 2 K M in forward and 10 in backward (2 recompute features, 2 recompute sums, 6
are gradients), plus in backward one product with a row, 2 M. Softmax attention, which torch
computes in blocks, has 2 dots of 2 K N in forward and 5 in backward (1 recomputes scores). Bytes
are exact for what autograd keeps, and a prediction for the working memory of the backward pass.

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

from sclong_ds.config.sections import COUNT_OFFSETS, POISSON_COUNTS, ModelConfig, PerformerConfig

_FAVOR_BLOCK = 2**20
"""Bytes of features in work at a time in the torch backend of FAVOR+."""


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
        at_targets = name == "decoder" and n_wanted is not None and model.zero_genes is None
        rows = n_wanted if at_targets and n_wanted is not None else n
        ways = zip(
            _layer_flops(model, stack, width, n, n),
            _layer_flops(model, stack, width, n, rows),
            strict=True,
        )
        forward, backward = ((stack.depth - 1) * layer + last for layer, last in ways)
        flops[name] = (forward, backward)
    return flops


def _layer_flops(
    model: ModelConfig, stack: PerformerConfig, width: int, n: int, rows: int
) -> tuple[int, int]:
    """Return (forward, backward) FLOPs of a layer with keys of n tokens and all else of `rows`."""
    inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
    linear = 2 * n * 2 * inner * width + 2 * rows * (2 * inner * width + 2 * wide * width)
    if model.attention_of(stack) == "softmax":
        dot = 2 * n * rows * inner
        return linear + 2 * dot, 2 * linear + 5 * dot
    row = 2 * rows * stack.heads * stack.features()
    of_key = 2 * inner * stack.features()
    keys, queries = n * of_key, row * stack.dim_head
    # The block of keys that holds each head's maximum, once more.
    maxima = min(n, max(16, _FAVOR_BLOCK // (4 * min(stack.heads, 8) * stack.features()))) * of_key
    backward = 2 * linear + 4 * keys + maxima + 4 * queries + row
    return linear + 2 * keys + 2 * queries, backward


def activation_bytes(
    model: ModelConfig,
    n_genes: int,
    *,
    element_bytes: int,
    recompute: bool,
    n_expressed: int | None = None,
    n_wanted: int | None = None,
) -> dict[str, int]:
    """Return what autograd keeps of one cell from forward to backward, by part.

    Per token of a Performer layer: inputs of both norms (W each), of the linear layers (W, I, W, F)
    and of GELU (F), q, k and v (3 I), and two fp32 statistics per norm; softmax attention also
    keeps the logarithm of each row's sum (H, fp32), FAVOR+ sums over the keys. With recompute the
    layer's input alone (W). The last decoder layer counts as if all tokens were wanted.

    Args:
        model: The `model` section.
        n_genes: Number of genes G.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: Whether activation checkpointing is on.
        n_expressed: Expected number of expressed genes of a cell.
        n_wanted: Predicted genes P; None: all.

    Returns:
        Bytes per cell; the split between cells is exact in fp32 for micro-batches above 1.
    """
    e, c, top = element_bytes, model.base_dim, top_genes(model, n_expressed)
    all_tokens, stats = n_genes + model.pad_token, 8
    wanted = n_genes if n_wanted is None else n_wanted
    n, some = read_tokens(model, n_genes, n_expressed), model.zero_genes is not None
    given = n if some else all_tokens
    parts = {
        # The values and the mask as the model reads them; the error and its weights.
        "batch_and_loss": (4 + 1) * given + (4 + 1) * wanted + (2 * n if e == 2 else 0),
        "expression_encoder": n * (model.expression_hidden * e + c * e + stats),
        "norm": n * (c * e + stats),
        "head": _head_bytes(model, n_genes, n_wanted, e),
    }
    parts |= _cell_parts(model, n_genes, wanted, e)
    packed = model.routing == "expressed"
    if model.contextual_encoder != "mini":
        # Two int64 permutations, the top genes that to_large reads: of packed cells a view.
        view = packed and model.contextual_encoder == "large"
        parts["order"] = given * 16 + (n if view else top) * c * e
        parts["to_large"] = top * (model.large_dim * e + stats)
        parts["from_large"] = top * ((model.large_dim + c) * e + stats)
    for name, (stack, width, tokens) in stacks(model, n_genes, n_expressed).items():
        layer, sums = width * e, 0
        if not recompute:
            layer = _layer_bytes(model, stack, width, e) + _joined_width(model, name, stack) * e
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
    visible = 0 if model.cell_offset == "visible" else n_genes
    return visible + n_genes * e + 7 * model.base_dim * e + 8


def _layer_bytes(model: ModelConfig, stack: PerformerConfig, width: int, e: int) -> int:
    """Return what one token of one layer keeps without recompute, bytes."""
    inner = stack.heads * stack.dim_head
    row_sums = 4 * stack.heads if model.attention_of(stack) == "softmax" else 0
    return e * (4 * width + 4 * inner + 2 * stack.ff_mult * width) + 16 + row_sums


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
    rows = min(stack.heads * tokens, _FAVOR_BLOCK // (4 * m))
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
    """
    e = element_bytes
    kept = activation_bytes(
        model,
        n_genes,
        element_bytes=e,
        recompute=recompute,
        n_expressed=n_expressed,
        n_wanted=n_wanted,
    )
    stored = sum(kept.values())
    # The gradients of the predictions and of what they are made from: all else is still kept.
    wanted = n_genes if n_wanted is None else n_wanted
    counts = 2 * 4 * POISSON_COUNTS if model.cell_offset in COUNT_OFFSETS else 0
    peak = micro_batch * (stored + wanted * (4 + model.base_dim * e + counts))
    for name, (stack, width, tokens) in stacks(model, n_genes, n_expressed).items():
        inner, wide = stack.heads * stack.dim_head, stack.ff_mult * width
        # Freed before: the head. Counted again: what this layer itself keeps, except its input.
        joined = _joined_width(model, name, stack)
        layer = _layer_bytes(model, stack, width, e) + joined * e
        own = 0 if recompute else tokens * (layer - width * e)
        others = stored - kept["head"] - own
        feed_forward = e * tokens * (4 * width + 4 * inner + joined + 3 * wide)
        attention = e * tokens * (3 * width + 7 * inner + joined)
        favor = model.attention_of(stack) == "favor"
        one_block = _favor_block_bytes(stack, tokens) if favor else 0
        peak = max(
            peak,
            micro_batch * (others + feed_forward),
            micro_batch * (others + attention) + one_block,
        )
    return peak
