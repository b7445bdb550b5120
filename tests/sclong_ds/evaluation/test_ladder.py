"""The rows of the ladder: their definitions, recomputed by other means."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import named_genes, write_model
from scipy.sparse import csr_matrix

from sclong_ds.evaluation import ladder, representations
from sclong_ds.evaluation.scored_cells import ScoredCells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.model.pooling import TOGETHER, principal_recipe
from sclong_ds.model.values.principal import random_blocks


@pytest.fixture
def counts() -> csr_matrix:
    dense = np.random.default_rng(0).poisson(0.8, (30, 40))
    dense[:, 3] = 0
    return csr_matrix(dense)


def log1p(counts: csr_matrix) -> csr_matrix:
    totals = np.asarray(counts.sum(axis=1))
    return csr_matrix(np.log1p(1.0e4 * counts.toarray() / totals))


def test_depth_is_total_and_genes_on_the_same_scale(counts: csr_matrix) -> None:
    found = ladder.depth(counts)
    np.testing.assert_allclose(found.std(axis=0), 1.0)
    total = np.log(counts.toarray().sum(axis=1))
    assert np.corrcoef(found[:, 0], total)[0, 1] == pytest.approx(1.0)
    np.testing.assert_array_equal(ladder.depth(csr_matrix(np.ones((4, 5), dtype=int))), 0.0)


def test_on_off_knows_no_values(counts: csr_matrix) -> None:
    found = ladder.on_off(counts, seed=0)
    assert found.shape == (30, 32)
    np.testing.assert_array_equal(ladder.on_off(counts * 3, seed=0), found)
    assert (ladder.on_off(counts, seed=1) != found).any()


def test_gene_vectors_are_averaged_over_the_genes_with_a_count(
    counts: csr_matrix, tmp_path: Path
) -> None:
    model = load_model(write_model(tmp_path, named_genes(40), seed=0))
    with torch.no_grad():
        vectors = model.gene_encoder().numpy()
    expected = [vectors[row > 0].mean(axis=0) for row in counts.toarray()]
    found = ladder.gene_vector_means(model, counts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_untrained_weights_are_of_the_same_model_and_leave_torch_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path, named_genes(40), seed=0)
    trained = load_model(folder)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fresh = ladder.untrained_model(trained, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert (fresh.config, fresh.genes.hash) == (trained.config, trained.genes.hash)
    assert fresh.transform == trained.transform
    ours, theirs = trained.state_dict(), fresh.state_dict()
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}
    assert any((ours[name] != theirs[name]).any() for name in ours)
    again = ladder.untrained_model(trained, seed=1).state_dict()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_untrained_directions_are_random_ones(counts: csr_matrix, tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, named_genes(40), seed=0))
    learnt = random_blocks(torch.zeros(2, 40, 8), 3)
    model.recipe = replace(
        principal_recipe(11, 8, TOGETHER),
        centres=torch.zeros(2, 8),
        maps=torch.eye(8).expand(2, -1, -1),
        directions=learnt,
    )
    none = {"batches": None, "left_out": {}, "rare_labels": {}}
    scored = ScoredCells(rows=np.arange(30), counts=counts, labels=np.array(["a"] * 30), **none)
    found = representations._untrained(model, scored, batch_size=8, seed=1)
    x = log1p(counts).toarray()
    drawn = random_blocks(learnt, 1).numpy()
    expected = np.concatenate([x @ drawn[0], x @ drawn[1]], axis=1)[:, :11]
    expected -= expected.mean(axis=0)
    expected /= np.sqrt(expected.var(axis=0, ddof=1).sum())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert model.recipe.directions is learnt


def test_pca_is_that_of_all_genes(counts: csr_matrix) -> None:
    values = log1p(counts)
    found = ladder.plain_rows(counts, values, seed=0)["pca"]
    assert found.shape == (30, 29)
    centred = values.toarray() - values.toarray().mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), singular[:29], rtol=1e-3)


def test_variable_genes_are_compared_with_genes_of_a_like_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ladder, "VARIABLE_GENES", 2)
    rng = np.random.default_rng(0)
    # Variance grows with the mean; genes 5 and 60 vary more than others of their mean.
    means = np.repeat([1.0, 50.0], 50)
    plain = rng.poisson(means, (400, 100)).astype(float)
    plain[:, 5] *= rng.choice([0.0, 2.0], 400)
    plain[:, 60] *= rng.choice([0.5, 1.5], 400)
    assert ladder.variable_genes(csr_matrix(np.log1p(plain))).tolist() == [5, 60]


def test_scaled_genes_have_variance_1_and_no_value_above_10() -> None:
    dense = np.random.default_rng(0).normal(size=(300, 3))
    dense[0, 1], dense[:, 2] = 1000.0, 7.0
    found = ladder.scaled(csr_matrix(dense))
    np.testing.assert_allclose(found[:, 0].std(ddof=1), 1.0)
    assert found[0, 1] == 10.0
    np.testing.assert_array_equal(found[:, 2], 0.0)
