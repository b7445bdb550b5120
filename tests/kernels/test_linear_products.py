"""Linear layers in fewer bits: bounded errors, gradients, the same bits in any batch."""

from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.linear_products import Linear, Products, linear, scaled_rows
from sclong_ds.config.sections import EngineConfig

HALF_STEP = {torch.float8_e4m3fn: (2**-4, 2**-10), torch.float8_e5m2: (2**-3, 2**-17)}
"""Largest error of rounding: relative to a number, and of those below the smallest normal one."""
FEWER = [p for p in get_args(Products) if p != "precision"]


def made(n=37, width=48, out=32, *, seed=0, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=gen) * scale
    x *= torch.rand(n, 1, generator=gen) * 4  # tokens of different sizes
    w = torch.randn(out, width, generator=gen) / width**0.5
    return x, w, torch.randn(out, generator=gen), torch.randn(n, out, generator=gen)


def results(x, w, b, grad, products):
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    out = linear(*leaves, products)
    out.backward(grad)
    return out.detach(), *(leaf.grad for leaf in leaves)


def test_the_configuration_offers_each_kind():
    assert get_type_hints(EngineConfig)["linear_products"] == Products


def test_precision_is_the_ordinary_layer():
    x, w, b, _ = made()
    assert torch.equal(linear(x, w, b, "precision"), torch.nn.functional.linear(x, w, b))


def test_a_layer_multiplies_as_it_is_told():
    x, w, b, _ = made()
    layer = Linear(48, 32)
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
    for products in get_args(Products):
        layer.products = products
        assert torch.equal(layer(x), linear(x, w, b, products))
    assert not torch.equal(linear(x, w, b, "bf16"), linear(x, w, b, "fp8"))


# torch.compile itself makes an instance of the function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("products", FEWER)
def test_layers_are_traced_without_graph_breaks(products):
    """As `engine.compile_layers` needs it: on a GPU rounding alone takes too many passes."""
    traced = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x, w, b, grad = made()
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    out = traced(*leaves, products)
    out.backward(grad)
    for found, wanted in zip(
        (out.detach(), *(leaf.grad for leaf in leaves)), results(x, w, b, grad, products),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", HALF_STEP)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.0, 1e-44, 1e-42, 1e-38, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
)
def test_rounding_to_eight_bits_is_off_by_half_a_step(dtype, seed, size):
    x = made(n=5, seed=seed)[0] * size
    rounded, scale = scaled_rows(x, dtype)
    assert rounded.dtype == dtype
    assert not rounded.float().isnan().any()
    found = rounded.double() * scale.double()
    relative, absolute = HALF_STEP[dtype]
    bound = torch.maximum(relative * x.double().abs(), absolute * scale.double())
    assert bool(((found - x.double()).abs() <= bound * (1 + 1e-6)).all())


def test_bf16_products_are_those_of_the_rounded_factors():
    x, w, b, grad = made()
    out, dx, dw, db = results(x, w, b, grad, "bf16")
    x, w, g = (t.bfloat16().double() for t in (x, w, grad))
    for got, want in ((out - b, x @ w.T), (dx, g @ w), (dw, g.T @ x)):
        near = want.abs() * 2**-8 + 1e-5 * want.abs().max()
        assert bool(((got.double() - want).abs() <= near).all())
    torch.testing.assert_close(db, grad.sum(0))


def test_fp8_products_are_within_the_bound_of_their_factors():
    """|ab - rounded| <= sum |a| |b| (ra + rb + ra rb), and what the smallest numbers add."""
    x, w, b, grad = made(n=64, width=96, out=80)
    out, dx, dw, _ = results(x, w, b, grad, "fp8")
    for got, left, right, dtype in (
        (out - b, x, w.T, torch.float8_e4m3fn),
        (dx, grad, w, torch.float8_e5m2),
    ):
        left, right = left.double(), right.double()
        (ra, sa), (rb, sb) = HALF_STEP[dtype], HALF_STEP[torch.float8_e4m3fn]
        scale_a = left.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        scale_b = right.abs().amax(0, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        away_a = torch.maximum(ra * left.abs(), sa * scale_a)
        away_b = torch.maximum(rb * right.abs(), sb * scale_b)
        bound = away_a @ right.abs() + left.abs() @ away_b + away_a @ away_b
        error = (got.double() - left @ right).abs()
        assert bool((error <= bound + 1e-5).all())
        # Independent roundings: far below that bound in norm.
        assert error.norm() < 0.06 * (left @ right).norm()
        assert error.norm() > 0.005 * (left @ right).norm()
    exact = grad.double().T @ x.double()
    assert (dw.double() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("products", FEWER)
def test_a_token_has_the_same_bits_in_any_batch(products):
    x, w, b, grad = made(n=301, width=64, out=96)
    whole = results(x, w, b, grad, products)
    for rows in (slice(0, 1), slice(3, 20), slice(150, 301)):
        part = results(x[rows], w, b, grad[rows], products)
        assert torch.equal(whole[0][rows], part[0])
        assert torch.equal(whole[1][rows], part[1])


@pytest.mark.parametrize("products", FEWER)
def test_dimensions_in_front_and_a_row_of_zeros(products):
    x, w, b, grad = made(n=24)
    x[7] = 0.0
    flat = results(x, w, b, grad, products)
    shaped = results(x.view(2, 3, 4, -1), w, b, grad.view(2, 3, 4, -1), products)
    assert torch.equal(shaped[0].view_as(flat[0]), flat[0])
    for got, want in zip(shaped[1:], flat[1:], strict=True):
        torch.testing.assert_close(got.view_as(want), want)
    assert torch.equal(flat[0][7], b)


def test_a_frozen_weight_gets_no_gradient():
    x, w, _, grad = made()
    x.requires_grad_()
    linear(x, w, None, "bf16").backward(grad)
    assert x.grad is not None
    assert w.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fp8_products_on_a_gpu_are_those_of_the_cpu():
    given = made()
    for found, want in zip(
        results(*(t.cuda() for t in given), "fp8"), results(*given, "fp8"), strict=True
    ):
        # The GPU rounds its products to bf16.
        torch.testing.assert_close(found.cpu(), want, rtol=2**-7, atol=1e-2)
