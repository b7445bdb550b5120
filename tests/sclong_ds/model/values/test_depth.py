"""Depth: expected values read off a table beside those that are summed."""

import math

import pytest
import torch

from sclong_ds.model.values.depth import expected_value, expected_values


def levels(n, seed=0):
    """Return log levels from far below one count to far above many."""
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * 24 - 12


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_table_says_what_the_sum_says(kind):
    level = levels(4000).to(kind)
    one = torch.tensor([0.05, 0.7, 3.0, 40.0, 900.0, 0.0], dtype=torch.float64)[:, None]
    found = expected_values(level, one)
    wide = torch.promote_types(kind, torch.float32)
    assert found.dtype == wide
    for row, o in zip(found, one, strict=True):
        each = expected_value(level.double()[None], o[None])[0]
        # At the border of large rates the sum itself takes a step.
        log_rate = level.double() - o.clamp(min=1e-6).log()
        slack = torch.where((log_rate - math.log(40)).abs() < 0.06, 5e-4, 3e-4)
        assert ((row.double() - each).abs() <= slack + 1e-6 * each).all()


def test_cells_do_not_depend_on_their_batch():
    level = levels(257).float()
    one = torch.tensor([[0.3], [2.0], [11.0]])
    together = expected_values(level, one)
    for row, o in zip(together, one, strict=True):
        assert torch.equal(expected_values(level, o[None])[0], row)


def test_the_gradient_is_that_of_the_sum():
    level = levels(300).requires_grad_()
    one = torch.tensor([[0.4], [5.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(expected_values(level, one).sum(), level)
    (exact,) = torch.autograd.grad(expected_value(level.expand(2, -1), one).sum(), level)
    inside = (level[None] - one.log() > -11).all(0)  # below it the table is flat
    assert inside.sum() > 100
    assert torch.allclose(found[inside], exact[inside], atol=0.02)
    assert not found.isnan().any()


def test_the_gradient_by_the_size_of_a_count_is_that_of_the_value():
    """What a slope of the model by its input goes through."""
    level = torch.tensor([-3.0, -0.4, 0.0, 1.5, 4.0, 9.0], dtype=torch.float64)
    one = torch.tensor([[0.3], [3.0], [40.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: expected_values(level, one), (one,))
    (found,) = torch.autograd.grad(expected_values(level, one).sum(), one)
    (exact,) = torch.autograd.grad(expected_value(level.expand(3, -1), one).sum(), one)
    assert torch.allclose(found, exact, rtol=0.05)
