"""The order of cells: uniform or weighted, a pure function of its arguments, resumable anywhere."""

import itertools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclong_ds.loader.order import ONE, CellStream, CellWeights
from sclong_ds.loader.weights import dataset_weights, explicit_weights

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def bounds_of(chunk_sizes, first=0):
    return first + np.concatenate([[0], np.cumsum(chunk_sizes)])


def weights_of(datasets, per_dataset):
    """Weights of cells whose datasets are `datasets`."""
    column = SimpleNamespace(row_dataset=np.asarray(datasets, np.uint32))
    return CellWeights(np.asarray(per_dataset, np.int64), column)


def take(stream, n, *, start=0, size=5):
    """Return the first n visits from `start` on as (row, epoch, pass)."""
    batches = stream.batches(start, size=size, stop=start + n)
    return [
        visit
        for b in batches
        for visit in zip(b.rows.tolist(), b.epochs.tolist(), b.passes.tolist(), strict=True)
    ]


@st.composite
def weighted(draw):
    """Chunk borders, a dataset for every cell, and weights that leave some visits."""
    bounds = bounds_of(draw(sizes))
    n_datasets = draw(st.integers(1, 3))
    n_cells = int(bounds[-1])
    datasets = draw(
        st.lists(st.integers(0, n_datasets - 1), min_size=n_cells, max_size=n_cells).map(np.array)
    )
    per_dataset = np.array(
        draw(
            st.lists(
                st.one_of(st.integers(0, 3 * ONE), st.sampled_from([0, ONE, 2 * ONE])),
                min_size=n_datasets,
                max_size=n_datasets,
            )
        )
    )
    total, largest = per_dataset[datasets].sum(), per_dataset[datasets].max()
    if total < ONE * max(1, -(-largest // ONE)):
        per_dataset = per_dataset + ONE * 4
        if len(datasets) < 7:
            per_dataset = np.full_like(per_dataset, ONE)
    return bounds, datasets, per_dataset


def plain_uniform_order(bounds, *, seed, group_chunks, epoch):
    """The definition of the uniform order, in plain Python."""

    def rng(part):
        return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, part, epoch]))

    order, rows = rng(0).permutation(len(bounds) - 1), []
    for first in range(0, len(order), group_chunks):
        group = [r for c in order[first : first + group_chunks] for r in range(*bounds[c : c + 2])]
        rows += rng(first + 1).permutation(group).tolist()
    return rows


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 99), group=st.integers(1, 9), first=st.integers(0, 30))
def test_uniform_order_is_the_defined_one(sizes, seed, group, first):
    bounds = bounds_of(sizes, first)
    stream = CellStream(bounds, seed=seed, group_chunks=group)
    n = stream.n_cells
    got = take(stream, 3 * n)
    for epoch in range(3):
        plain = plain_uniform_order(bounds, seed=seed, group_chunks=group, epoch=epoch)
        assert got[epoch * n : (epoch + 1) * n] == [(row, epoch, 0) for row in plain]
        assert sorted(plain) == list(range(first, first + n))


@settings(max_examples=25, deadline=None)
@given(sizes=sizes, seed=st.integers(0, 9), group=st.integers(1, 4), start=st.integers(0, 50))
def test_equal_weights_give_the_uniform_order(sizes, seed, group, start):
    bounds = bounds_of(sizes)
    weights = weights_of(np.arange(bounds[-1]) % 2, [ONE, ONE])
    uniform = CellStream(bounds, seed=seed, group_chunks=group)
    equal = CellStream(bounds, seed=seed, group_chunks=group, weights=weights)
    assert equal.epoch_visits == uniform.epoch_visits
    assert take(equal, 60, start=start) == take(uniform, 60, start=start)


