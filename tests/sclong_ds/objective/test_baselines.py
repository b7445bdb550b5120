"""The depth baselines against plain numpy, and on cells of known depth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import poisson

from sclong_ds.corpus.corpus import GeneStats
from sclong_ds.objective.baselines import DepthBaselines
from sclong_ds.run_folder.metric_names import DEPTH_BASELINES as NAMES

G, TARGET_SUM = 300, 1e4


def made_cells(n_cells: int, seed: int) -> np.ndarray:
    """(cells, G) counts of one expression profile at depths from 200 to 20,000."""
    rng = np.random.default_rng(seed)
    profile = np.random.default_rng(0).lognormal(0, 1.5, G)
    depths = rng.uniform(np.log(200), np.log(20_000), n_cells)
    return rng.poisson(np.exp(depths)[:, None] * profile / profile.sum())


def values_of(counts: np.ndarray) -> np.ndarray:
    return np.log1p(TARGET_SUM * counts / counts.sum(axis=1, keepdims=True))


def stats_of(counts: np.ndarray) -> GeneStats:
    values, seen = values_of(counts), (counts > 0).sum(axis=0)
    mean_all = values[counts > 0].mean()
    return GeneStats(
        n_expressing=seen, total_counts=counts.sum(axis=0),
        mean_expressed=np.where(seen > 0, values.sum(axis=0) / np.maximum(seen, 1), mean_all),
        mean_expressed_all=mean_all, var_expressed_all=values[counts > 0].var(),
        target_sum=TARGET_SUM,
    )  # fmt: skip


def batch(counts: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, hidden (15% of the expressed genes) and every gene as a position."""
    x = torch.from_numpy(values_of(counts)).float()
    hidden = torch.from_numpy(np.random.default_rng(seed).random(x.shape) < 0.15) & (x > 0)
    return x, hidden, torch.arange(G).expand(len(x), -1)


def fitted(train: np.ndarray) -> DepthBaselines:
    found = DepthBaselines(stats_of(train), torch.device("cpu"))
    x, hidden, positions = batch(train, seed=5)
    for part in (slice(0, 100), slice(100, None)):
        found.add(x[part], hidden[part], positions[part], hidden[part])
    found.fit()
    return found


def test_predictions_are_those_of_plain_numpy() -> None:
    train, counts = made_cells(200, 1), made_cells(6, 2)
    stats, baselines = stats_of(train), fitted(train)
    x, hidden, positions = batch(counts, seed=3)
    found = baselines.predict(x, hidden, positions).numpy()
    values, mean = x.double().numpy(), stats.mean_expressed
    share = np.maximum(stats.total_counts / stats.total_counts.sum(), 1e-9)
    k = np.arange(1, 400)
    for cell in range(len(counts)):
        visible = (counts[cell] > 0) & ~hidden[cell].numpy()
        offset = (values[cell, visible] - mean[visible]).mean()
        one = math.expm1(values[cell, visible].min())
        assert found[0, cell] == pytest.approx(mean)
        assert found[1, cell] == pytest.approx(mean + offset)
        for gene in range(0, G, 17):
            chance = poisson.pmf(k, TARGET_SUM / one * share[gene])
            expected = (chance * np.log1p(k * one)).sum() / chance.sum()
            assert found[2, cell, gene] == pytest.approx(expected, abs=0.002)


def test_the_linear_weights_are_those_of_numpys_least_squares() -> None:
    train = made_cells(200, 1)
    stats, baselines = stats_of(train), fitted(train)
    x, hidden, positions = batch(train, seed=5)
    rows = []
    for cell in range(len(train)):
        visible = (train[cell] > 0) & ~hidden[cell].numpy()
        v, m = x[cell].double().numpy(), stats.mean_expressed
        o, s = (v[visible] - m[visible]).mean(), v[visible].min()
        for g in np.flatnonzero(hidden[cell].numpy()):
            rows.append([1, m[g], o, s, m[g] * o, m[g] * s, m[g] ** 2, v[g]])
    table = np.array(rows)
    weights = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=None)[0]
    linear = baselines.predict(x, hidden, positions)[3][hidden].numpy()
    assert linear == pytest.approx(table[:, :-1] @ weights, abs=1e-8)


def test_where_depth_is_all_there_is_each_baseline_beats_the_one_before() -> None:
    baselines, counts = fitted(made_cells(400, 1)), made_cells(200, 2)
    x, hidden, positions = batch(counts, seed=3)
    errors = (baselines.predict(x, hidden, positions) - x).square()[:, hidden].mean(dim=1)
    mean, offset, truncated, linear = errors.tolist()
    assert offset < 0.9 * mean
    assert min(truncated, linear) < offset


def test_what_is_hidden_is_not_looked_at() -> None:
    baselines = fitted(made_cells(200, 1))
    x, hidden, positions = batch(made_cells(6, 2), seed=3)
    other = torch.where(hidden, x + 7.0, x)
    assert torch.equal(
        baselines.predict(x, hidden, positions), baselines.predict(other, hidden, positions)
    )


def test_a_cell_without_visible_values_gets_the_gene_means() -> None:
    baselines = fitted(made_cells(200, 1))
    x, _, positions = batch(made_cells(2, 2), seed=3)
    found = baselines.predict(x, torch.ones_like(x, dtype=torch.bool), positions)
    assert torch.equal(found[NAMES.index("offset")], found[0])
    assert torch.equal(found[NAMES.index("poisson")], found[0])
    assert torch.isfinite(found).all()


def test_without_training_values_the_fit_is_the_offset() -> None:
    baselines = DepthBaselines(stats_of(made_cells(50, 1)), torch.device("cpu"))
    baselines.fit()
    x, hidden, positions = batch(made_cells(3, 2), seed=3)
    found = baselines.predict(x, hidden, positions)
    assert torch.allclose(found[NAMES.index("linear")], found[NAMES.index("offset")])


def test_predicting_before_the_fit_is_an_error() -> None:
    baselines = DepthBaselines(stats_of(made_cells(50, 1)), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="before fit"):
        baselines.predict(*batch(made_cells(3, 2), seed=3))
