"""Scores that can be checked by hand, folds of groups, transfer, and intervals."""

import dataclasses

import numpy as np
import pytest

from sclong_ds.evaluation.scores import (
    Layout,
    Scores,
    fewer_neighbours,
    neighbours_of,
    resampled_sums,
    score,
)
from sclong_ds.objective.scores import interval


def test_label_scores_tell_structure_from_noise() -> None:
    rng = np.random.default_rng(0)
    layout = Layout(labels=np.repeat(["a", "b"], 50))
    apart = rng.normal(size=(100, 3)) + 20 * (layout.labels == "a")[:, None]
    perfect = score(apart, layout).values
    assert perfect["knn_accuracy"] == perfect["knn_macro_f1"] == 1.0
    assert perfect["kmeans_ari"] == perfect["kmeans_nmi"] == pytest.approx(1.0)
    assert perfect["label_asw"] > 0.9
    noise = score(rng.normal(size=(100, 3)), layout).values
    assert noise["knn_accuracy"] < 0.7
    assert abs(noise["kmeans_ari"]) < 0.1
    assert abs(noise["label_asw"] - 0.5) < 0.05
    assert score(apart, layout).values == perfect


def test_macro_f1_counts_a_small_label_as_much_as_a_large_one() -> None:
    rng = np.random.default_rng(0)
    layout = Layout(labels=np.repeat(["large", "small"], [95, 5]))
    scores = score(rng.normal(size=(100, 3)), layout).values
    assert scores["knn_accuracy"] > 0.9
    assert scores["knn_macro_f1"] < 0.6


def test_a_rare_label_can_win_with_all_its_cells_and_15_vote_where_none_is_rare() -> None:
    rng = np.random.default_rng(0)
    layout = Layout(labels=np.repeat(["large", "rare"], [200, 6]))
    x = rng.normal(size=(206, 5)) + 100 * (layout.labels == "rare")[:, None]
    found = score(x, layout)
    assert found.values["knn_macro_f1"] == 1.0
    assert neighbours_of(layout) == (7, 9)
    assert fewer_neighbours(layout)[0].startswith(
        "knn: 7 to 9 nearest cells and not 15, in all rows"
    )
    usual = Layout(labels=np.repeat(["large", "small"], [200, 15]))
    assert (neighbours_of(usual), fewer_neighbours(usual)) == ((15, 15), [])
    groups = np.array([*(["d1", "d2"] * 100), "d1", "d2", "d2", "d2", "d2", "d2"])
    assert neighbours_of(dataclasses.replace(layout, groups=groups)) == (1, 9)


@pytest.mark.parametrize(("n", "groups"), [(30, None), (40, np.repeat(list("abcde"), 8))])
def test_the_interval_of_cells_that_are_all_right_or_all_wrong_is_no_point(
    n: int, groups: np.ndarray | None
) -> None:
    labels = np.tile(["a", "b"], n // 2)
    x = np.random.default_rng(0).normal(size=(n, 3)) + 50 * (labels == "a")[:, None]
    found, units = score(x, Layout(labels=labels, groups=groups)), 30 if groups is None else 5
    low, high = found.interval("knn_accuracy")
    assert (low, high) == (pytest.approx(0.025 ** (1 / units)), 1.0)
    assert found.interval("knn_macro_f1").low < 0.89
    train = np.zeros(n, dtype=bool)
    train[: n // 2] = True
    other = np.where((labels == "a") == train, 1.0, -1.0)[:, None]
    wrong = score(other, Layout(labels=labels, train=train, test=~train))
    low, high = wrong.interval("transfer_accuracy")
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (2 / n)))


def test_batch_scores_tell_mixed_from_separated() -> None:
    rng = np.random.default_rng(0)
    layout = Layout(labels=np.repeat(["a", "b"], 100), batches=np.tile(["x", "y"], 100))
    x = rng.normal(size=(200, 3)) + 50 * (layout.labels == "a")[:, None]
    mixed = score(x, layout).values
    shifted = x + np.array([0, 20, 0]) * (layout.batches == "x")[:, None]
    apart = score(shifted, layout).values
    assert mixed["batch_mixing"] > 0.9
    assert mixed["batch_asw"] > 0.9
    assert apart["batch_mixing"] == pytest.approx(0.0)
    assert apart["batch_asw"] < 0.2


def test_batch_width_is_undefined_where_batches_are_the_labels() -> None:
    labels = np.repeat(["a", "b"], 20)
    x = np.random.default_rng(0).normal(size=(40, 3))
    assert score(x, Layout(labels=labels, batches=labels)).values["batch_asw"] is None


