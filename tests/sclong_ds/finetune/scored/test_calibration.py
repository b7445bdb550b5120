"""Temperatures, unknown cells and errors, chosen on cells that training did not see."""

import numpy as np
import pytest

from sclong_ds.exported.head import is_unknown, probabilities
from sclong_ds.finetune.scored.calibration import (
    fit_reference,
    fit_temperature,
    judge_labels,
    judge_numbers,
)

RNG = np.random.default_rng(0)
N = 4000


def drawn(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return scores `scale` times as sure as they should be, and labels of the right odds."""
    scores = RNG.normal(0, 2, (N, 3))
    shares = probabilities(scores, 1.0)
    target = (shares.cumsum(axis=1) < RNG.random((N, 1))).sum(axis=1)
    return scores * scale, target


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_too_sharp_and_too_flat_scores(scale):
    scores, target = drawn(scale)
    assert fit_temperature(scores, target) == pytest.approx(scale, rel=0.1)


def test_a_class_that_was_not_learnt_has_no_share_at_any_temperature():
    scores = np.array([[1.0, -np.inf, 0.0]])
    np.testing.assert_array_equal(probabilities(scores, 3.0)[:, 1], 0.0)


def test_the_share_of_right_cells_that_are_called_unknown_is_the_one_asked_for():
    scores, target = drawn(1.0)
    judged = judge_labels(scores, RNG.random(N), target, unknown_rate=0.1)
    assert judged.unknown_by == "confidence"
    shares = probabilities(scores, judged.temperature)
    right = shares.argmax(axis=1) == target
    called = is_unknown(shares.max(axis=1), np.zeros(N), judged)
    assert called[right].mean() == pytest.approx(0.1, abs=0.005)
    assert called[~right].mean() > 0.15
    nobody = judge_labels(scores, RNG.random(N), target, unknown_rate=0.0)
    assert not is_unknown(shares.max(axis=1), np.zeros(N), nobody).any()


def test_distance_is_taken_where_it_tells_right_from_wrong_better():
    scores, target = drawn(1.0)
    wrong = scores.argmax(axis=1) != target
    judged = judge_labels(scores, wrong + 0.1 * RNG.random(N), target, unknown_rate=0.05)
    assert judged.unknown_by == "distance"
    assert is_unknown(np.ones(N), wrong.astype(float) + 0.05, judged)[wrong].all()


def test_distance_is_near_in_a_class_and_far_from_all():
    codes = np.arange(300) % 2
    scaled = RNG.normal(0, 1, (300, 4)).astype(np.float32) + 10 * codes[:, None]
    reference = fit_reference(scaled.astype(np.float32), codes, 3)  # class 2 has no cells
    near = reference.distance(scaled.astype(np.float32))
    far = reference.distance(np.full((1, 4), 5, np.float32))
    assert np.median(near) == pytest.approx(1.0, abs=0.2)
    assert far[0] > 3 * near.max() / 2


def test_the_error_of_numbers_holds_nine_of_ten():
    true = RNG.normal(0, 1, N)
    predicted = true + RNG.normal(0, 1, N)
    judged = judge_numbers(predicted, np.arange(N, dtype=float), true, unknown_rate=0.05)
    assert (np.abs(predicted - true) <= judged.error).mean() == pytest.approx(0.9, abs=0.01)
    assert judged.unknown_by == "distance"
    assert judged.threshold == pytest.approx(0.95 * N, rel=0.01)
