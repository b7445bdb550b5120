"""Performer: a stack of pre-norm layers with FAVOR+ attention, or exact softmax attention.

The random features are no buffers: each is a pure function of (seed, stack, layer, redraw index),
drawn on the CPU when first needed; an imported model brings its own for redraw index 0. So every
rank has the same features, a resumed run has those it left off with, and neither a cast of the
model to bf16 nor ZeRO touches them. Source: arXiv:2009.14794; layer layout of the published scLong
model.

Cells are rectangular (B, N, C), or packed on one axis (T, C) with `CellSpans`. The last layer can
be computed at some positions alone: its keys and values are those of all tokens, and everything
behind the queries is of the wanted ones.

Shapes: B cells, N tokens, T tokens of all cells, P wanted positions, C width of the stack, H heads,
K head width, M random features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.favor_attention import Backend, favor_attention_kv, favor_attention_packed
from kernels.favor_torch import Scope
from kernels.linear_products import Linear, Products, linear
from kernels.softmax_attention import softmax_attention, softmax_attention_packed
from sclong_ds.config.sections import ModelConfig, PerformerConfig
from sclong_ds.model.random_features import layer_features


@dataclass(frozen=True, slots=True)
class CellSpans:
    """Where cells of different lengths lie on one axis of tokens."""

    cu_seqlens: Tensor
    """int32 (B + 1,): cell b has the tokens from cu_seqlens[b] up to cu_seqlens[b + 1]."""
    longest: int
    """At least the tokens of the longest cell."""
    lengths: tuple[int, ...]
    """(B,) tokens of each cell, on the host; softmax attention alone reads them."""


def select_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens (B, P, C) at `positions` (B, P) of tokens (B, N, C).

    No host synchronisation. In the backward pass a GPU adds up the gradients of a position that a
    cell names twice in any order.
    """
    b, n, c = tokens.shape
    rows = positions + torch.arange(b, device=positions.device)[:, None] * n
    return tokens.reshape(b * n, c).index_select(0, rows.reshape(-1)).view(*positions.shape, c)


