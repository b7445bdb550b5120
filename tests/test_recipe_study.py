"""Parts of the recipe study: shares of training cells, residuals, rivals of the vector, fits."""

import gc
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from small_model import G, small_model

from benchmarks.recipe.bounds import from_near, from_other_genes, residual_covariance
from benchmarks.recipe.cells import exponent, vector_parameters
from benchmarks.recipe.panel import Cells, Panel, _statistics, with_share
from benchmarks.recipe.training import change, uniform_attention
from sclong_ds.model.values.cell_vector import CellVector


def panel_of(sizes: list[int], genes: int = 12) -> Panel:
    """Cells of datasets of these sizes."""
    counts = csr_matrix(np.random.default_rng(0).poisson(1.0, (sum(sizes), genes)))
    dataset = np.repeat(np.arange(len(sizes)), sizes)
    train = Cells(np.arange(sum(sizes)), counts, dataset)
    return Panel(train, train, {}, _statistics(train), None)


def test_a_share_is_of_every_dataset_and_has_its_own_statistics() -> None:
    panel = panel_of([40, 8, 1])
    some = with_share(panel, 0.25, seed=0)
    np.testing.assert_array_equal(np.bincount(some.train.dataset), [10, 2, 1])
    assert len(set(some.train.rows.tolist())) == 13
    np.testing.assert_array_equal(
        some.train.counts.toarray(), panel.train.counts[some.train.rows].toarray()
    )
    shown = np.asarray((some.train.counts > 0).sum(0)).ravel()
    np.testing.assert_array_equal(some.stats.n_expressing, shown)
    other = with_share(panel, 0.25, seed=1).train.rows
    assert not np.array_equal(some.train.rows, other)
    np.testing.assert_array_equal(with_share(panel, 1.0, seed=1).train.rows, panel.train.rows)


def test_residuals_of_genes_that_vary_together_tell_each_other() -> None:
    rng = np.random.default_rng(0)
    common = rng.standard_normal((400, 1))
    residual = np.hstack([common + 0.1 * rng.standard_normal((400, 3)), rng.normal(size=(400, 2))])
    visible = np.ones((400, 5), bool)
    products, own = residual_covariance(residual, visible)
    visible[:, 0] = False
    told = from_other_genes(np.where(visible, residual, 0.0), visible, products, own, 0.01)
    assert np.corrcoef(told[:, 0], residual[:, 0])[0, 1] > 0.95
    assert not told[:, 1:].any(), "visible values need no prediction"


def test_near_cells_tell_the_mean_of_those_that_show_the_gene() -> None:
    distance = torch.tensor([[1.0, 2.0, 9.0]])
    residual = np.array([[1.0, 0.0], [3.0, 2.0], [50.0, 50.0]])
    visible = np.array([[True, False], [True, True], [True, True]])
    found = from_near(distance, residual, visible, 2, 0.0)
    np.testing.assert_allclose(found, [[2.0, 2.0]])
    np.testing.assert_allclose(from_near(distance, residual, visible, 2, 2.0)[0, 0], 1.0)


def test_the_exponent_of_errors_that_fall_as_a_power_above_a_floor_is_found() -> None:
    runs = {}
    for cells in (100, 200, 400):
        error = 0.1 + 2.0 * cells**-0.3
        errors = {"n_hidden": [1.0] * 6, "model": [error] * 6}
        runs[32, cells] = [{"cell_dataset": [0, 0, 0, 1, 1, 1], "cell_errors": errors}]
    assert exponent(runs, 32, 0.1) == pytest.approx((0.3, 0.3, 0.3))
    assert exponent(runs, 32, 0.0)[0] < 0.3


def test_parameters_of_the_vector_are_counted_as_the_model_has_them() -> None:
    parts = CellVector(50, 8).parameters()
    head = 50 * 8 + 50  # a weight and a bias per gene
    assert vector_parameters(8, 50) == sum(p.numel() for p in parts) + head


@pytest.mark.thorough
@pytest.mark.parametrize("attention", ["favor", "softmax"])
def test_uniform_attention_stays_for_the_whole_training(attention: str) -> None:
    net = small_model(attention=attention)
    x = torch.rand(3, G) * (torch.rand(3, G) < 0.6)
    with torch.no_grad():
        before = net(x)
        with ExitStack() as meanwhile:
            for stack in net.performers().values():
                meanwhile.enter_context(uniform_attention(stack))
            uniform = net(x)
        assert torch.equal(net(x), before)
        change(net, {"attention": "uniform"})
        gc.collect()
        assert torch.equal(net(x), uniform)
    assert not torch.allclose(uniform, before)
