"""Whole numbers that are no raw counts are found, also in a part of the cells; real ones pass."""

import re

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts.whole_numbers import describe_limits, describe_whole

RNG = np.random.default_rng(17)
N_CELLS, N_GENES = 200, 1500
SHARES = RNG.gamma(0.4, 1, N_GENES)
SHARES /= SHARES.sum()
COUNTS = RNG.poisson(RNG.lognormal(7.2, 0.4, (N_CELLS, 1)) * SHARES)
"""About 1300 counts a cell on 500 genes."""
CP10K = 1e4 * COUNTS / COUNTS.sum(axis=1, keepdims=True)
PER_LENGTH = COUNTS / RNG.lognormal(0.5, 0.7, N_GENES)
TPM = np.rint(1e6 * PER_LENGTH / PER_LENGTH.sum(axis=1, keepdims=True))
FACTORS = np.exp(np.linspace(1, 1.8, N_CELLS))[:, None]


def described(values: np.ndarray, first: int = 0) -> str:
    return describe_whole(sparse.csr_matrix(values.astype(np.int64)), first=first)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (TPM, "looks like TPM or CPM, rounded"),
        (np.floor(CP10K), "looks (scaled|normalised) and rounded"),
        (np.rint(COUNTS * FACTORS), "looks scaled and rounded"),
        (np.floor(np.log1p(CP10K)), "looks like rounded logarithms"),
        (np.floor(100 * np.log1p(CP10K)), "looks (scaled|normalised) and rounded"),
        (np.minimum(COUNTS, 1), r"holds no other value than 1 \(detected / not detected\)"),
        (COUNTS * 2, "holds only multiples of 2"),
        (np.minimum(COUNTS, 2) * 3, "holds only multiples of 3"),
    ],
)
@pytest.mark.parametrize("counted", ["none", "one", "half"])
def test_processed_cells_are_found_among_counts(
    values: np.ndarray, message: str, counted: str
) -> None:
    n_counted = {"none": 0, "one": 1, "half": N_CELLS // 2}[counted]
    mixed = np.vstack([COUNTS[:n_counted], values[n_counted:]])
    found = described(mixed)
    assert re.match(message, found), found


def test_the_cells_are_numbered_as_in_the_matrix() -> None:
    mixed = np.vstack([COUNTS[:2], np.zeros((1, N_GENES)), np.minimum(COUNTS[:30], 1)])
    assert "in 30 of 32 cells (rows 1003, 1004, 1005, ...)" in described(mixed, first=1000)
    assert described(mixed[:22]) == ""


def test_counts_of_any_depth_and_kind_pass() -> None:
    shallow = RNG.poisson(60 * SHARES, (N_CELLS, N_GENES))
    reads = np.rint(COUNTS * RNG.lognormal(3, 1.2, COUNTS.shape))
    equal = RNG.multinomial(1000, SHARES, N_CELLS)
    million = RNG.multinomial(1_000_000, SHARES, N_CELLS)
    one_gene = RNG.poisson(60 * SHARES, (N_CELLS, N_GENES))
    one_gene[:100, 0] += RNG.poisson(3000, 100)
    proteins = RNG.negative_binomial(2, 0.01, (N_CELLS, 20))
    for values in (COUNTS, shallow, reads, equal, million, one_gene):
        assert described(values) == ""
        assert described(np.vstack([values[:100], COUNTS[:100]])) == ""
    assert described(np.hstack([COUNTS, proteins])) == ""
    assert described(2 * np.eye(30)) == ""


def test_totals_that_agree_though_no_number_is_missing_are_a_warning() -> None:
    deep = np.random.default_rng(2).poisson(
        RNG.lognormal(9.8, 0.3, (N_CELLS, 1)) * np.append(SHARES, np.zeros(N_GENES))
    )
    rounded = np.rint(1e4 * deep / deep.sum(axis=1, keepdims=True))
    for values, found in ((rounded, True), (deep, False)):
        limits = describe_limits(
            sparse.csr_matrix(values.astype(np.int64)), dtype=np.dtype(np.float32)
        )
        assert ("these may be scaled to 10000 and rounded" in limits) == found