def donors() -> tuple[np.ndarray, Layout]:
    """Return cells that lie by donor, and within a donor by label the other way round."""
    labels, groups = np.tile(["a", "b"], 60), np.repeat(["d1", "d2"], 60)
    side = np.where((labels == "a") == (groups == "d1"), 1.0, -1.0)
    x = np.stack([100.0 * (groups == "d1"), side], axis=1)
    x += np.random.default_rng(0).normal(scale=0.01, size=x.shape)
    return x, Layout(labels=labels, groups=groups, batches=groups)


def test_a_group_is_predicted_from_the_others_alone() -> None:
    x, layout = donors()
    assert score(x, dataclasses.replace(layout, groups=None)).values["knn_accuracy"] == 1.0
    x[:, 0] = 0.0
    assert score(x, layout).values["knn_accuracy"] == 0.0


def test_transfer_learns_from_some_batches_and_leaves_out_labels_they_lack() -> None:
    x, layout = donors()
    labels = layout.labels.copy()
    labels[-10:] = "only in d2"
    x[:, 0] = 0.0
    x[layout.groups == "d2", 1] *= -1
    train = layout.groups == "d1"
    found = score(x, Layout(labels=labels, train=train, test=~train))
    assert found.values["transfer_accuracy"] == found.values["transfer_macro_f1"] == 1.0
    x[60, 1] *= -1
    found = score(x, Layout(labels=labels, train=train, test=~train))
    assert found.values["transfer_accuracy"] == pytest.approx(49 / 50)


def accuracy_draws(groups: np.ndarray | None, *, seed: int = 0) -> Scores:
    labels = np.tile(["a", "b"], 100)
    x = np.where(labels == "a", 1.0, -1.0)[:, None] + np.zeros((200, 2))
    # Half of the donors are labelled the other way round: right or wrong as a whole.
    x[:100] *= -1
    train = np.zeros(200, dtype=bool)
    train[100:140] = True
    layout = Layout(labels=labels, groups=groups, train=train, test=~train, seed=seed)
    return score(x + np.random.default_rng(0).normal(scale=0.01, size=x.shape), layout)


def test_intervals_are_of_cells_or_of_groups() -> None:
    cells = accuracy_draws(None)
    p = cells.values["transfer_accuracy"]
    assert p == pytest.approx(60 / 160)
    low, high = cells.interval("transfer_accuracy")
    # That of a binomial share.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 160), rel=0.1)
    groups = accuracy_draws(np.repeat([f"d{i}" for i in range(10)], 20))
    low, high = groups.interval("transfer_accuracy")
    wider = 2.365 * np.sqrt(8 / 7)  # Student's t of 7 degrees of freedom
    assert high - low == pytest.approx(2 * wider * np.sqrt(p * (1 - p) / 8), rel=0.15)
    few = accuracy_draws(np.repeat(["d1", "d2"], 100))
    np.testing.assert_array_equal(few.draws["transfer_accuracy"], cells.draws["transfer_accuracy"])
    again, other = accuracy_draws(None), accuracy_draws(None, seed=1)
    name = "transfer_accuracy"
    np.testing.assert_array_equal(again.draws[name], cells.draws[name])
    assert (other.draws[name] != cells.draws[name]).any()
    assert interval(np.arange(1001.0), 500.0, n_units=10**6) == pytest.approx(
        (25.0, 975.0), rel=1e-4
    )


def test_intervals_over_few_groups_hold_the_truth_as_often_as_they_claim() -> None:
    rng, plain, wider, n = np.random.default_rng(0), 0, 0, 400
    for seed in range(n):
        groups = np.array(list("abcdef"))
        values = np.stack([rng.normal(size=6), np.ones(6)], axis=1)
        sums = resampled_sums(values, Layout(labels=groups, groups=groups, seed=seed), np.arange(6))
        means = sums[:, 0] / sums[:, 1]
        low, high = np.quantile(means[1:], [0.025, 0.975])
        plain += low <= 0 <= high
        low, high = interval(means[1:], means[0], n_units=6)
        wider += low <= 0 <= high
    assert plain / n < 0.89
    assert 0.92 < wider / n < 0.98


def test_intervals_end_where_their_scores_do_and_undefined_resamples_are_few() -> None:
    draws = np.linspace(0.8, 1.0, 1000)
    found = Scores(values={"knn_accuracy": 0.9}, draws={"knn_accuracy": draws})
    found.units["knn_accuracy"] = 5
    assert found.interval("knn_accuracy").high == 1.0
    assert interval(draws, 0.9, n_units=5).high > 1.0
    assert interval(draws, 0.9, n_units=1) is None
    draws[:40] = np.nan
    assert interval(draws, 0.9, n_units=1000) == pytest.approx((0.813, 0.995), abs=0.01)
    draws[:60] = np.nan
    assert interval(draws, 0.9, n_units=1000) is None
