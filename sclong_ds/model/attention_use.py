"""Is attention used? What the weights of FAVOR+ are, and what the model is worth without them.

Per layer, over sampled queries of a few cells, each mean over queries and heads:

- `eps_share`: the part of the denominator that the constant eps makes, of both features. Near 1 the
  weights are the same for all keys, whatever queries and keys are.
- `effective_keys`: exp of the entropy of the computed weights, over the number of keys. 1: every
  key gets the same.
- `beyond_mean`: |out - mean of values| / |mean of values|, per head.

Per stack: the error of hidden values with its attention replaced by the mean of values, and of the
whole model with exact softmax. Queries and keys of zero make all weights equal, in FAVOR+ and in
softmax, so the replacement needs no other code path.

Hooks on modules see what a layer computes; under ZeRO-3 every rank must make the same calls.

Shapes: P queries, N keys, H heads, K head width, M random features, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.reference import EPS
from sclong_ds.model.performer import CellSpans, Performer, SelfAttention
from sclong_ds.model.sclong import ScLong

LAYER_FIGURES = ("eps_share", "effective_keys", "beyond_mean")
QUERIES = 32
"""Queries of a cell and layer that are looked at, evenly spread; bounds time and memory."""
SOFTMAX_TOKENS = 8192
"""Tokens of a cell up to which exact softmax is computed: its time grows with their square."""


Projections = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Queries (P, H, K), keys and values (N, H, K) of each cell."""


class Weights(NamedTuple):
    """Computed attention weights of one cell."""

    weights: Tensor
    """(H, P, N), rows sum to 1."""
    eps_share: Tensor
    """(H, P)."""


def favor_weights(
    q: Tensor,
    k: Tensor,
    features: Tensor,
    *,
    per_head: bool = False,
    eps: float = EPS,
) -> Weights:
    """Return the weights that FAVOR+ gives the keys of one cell (`kernels/reference.py`).

    Args:
        q: (P, H, K).
        k: (N, H, K).
        features: (M, K).
        per_head: Take the maximum of each head (scope `head`).
        eps: Constant added to every feature.
    """
    w = features.float() * q.shape[-1] ** -0.25
    half = q.shape[-1] ** -0.5 / 2
    q, k = q.float().transpose(0, 1), k.float().transpose(0, 1)
    y = k @ w.T
    peak = y.amax((1, 2), keepdim=True) if per_head else y.amax()
    shares, rows = [], []
    for qh, kh, yh, ph in zip(q, k, y, peak.expand(len(y), 1, 1), strict=True):
        x = qh @ w.T
        e = torch.exp(x - half * qh.square().sum(-1, keepdim=True) - x.amax(-1, keepdim=True))
        f = torch.exp(yh - half * kh.square().sum(-1, keepdim=True) - ph[0])
        product = (e + eps) @ (f + eps).T
        denominator = product.sum(-1)
        rows.append(product / denominator[:, None])
        shares.append(1 - (e @ f.sum(0)) / denominator)
    return Weights(torch.stack(rows), torch.stack(shares).clamp(min=0))


def softmax_weights(q: Tensor, k: Tensor) -> Weights:
    """Return the weights (H, P, N) of exact attention; there is no eps."""
    scores = torch.einsum("phk,nhk->hpn", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1)
    return Weights(weights, torch.zeros_like(weights[..., 0]))


def cell_figures(found: Weights, v: Tensor) -> Tensor:
    """Return (4,) float64: the sums of `LAYER_FIGURES` over heads and queries, and their number.

    Args:
        found: Weights (H, P, N) of one cell.
        v: (N, H, K) values.
    """
    w, values = found.weights, v.float().transpose(0, 1)
    entropy = -torch.special.xlogy(w, w).sum(-1)
    mean = values.mean(1, keepdim=True)
    beyond = (w @ (values - mean)).norm(dim=-1) / mean.norm(dim=-1).clamp(min=1e-12)
    figures = [found.eps_share, entropy.exp() / w.shape[-1], beyond]
    sums = [figure.double().sum() for figure in figures]
    return torch.stack([*sums, torch.full_like(sums[0], w[..., 0].numel())])


