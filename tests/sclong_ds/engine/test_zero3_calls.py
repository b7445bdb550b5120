"""The linear layer of gathered weights, and the kept lists of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sclong_ds.engine.zero3_calls import _keep_list, _linear


def passes(x: Tensor, layer: nn.Linear, *, ours: bool) -> list[Tensor]:
    """Return the output and all gradients of x W' + b, or of torch's own operator."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = (_linear if ours else nn.functional.linear)(x, layer.weight, layer.bias)
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
    layer = nn.Linear(12, 9, bias=bias).to(dtype)
    x = torch.randn(*shape, dtype=dtype)
    found, expected = (passes(x, layer, ours=ours) for ours in (True, False))
    assert len(found) == len(expected) == 3 + bias
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_linear_asks_only_for_the_gradients_that_are_wanted() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 4)
    _linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 5.0))


def test_linear_of_rows_that_are_not_contiguous() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(4, 6).t()
    torch.testing.assert_close(
        passes(x, layer, ours=True), passes(x, layer, ours=False), rtol=0, atol=0
    )


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
