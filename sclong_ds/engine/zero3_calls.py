"""ZeRO-3 with fewer Python calls at each layer: nothing that nobody reads is made.

Where a layer's kernels are short, the host's work at its hooks is what a step takes. DeepSpeed
marks ranges for Nsight Systems whether or not it looks, asks for the rank before it drops a
message, lists the parameters of a module again at every hook and all modules twice in every forward
pass; its linear layer is an autograd function of the kind whose arguments torch binds by `inspect`.
Source: deepspeed/runtime and deepspeed/utils of DeepSpeed 0.19; counted by
`benchmarks/host_time.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload, partition_parameters, stage3
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import nvtx, z3_leaf_module
from torch import Tensor, nn

_TORCH_LINEAR = torch._C._nn.linear


class _GatheredLinear(torch.autograd.Function):
    """x W' + b of a weight that is gathered for both passes and away between them.

    What torch's own operator keeps for its backward pass is a view of the weight, which would hold
    the gathered one; here it is the parameter. Rounds as torch's operator does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        turned = weight.t()
        out = rows.mm(turned) if bias is None else torch.addmm(bias, rows, turned)
        # No view, which could not be changed in place.
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        away = getattr(weight, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE
        if away and of_x:
            weight.all_gather()
        result = (
            rows.mm(weight).view(x.shape) if of_x else None,
            rows.t().mm(x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
        if away and of_x:
            weight.partition()
        return result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear; of what ZeRO-3 does not partition, torch's own operator."""
    if not hasattr(weight, "ds_id"):
        return _TORCH_LINEAR(input, weight, bias)
    return _GatheredLinear.apply(input, weight, bias)


def mark_ranges(marked: bool) -> None:
    """Let DeepSpeed mark its ranges for Nsight Systems, or not."""
    nvtx.enable_nvtx = marked


def spare_calls(model: nn.Module, *, autocast: bool) -> None:
    """Take away what ZeRO-3 does at each hook and nobody reads.

    Args:
        model: The model, after `deepspeed.initialize`; its modules have all parameters that they
            will ever have.
        autocast: Whether torch's autocast is on, which DeepSpeed's own linear layer follows.
    """
    for module in (partition_parameters, parameter_offload, stage3):
        _print_only_what_is_wanted(module)
    if nn.functional.linear in (zero3_linear_wrap, _linear):
        nn.functional.linear = zero3_linear_wrap if autocast else _linear
    for part in model.modules():
        # inspect takes what `__signature__` says.
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if function := getattr(part, name, None):
                function.forward.__signature__ = inspect.signature(function.forward)
        if z3_leaf_module(part):
            _keep_list(part)
    _keep_modules(model)


def _print_only_what_is_wanted(module: Any) -> None:
    said = module.print_rank_0
    if getattr(said, "spared", False):
        return

    def print_rank_0(message: str, debug: bool = False, force: bool = False) -> None:
        if debug or force:
            said(message, debug=debug, force=force)

    print_rank_0.spared = True  # type: ignore[attr-defined]
    module.print_rank_0 = print_rank_0


def _keep_modules(model: nn.Module) -> None:
    """Let a model give its modules without walking through them."""
    kept = list(model.modules())

    def modules(module: nn.Module) -> Iterator[nn.Module]:
        return iter(kept) if module is model else type(module).modules(module)

    # As in `_keep_list`, a copy has modules of its own.
    model.modules = MethodType(modules, model)  # type: ignore[method-assign]


def _keep_list(leaf: nn.Module) -> None:
    """Let a module give the list of its parameters without walking through its parts."""
    kept = list(leaf.named_parameters())

    def named_parameters(
        module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if module is leaf and recurse and remove_duplicate and not prefix:
            return iter(kept)
        return type(module).named_parameters(module, prefix, recurse, remove_duplicate)

    # Of the module that it is called of: a copy has parameters of its own. A bound method, since
    # torch.compile looks at its function.
    leaf.named_parameters = MethodType(named_parameters, leaf)  # type: ignore[method-assign]
