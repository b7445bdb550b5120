"""The linear layer of gathered weights, and the kept lists of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from sclong_ds.engine.zero3_calls import _keep_list, _keep_modules, _linear

TORCH_LINEAR: Callable[..., Tensor] = torch._C._nn.linear


def partitioned(layer: nn.Linear) -> nn.Linear:
    """Mark a layer's parameters as ZeRO-3 does."""
    for number, parameter in enumerate(layer.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    return layer


def passes(x: Tensor, layer: nn.Linear, linear: Callable[..., Tensor]) -> list[Tensor]:
    """Return the output and all gradients of x W' + b."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = linear(x, layer.weight, layer.bias)
    out.backward(torch.sin(torch.arange(out.numel(), dtype=x.dtype)).view_as(out))
    assert x.grad is not None
    return [
        out.detach(),
        x.grad,
        *(p.grad.clone() for p in layer.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 1, 12), (2, 3, 2, 12), (0, 12)])
def test_linear_gives_the_bits_of_torch(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = partitioned(nn.Linear(12, 9, bias=bias).to(dtype))
    x = torch.randn(*shape, dtype=dtype)
    found, expected = passes(x, layer, _linear), passes(x, layer, TORCH_LINEAR)
    assert len(found) == len(expected) == 3 + bias
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_linear_of_rows_that_are_not_contiguous() -> None:
    """To rounding: torch takes the transposed product there, on some CPUs in another order."""
    layer = partitioned(nn.Linear(4, 3))
    x = torch.randn(4, 6).t()
    found, expected = passes(x, layer, _linear), passes(x, layer, TORCH_LINEAR)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_linear_asks_only_for_the_gradients_that_are_wanted() -> None:
    layer = partitioned(nn.Linear(4, 3))
    layer.weight.requires_grad_(False)
    _linear(torch.randn(5, 4), layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 5.0))


def test_the_output_can_be_changed_in_place() -> None:
    layer = partitioned(nn.Linear(4, 3))
    for shape in ((5, 4), (2, 5, 4)):
        torch.relu_(_linear(torch.randn(shape), layer.weight, layer.bias)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("linear", "kept"), [(_linear, 0), (TORCH_LINEAR, 1)])
def test_a_gathered_weight_is_not_kept_for_the_backward_pass(
    linear: Callable[..., Tensor], kept: int
) -> None:
    layer = partitioned(nn.Linear(4, 3))
    gathered, calls = layer.weight.detach().clone(), []
    weight, x = layer.weight, torch.randn(2, 5, 4, requires_grad=True)

    def all_gather() -> None:
        calls.append("gather")
        weight.data = gathered

    def partition() -> None:
        calls.append("partition")
        weight.data = torch.empty(0)

    weight.all_gather, weight.partition = all_gather, partition  # type: ignore[attr-defined]
    storage = gathered.untyped_storage()._cdata
    alone = torch._C._storage_Use_Count(storage)
    weight.data = gathered
    out = linear(x, weight, layer.bias)
    weight.data = torch.empty(0)
    assert torch._C._storage_Use_Count(storage) == alone + kept
    if kept:
        return
    weight.requires_grad_(False)
    weight.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
    (found,) = torch.autograd.grad(out.sum(), x)
    assert calls == ["gather", "partition"]
    torch.testing.assert_close(found, gathered.sum(0).expand(2, 5, 4))


def test_what_is_not_partitioned_is_left_to_torch() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = _linear(x, layer.weight, layer.bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    torch.func.vmap(lambda row: _linear(row, layer.weight, layer.bias))(x)


def test_a_kept_list_is_that_of_the_module() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    expected, shallow = (
        dict(module.named_parameters()),
        dict(module.named_parameters(recurse=False)),
    )
    with_prefix = dict(module.named_parameters("a"))
    _keep_list(module)
    for _ in range(2):
        assert dict(module.named_parameters()) == expected
    assert list(module.parameters()) == list(expected.values())
    assert dict(module.named_parameters(recurse=False)) == shallow
    assert dict(module.named_parameters("a")) == with_prefix
    of_copy = [*copy.deepcopy(module).parameters()]
    assert not {*map(id, of_copy)} & {*map(id, expected.values())}
    assert len(of_copy) == len(expected)


def test_kept_modules_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.GELU()), nn.LayerNorm(3))
    expected = list(model.modules())
    _keep_modules(model)
    for _ in range(2):
        assert list(model.modules()) == expected
    assert list(model[0].modules()) == expected[1:4]
    of_copy = list(copy.deepcopy(model).modules())
    assert [type(part) for part in of_copy] == [type(part) for part in expected]
    assert not {*map(id, of_copy)} & {*map(id, expected)}
