"""Predictions from the most similar training cells, against loops."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from sclong_ds.objective.nearest_cells import NearestCells


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
