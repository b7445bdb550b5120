"""The published scLong checkpoint in this project's terms: names, sizes, weights, random features.

`reference_config` reads the architecture off a released state dict, `ReferenceWeights` shows the
state dict under the names of `ScLong`, `reference_features` are its random features,
`check_hyper_parameters` compares the constructor's arguments with the shapes. Tensors are converted
one at a time, when asked for, and keep their type (pos_emb is float64).

    released                                     here
    token_emb.fc1, fc2; token_norm; mask_emb     expression_encoder.mlp.0, 2; norm; mask_vector
    pos_emb.emb; go_conv.emb; .sim_layers.I      gene_encoder.vectors; table; linears.I
    STACK.net.layers.L.0.norm                    STACK.layers.L.attention_norm
    STACK.net.layers.L.0.fn.to_q, to_k, to_v     STACK.layers.L.attention.to_qkv
    STACK.net.layers.L.0.fn.to_out               STACK.layers.L.attention.to_out
    STACK.net.layers.L.1.norm, .1.fn.fn.w1, w2   STACK.layers.L.feed_forward_norm, feed_forward.0, 2
    base_to_large, large_in_norm                 to_large.0, 1
    large_to_base, large_to_base_out_norm        from_large.0, 1
    decode_norm; exp_to_out                      norm; head

The released model has one token more than genes (`model.pad_token`). Counters of redraws
(STACK.calls_since_last_redraw) say nothing about a model whose features stay, and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sclong_ds.config.sections import ModelConfig, PerformerConfig

STACKS = {"large_encoder": "large_enc", "mini_encoder": "mini_enc", "decoder": "dec"}
"""Our and released name of a stack, and the prefix of its constructor arguments."""
_ONE_ROW = ("expression_encoder.mask_vector", "head.weight")
"""Vectors here, matrices of one row there."""
_INITIAL = {"device", "gene2vec_file", "go_use_gene2vec", "g2v_position_emb"}
"""Constructor arguments that decide where weights lie and start, not what they mean."""
_OTHER_ATTENTION = ("causal", "generalized_attention", "no_projection")
"""Options of Performers that leave no trace in the weights and are not built here."""


def reference_config(state: Mapping[str, Tensor], *, top_seq_len: int) -> ModelConfig:
    """Return the architecture of a released state dict.

    Args:
        state: Released state dict; only names and shapes are used.
        top_seq_len: Tokens of the large encoder, which no shape tells.

    Returns:
        The `model` section that behaves as the released code, for one cell at a time.

    Raises:
        ValueError: A name is missing.
    """
    layers = [n for n in state if n.startswith("go_conv.sim_layers.") and n.endswith(".lin.weight")]
    stacks = {name: _stack(state, name) for name in STACKS}
    return ModelConfig(
        base_dim=_shape(state, "token_norm.weight")[0],
        large_dim=_shape(state, "base_to_large.weight")[0],
        top_seq_len=top_seq_len,
        routing="top",
        zero_genes=None,
        expression_hidden=_shape(state, "token_emb.fc1.weight")[0],
        mask_vector_max_norm=1.0,
        pad_token=True,
        gene_encoder="graph" if layers else "none",
        gene_encoder_layers=max(1, len(layers)),
        gene_graph=None,
        use_gene_vectors="pos_emb.emb.weight" in state,
        gene_vectors=None,
        contextual_encoder="dual",
        **stacks,
        qkv_bias="decoder.net.layers.0.0.fn.to_q.bias" in state,
        head="linear",
        head_init="random",
        gene_bias=False,
        cell_offset="none",
        cell_vector="none",
        zero_head=False,
        attention="favor",
        favor_eps=1e-4,
        random_features="orthogonal_qr",
        random_features_file=None,
        stabiliser_scope="sample",
        feature_redraw_interval=0,
        projection_seed=0,
    )


def reference_features(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the random features (M, K) of a released state dict by `stack.layer`."""
    features = {}
    for name in STACKS:
        stack = getattr(config, name)
        wanted = (stack.features(), stack.dim_head)
        for layer in range(stack.depth):
            source = _projection(name, layer)
            _check_shape(source, _shape(state, source), wanted)
            features[f"{name}.{layer}"] = state[source]
    return features


