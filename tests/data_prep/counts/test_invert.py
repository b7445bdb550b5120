"""Counts restored from log1p values: exact where proven, never guessed.

Covers also `data_prep/counts/not_counts.py`.
"""

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts.invert import FEWEST_VALUES, find_target, restore_counts
from data_prep.source.source import UnusableError


def cells(seed: int = 0, *, n_cells: int = 40, n_genes: int = 600) -> np.ndarray:
    """Counts with a long tail (up to some thousands) and ones in every cell."""
    rng = np.random.default_rng(seed)
    means = 2000.0 * np.arange(1, n_genes + 1) ** -1.2
    return rng.poisson(means * rng.uniform(0.3, 3, (n_cells, 1))).astype(np.float64)


def logged(counts: np.ndarray, target: float = 1e4) -> np.ndarray:
    return np.log1p(counts * (target / counts.sum(axis=1, keepdims=True)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [1e4, 1e6, 4512.0])
def test_counts_come_back_exactly(dtype: type, target: float) -> None:
    counts = cells()
    values = sparse.csr_matrix(logged(counts, target).astype(dtype))
    assert find_target(values, where="X") == pytest.approx(target, rel=1e-6)
    restored = restore_counts(values, target=find_target(values, where="X"), where="X")
    assert restored.proven.all()
    assert restored.counts.dtype == np.int64
    np.testing.assert_array_equal(restored.counts.toarray(), counts)
    assert 0 < restored.largest_residual < 0.05


def test_genes_removed_after_scaling_leave_totals_that_prove_the_cells() -> None:
    counts = cells()
    values = sparse.csr_matrix(logged(counts).astype(np.float32)[:, 5:])
    assert find_target(values, where="X") == 10_000
    restored = restore_counts(values, target=10_000, where="X")
    assert restored.proven.all()
    np.testing.assert_array_equal(restored.counts.toarray(), counts[:, 5:])


def test_a_cell_without_a_single_count_of_one_is_not_proven() -> None:
    counts = cells()
    counts[3] *= 5
    counts[3, :300:2] += 2 * (counts[3, :300:2] > 0)
    restored = restore_counts(sparse.csr_matrix(logged(counts)), target=1e4, where="X")
    assert np.flatnonzero(~restored.proven).tolist() == [3]
    assert restored.counts[3].nnz == 0
    np.testing.assert_array_equal(
        np.delete(restored.counts.toarray(), 3, axis=0), np.delete(counts, 3, axis=0)
    )


def test_a_few_values_prove_nothing_and_none_are_fine() -> None:
    counts = cells(n_cells=3)
    counts[0] = 0
    counts[1, FEWEST_VALUES - 1 :] = 0
    values = sparse.csr_matrix(logged(np.maximum(counts, 0) + (counts.sum(1) == 0)[:, None]))
    values[0] = 0
    restored = restore_counts(values, target=1e4, where="X")
    assert restored.proven.tolist() == [True, False, True]


def test_the_wrong_total_is_no_proof() -> None:
    values = sparse.csr_matrix(logged(cells()))
    assert not restore_counts(values, target=9_999, where="X").proven.any()


def test_values_with_few_digits_are_not_proven() -> None:
    values = sparse.csr_matrix(np.round(logged(cells()), 2))
    assert not restore_counts(values, target=1e4, where="X").proven.any()


def test_what_is_no_log1p_of_scaled_counts_is_refused() -> None:
    counts = cells()
    rates = counts / np.random.default_rng(2).uniform(0.5, 9, counts.shape[1])
    unequal = counts * np.random.default_rng(3).uniform(0.1, 9, (len(counts), 1))
    with pytest.raises(UnusableError, match="not log1p of counts scaled to one total"):
        find_target(sparse.csr_matrix(np.log1p(unequal)), where="X")
    tpm = sparse.csr_matrix(logged(rates, 1e6))
    assert not restore_counts(tpm, target=find_target(tpm, where="X"), where="X").proven.any()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.nan, ValueError, "NaN"),
        (np.inf, ValueError, "infinite"),
        (-0.5, UnusableError, "negative"),
        (400.0, UnusableError, "too large for a logarithm"),
    ],
)
def test_values_that_are_no_logarithms(value: float, error: type, message: str) -> None:
    values = logged(cells())
    values[2, 2] = value
    with pytest.raises(error, match=message):
        restore_counts(sparse.csr_matrix(values), target=1e4, where="X")


def test_counts_are_not_inverted() -> None:
    with pytest.raises(ValueError, match="X holds whole numbers, not log1p values"):
        find_target(sparse.csr_matrix(cells()), where="X")


def test_two_values_of_one_place_are_refused() -> None:
    values = sparse.csr_matrix(logged(cells(n_cells=3)))
    values.indices[1] = values.indices[0]
    with pytest.raises(ValueError, match="X holds 1 values more than places"):
        restore_counts(values, target=1e4, where="X")