class Projection(Linear):
    """Linear layer to queries, keys and values side by side."""

    def forward(  # type: ignore[override]
        self, x: Tensor, queries: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return queries, keys and values (..., N, 3 I) of tokens (..., N, C).

        With `queries` (..., P, C) return their queries (..., P, I), and keys and values (..., N, 2
        I) of x. All in one module, since ZeRO-3 gathers weights where a module is called.
        """
        if queries is None:
            return super().forward(x)
        inner, weight, how = self.out_features // 3, self.weight, self.products
        first, rest = (None, None) if self.bias is None else (self.bias[:inner], self.bias[inner:])
        return linear(queries, weight[:inner], first, how), linear(x, weight[inner:], rest, how)


class SelfAttention(nn.Module):
    """Multi-head self-attention through random features, or exact."""

    def __init__(self, dim: int, config: PerformerConfig, model: ModelConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads, self.dim_head = config.heads, config.dim_head
        self.scope: Scope = model.stabiliser_scope
        self.eps = model.favor_eps
        self.backend: Backend = "auto"
        self.to_qkv = Projection(dim, 3 * inner, bias=model.qkv_bias)
        self.to_out = Linear(inner, dim)

    def forward(
        self,
        x: Tensor,
        features: Tensor | None,
        cells: CellSpans | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """Return the attention output (B, N, C) for tokens (B, N, C).

        Args:
            x: Tokens (B, N, C), or (T, C) with `cells`.
            features: Random features (M, K) of FAVOR+; None computes softmax attention.
            cells: Where packed cells lie; None: they are rectangular.
            queries: Tokens (B, P, C), as in x, whose output (B, P, C) is wanted; None: all of x.
        """
        if queries is not None:
            q, kv = self.to_qkv(x, queries)
            q = q.unflatten(-1, (self.heads, self.dim_head))
            kv = kv.unflatten(-1, (2, self.heads, self.dim_head))
            if features is None:
                out = softmax_attention(q, *kv.unbind(2))
            else:
                out = favor_attention_kv(
                    q, kv, features, scope=self.scope, eps=self.eps, backend=self.backend
                )
            return self.to_out(out.flatten(2))
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, self.dim_head))
        if features is not None:
            out = favor_attention_packed(
                qkv,
                features,
                scope=self.scope,
                eps=self.eps,
                backend=self.backend,
                cu_seqlens=None if cells is None else cells.cu_seqlens,
                max_seqlen=None if cells is None else cells.longest,
            )
        elif cells is None:
            out = softmax_attention(*qkv.unbind(2))
        else:
            out = softmax_attention_packed(qkv, cells.lengths)
        return self.to_out(out.flatten(-2))


class PerformerLayer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the stream."""

    def __init__(self, dim: int, config: PerformerConfig, model: ModelConfig) -> None:
        super().__init__()
        self.compiled = False
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, config, model)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            Linear(dim, dim * config.ff_mult), nn.GELU(), Linear(dim * config.ff_mult, dim)
        )

    def forward(
        self,
        x: Tensor,
        features: Tensor | None,
        cells: CellSpans | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the stream (B, N, C), or (T, C), after this layer; (B, P, C) of `positions`.

        Args:
            x: The stream (B, N, C), or (T, C) with `cells`.
            features: As in `SelfAttention`.
            cells: As in `SelfAttention`.
            positions: (B, P) int64 tokens whose stream is wanted; None: all.
        """
        compute = _compiled_layer() if self.compiled else PerformerLayer.compute
        return compute(self, x, features, cells, positions)

    def compute(
        self,
        x: Tensor,
        features: Tensor | None,
        cells: CellSpans | None,
        positions: Tensor | None,
    ) -> Tensor:
        """As `forward`, of weights that are there: under ZeRO-3 calling the layer gathers them."""
        normed, queries = self.attention_norm(x), None
        if positions is not None:
            x, queries = select_tokens(x, positions), select_tokens(normed, positions)
        x = x + self.attention(normed, features, cells, queries)
        return x + self.feed_forward(self.feed_forward_norm(x))


@functools.cache
def _compiled_layer() -> Callable[..., Tensor]:
    """Return the computation of a layer, compiled without graph breaks.

    Layers of a stack share their graphs. The second length of an axis makes a graph for all
    lengths, so that there are at most a handful per stack: with and without gradients, with and
    without positions, for the first length and for all others.
    """
    compiled = torch.compile(PerformerLayer.compute, fullgraph=True)
    # By the configuration: torch.compile takes the limit as an argument from 2.13 on only.
    return torch._dynamo.config.patch(recompile_limit=64)(compiled)


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
        self.favor = model.attention_of(config) == "favor"
        self.layers = nn.ModuleList(PerformerLayer(dim, config, model) for _ in range(config.depth))
        self.first_features = first_features
        self._drawn: tuple[int, torch.device, list[Tensor]] | None = None

    def forward(
        self, x: Tensor, cells: CellSpans | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the stream (B, N, C), or (T, C), after all layers; (B, P, C) of `positions`.

        Args:
            x: The stream (B, N, C), or (T, C) with `cells`.
            cells: Where packed cells lie; None: they are rectangular.
            positions: (B, P) int64 tokens of rectangular cells whose stream is wanted; None: all.
        """
        for i, layer in enumerate(self.layers):
            features = self.features(x.device)[i] if self.favor else None
            wanted = positions if i == len(self.layers) - 1 else None
            if self.recompute and torch.is_grad_enabled():
                # The reentrant form: the other one compares tensor shapes between the two forward
                # passes and sees the emptied parameters of ZeRO-3.
                x = checkpoint(
                    layer, x, features, cells, wanted, use_reentrant=True, preserve_rng_state=False
                )
            else:
                x = layer(x, features, cells, wanted)
        return x

    @property
    def compile_layers(self) -> bool:
        """Whether the layers run compiled."""
        return any(layer.compiled for layer in self.layers)

    @compile_layers.setter
    def compile_layers(self, compiled: bool) -> None:
        for layer in self.layers:
            assert isinstance(layer, PerformerLayer)
            layer.compiled = compiled

    def set_products(self, products: Products) -> None:
        """Tell the layers how their linear layers multiply."""
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.products = products

    def features(self, device: torch.device) -> list[Tensor]:
        """Return the layers' random features (M, K) on `device`, drawing them after a redraw."""
        if self._drawn is None or self._drawn[:2] != (self.redraw_index, device):
            with torch.inference_mode(False):  # training may come behind an inference
                features = self.first_features if self.redraw_index == 0 else None
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
