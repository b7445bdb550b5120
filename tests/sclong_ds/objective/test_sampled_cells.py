"""Predictions from a sample of training cells, against loops and dense algebra."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from sclong_ds.objective.sampled_cells import (
    DIRECTIONS,
    PENALTY,
    NearestCells,
    PrincipalResiduals,
)


def made(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 80)) * (rng.random((n, 80)) < 0.3)).astype(np.float32)


def test_predictions_are_those_of_a_loop() -> None:
    train, cells = made(100, 1), made(5, 2)
    genes = np.random.default_rng(3).integers(0, 80, (5, 12))
    found = NearestCells(csr_matrix(train)).predict(csr_matrix(cells), genes)
    for i, cell in enumerate(cells.astype(float)):
        sizes = np.linalg.norm(train, axis=1) * np.linalg.norm(cell)
        near = np.argsort(-(train @ cell) / sizes, kind="stable")[:30]
        for p, g in enumerate(genes[i]):
            values = train[near, g][train[near, g] != 0]
            np.testing.assert_allclose(found[i, p], values.sum() / (len(values) + 3), atol=1e-6)


def test_cells_of_a_kind_are_found() -> None:
    """Two programmes of genes: what the visible half shows tells the hidden half."""
    kinds = np.sign(np.random.default_rng(0).normal(size=(2, 80)))
    train = np.repeat(kinds, 40, axis=0) + 0.3 * np.random.default_rng(1).normal(size=(80, 80))
    visible = kinds * (np.arange(80) < 40)
    genes = np.tile(np.arange(40, 80), (2, 1))
    found = NearestCells(csr_matrix(train)).predict(csr_matrix(visible), genes)
    assert (np.sign(found) == kinds[:, 40:]).all()


def test_without_cells_or_values_nothing_is_added() -> None:
    empty = NearestCells(csr_matrix((0, 80), dtype=np.float32))
    genes = np.zeros((2, 3), dtype=np.int64)
    assert not empty.predict(csr_matrix(made(2, 2)), genes).any()
    blank = NearestCells(csr_matrix(made(3, 1))).predict(csr_matrix((2, 80)), genes)
    assert np.isfinite(blank).all()


def programmes(n: int, seed: int, n_genes: int = 80) -> np.ndarray:
    """Return (n, G) values of three programmes of genes and noise, 30% of them there."""
    rng, programmes = (
        np.random.default_rng(seed),
        np.random.default_rng(9).normal(size=(3, n_genes)),
    )
    values = rng.normal(size=(n, 3)) @ programmes + 0.3 * rng.normal(size=(n, n_genes))
    return (values * (rng.random((n, n_genes)) < 0.3)).astype(np.float32)


def test_predictions_are_those_of_penalized_least_squares() -> None:
    train, cells = programmes(200, 1), programmes(5, 2)
    genes = np.random.default_rng(3).integers(0, 80, (5, 12))
    found = PrincipalResiduals(csr_matrix(train)).predict(csr_matrix(cells), genes)
    _, _, rows = np.linalg.svd(train.astype(np.float64), full_matrices=False)
    directions = rows[:DIRECTIONS].T
    for i, cell in enumerate(cells):
        seen = cell != 0
        # The penalty as further observations of 0.
        left = np.vstack([directions[seen], np.sqrt(PENALTY) * np.eye(DIRECTIONS)])
        right = np.concatenate([cell[seen], np.zeros(DIRECTIONS)])
        coordinates = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(found[i], directions[genes[i]] @ coordinates, atol=1e-4)


def test_what_varies_together_tells_hidden_from_visible() -> None:
    cells = programmes(20, 2, 800)
    hidden = (np.random.default_rng(4).random(cells.shape) < 0.15) & (cells != 0)
    genes = np.tile(np.arange(800), (20, 1))
    visible = csr_matrix(np.where(hidden, 0, cells))
    found = PrincipalResiduals(csr_matrix(programmes(300, 1, 800))).predict(visible, genes)
    error = np.mean((found - cells)[hidden] ** 2)
    assert error < 0.4 * np.mean(cells[hidden] ** 2)


def test_without_cells_or_values_no_direction_says_anything() -> None:
    empty = PrincipalResiduals(csr_matrix((0, 80), dtype=np.float32))
    genes = np.zeros((2, 3), dtype=np.int64)
    assert not empty.predict(csr_matrix(programmes(2, 2)), genes).any()
    blank = PrincipalResiduals(csr_matrix(programmes(50, 1))).predict(csr_matrix((2, 80)), genes)
    assert not blank.any()
