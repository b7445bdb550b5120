"""The order by lanes: whole epochs, any rank's share from any position, and how well it mixes."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclong_ds.loader.lanes import LaneStream, lanes_for
from sclong_ds.loader.order import ONE, CellStream, CellWeights


def bounds_of(chunk_sizes, first=0):
    return first + np.concatenate([[0], np.cumsum(chunk_sizes)])


def weights_of(datasets, per_dataset):
    """Weights of cells whose datasets are `datasets`."""
    column = SimpleNamespace(row_dataset=np.asarray(datasets, np.uint32))
    return CellWeights(np.asarray(per_dataset, np.int64), column)


def visits_at(stream, start, stop):
    """Return (row, epoch, pass) at each position."""
    v = stream.between(start, stop)
    return list(zip(v.rows.tolist(), v.epochs.tolist(), v.passes.tolist(), strict=True))


@st.composite
def orders(draw):
    """Chunk borders, weights or none, and lanes that fit a batch."""
    bounds = bounds_of(draw(st.lists(st.integers(1, 9), min_size=1, max_size=12)))
    n_cells = int(bounds[-1])
    weights = None
    if draw(st.booleans()):
        # Always enough for a visit in every pass: dataset 0 has one visit a cell.
        datasets = draw(st.lists(st.integers(0, 2), min_size=n_cells, max_size=n_cells))
        datasets = np.array([0] * n_cells if sum(d == 0 for d in datasets) < 4 else datasets)
        others = draw(st.tuples(st.integers(0, 4 * ONE), st.sampled_from([0, ONE, 3 * ONE])))
        weights = weights_of(datasets, [ONE, *others])
        if weights.of(0, n_cells).sum() < 4 * ONE * 2:
            weights = None
    batch = draw(st.integers(1, 12))
    lanes = draw(st.one_of(st.integers(1, batch), st.integers(1, 4).map(lambda k: k * batch)))
    return bounds, weights, {"seed": draw(st.integers(0, 9)), "lanes": lanes, "batch": batch}


@settings(max_examples=80, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_has_the_visits_of_the_order_by_groups(order, epoch):
    bounds, weights, how = order
    lanes = LaneStream(bounds, weights=weights, **how)
    groups = CellStream(bounds, seed=how["seed"], group_chunks=2, weights=weights)
    n = lanes.epoch_visits
    assert (n, lanes.passes) == (groups.epoch_visits, groups.passes)
    ours = visits_at(lanes, epoch * n, (epoch + 1) * n)
    (batch,) = groups.batches(epoch * n, size=n, stop=(epoch + 1) * n)
    theirs = zip(batch.rows.tolist(), batch.epochs.tolist(), batch.passes.tolist(), strict=True)
    assert sorted(ours) == sorted(theirs)
    if weights is None:
        assert sorted(ours) == [(row, epoch, 0) for row in range(bounds[-1])]


@settings(max_examples=40, deadline=None)
@given(order=orders(), start=st.integers(0, 150), size=st.integers(1, 20))
def test_any_part_of_the_stream_is_that_of_the_whole(order, start, size):
    bounds, weights, how = order
    stream = LaneStream(bounds, weights=weights, **how)
    whole = visits_at(stream, 0, start + 40)
    again = pickle.loads(pickle.dumps(LaneStream(bounds, weights=weights, **how)))
    parts = list(again.batches(start, size=size, stop=start + 40))
    assert [v for p in parts for v in visits_at(again, p.start, p.start + len(p.rows))] == whole[
        start:
    ]
    assert [len(p.rows) for p in parts[:-1]] == [size] * (len(parts) - 1)


@settings(max_examples=40, deadline=None)
@given(order=orders(), seed=st.integers(0, 9))
def test_equal_weights_give_the_uniform_order(order, seed):
    bounds, _, how = order
    weights = weights_of(np.arange(bounds[-1]) % 2, [ONE, ONE])
    uniform, equal = LaneStream(bounds, **how), LaneStream(bounds, weights=weights, **how)
    assert visits_at(uniform, 0, 70) == visits_at(equal, 0, 70)


def share_of(stream, rank, *, start, batch, world_size, n_batches):
    """Return the positions of a rank."""
    places = [
        stream.places(start + k * batch, micro_batch_size=1, world_size=world_size, batch=batch)
        for k in range(n_batches)
    ]
    mine = np.concatenate(places) // (batch // world_size) == rank
    return start + np.flatnonzero(mine)


@settings(max_examples=80, deadline=None)
@given(
    order=orders(), world=st.sampled_from([1, 2, 3, 4]), per_rank=st.integers(1, 4),
    start=st.integers(0, 120), n_batches=st.integers(1, 12), changed=st.booleans(),
)  # fmt: skip
def test_ranks_read_what_their_visits_need(order, world, per_rank, start, n_batches, changed):
    bounds, weights, how = order
    if not changed:
        how |= {"batch": world * per_rank, "lanes": 2 * world * per_rank}
    stream = LaneStream(bounds, weights=weights, **how)
    batch = world * per_rank
    stop = start + n_batches * batch
    whole = visits_at(stream, start, stop)
    for rank in range(world):
        mine = share_of(
            stream, rank, start=start, batch=batch, world_size=world, n_batches=n_batches
        )
        assert len(mine) == n_batches * per_rank
        got, firsts = {}, []
        for read in stream.reads(start, stop=stop, lanes=np.unique(stream.lane_of(mine))):
            positions, rows, passes = read.visits()
            firsts.append(read.first)
            assert len(np.unique(positions)) == len(positions)
            assert len(set(np.searchsorted(bounds, rows, side="right"))) == 1
            own = np.isin(positions, mine)
            assert read.first <= positions[own].min(initial=read.first)
            assert read.last >= positions[own].max(initial=read.last)
            for t, row, number in zip(positions[own], rows[own], passes[own], strict=True):
                got[int(t)] = (int(row), int(t) // stream.epoch_visits, int(number))
        assert firsts == sorted(firsts)
        assert got == {t: whole[t - start] for t in mine.tolist()}


@settings(max_examples=30, deadline=None)
@given(order=orders(), world=st.sampled_from([2, 3, 4]), start=st.integers(0, 99))
def test_a_rank_keeps_its_lanes_for_ever(order, world, start):
    bounds, _, how = order
    how |= {"batch": 3 * world, "lanes": how["lanes"] % 3 * 6 * world + 3 * world}
    stream = LaneStream(bounds, **how)
    repeats = stream.repeats_after(3 * world)
    options = {"start": start, "batch": 3 * world, "world_size": world, "n_batches": 2 * repeats}
    lanes = [set(stream.lane_of(share_of(stream, r, **options)).tolist()) for r in range(world)]
    assert sum(map(len, lanes)) == stream.lanes
    assert set.union(*lanes) == set(range(stream.lanes))
    first = min(range(world), key=lambda r: min(lanes[r]))
    assert lanes[first] == set(range(stream.lanes // world))


def test_lanes_for_a_batch():
    batches = (1, 4, 96, 192, 200, 256, 300, 384, 1024, 1021, 4096)
    found = [lanes_for(batch, most=256) for batch in batches]
    assert found == [256, 256, 192, 192, 200, 256, 150, 192, 256, 256, 256]


def test_what_no_order_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="no cells"):
        LaneStream([5], seed=0, lanes=1, batch=1)
    with pytest.raises(ValueError, match="7 lanes for batches of 3"):
        LaneStream([0, 5], seed=0, lanes=7, batch=3)
    weights = weights_of([0, 0, 1], [0, ONE * 3 // 2])
    with pytest.raises(ValueError, match="less than one visit"):
        LaneStream([0, 3], seed=0, lanes=1, batch=1, weights=weights)


def large(n_chunks, *, seed=0):
    """Borders of chunks of real sizes."""
    sizes = np.maximum(40, np.random.default_rng(seed).normal(271, 25, n_chunks).astype(int))
    return bounds_of(sizes)


def reads_of_a_rank(stream, rank, world_size, *, batch=1024):
    mine = share_of(
        stream,
        rank,
        start=0,
        batch=batch,
        world_size=world_size,
        n_batches=stream.repeats_after(batch),
    )
    return sum(
        1 for _ in stream.reads(0, stop=stream.epoch_visits, lanes=np.unique(stream.lane_of(mine)))
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("world", "most"), [(1, 1.0), (8, 1.05), (64, 1.15), (512, 2.2)])
def test_a_rank_reads_its_share_of_the_chunks(world, most, weighted):
    bounds = large(8192)
    weights = None
    if weighted:
        datasets = np.random.default_rng(1).choice(4, bounds[-1], p=[0.7, 0.2, 0.08, 0.02])
        weights = weights_of(datasets, [ONE // 2, ONE, 4 * ONE, 12 * ONE])
    stream = LaneStream(bounds, seed=0, lanes=256, batch=1024, weights=weights)
    assert stream.passes == (12 if weighted else 1)
    read = max(reads_of_a_rank(stream, rank, world) for rank in {0, world // 3, world - 1})
    assert read * world / 8192 <= most


@pytest.mark.parametrize("weighted", [False, True])
def test_any_position_of_a_corpus_of_48_million_cells_is_reached_at_once(weighted):
    bounds = np.append(np.arange(0, 48_024_242, 271), 48_024_242)
    weights = None
    if weighted:
        weights = SimpleNamespace(of=lambda start, stop: np.full(stop - start, ONE * 3 // 2))
    stream = LaneStream(bounds, seed=0, lanes=256, batch=1024, weights=weights)
    position = 7 * stream.epoch_visits + 31_234_567
    assert stream.between(position, position + 5).epochs.tolist() == [7] * 5
    read = next(stream.reads(position))
    assert read.first == position
    assert read.visits()[0].max() >= position


def epochs_of(stream, n_epochs=2):
    n = stream.epoch_visits
    return [stream.between(e * n, (e + 1) * n).rows for e in range(n_epochs)]


def batch_of(order, batch):
    """Return the batch of every cell."""
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(len(order)) // batch
    return found


def mates_again(first, second, batch):
    """Return the share of a cell's batch mates that are its mates again in the next epoch."""
    pair = batch_of(first, batch) * len(first) + batch_of(second, batch)
    _, which, times = np.unique(pair, return_inverse=True, return_counts=True)
    return (times[which] - 1).mean() / (batch - 1)


