"""Performer: a stack of pre-norm layers with FAVOR+ attention, or softmax for comparison.

The random features are no buffers: each is a pure function of (seed, stack, layer, redraw index),
drawn on the CPU when first needed; an imported model brings its own for redraw index 0. So every
rank has the same features, a resumed run has those it left off with, and neither a cast of the
model to bf16 nor ZeRO touches them. Source: arXiv:2009.14794; layer layout of the published scLong
model.

Shapes: B cells, N tokens, C width of the stack, H heads, K head width, M random features.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.favor_attention import Backend, favor_attention_packed
from kernels.reference import Scope, random_features
from sclong_ds.config import ModelConfig, PerformerConfig

STACKS = {
    "dual": ("large_encoder", "mini_encoder", "decoder"),
    "large": ("large_encoder", "decoder"),
    "mini": ("mini_encoder", "decoder"),
}
"""Performer stacks by `model.contextual_encoder`."""


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


def drawn_features(model: ModelConfig, redraw_index: int) -> dict[str, Tensor]:
    """Draw the random features of all layers that a model has.

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
        for name in STACKS[model.contextual_encoder]
        for layer in range(getattr(model, name).depth)
    }


class SelfAttention(nn.Module):
    """Multi-head self-attention through random features, or exact."""

    def __init__(self, dim: int, config: PerformerConfig, *, qkv_bias: bool, scope: Scope) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.dim_head, self.scope = config.heads, config.dim_head, scope
        self.backend: Backend = "auto"
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, features: Tensor | None) -> Tensor:
        """Return the attention output (B, N, C) for tokens (B, N, C).

        Args:
            x: Tokens (B, N, C).
            features: Random features (M, K) of FAVOR+; None computes softmax attention.
        """
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, self.dim_head))
        if features is None:
            heads_first = (t.transpose(1, 2) for t in qkv.unbind(2))
            out = nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        else:
            out = favor_attention_packed(qkv, features, scope=self.scope, backend=self.backend)
        return self.to_out(out.flatten(2))


class PerformerLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the stream."""

    def __init__(self, dim: int, config: PerformerConfig, *, qkv_bias: bool, scope: Scope) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, config, qkv_bias=qkv_bias, scope=scope)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim * config.ff_mult), nn.GELU(), nn.Linear(dim * config.ff_mult, dim)
        )

    def forward(self, x: Tensor, features: Tensor | None) -> Tensor:
        """Return the stream (B, N, C) after this layer."""
        x = x + self.attention(self.attention_norm(x), features)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Performer(nn.Module):
    """A stack of Performer layers.

    Args:
        dim: Width C of the stream.
        config: Depth, heads, head width, random features, feed-forward factor.
        model: What all stacks share: biases, kind of attention, features and stabiliser.
        name: Name of the stack; part of the seed of its random features.
        first_features: (M, K) per layer to use at redraw index 0; None: they are drawn.
    """

    def __init__(
        self,
        dim: int,
        config: PerformerConfig,
        model: ModelConfig,
        *,
        name: str,
        first_features: list[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.name, self.model = config, name, model
        self.redraw_index = 0
        self.recompute = False
        self.layers = nn.ModuleList(
            PerformerLayer(dim, config, qkv_bias=model.qkv_bias, scope=model.stabiliser_scope)
            for _ in range(config.depth)
        )
        self._first_features = first_features
        self._drawn: tuple[int, torch.device, list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream (B, N, C) after all layers."""
        for i, layer in enumerate(self.layers):
            features = self.features(x.device)[i] if self.model.attention == "favor" else None
            if self.recompute and torch.is_grad_enabled():
                # The reentrant form: the other one compares tensor shapes between the two forward
                # passes and sees the emptied parameters of ZeRO-3.
                x = checkpoint(layer, x, features, use_reentrant=True, preserve_rng_state=False)
            else:
                x = layer(x, features)
        return x

    def features(self, device: torch.device) -> list[Tensor]:
        """Return the layers' random features (M, K) on `device`, drawing them after a redraw."""
        if self._drawn is None or self._drawn[:2] != (self.redraw_index, device):
            features = self._first_features if self.redraw_index == 0 else None
            if features is None:
                features = [
                    layer_features(
                        self.config,
                        self.model,
                        name=self.name,
                        layer=i,
                        redraw_index=self.redraw_index,
                    )
                    for i in range(self.config.depth)
                ]
            self._drawn = (self.redraw_index, device, [f.to(device) for f in features])
        return self._drawn[2]
