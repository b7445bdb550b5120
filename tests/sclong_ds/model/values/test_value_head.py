"""The head: depth of a cell in its predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_model import G, small_model
from small_model import cells as small_cells

from sclong_ds.corpus.corpus import GeneStats
from sclong_ds.model.values.depth import expected_value, one_count, pairwise_sum
from sclong_ds.objective.baselines import DepthBaselines
from sclong_ds.objective.starts import first_output
from sclong_ds.run_folder.metric_names import DEPTH_BASELINES


def test_a_cells_offset_is_the_mean_over_its_visible_values():
    """A head without weights predicts the two-way additive model: gene bias and cell offset."""
    model = small_model(gene_bias=True, cell_offset="visible")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    x, mask = small_cells()
    unmeasured = torch.zeros_like(mask)
    unmeasured[:, 40:] = True
    x[3, :40] = 0  # a cell without a visible value
    predicted = model(x, mask, unmeasured=unmeasured)
    bias = model.head.bias
    for b in range(len(x)):
        seen = (x[b] > 0) & ~mask[b] & ~unmeasured[b]
        offset = (x[b] - bias)[seen].mean() if seen.any() else 0.0
        assert torch.allclose(predicted[b], bias + offset, atol=1e-6)
    # What is hidden or not measured has no part in it.
    moved = torch.where(mask | unmeasured, x + 1, x)
    assert torch.equal(model(moved, mask, unmeasured=unmeasured), predicted)
    positions = torch.tensor([[0, 7], [3, 3], [59, 1], [2, 4]])
    some = model(x, mask, unmeasured=unmeasured, positions=positions)
    assert torch.equal(some, predicted.gather(1, positions))


@pytest.mark.parametrize("n", [1, 2, 60, 1000])
def test_pairwise_sums_are_the_same_in_any_batch(n):
    values = torch.randn(7, n, generator=torch.Generator().manual_seed(n))
    sums = pairwise_sum(values)
    assert torch.allclose(sums[:, 0], values.double().sum(1).float(), atol=1e-3)
    for row, together in zip(values, sums, strict=True):
        assert torch.equal(pairwise_sum(row[None])[0], together)


@pytest.mark.parametrize("rate", [1e-4, 0.3, 2.0, 15.0, 39.0, 41.0, 300.0])
def test_the_expected_value_is_the_mean_over_drawn_counts(rate):
    """Against numbers drawn from a Poisson distribution without its zeros."""
    one = 3.0
    rng = np.random.default_rng(0)
    if rate < 1:  # by the inverse of the distribution function, for zeros would be most
        k = np.arange(1, 30)
        chance = np.exp(k * np.log(rate) - np.cumsum(np.log(k)))
        drawn = rng.choice(k, 200_000, p=chance / chance.sum())
    else:
        drawn = rng.poisson(rate, 400_000)
        drawn = drawn[drawn > 0]
    found = expected_value(torch.tensor([[rate * one]]).log(), torch.tensor([[one]]))
    assert abs(float(found) - np.log1p(drawn * one).mean()) < 0.004


def test_an_untrained_poisson_head_predicts_the_poisson_baseline():
    """Of visible values alone, the same in a batch of any size, at some genes or all."""
    model = small_model(gene_bias=True, cell_offset="poisson")
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(rng.gamma(0.5, 2.0, (4, G)))).double()
    counts[:, 0] = 1
    counts[:, 1] = 200
    x = torch.log1p(1e4 * counts / counts.sum(1, keepdim=True)).float()
    mask = torch.zeros(4, G, dtype=torch.bool)
    mask[:, 20:30] = True
    total = rng.integers(1, 10**6, G)
    total[1] = 5 * 10**7
    stats = GeneStats(np.ones(G, int), total, np.ones(G), 1.0, 1.0, 1e4)
    first = first_output(model.config, stats)
    model.head.bias.data.copy_(torch.from_numpy(first))
    torch.nn.init.zeros_(model.head.weight)
    depth = DepthBaselines(stats, torch.device("cpu"))
    depth.fit()
    positions = torch.arange(G).expand(4, -1)
    expected = depth.predict(x, mask, positions)[DEPTH_BASELINES.index("poisson")]
    predicted = model(x, mask)
    few = torch.as_tensor(first) - one_count(x, (x > 0) & ~mask).log() < np.log(40)
    assert few.any()
    assert not few.all()
    assert torch.allclose(predicted.double(), expected, atol=1e-4)
    assert torch.equal(model(x + mask, mask), predicted)
    assert torch.equal(model(x[2:3], mask[2:3])[0], predicted[2])
    assert torch.equal(model(x, mask, positions=positions[:, 7:9]), predicted[:, 7:9])


def test_a_cell_without_visible_values_has_predictions_and_gradients():
    model = small_model(gene_bias=True, cell_offset="poisson")
    x, _ = small_cells()
    predicted = model(x, torch.ones_like(x, dtype=torch.bool))
    predicted.sum().backward()
    assert predicted.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