@settings(max_examples=60, deadline=None)
@given(corpus=weighted(), seed=st.integers(0, 9), group=st.integers(1, 4), epoch=st.integers(0, 3))
def test_an_epoch_visits_a_cell_floor_or_ceil_of_its_weight(corpus, seed, group, epoch):
    bounds, datasets, per_dataset = corpus
    stream = CellStream(
        bounds, seed=seed, group_chunks=group, weights=weights_of(datasets, per_dataset)
    )
    visits = take(stream, stream.epoch_visits, start=epoch * stream.epoch_visits)
    assert len(visits) == stream.epoch_visits
    assert {e for _, e, _ in visits} == {epoch}
    for number, in_pass in itertools.groupby(visits, key=lambda v: v[2]):
        rows = [row for row, _, _ in in_pass]
        assert len(rows) == len(set(rows)) == stream.pass_visits, f"pass {number}"
    weight = per_dataset[datasets]
    times = np.bincount([row for row, _, _ in visits], minlength=len(weight))
    assert np.all(times <= -(-weight // ONE))
    # What is left out of the ring is shorter than the number of passes.
    missing = np.maximum(weight // ONE - times, 0).sum()
    assert missing <= stream.passes
    assert stream.epoch_visits >= weight.sum() // ONE - stream.passes


def test_over_many_epochs_every_cell_gets_its_weight():
    datasets = np.repeat([0, 1, 2], [7, 5, 11])
    per_dataset = np.array([2 * ONE + 13107, ONE // 2, ONE // 4])
    stream = CellStream(
        bounds_of([4, 9, 10]), seed=3, group_chunks=2, weights=weights_of(datasets, per_dataset)
    )
    epochs = 400
    visits = take(stream, epochs * stream.epoch_visits, size=1000)
    weight = per_dataset[datasets] / ONE
    expected = weight * stream.epoch_visits / weight.sum()
    times = np.bincount([row for row, _, _ in visits], minlength=23) / epochs
    # 400 draws of a number of visits whose standard deviation is below 0.5 (0.9 at the seam).
    np.testing.assert_allclose(times, expected, atol=0.12)


@settings(max_examples=40, deadline=None)
@given(
    corpus=weighted(),
    use_weights=st.booleans(),
    start=st.integers(0, 80),
    size=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_a_stream_resumes_anywhere(corpus, use_weights, start, size, seed):
    bounds, datasets, per_dataset = corpus
    weights = weights_of(datasets, per_dataset) if use_weights else None
    stream = CellStream(bounds, seed=seed, group_chunks=2, weights=weights)
    assert take(stream, 40, start=start, size=size) == take(stream, start + 40)[start:]


def test_batches_end_where_they_are_told_to():
    stream = CellStream(bounds_of([3, 4]), seed=0, group_chunks=1)
    lengths = [len(b.rows) for b in stream.batches(2, size=4, stop=13)]
    assert lengths == [4, 4, 3]
    assert [b.start for b in stream.batches(2, size=4, stop=13)] == [2, 6, 10]
    assert list(stream.batches(13, size=4, stop=13)) == []


def test_weight_zero_leaves_a_dataset_out_and_its_chunks_unread():
    weights = weights_of([0] * 6 + [1] * 4 + [0] * 6, [ONE * 5 // 4, 0])
    stream = CellStream(bounds_of([6, 4, 6]), seed=0, group_chunks=1, weights=weights)
    visits = take(stream, 5 * stream.epoch_visits)
    assert not {row for row, _, _ in visits} & set(range(6, 10))
    assert {row for row, _, _ in visits} == set(range(6)) | set(range(10, 16))


def test_other_seed_other_order():
    bounds = bounds_of([9, 9, 9])
    one, two = (CellStream(bounds, seed=seed, group_chunks=2) for seed in (0, 1))
    assert take(one, 27) != take(two, 27)


def test_a_pickled_stream_goes_on_alike():
    weights = weights_of(np.arange(20) % 3, [ONE * 2, ONE // 2, ONE])
    stream = CellStream(bounds_of([8, 12]), seed=1, group_chunks=1, weights=weights)
    assert take(pickle.loads(pickle.dumps(stream)), 50) == take(stream, 50)


@pytest.mark.parametrize("use_weights", [False, True])
def test_positions_far_ahead_are_reached_at_once(use_weights):
    n = 1_000_000
    weights = weights_of(np.arange(n) % 5, [ONE // 2, ONE, 0, ONE, ONE * 5 // 2])
    stream = CellStream(
        np.append(np.arange(0, n, 271), n), seed=0, group_chunks=8,
        weights=weights if use_weights else None,
    )  # fmt: skip
    position = 7 * stream.epoch_visits + 400_000
    group = next(stream.groups(position))
    assert group.epoch == 7
    assert group.pass_number == 400_000 // stream.pass_visits
    assert group.start <= position < group.start + len(group.rows)


def test_streams_without_visits_are_refused():
    with pytest.raises(ValueError, match="no cells"):
        CellStream([5], seed=0, group_chunks=1)
    with pytest.raises(ValueError, match="group_chunks 0"):
        CellStream([0, 5], seed=0, group_chunks=0)
    with pytest.raises(ValueError, match="less than one visit"):
        CellStream([0, 3], seed=0, group_chunks=1, weights=weights_of([0, 0, 1], [0, ONE * 3 // 2]))


def visits_of(weights, n_cells):
    return weights / ONE * np.asarray(n_cells)


def test_dataset_weights_follow_the_exponent():
    n_cells, groups = [900, 50, 50], ["a", "b", "c"]
    as_in_corpus = dataset_weights(n_cells, groups, exponent=1.0, max_repeats=10)
    assert as_in_corpus.tolist() == [ONE] * 3
    even = dataset_weights(n_cells, groups, exponent=0.0, max_repeats=10)
    np.testing.assert_allclose(visits_of(even, n_cells), 1000 / 3, rtol=1e-3)
    root = dataset_weights(n_cells, groups, exponent=0.5, max_repeats=10)
    share = np.sqrt(n_cells) / np.sqrt(n_cells).sum()
    np.testing.assert_allclose(visits_of(root, n_cells), 1000 * share, rtol=1e-3)


def test_dataset_weights_join_datasets_of_one_group():
    weights = dataset_weights(
        [100, 300, 50, 50], ["lung", "liver", None, None], exponent=0.0, max_repeats=9
    )
    assert weights[2] == weights[3]
    np.testing.assert_allclose(visits_of(weights, [100, 300, 100, 0])[:3], 500 / 3, rtol=1e-3)


def test_capped_groups_give_the_rest_to_the_others():
    n_cells = [1000, 100, 10]
    weights = dataset_weights(n_cells, ["a", "b", "c"], exponent=0.0, max_repeats=3)
    assert weights[1] == weights[2] == 3 * ONE
    np.testing.assert_allclose(weights[0] / ONE, (1110 - 330) / 1000, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    datasets=st.lists(
        st.tuples(st.integers(0, 10**7), st.sampled_from(["a", "b", "c", None])),
        min_size=1,
        max_size=8,
    ).filter(lambda d: sum(n for n, _ in d)),
    exponent=st.floats(0, 1),
    max_repeats=st.integers(1, 20),
)
def test_dataset_weights_are_capped_and_one_on_average(datasets, exponent, max_repeats):
    n_cells, groups = zip(*datasets, strict=True)
    weights = dataset_weights(n_cells, groups, exponent=exponent, max_repeats=max_repeats)
    used = np.array(n_cells) > 0
    assert np.all(weights[used] >= 1)
    assert np.all(weights <= max_repeats * ONE)
    assert abs(visits_of(weights, n_cells).sum() / sum(n_cells) - 1) < 1 / ONE


def test_dataset_weights_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="groups for 1"):
        dataset_weights([3, 4], ["a"], exponent=1, max_repeats=1)
    with pytest.raises(ValueError, match=r"exponent 1\.5"):
        dataset_weights([3], ["a"], exponent=1.5, max_repeats=1)
    with pytest.raises(ValueError, match="max_repeats 0"):
        dataset_weights([3], ["a"], exponent=1, max_repeats=0)
    with pytest.raises(ValueError, match="no dataset has cells"):
        dataset_weights([0], ["a"], exponent=1, max_repeats=1)


def test_explicit_weights_are_scaled_to_one_visit_on_average():
    weights = explicit_weights(
        {"a": 1, "b": 3, "c": 0}, dataset_ids=["a", "b", "c"], n_cells=[100, 100, 50]
    )
    assert weights[2] == 0
    np.testing.assert_allclose(weights / ONE, [250 / 400, 750 / 400, 0], rtol=1e-4)


def test_only_a_weight_of_zero_leaves_a_dataset_out():
    weights = explicit_weights(
        {"a": 1, "b": 1e-9, "c": 0}, dataset_ids=["a", "b", "c"], n_cells=[10, 10, 10]
    )
    assert weights[1] == 1
    assert weights[2] == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "x": 1}, "does not have: x"),
        ({"a": 1}, "without a weight: b"),
        ({"a": 1, "b": -1}, "got b -1"),
        ({"a": 1, "b": float("nan")}, "got b nan"),
        ({"a": 0, "b": 5}, "weight 0: nothing is left"),
    ],
)
def test_explicit_weights_refuse_mistakes(weights, message):
    with pytest.raises(ValueError, match=message):
        explicit_weights(weights, dataset_ids=["a", "b"], n_cells=[10, 0])