def attention_figures(
    model: ScLong,
    error: Callable[[], Tensor],
    add_up: Callable[[Tensor], object],
    *,
    counts: bool = True,
) -> dict[str, float]:
    """Return the figures of attention on a few cells of every rank, by metric name.

    Args:
        model: The model.
        error: Predicts the cells with it, through the engine, and returns (2,) the sum of squared
            errors of hidden values and their number; called once, once per stack, and once with
            exact softmax where cells are small: as often on every rank.
        add_up: Adds a tensor up over the ranks, in place.
        counts: False: this rank has no cell; it makes the passes and counts nothing.

    Returns:
        `attention/mse` of the cells as it is, `attention/STACK/mean_mse` with the attention of a
        stack replaced by the mean of values, `attention/softmax_mse`, and
        `attention/STACK.LAYER/FIGURE`.
    """
    stacks = model.performers()
    passes: dict[str, Callable[[], Any]] = {"attention/mse": lambda: _layer_sums(model, layers)}
    layers: dict[str, Tensor] = {}
    passes |= {
        f"attention/{name}/mean_mse": partial(_mean_of_values, model, name) for name in stacks
    }
    small = model.n_genes <= SOFTMAX_TOKENS or model.config.zero_genes is not None
    if small and any(stack.favor for stack in stacks.values()):
        passes["attention/softmax_mse"] = lambda: _exact_softmax(model)
    sums = []
    with without_compiling(stacks.values()):
        for listening in passes.values():
            with listening():
                sums.append(error().double())
    names = [f"{name}.{i}" for name, stack in stacks.items() for i in range(len(stack.layers))]
    none = torch.zeros(len(LAYER_FIGURES) + 1, dtype=torch.float64, device=sums[0].device)
    flat = torch.cat([*sums, *(layers.get(name, none) for name in names)]) * counts
    add_up(flat)
    favor = {name: stacks[name.partition(".")[0]].favor for name in names}
    return _named(flat.tolist(), list(passes), favor)


def _named(flat: list[float], passes: list[str], layers: Mapping[str, bool]) -> dict[str, float]:
    """Return the figures by name, of layers by whether their attention is FAVOR+."""
    found: dict[str, float] = {}
    for i, name in enumerate(passes):
        total, number = flat[2 * i : 2 * i + 2]
        if number:
            found[name] = total / number
    rest, size = flat[2 * len(passes) :], len(LAYER_FIGURES) + 1
    for i, (layer, favor) in enumerate(layers.items()):
        *totals, number = rest[size * i : size * (i + 1)]
        for figure, total in zip(LAYER_FIGURES, totals, strict=True):
            if number and (favor or figure != "eps_share"):
                found[f"attention/{layer}/{figure}"] = total / number
    return found


def attentions(model: ScLong) -> Iterator[tuple[str, SelfAttention]]:
    """Yield the attention of every layer, by stack.layer."""
    for name, stack in model.performers().items():
        for i, layer in enumerate(stack.layers):
            yield f"{name}.{i}", layer.attention  # type: ignore[misc]


