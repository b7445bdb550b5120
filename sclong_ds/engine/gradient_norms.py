"""Norm of the gradient by part of the model, under any ZeRO stage.

DeepSpeed computes the norm of the whole gradient at each step; this takes the same gradients, apart
by the part of the model (`PARTS`). Where a gradient is partitioned every rank adds its own share,
and the sums over the ranks are the norms: nothing is gathered. Together they are the whole norm:
the squares of `train/grad_norm/PART` add up to that of `train/grad_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sclong_ds.engine.deepspeed_engine import Engine

PARTS = {
    "gene_encoder": ("gene_encoder",),
    "expression_encoder": ("expression_encoder",),
    "cell_vector": ("cell_vector",),
    "large": ("to_large", "large_encoder", "from_large"),
    "mini": ("mini_encoder",),
    "decoder": ("decoder", "norm"),
    "head": ("head", "zero_head"),
}
"""Metric name to the children of `ScLong` that it covers."""


class GradientNorms:
    """Measures between the last backward pass of a step and its optimizer step.

    Args:
        engine: The DeepSpeed engine.
        model: Its model; a part that a model has not has no figure.
    """

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        children = dict(model.named_children())
        self.names = [n for n, parts in PARTS.items() if any(p in children for p in parts)]
        self._engine = engine
        self._part = {
            id(parameter): number
            for number, name in enumerate(self.names)
            for child in PARTS[name]
            if child in children
            for parameter in children[child].parameters()
        }
        missing = [n for n, p in model.named_parameters() if id(p) not in self._part]
        assert not missing, f"parameters of no part: {missing[:3]}"
        self._squares: Tensor | None = None

    def measure(self) -> None:
        """Add up the squares, at the last micro-batch of a step; every rank must call it."""
        if not self._engine.is_gradient_accumulation_boundary():
            return
        norms: list[list[Tensor]] = [[] for _ in self.names]
        for parameter, norm in _local_norms(self._engine.optimizer):
            norms[self._part[id(parameter)]].append(norm)
        device = self._engine.device
        squares = [
            torch.stack(part).square().sum() if part else torch.zeros((), device=device)
            for part in norms
        ]
        # One float each: a rank does not wait for them, the loss is read from the device anyway.
        self._squares = torch.stack(squares).double()
        dist.all_reduce(self._squares)

    def figures(self) -> dict[str, float]:
        """Return the norms of the step that was measured last, before clipping, by metric name."""
        assert self._squares is not None, "measure() was not called"
        return {
            f"train/grad_norm/{name}": math.sqrt(square)
            for name, square in zip(self.names, self._squares.tolist(), strict=True)
        }


def _local_norms(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter's norm of the part of the averaged gradient that this rank holds."""
    # Stage 3 keeps a part of every parameter; stages 1 and 2 a slice of all parameters in a row.
    groups = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups
    on_host = getattr(optimizer, "cpu_offload", False) or getattr(
        optimizer, "offload_optimizer", False
    )
    for i, parameters in enumerate(groups):
        if on_host:
            # Gradients are in the host's memory; DeepSpeed has kept their norms.
            kept = optimizer.norm_for_param_grads
            ids = [(parameter, optimizer.get_param_id(parameter)) for parameter in parameters]
            yield from ((p, torch.as_tensor(kept[key]).float()) for p, key in ids if key in kept)
            continue
        gradients = [
            g for g in optimizer.averaged_gradients[i] if not getattr(g, "_zero_padding", False)
        ]
        # One call for all of them. Stages 1 and 2 pad the end with a tensor of no parameter.
        norms = torch._foreach_norm(gradients[: len(parameters)], 2, torch.float32)
        yield from zip(parameters, norms, strict=True)