@pytest.mark.parametrize("batch", [64, 1024])
def test_batches_are_as_mixed_as_those_of_a_uniform_permutation(batch):
    bounds = large(1024)
    n = int(bounds[-1])
    stream = LaneStream(bounds, seed=3, lanes=256, batch=batch)
    one, two = epochs_of(stream)
    rng = np.random.default_rng(0)
    uniform = [rng.permutation(n) for _ in range(2)]
    # Mates of an epoch meet again as often as by chance.
    assert mates_again(one, two, batch) < 1.25 * mates_again(*uniform, batch)
    # Datasets lie in the store in pieces of 60: the worst case, since finalize permutes the cells.
    datasets = np.arange(n) // 60 % 50
    entropies = []
    for order in (one, uniform[0]):
        batches = order[: n // batch * batch].reshape(-1, batch)
        counts = np.array([np.bincount(datasets[b], minlength=50) for b in batches]) / batch
        entropies.append(
            -(counts * np.log2(counts, where=counts > 0, out=np.zeros_like(counts))).sum(1)
        )
    assert entropies[0].mean() > entropies[1].mean() - 0.02
    # Cells that lie next to each other in the store are in one batch no more often than by chance.
    for order in (one, two):
        of_cell = batch_of(order, batch)
        together = (of_cell[1:] == of_cell[:-1]).mean()
        assert together < 8 * batch / n
    # No trend of the place in the store within an epoch, nor between the two epochs.
    place = np.argsort(one), np.argsort(two)
    assert abs(np.corrcoef(place[0], np.arange(n))[0, 1]) < 0.1
    assert abs(np.corrcoef(*place)[0, 1]) < 0.1