def check_hyper_parameters(
    given: Mapping[str, Any], config: ModelConfig, *, n_tokens: int
) -> list[str]:
    """Check the constructor's arguments against the sizes that the weights have.

    Args:
        given: Arguments by released name; those that are absent are not checked.
        config: Architecture, from `reference_config`.
        n_tokens: Genes and the pad token.

    Returns:
        Names that are not known.

    Raises:
        ValueError: An argument and the weights disagree.
    """
    sizes: dict[str, int | float] = {
        "max_seq_len": n_tokens,
        "base_dim": config.base_dim,
        "large_dim": config.large_dim,
        "qkv_bias": config.qkv_bias,
        "go_num_layers": config.gene_encoder_layers if config.gene_encoder == "graph" else 0,
    }
    for name, prefix in STACKS.items():
        stack = getattr(config, name)
        sizes |= {f"{prefix}_{k}": getattr(stack, k) for k in ("depth", "heads", "dim_head")}
        if "nb_features" in given:
            drawn = dataclasses.replace(stack, nb_features=given["nb_features"]).features()
            _check_size("nb_features", drawn, stack.features(), f" in {name}")
    for key, size in sizes.items():
        if key in given:
            _check_size(key, given[key], size)
    for key in _OTHER_ATTENTION:
        if given.get(key, False) is not False:
            raise ValueError(f"{key} is {given[key]}: only models without it can be imported")
    threshold = given.get("mask_token_thres", -1)
    if not isinstance(threshold, (int, float)) or threshold >= 0:
        raise ValueError(f"mask_token_thres is {threshold}, must be < 0: values are >= 0")
    known = {*sizes, *_INITIAL, *_OTHER_ATTENTION, "top_seq_len", "nb_features", "mask_token_thres"}
    return sorted(set(given) - known - {"G_go", "G_go_weight"})


def _check_size(key: str, given: Any, found: int | float, where: str = "") -> None:
    if not isinstance(given, (int, float)) or given != found:
        raise ValueError(f"the hyper-parameter {key} is {given}, the weights have {found}{where}")


class ReferenceWeights(Mapping[str, Tensor]):
    """A released state dict under the names, shapes and packing of `ScLong`.

    Args:
        state: Released state dict.
        config: Its architecture, from `reference_config`.

    Attributes:
        unused: Released names that stand for no weight here (random features and their counters
            are left out).
    """

    def __init__(self, state: Mapping[str, Tensor], config: ModelConfig) -> None:
        self._state = state
        self._sources = released_names(config)
        used = {name for names in self._sources.values() for name in names}
        kept = {f"{stack}.calls_since_last_redraw" for stack in STACKS} | {
            _projection(stack, i) for stack in STACKS for i in range(getattr(config, stack).depth)
        }
        missing = sorted(used - set(state))
        if missing:
            raise ValueError(
                f"the state dict has no {missing[0]} ({len(missing)} of {len(used)} weights are "
                f"missing): it is not that of a released scLong model"
            )
        self.unused = sorted(set(state) - used - kept)

    @property
    def n_tokens(self) -> int:
        """Number of genes and the pad token."""
        tables = ("gene_encoder.vectors", "gene_encoder.table")
        source = next(self._sources[name][0] for name in tables if name in self._sources)
        return _shape(self._state, source)[0]

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check all shapes before any tensor is read.

        Args:
            shapes: Shape of every weight of `ScLong`.

        Raises:
            ValueError: A released tensor has another shape.
        """
        for name, sources in self._sources.items():
            rows, *rest = (1, *shapes[name]) if name in _ONE_ROW else shapes[name]
            for source in sources:
                found = tuple(self._state[source].shape)
                _check_shape(source, found, (rows // len(sources), *rest))

    def converted(self) -> dict[str, str]:
        """Return the released names of weights that are not float32, and their types."""
        names = (source for sources in self._sources.values() for source in sources)
        types = {name: self._state[name].dtype for name in names}
        return {n: str(t).removeprefix("torch.") for n, t in types.items() if t != torch.float32}

    def __getitem__(self, name: str) -> Tensor:
        """Return one weight of `ScLong`, packed from the released ones.

        Raises:
            ValueError: It holds values that are not finite in float32.
        """
        parts = [self._state[source] for source in self._sources[name]]
        for source, part in zip(self._sources[name], parts, strict=True):
            if not part.float().isfinite().all():
                raise ValueError(f"{source} holds values that are not finite")
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor[0] if name in _ONE_ROW else tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of `ScLong`."""
        return iter(self._sources)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self._sources)


