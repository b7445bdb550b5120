"""Scores against scikit-learn's, paired intervals, order and verdict."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, r2_score

from sclong_ds.finetune.scored.table import (
    FINE_TUNED,
    label_scores,
    number_scores,
    numbers_of,
    ordered,
    row_of,
    shown_rows,
    verdict,
)

RNG = np.random.default_rng(0)
N = 300
TARGET = RNG.integers(3, size=N)
GROUPS = np.repeat([f"d{i}" for i in range(10)], N // 10)


def shares(sharpness: float, seed: int = 0) -> np.ndarray:
    """Return probabilities that are right more often the sharper they are."""
    noise = np.random.default_rng(seed).normal(size=(N, 3))
    scores = sharpness * np.eye(3)[TARGET] + noise
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def test_scores_of_labels_are_those_of_scikit_learn():
    given = shares(1.0)
    found = label_scores(given, TARGET, GROUPS).values
    predicted = given.argmax(axis=1)
    assert found["accuracy"] == pytest.approx((predicted == TARGET).mean())
    assert found["macro_f1"] == pytest.approx(f1_score(TARGET, predicted, average="macro"))
    assert found["nll"] == pytest.approx(log_loss(TARGET, given))


def test_calibration_error_is_that_of_its_definition():
    confidence, right = np.array([0.55, 0.55, 0.95, 0.95]), np.array([1, 0, 1, 1])
    given = np.stack([confidence, 1 - confidence], axis=1)
    found = label_scores(given, 1 - right, np.array(list("abcd"))).values["ece"]
    assert found == pytest.approx((2 * abs(0.55 - 0.5) + 2 * abs(0.95 - 1.0)) / 4)


def test_every_interval_holds_its_score_and_a_calibration_error_has_none():
    row = row_of([label_scores(shares(1.0, seed), TARGET, GROUPS) for seed in range(2)])
    for name, value in row.scores.values.items():
        bounds = row.scores.interval(name)
        assert (bounds is None) == (name == "ece")
        if bounds is not None:
            assert value is not None
            assert bounds.low <= value <= bounds.high


def test_scores_of_numbers_are_those_of_scikit_learn():
    true = RNG.normal(50, 10, N)
    predicted = true + RNG.normal(0, 5, N)
    found = number_scores(predicted, true, GROUPS).values
    assert found["mae"] == pytest.approx(np.abs(predicted - true).mean())
    assert found["r2"] == pytest.approx(r2_score(true, predicted))


def test_a_row_of_seeds_has_their_mean_and_spread():
    found = [label_scores(shares(1.0, seed), TARGET, GROUPS) for seed in range(3)]
    row, each = row_of(found), [s.values["accuracy"] for s in found]
    assert row.scores.values["accuracy"] == pytest.approx(np.mean(each))
    assert row.spread == pytest.approx(np.std(each, ddof=1))
    assert row_of(found[:1]).spread is None


@pytest.mark.parametrize(
    ("own", "other", "word"), [(3.0, 1.0, "above"), (1.0, 3.0, "below"), (1.0, 1.0, "not told")]
)
def test_the_strongest_row_is_first_and_the_verdict_names_the_side(own, other, word):
    rows = {
        FINE_TUNED: row_of([label_scores(shares(own, 1), TARGET, GROUPS)]),
        "weak": row_of([label_scores(shares(0.2, 2), TARGET, GROUPS)]),
        "strong": row_of([label_scores(shares(other, 1), TARGET, GROUPS)]),
    }
    sentence = verdict(rows)
    assert word in sentence
    assert "strongest baseline, strong" in sentence
    order = ordered(rows)
    assert order[-1] == "weak"
    assert list(numbers_of(rows).index) == list(shown_rows(rows).index) == order


def test_lower_errors_of_numbers_are_above():
    true = RNG.normal(50, 10, N)
    rows = {
        FINE_TUNED: row_of([number_scores(true + RNG.normal(0, 1, N), true, GROUPS)]),
        "mean": row_of([number_scores(np.full(N, true.mean()), true, GROUPS)]),
    }
    assert ordered(rows)[0] == FINE_TUNED
    assert "above the strongest" in verdict(rows)


def test_explained_variance_has_an_interval_only_where_it_is_defined_in_nearly_all_resamples():
    ages = {name: 20.0 + 10 * (i % 5) for i, name in enumerate(np.unique(GROUPS))}
    true = np.array([ages[name] for name in GROUPS])
    predicted = true + RNG.normal(0, 5, N)
    row = row_of([number_scores(predicted, true, GROUPS)])
    bounds = row.scores.interval("r2")
    assert np.isfinite(bounds).all()
    assert bounds.low <= row.scores.values["r2"] <= bounds.high <= 1
    # Of five groups all but one have the same number: a third of the resamples have one number.
    groups = np.repeat(list("abcde"), N // 5)
    true = np.where(groups == "a", 0.1, 37.3)
    row = row_of([number_scores(true + RNG.normal(0, 5, N), true, groups)])
    assert row.scores.interval("r2") is None
    shown = shown_rows({FINE_TUNED: row})
    assert "no interval: undefined in 3" in shown.loc[FINE_TUNED, "r2"]
    assert "[" in shown.loc[FINE_TUNED, "mae"]