@contextmanager
def without_compiling(stacks: Iterable[Performer]) -> Iterator[None]:
    """Run the layers of stacks as they are: a compiled layer does not call hooks.

    Args:
        stacks: Some Performers.
    """
    compiled = [(stack, stack.compile_layers) for stack in stacks]
    try:
        for stack, _ in compiled:
            stack.compile_layers = False
        yield
    finally:
        for stack, was in compiled:
            stack.compile_layers = was


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_of_values(model: ScLong, stack: str) -> Any:
    """Make a stack's attention the mean of values: queries and keys of zero weigh all alike."""

    def without_queries_and_keys(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            q, kv = output
            inner = kv.shape[-1] // 2
            return torch.zeros_like(q), torch.cat(
                [torch.zeros_like(kv[..., :inner]), kv[..., inner:]], dim=-1
            )
        inner = output.shape[-1] // 3
        return torch.cat(
            [torch.zeros_like(output[..., : 2 * inner]), output[..., 2 * inner :]], dim=-1
        )

    return _removed(
        [
            attention.to_qkv.register_forward_hook(without_queries_and_keys)
            for name, attention in attentions(model)
            if name.partition(".")[0] == stack
        ]
    )


def _exact_softmax(model: ScLong) -> Any:
    """Compute exact softmax everywhere: attention without random features."""

    def without_features(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, _features, *rest = inputs
        return (x, None, *rest)

    return _removed([a.register_forward_pre_hook(without_features) for _, a in attentions(model)])


def _layer_sums(model: ScLong, sums: dict[str, Tensor]) -> Any:
    """Add the figures of every layer of the passes made within to `sums`, by layer."""

    def look(
        name: str, attention: SelfAttention, features: Tensor | None, projections: Projections
    ) -> None:
        for q, k, v in projections:
            if len(q) and len(k):
                found = computed_weights(q[spread(len(q))], k, features, attention)
                part = cell_figures(found, v)
                sums[name] = sums[name] + part if name in sums else part

    return looking(attentions(model), look)


def looking(
    watched: Iterable[tuple[str, SelfAttention]],
    look: Callable[[str, SelfAttention, Tensor | None, Projections], None],
) -> Any:
    """Show every attention of the passes made within to a function; compiled layers call no hooks.

    Args:
        watched: Attentions by name.
        look: Takes the name, the attention, its random features and what `cells_of` yields.
    """
    handles = []
    for name, attention in watched:
        seen: dict[str, Any] = {}

        def remember(_: Any, inputs: tuple[Any, ...], seen: dict[str, Any] = seen) -> None:
            seen["features"] = inputs[1]
            seen["cells"] = inputs[2] if len(inputs) > 2 else None

        def projected(
            _: Any,
            __: Any,
            output: Any,
            *,
            name: str = name,
            attention: SelfAttention = attention,
            seen: Mapping[str, Any] = seen,
        ) -> None:
            look(name, attention, seen["features"], cells_of(output, attention, seen["cells"]))

        handles.append(attention.register_forward_pre_hook(remember))
        handles.append(attention.to_qkv.register_forward_hook(projected))
    return _removed(handles)


def computed_weights(
    q: Tensor, k: Tensor, features: Tensor | None, attention: SelfAttention
) -> Weights:
    """Return the weights of one cell as the layer computes them.

    With scope `tensor`, for comparison with the released code alone, the maximum is that of the
    cell and not of its batch.
    """
    if features is None:
        return softmax_weights(q, k)
    return favor_weights(q, k, features, per_head=attention.scope == "head", eps=attention.eps)


def spread(count: int) -> list[int]:
    """Return at most QUERIES places of `count`, evenly spread."""
    return sorted({round(i) for i in torch.linspace(0, count - 1, min(count, QUERIES)).tolist()})


def cells_of(output: Any, attention: SelfAttention, cells: CellSpans | None) -> Projections:
    """Yield queries (P, H, K), keys and values (N, H, K) of each cell from a projection's output.

    Args:
        output: (B, N, 3 I), (T, 3 I) of packed cells, or queries and the rest, as `Projection`.
        attention: The projection's module.
        cells: Where packed cells lie.
    """
    heads = (attention.heads, attention.dim_head)
    if isinstance(output, tuple):
        q, kv = output
        for qb, kvb in zip(q.unflatten(-1, heads), kv.unflatten(-1, (2, *heads)), strict=True):
            yield qb, kvb[:, 0], kvb[:, 1]
        return
    qkv = output.unflatten(-1, (3, *heads))
    for cell in qkv if cells is None else qkv.split(cells.lengths):
        yield cell[:, 0], cell[:, 1], cell[:, 2]
