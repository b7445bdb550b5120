"""The order of cells: a pure function of the seed, the same for every world size, resumable
anywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sclong_ds.data import CellLoader, CellStream, log1p_normalise


class FakeCorpus:
    """Rows whose only count is their own number, so that content proves identity."""

    def __init__(self, bounds):
        self.chunk_rows = np.asarray(bounds, dtype=np.int64)
        self.n = int(bounds[-1])

    def split(self, name):
        assert name == "train"
        return np.arange(self.n)

    def rows(self, indices):
        n = len(indices)
        return sparse.csr_matrix(
            (np.asarray(indices) + 1, np.zeros(n, dtype=int), np.arange(n + 1)), shape=(n, 3)
        )


def take(bounds, steps, *, world=1, batch=4, micro=1, seen=0, seed=0, group=2):
    """Return per rank and step the ids, and check that counts belong to them."""
    ranks = []
    for rank in range(world):
        loader = CellLoader(
            FakeCorpus(bounds), seed=seed, cells_seen=seen, rank=rank, world_size=world,
            train_batch_size=batch, micro_batch_size=micro, group_chunks=group, prefetch_batches=2,
        )  # fmt: skip
        got = []
        for _ in range(steps):
            step = next(loader)
            for b in step.micro_batches:
                assert np.array_equal(b.counts.toarray()[:, 0], b.cell_ids + 1)
            got.append(step)
        loader.close()
        ranks.append(got)
    return ranks


def in_order(ranks, world, micro):
    """Put the ranks' micro-batches back together into the global stream."""
    stream = []
    for step in zip(*ranks, strict=True):
        for j in range(len(step[0].micro_batches)):
            for rank in range(world):
                stream += [
                    (int(i), int(e))
                    for i, e in zip(
                        step[rank].micro_batches[j].cell_ids,
                        step[rank].micro_batches[j].epochs,
                        strict=True,
                    )
                ]
    return stream


BOUNDS = [0, 7, 12, 13, 29]


def test_an_epoch_visits_every_cell_once_and_epochs_differ():
    stream = in_order(take(BOUNDS, 29, batch=2), 1, 1)
    first, second = stream[:29], stream[29:58]
    assert sorted(i for i, _ in first) == list(range(29))
    assert {e for _, e in first} == {0}
    assert sorted(i for i, _ in second) == list(range(29))
    assert {e for _, e in second} == {1}
    assert [i for i, _ in first] != [i for i, _ in second]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    group=st.integers(1, 4),
    seen=st.integers(0, 40),
)
def test_same_stream_for_every_world_size_and_position(sizes, seed, group, seen):
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    settings_ = {"seed": seed, "group": group, "batch": 8}
    whole = in_order(take(bounds, 12, **settings_), 1, 1)
    for world, micro in ((2, 2), (4, 1), (1, 8)):
        assert (
            in_order(take(bounds, 3, world=world, micro=micro, **settings_), world, micro)
            == whole[:24]
        )
    later = in_order(take(bounds, 4, seen=seen, **settings_), 1, 1)
    assert later == whole[seen : seen + 32]


def test_other_seed_other_order():
    assert in_order(take(BOUNDS, 7), 1, 1) != in_order(take(BOUNDS, 7, seed=1), 1, 1)


def test_positions_far_ahead_are_reached_at_once():
    stream = CellStream(np.arange(0, 10_000_001, 271), seed=0, group_chunks=8)
    group = next(stream.groups(7 * stream.n_cells + 4_000_000))
    assert group.epoch == 7
    assert group.start <= 7 * stream.n_cells + 4_000_000 < group.start + len(group.rows)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="must be a multiple"):
        take(BOUNDS, 1, world=3, batch=4)


def test_reading_errors_reach_the_training_loop():
    corpus = FakeCorpus(BOUNDS)
    corpus.rows = lambda indices: (_ for _ in ()).throw(OSError("shard c/0 is damaged"))
    loader = CellLoader(
        corpus, seed=0, cells_seen=0, rank=0, world_size=1, train_batch_size=4, micro_batch_size=1,
        group_chunks=1, prefetch_batches=1,
    )  # fmt: skip
    with pytest.raises(OSError, match="shard c/0"):
        next(loader)
    loader.close()


def test_log1p_normalise():
    counts = sparse.csr_matrix(np.array([[1, 0, 3], [0, 0, 0], [5, 5, 0]], dtype=np.uint32))
    x = log1p_normalise(counts, target_sum=1e4)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0], np.log1p([2500, 0, 7500]), rtol=1e-6)
    assert not x[1].any()
    np.testing.assert_allclose(x[2], np.log1p([5000, 5000, 0]), rtol=1e-6)
