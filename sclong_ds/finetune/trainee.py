"""What is trained: a head on cached features, or on a model of which all or little is trained.

LoRA adds B A to the weight of each linear layer of the chosen stacks, A (r, in) and B (out, r) with
a small rank r; B starts at zero, so that training starts from the model as it is. Afterwards B A is
added to the weight: a merged model is read like any other. Source: arXiv:2106.09685

Shapes: B cells, G genes, F features, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sclong_ds.exported.head import Head
from sclong_ds.model.pooling import Part
from sclong_ds.model.sclong import ScLong


class LowRank(nn.Module):
    """Adds scale * B A to a weight (out, in).

    Args:
        weight: The weight.
        rank: r.
        scale: Factor on B A.
    """

    def __init__(self, weight: Tensor, *, rank: int, scale: float) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, n_in, dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(n_out, rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with what was learnt."""
        return weight + self.scale * (self.up @ self.down)


def check_stacks(model: ScLong, stacks: Sequence[str]) -> None:
    """Refuse names that are not those of a model's stacks.

    Raises:
        ValueError: The model has no such stack, or none is named.
    """
    known = model.performers()
    unknown = [name for name in stacks if name not in known]
    if unknown or not stacks:
        raise ValueError(
            f"--stacks {','.join(unknown)}: the model has {', '.join(known)}; name some of these"
        )


def add_low_rank(model: ScLong, stacks: Sequence[str], *, rank: int, scale: float) -> None:
    """Freeze a model and add low-rank parameters to the linear layers of some stacks.

    Args:
        model: The model.
        stacks: Names of `ScLong.performers`.
        rank: Rank of what is added.
        scale: Factor on it.

    Raises:
        ValueError: As `check_stacks`.
    """
    check_stacks(model, stacks)
    known = model.performers()
    model.requires_grad_(False)
    # With recomputation a layer whose input needs no gradient would pass none to its weights.
    model.expression_encoder.register_forward_hook(_begin_gradients)
    for name in stacks:
        for linear in list(_linear_layers(known[name])):
            added = LowRank(linear.weight, rank=rank, scale=scale)
            parametrize.register_parametrization(linear, "weight", added)


def _begin_gradients(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
    return output.requires_grad_() if torch.is_grad_enabled() else None


def _linear_layers(stack: nn.Module) -> Iterator[nn.Linear]:
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            yield module


def merged_weights(model: ScLong) -> dict[str, Tensor]:
    """Return the state dict of a model, low-rank parameters merged, under the names of `ScLong`."""
    found = {}
    for name, tensor in model.state_dict().items():
        if ".parametrizations.weight.0." in name:
            continue
        owner, original, _ = name.partition(".parametrizations.weight.original")
        if original:
            linear = model.get_submodule(owner)
            name, tensor = f"{owner}.weight", linear.weight
        found[name] = tensor.detach().cpu().float()
    return found


class Trainee(nn.Module):
    """A head, with the model that it sits on where that is trained too.

    Args:
        head: The head.
        model: The model; None: features are given.
    """

    def __init__(self, head: Head, model: ScLong | None) -> None:
        super().__init__()
        self.head, self.model = head, model

    def features(self, x: Tensor, unmeasured: Tensor | None = None) -> Tensor:
        """Return the features (B, F) of cells.

        Args:
            x: (B, G) transformed expression; (B, F) features without a model.
            unmeasured: (B, G) bool, genes of which nothing is known; None: all are known.
        """
        if self.model is None:
            return x
        return pooled_features(self.model, x, self.head.shape.parts, unmeasured)

    def forward(self, x: Tensor, unmeasured: Tensor | None = None) -> Tensor:
        """Return the outputs (B, K); arguments as `features`."""
        found: Tensor = self.head(self.features(x, unmeasured))
        return found


def pooled_features(
    model: ScLong, x: Tensor, parts: Sequence[Part], unmeasured: Tensor | None
) -> Tensor:
    """Return the features (B, F) of cells x (B, G): the parts of a head, one behind the other."""
    return torch.cat(model.pooled(x, parts, unmeasured=unmeasured), dim=1)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
