"""Performer: a stack of pre-norm layers with FAVOR+ attention.

The random features are no buffers: each is a pure function of (seed, stack, layer, redraw index),
drawn on the CPU when first needed. So every rank has the same features, a resumed run has those it
left off with, and neither a cast of the model to bf16 nor ZeRO touches them. Source:
arXiv:2009.14794; layer layout of the published scLong model.

Shapes: B cells, N tokens, C width of the stack, H heads, K head width, M random features.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.reference import Scope, favor_attention, orthogonal_features
from sclong_ds.config import PerformerConfig


def layer_features(
    config: PerformerConfig, *, name: str, layer: int, seed: int, redraw_index: int
) -> Tensor:
    """Draw the random features of one layer, the same on every rank and machine.

    Args:
        config: The stack's sizes.
        name: Name of the stack (`large_encoder`).
        layer: Index of the layer in the stack.
        seed: `model.projection_seed`.
        redraw_index: How many times the features were redrawn before.

    Returns:
        (M, K) float32 on the CPU.
    """
    key = zlib.crc32(f"{seed}/{name}/{layer}/{redraw_index}".encode())
    generator = torch.Generator().manual_seed(key)
    return orthogonal_features(config.features(), config.dim_head, generator=generator)


class FavorSelfAttention(nn.Module):
    """Multi-head self-attention through random features."""

    def __init__(self, dim: int, config: PerformerConfig, *, qkv_bias: bool, scope: Scope) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.dim_head, self.scope = config.heads, config.dim_head, scope
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the attention output (B, N, C) for tokens (B, N, C) and features (M, K)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, self.dim_head))
        q, k, v = qkv.unbind(2)
        out = favor_attention(q, k, v, features, scope=self.scope)
        return self.to_out(out.flatten(2))


class PerformerLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the stream."""

    def __init__(self, dim: int, config: PerformerConfig, *, qkv_bias: bool, scope: Scope) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = FavorSelfAttention(dim, config, qkv_bias=qkv_bias, scope=scope)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim * config.ff_mult), nn.GELU(), nn.Linear(dim * config.ff_mult, dim)
        )

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the stream (B, N, C) after this layer."""
        x = x + self.attention(self.attention_norm(x), features)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Performer(nn.Module):
    """A stack of Performer layers.

    Args:
        dim: Width C of the stream.
        config: Depth, heads, head width, random features, feed-forward factor.
        name: Name of the stack; part of the seed of its random features.
        qkv_bias: Whether queries, keys and values have biases.
        scope: Scope of the key stabiliser.
        seed: Seed of the random features.
    """

    def __init__(
        self,
        dim: int,
        config: PerformerConfig,
        *,
        name: str,
        qkv_bias: bool,
        scope: Scope,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.name, self.seed = config, name, seed
        self.redraw_index = 0
        self.recompute = False
        self.layers = nn.ModuleList(
            PerformerLayer(dim, config, qkv_bias=qkv_bias, scope=scope) for _ in range(config.depth)
        )
        self._drawn: tuple[int, torch.device, list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream (B, N, C) after all layers."""
        for layer, features in zip(self.layers, self._features(x.device), strict=True):
            if self.recompute and torch.is_grad_enabled():
                # The reentrant form: the other one compares tensor shapes between the two forward
                # passes and sees the emptied parameters of ZeRO-3.
                x = checkpoint(layer, x, features, use_reentrant=True, preserve_rng_state=False)
            else:
                x = layer(x, features)
        return x

    def _features(self, device: torch.device) -> list[Tensor]:
        """Return the layers' random features on `device`, drawing them after a redraw."""
        if self._drawn is None or self._drawn[:2] != (self.redraw_index, device):
            drawn = [
                layer_features(
                    self.config,
                    name=self.name,
                    layer=i,
                    seed=self.seed,
                    redraw_index=self.redraw_index,
                ).to(device)
                for i in range(self.config.depth)
            ]
            self._drawn = (self.redraw_index, device, drawn)
        return self._drawn[2]
