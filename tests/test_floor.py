"""How much of an error is noise of counting: `benchmarks/recipe/floor.py`."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import poisson

from benchmarks.recipe.floor import (
    PRIOR,
    Hidden,
    halves,
    moments,
    replicate_errors,
    spread_of_rates,
)
from benchmarks.recipe.panel import Cells


def drawn(rate: np.ndarray, seed: int = 0) -> Hidden:
    """Values of Poisson counts above 0 of these rates, predicted at their mean."""
    count = np.random.default_rng(seed).poisson(rate).astype(float)
    rate, count = rate[count > 0], count[count > 0]
    one, where = np.full(len(rate), 0.5), np.zeros(len(rate), dtype=int)
    predicted = moments(rate, one)[0]
    return Hidden(rate, one, count, np.log1p(count * one), predicted, where, where)


def test_moments_are_those_of_a_poisson_count_known_to_be_seen() -> None:
    rate, one = np.array([0.01, 0.7, 5.0, 60.0]), np.array([2.0, 0.3, 1.0, 0.1])
    k = np.arange(1, 300)
    chance = poisson.pmf(k, rate[:, None]) / -np.expm1(-rate)[:, None]
    values = np.log1p(k * one[:, None])
    mean = (chance * values).sum(1)
    found = moments(rate, one)
    np.testing.assert_allclose(found[0], mean, rtol=1e-10)
    np.testing.assert_allclose(found[1], (chance * (values - mean[:, None]) ** 2).sum(1), rtol=1e-7)


def test_true_rates_leave_noise_alone_and_false_ones_a_spread() -> None:
    rate = np.random.default_rng(1).uniform(0.5, 8.0, 1200)
    true = drawn(rate)
    shape, noise, spread = spread_of_rates(true)
    assert shape == 100
    assert noise == pytest.approx(((true.predicted - true.value) ** 2).mean(), rel=0.15)
    assert spread < 0.15 * noise
    wide = drawn(rate * np.random.default_rng(2).gamma(2.0, 0.5, len(rate)))
    false = wide._replace(rate=np.full(len(wide.rate), rate.mean()))
    assert spread_of_rates(false)[2] > 0.3 * noise


def test_the_other_half_of_a_count_tells_where_rates_are_false() -> None:
    rate = np.random.default_rng(3).uniform(0.5, 8.0, 1200)
    true = drawn(rate)
    plain, _, noise = halves(true, 100.0)
    assert noise == pytest.approx(plain, rel=0.15)
    false = true._replace(rate=np.full(len(true.rate), 4.0))
    plain, told, _ = halves(false, 3.0)
    assert told < 0.95 * plain


def test_a_group_is_read_without_the_cell_itself() -> None:
    counts = csr_matrix(np.array([[9, 1], [50, 50], [50, 50], [1, 99]]))
    cells = Cells(np.arange(4), counts, np.zeros(4, dtype=int))
    found = Hidden(
        rate=np.array([1e-9]), one=np.array([100.0]), count=np.array([9.0]),
        value=np.array([0.0]), predicted=np.array([0.0]), cell=np.array([0]), gene=np.array([0]),
    )  # fmt: skip
    errors = replicate_errors(found, cells, np.array([0]), np.array(["a", "a", "a", "b"]))
    # 100 of 200 counts in the group, and one count is 100 of 10,000: a rate of 50.
    assert errors[0] == pytest.approx(moments(np.array([50.0]), np.array([100.0]))[0][0] ** 2)
    assert len(errors) == len(PRIOR)