def released_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the released name of every weight of `ScLong`; several are stacked along rows.

    Args:
        config: Architecture, from `reference_config`.
    """
    modules = {
        "expression_encoder.mlp.0": "token_emb.fc1",
        "expression_encoder.mlp.2": "token_emb.fc2",
        "expression_encoder.norm": "token_norm",
        "to_large.0": "base_to_large",
        "to_large.1": "large_in_norm",
        "from_large.0": "large_to_base",
        "from_large.1": "large_to_base_out_norm",
        "norm": "decode_norm",
    }
    names: dict[str, tuple[str, ...]] = {
        "expression_encoder.mask_vector": ("mask_emb.weight",),
        "head.weight": ("exp_to_out.weight",),
        "head.bias": ("exp_to_out.bias",),
    }
    if config.use_gene_vectors:
        names["gene_encoder.vectors"] = ("pos_emb.emb.weight",)
    if config.gene_encoder != "none":
        names["gene_encoder.table"] = ("go_conv.emb.weight",)
        for i in range(config.gene_encoder_layers):
            modules[f"gene_encoder.linears.{i}"] = f"go_conv.sim_layers.{i}.lin"
    for name in STACKS:
        for i in range(getattr(config, name).depth):
            ours, theirs = f"{name}.layers.{i}", _layer(name, i)
            modules |= {
                f"{ours}.attention_norm": f"{theirs}.0.norm",
                f"{ours}.attention.to_out": f"{theirs}.0.fn.to_out",
                f"{ours}.feed_forward_norm": f"{theirs}.1.norm",
                f"{ours}.feed_forward.0": f"{theirs}.1.fn.fn.w1",
                f"{ours}.feed_forward.2": f"{theirs}.1.fn.fn.w2",
            }
            for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
                packed = tuple(f"{theirs}.0.fn.to_{part}.{kind}" for part in "qkv")
                names[f"{ours}.attention.to_qkv.{kind}"] = packed
    for ours, theirs in modules.items():
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}
    return names


def _layer(stack: str, layer: int) -> str:
    return f"{stack}.net.layers.{layer}"


def _projection(stack: str, layer: int) -> str:
    return f"{_layer(stack, layer)}.0.fn.fast_attention.projection_matrix"


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ValueError(f"{name} has the shape {found}, must be {wanted}")


def _stack(state: Mapping[str, Any], name: str) -> PerformerConfig:
    """Return the sizes of one stack of a released state dict."""
    depth = 0
    while f"{_layer(name, depth)}.0.norm.weight" in state:
        depth += 1
    first = _layer(name, 0)
    features, dim_head = _shape(state, _projection(name, 0), ndim=2)
    wide, width = _shape(state, f"{first}.1.fn.fn.w1.weight", ndim=2)
    return PerformerConfig(
        depth=depth,
        heads=_shape(state, f"{first}.0.fn.to_q.weight")[0] // dim_head,
        dim_head=dim_head,
        nb_features=features,
        ff_mult=wide // width,
        attention=None,
    )


def _shape(state: Mapping[str, Tensor], name: str, *, ndim: int = 1) -> tuple[int, ...]:
    """Return the shape of a tensor of at least `ndim` axes, none of them empty."""
    if name not in state:
        raise ValueError(
            f"the state dict has no {name}: it is not that of a released scLong model "
            f"(its first name is {next(iter(state), 'absent')})"
        )
    shape = tuple(state[name].shape)
    if len(shape) < ndim or 0 in shape:
        raise ValueError(f"{name} has the shape {shape}, must have {ndim} axes, none of them empty")
    return shape
