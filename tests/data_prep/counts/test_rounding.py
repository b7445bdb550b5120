"""Corrected counts become whole numbers, and what that changed is known; others are refused."""

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts.rounding import round_counts
from data_prep.source.source import UnusableError

RNG = np.random.default_rng(3)
COUNTS = RNG.negative_binomial(1, RNG.uniform(0.2, 0.8, 200), (300, 200)).astype(np.float64)
CORRECTED = np.where(COUNTS > 0, COUNTS * 0.93 - 0.01, 0)


def rounded(values: np.ndarray) -> object:
    return round_counts(sparse.csr_matrix(values), where="X")


def test_values_become_the_nearest_whole_numbers_and_the_change_is_known() -> None:
    found = round_counts(sparse.csr_matrix(CORRECTED), where="X")
    np.testing.assert_array_equal(found.counts.toarray(), np.rint(CORRECTED))
    assert found.n_values == found.n_rounded == np.count_nonzero(COUNTS)
    assert found.total == pytest.approx(CORRECTED.sum(), rel=1e-6)
    largest = np.abs(CORRECTED - np.rint(CORRECTED)).max()
    assert found.largest_distance == pytest.approx(largest, rel=1e-4)
    whole = round_counts(sparse.csr_matrix(COUNTS), where="X")
    assert (whole.n_rounded, whole.largest_distance) == (0, 0.0)


def test_values_of_one_place_are_added_before_they_are_rounded() -> None:
    halves = sparse.csr_matrix((np.full(3, 0.4), [0, 0, 0], [0, 3]), shape=(1, 2))
    assert round_counts(halves, where="X").counts.toarray().tolist() == [[1, 0]]


SCALED = COUNTS / np.maximum(COUNTS.sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.log1p(1e4 * SCALED), "log1p of cells scaled to 10000"),
        (np.log2(1 + 1e6 * SCALED), r"log2\(1 \+ x\) of cells scaled to 1e\+06"),
        (1e4 * SCALED, r"normalised to about 1e\+04 a cell"),
        (-CORRECTED, "negative"),
        (COUNTS > 0, "bool"),
    ],
)
def test_what_is_no_corrected_counts_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UnusableError, match=f"X .*{message}"):
        rounded(values)


def test_normalised_cells_among_corrected_ones_are_found() -> None:
    mixed = CORRECTED.copy()
    mixed[-21:] = np.log1p(1e4 * SCALED[-21:]).astype(np.float32)
    with pytest.raises(UnusableError, match="log1p of cells scaled to 10000"):
        rounded(mixed)
    mixed[-21:] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        rounded(mixed)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_total_that_one_gene_carries_is_no_total(share: float) -> None:
    """exp of the largest of these values is most of the sum, and many cells have the same."""
    rng = np.random.default_rng(1)
    means = np.append(rng.lognormal(-3.2, 1.1, 600), 14)
    counts = rng.poisson(means, (600, 601)).astype(np.float64)
    few = counts - 0.3 * ((counts > 0) & (rng.random(counts.shape) < share))
    few[:, 600] = counts[:, 600]
    np.testing.assert_array_equal(
        round_counts(sparse.csr_matrix(few), where="X").counts.toarray(), counts
    )
