"""The random features of FAVOR+: drawn, redrawn and kept in files.

A draw is a pure function of (projection seed, redraw, stack, layer). An exported model keeps its
features in `random_features.safetensors`, since another processor may round a draw differently.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.reference import random_features
from sclong_ds.config.sections import ModelConfig, PerformerConfig

STACKS = {
    "dual": ("large_encoder", "mini_encoder", "decoder"),
    "large": ("large_encoder", "decoder"),
    "mini": ("mini_encoder", "decoder"),
}
"""Performer stacks by `model.contextual_encoder`."""


def redraw_index(model: ModelConfig, step: int) -> int:
    """Return which draw of the random features belongs to the state after a number of steps."""
    interval = model.feature_redraw_interval
    return step // interval if interval else 0


def layer_features(
    config: PerformerConfig, model: ModelConfig, *, name: str, layer: int, redraw_index: int
) -> Tensor:
    """Draw the random features of one layer, the same on every rank and machine.

    Args:
        config: The stack's sizes.
        model: Seed and kind of the features.
        name: Name of the stack (`large_encoder`).
        layer: Index of the layer in the stack.
        redraw_index: How many times the features were redrawn before.

    Returns:
        (M, K) float32 on the CPU.
    """
    key = zlib.crc32(f"{model.projection_seed}/{name}/{layer}/{redraw_index}".encode())
    generator = torch.Generator().manual_seed(key)
    return random_features(
        config.features(), config.dim_head, generator=generator, kind=model.random_features
    )


def favor_stacks(model: ModelConfig) -> list[str]:
    """Return the names of the stacks whose attention is FAVOR+."""
    return [
        name
        for name in STACKS[model.contextual_encoder]
        if model.attention_of(getattr(model, name)) == "favor"
    ]


def drawn_features(model: ModelConfig, redraw_index: int) -> dict[str, Tensor]:
    """Draw the random features of all layers with FAVOR+ that a model has.

    Args:
        model: The `model` section.
        redraw_index: How many times the features were redrawn before.

    Returns:
        (M, K) float32 on the CPU by `stack.layer`.
    """
    return {
        f"{name}.{layer}": layer_features(
            getattr(model, name), model, name=name, layer=layer, redraw_index=redraw_index
        )
        for name in favor_stacks(model)
        for layer in range(getattr(model, name).depth)
    }


def stack_features(
    features: Mapping[str, Tensor], name: str, sizes: PerformerConfig
) -> list[Tensor]:
    """Return the given random features (M, K) of one stack, a tensor per layer.

    Args:
        features: (M, K) by `stack.layer`.
        name: Name of the stack.
        sizes: Its sizes.

    Raises:
        ValueError: A layer is missing or has another shape.
    """
    wanted = (sizes.features(), sizes.dim_head)
    for layer in range(sizes.depth):
        key = f"{name}.{layer}"
        found = tuple(features[key].shape) if key in features else None
        if found != wanted:
            raise ValueError(
                f"model.random_features_file: {key} has the shape {found}, must be {wanted}: "
                f"(nb_features, dim_head); use the file that belongs to the model"
            )
    return [features[f"{name}.{layer}"] for layer in range(sizes.depth)]
