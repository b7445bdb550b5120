"""The loader: every rank gets its share of one stream, from any position, whatever happens.

Covers also `sclong_ds/corpus/transform.py`, `sclong_ds/loader/batches.py` and
`sclong_ds/loader/shares.py`.
"""

import re
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_cells import (
    WEIGHTS,
    dense,
    in_order,
    in_stream,
    make_corpus,
    open_loader,
    order_of,
    take,
    visits,
)
from scipy import sparse

from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.loader.loader import CellLoader, most_lanes, open_stream
from sclong_ds.loader.order import ONE
from sclong_ds.loader.weights import ColumnWeights

OUTPUTS = ("packed", "csr", "dense", "dense_norm")


@settings(max_examples=30, deadline=None)
@given(
    which=st.integers(0, 1),
    world=st.sampled_from([1, 2, 4, 8]),
    micro=st.integers(1, 5),
    micro_steps=st.integers(1, 3),
    steps=st.integers(1, 6),
    seen=st.integers(0, 250),
    seed=st.integers(0, 99),
    group=st.integers(1, 5),
    lanes=st.sampled_from([None, (8, 8), (24, 8), (3, 7)]),
    weights=st.sampled_from([None, WEIGHTS]),
    output=st.sampled_from(["packed", "csr", "dense"]),
    short=st.integers(0, 20),
    prefetch=st.integers(0, 2),
    threads=st.integers(1, 3),
)
def test_ranks_together_deliver_the_stream(
    corpora, which, world, micro, micro_steps, steps, seen, seed, group, lanes, weights, output,
    short, prefetch, threads,
):  # fmt: skip
    batch = world * micro * micro_steps
    n = max(1, steps * batch - short)
    order = {"seed": seed, "weights": weights}
    ranks = [
        take(
            corpora[which], group=group, lanes=lanes, cells_seen=seen, rank=rank,
            world_size=world, train_batch_size=batch, micro_batch_size=micro, stop_at=seen + n,
            output=output, prefetch_batches=prefetch, read_threads=threads, **order
        )
        for rank in range(world)
    ]  # fmt: skip
    assert {len(rank) for rank in ranks} == {-(-n // batch)}
    assert {len(step) for rank in ranks for step in rank} == {micro_steps}
    got = in_order(ranks)
    expected = in_stream(corpora[which], n, start=seen, **order_of(group, lanes), **order)
    if lanes is not None:  # the ranks share a batch in the order of the lanes
        got, expected = (
            [sorted(visits[k : k + batch]) for k in range(0, n, batch)]
            for visits in (got, expected)
        )
    assert got == expected


@pytest.mark.parametrize("lanes", [None, (8, 8), (24, 8)])
def test_every_rank_knows_the_whole_batch_in_the_order_of_the_stream(corpora, lanes):
    options = {"lanes": lanes, "cells_seen": 3, "stop_at": 30, "micro_batch_size": 2}
    expected = [row for row, *_ in in_stream(corpora[0], 27, start=3, seed=0, **order_of(2, lanes))]
    for world in (1, 2, 4):
        for rank in range(world):
            with open_loader(corpora[0], rank=rank, world_size=world, **options) as loader:
                steps = [(step.n_cells, step.cell_ids.tolist()) for step in loader]
            assert [n for n, _ in steps] == [8, 8, 8, 3]
            assert [row for _, ids in steps for row in ids] == expected


@settings(max_examples=10, deadline=None)
@given(stops=st.lists(st.integers(1, 7), min_size=1, max_size=3), weighted=st.booleans())
def test_stop_and_go_equals_straight_through(corpora, stops, weighted):
    options = {"weights": WEIGHTS if weighted else None, "seed": 3}
    straight = take(corpora[0], sum(stops), **options)
    pieces, position = [], 0
    for steps in stops:
        with open_loader(corpora[0], cells_seen=position, **options) as loader:
            pieces += [[visits(b) for b in next(loader).micro_batches] for _ in range(steps)]
            assert loader.position == position + 8 * steps
            position = loader.position
    assert pieces == straight


def test_a_remote_corpus_delivers_the_same(corpora, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(corpora[0].path), "/loaded", recursive=True)
    remote = Corpus("memory://loaded", cache_dir=tmp_path)
    try:
        assert take(remote, 8, weights=WEIGHTS) == take(corpora[0], 8, weights=WEIGHTS)
    finally:
        memory.rm("/loaded", recursive=True)


def test_an_epoch_is_every_training_cell_once(corpus):
    epoch = in_order([take(corpus, stop_at=61)])
    assert sorted(epoch) == [(row, 0, 0) for row in range(61)]
    second = in_order([take(corpus, cells_seen=61, stop_at=122)])
    assert sorted(second) == [(row, 1, 0) for row in range(61)]
    assert [row for row, *_ in epoch] != [row for row, *_ in second]


def test_other_splits_and_weights_of_datasets(corpus):
    held_out = in_order([take(corpus, split="validation", stop_at=10)])
    assert sorted(row for row, *_ in held_out) == list(range(61, 71))
    weights = np.array([0, 2 * ONE, ONE])
    n = open_stream(corpus, seed=0, group_chunks=2, weights=weights).epoch_visits
    seen = [row for row, *_ in in_order([take(corpus, weights=weights, stop_at=n)])]
    assert {corpus.row_dataset[row] for row in seen} == {1, 2}
    assert abs(sum(corpus.row_dataset[row] == 1 for row in seen) - 40) <= 2


def test_a_batch_has_the_columns_that_were_asked_for(corpus):
    for options in ({"columns": "dataset_id"}, {"lanes": (4, 8), "world_size": 2, "rank": 1}):
        options = {"columns": ["dataset_id"], "stop_at": 24} | options
        with open_loader(corpus, **options) as loader:
            for batch in (batch for step in loader for batch in step.micro_batches):
                codes = batch.columns["dataset_id"]
                names = np.array(corpus.columns["dataset_id"].values)[codes]
                expected = [f"d{corpus.row_dataset[row]}" for row in batch.cell_ids]
                assert names.tolist() == expected
    with pytest.raises(ValueError, match="has no column 'cell_type', it has dataset_id"):
        open_loader(corpus, columns=["cell_type"])


def test_a_column_weighs_cells_as_their_datasets_do(corpus):
    by_dataset = np.array([0, 2 * ONE, ONE])
    by_column = ColumnWeights(np.array([0, *by_dataset]), corpus.columns["dataset_id"])
    for lanes in (None, (4, 8)):
        options = {"lanes": lanes, "stop_at": 40, "check": False}
        assert take(corpus, weights=by_column, **options) == take(
            corpus, weights=by_dataset, **options
        )


def test_the_four_outputs_agree(corpus):
    options = {"cells_seen": 3, "prefetch_batches": 1}
    loaders = [
        open_loader(corpus, output=o, target_sum=1e4 if o == "dense_norm" else None, **options)
        for o in OUTPUTS
    ]
    for steps in (next(group) for group in [zip(*loaders, strict=True)] for _ in range(9)):
        for packed, csr, raw, norm in zip(*(s.micro_batches for s in steps), strict=True):
            assert csr.counts.dtype == np.uint32
            assert csr.counts.has_sorted_indices
            csr.counts.check_format(full_check=True)
            truth = corpus.rows(csr.cell_ids)
            assert np.array_equal(csr.counts.toarray(), truth.toarray())
            assert np.array_equal(dense(packed.counts), truth.toarray())
            assert np.array_equal(packed.counts.row_nnz, corpus.row_nnz[packed.cell_ids])
            assert np.array_equal(packed.counts.row_total, corpus.row_total[packed.cell_ids])
            assert np.array_equal(raw.counts, truth.toarray())
            assert np.array_equal(norm.counts, log1p_normalise(truth, target_sum=1e4))
            assert raw.counts.dtype == norm.counts.dtype == np.float32
    for loader in loaders:
        loader.close()


def test_buffers_are_few_used_again_and_hold_a_whole_micro_batch(corpus):
    made = []

    def allocate(size_bytes):
        made.append(np.full(size_bytes, 0xAB, np.uint8))
        return made[-1]

    with open_loader(corpus, output="dense", allocate=allocate, prefetch_batches=2) as loader:
        for _ in range(30):
            next(loader)
    assert len(made) == (2 + 2) * 2
    made.clear()
    with open_loader(corpus, allocate=allocate) as loader:
        for _ in range(10):
            for batch in next(loader).micro_batches:
                c, blocks = batch.counts, list(made)
                arrays = [c.gap, c.count, c.row_entries, c.row_nnz, c.row_total]
                homes = [
                    [np.shares_memory(array, block) for block in blocks]
                    for array in arrays
                    if array.size
                ]
                assert sum(homes[0]) == 1
                assert homes == [homes[0]] * len(homes)


@pytest.mark.parametrize("prefetch_batches", [0, 3])
@pytest.mark.parametrize("output", OUTPUTS)
def test_owned_batches_stay_as_they_are_and_their_memory_is_used_again(
    corpus, output, prefetch_batches
):
    made = []

    def allocate(size_bytes):
        made.append(np.full(size_bytes, 0xAB, np.uint8))
        return made[-1]

    options = {"output": output, "target_sum": 1e4 if output == "dense_norm" else None}
    kept = []
    with open_loader(
        corpus, allocate=allocate, owned=True, prefetch_batches=prefetch_batches, **options
    ) as loader:
        for _ in range(12):
            kept += [batch.counts for batch in next(loader).micro_batches]
    with open_loader(corpus, **options) as borrowed:
        for place in range(0, len(kept), 2):
            batches = next(borrowed).micro_batches
            for mine, theirs in zip(kept[place : place + 2], batches, strict=True):
                assert np.array_equal(as_dense(mine), as_dense(theirs.counts))
    assert len(made) >= len(kept)
    # One array is enough to hold a batch, whatever else of it is gone.
    one = parts(kept[0])[0]
    before = one.copy()
    del kept, mine
    made.clear()
    with open_loader(
        corpus, allocate=allocate, owned=True, prefetch_batches=prefetch_batches, **options
    ) as loader:
        held = parts(next(loader).micro_batches[0].counts)[0]
        copy = held.copy()
        for _ in range(40):
            next(loader)
    assert np.array_equal(one, before)
    assert np.array_equal(held, copy)
    # Packed and csr blocks grow with the largest share so far.
    assert len(made) < 40


def parts(counts):
    """Return the arrays of counts that lie in a buffer."""
    if isinstance(counts, np.ndarray):
        return [counts]
    return [counts.data] if hasattr(counts, "indptr") else [counts.gap, counts.count]


def as_dense(counts):
    """Return counts of any output as a dense matrix."""
    if isinstance(counts, np.ndarray):
        return counts
    return counts.toarray() if hasattr(counts, "indptr") else dense(counts)


def test_a_step_stays_whole_until_the_next_one_is_asked_for(corpus):
    with open_loader(corpus, output="dense", prefetch_batches=1) as loader:
        step = next(loader)
        before = [b.counts.copy() for b in step.micro_batches]
        while loader._threads._steps.empty():
            time.sleep(0.01)
        time.sleep(0.1)
        for batch, counts in zip(step.micro_batches, before, strict=True):
            assert np.array_equal(batch.counts, counts)


def test_finish_works_on_every_micro_batch_in_a_thread(corpus):
    def finish(batch):
        assert threading.current_thread() is not threading.main_thread()
        return dense(batch.counts).sum()

    with open_loader(corpus, finish=finish) as loader:
        for _ in range(5):
            for batch in next(loader).micro_batches:
                assert batch.extra == corpus.row_total[batch.cell_ids].sum()


@pytest.fixture(scope="module")
def many_cells(tmp_path_factory):
    """A corpus of small cells: what is known of their visits takes more than their bytes."""
    folder = tmp_path_factory.mktemp("many")
    return make_corpus(folder / "c", n_train=30_000, chunk_entries=2**14, chunks_per_shard=4)


@pytest.mark.parametrize(
    ("world_size", "memory_bytes", "output", "weighted"),
    [
        (1, 1_000_000, "packed", False), (1, 2_000_000, "csr", False),
        (1, 2_000_000, "dense", False), (4, 1_000_000, "packed", False),
        (1, 4_000_000, "packed", True),
    ],
)  # fmt: skip
def test_the_memory_of_a_rank_stays_within_its_limit(
    many_cells, world_size, memory_bytes, output, weighted
):
    batch = 256
    lanes = most_lanes(many_cells, batch, most=256, memory_bytes=memory_bytes)
    assert lanes > 1
    options = {
        "lanes": (lanes, batch), "train_batch_size": batch, "world_size": world_size,
        "micro_batch_size": batch // world_size, "output": output, "memory_bytes": memory_bytes,
        "weights": np.array([ONE, 2 * ONE, 3 * ONE]) if weighted else None, "prefetch_batches": 4,
    }  # fmt: skip

    def read(steps):
        with open_loader(many_cells, **options) as loader:
            for _ in range(steps):
                next(loader)

    read(1)  # compiles, and opens the tables
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        read(60)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert memory_bytes / 20 < peak <= memory_bytes


def test_more_lanes_than_fit_are_refused(many_cells):
    options = {"lanes": (64, 64), "train_batch_size": 64}
    with pytest.raises(ValueError, match=r"memory_bytes=2000000: .* or use more ranks") as error:
        open_loader(many_cells, memory_bytes=2_000_000, **options)
    open_loader(many_cells, memory_bytes=asked_for(error.value), **options)


def asked_for(error):
    """Return the bytes that a message asks for; the megabytes beside them are the same."""
    n, mb = re.search(
        r"set memory_bytes=(\d+) \(data\.loader_memory: (\d+) MB\)", str(error)
    ).groups()
    assert int(n) == int(mb) * 10**6
    return int(n)


@pytest.mark.parametrize("batch", [8, 64, 256])
@pytest.mark.parametrize("output", ["packed", "csr", "dense"])
@pytest.mark.parametrize("prefetch", [0, 4, 100, 5000])
@pytest.mark.parametrize("few", [True, False])
def test_the_memory_that_a_message_asks_for_is_enough(
    many_cells, corpus, batch, output, prefetch, few
):
    options = {"train_batch_size": batch, "output": output, "prefetch_batches": prefetch}
    cells = corpus if few else many_cells
    for memory_bytes in (1,) if few else (1, 10**5):
        with pytest.raises(ValueError, match="use more ranks") as error:
            CellLoader(cells, memory_bytes=memory_bytes, **options)
        CellLoader(cells, memory_bytes=asked_for(error.value), **options)


def test_the_memory_is_enough_for_the_chunks_that_a_small_corpus_has(corpus):
    """An order may ask for more chunks than there are."""
    with pytest.raises(ValueError, match="this rank has") as error:
        open_loader(corpus, lanes=(512, 8), memory_bytes=1)
    assert asked_for(error.value) == 10**6
    open_loader(corpus, lanes=(512, 8), memory_bytes=10**6)


def test_only_chunks_with_cells_between_start_and_end_are_read(corpora, monkeypatch):
    corpus = Corpus(corpora[0].path)
    n_chunks = int(np.searchsorted(corpus.chunk_rows, 61))
    read, chunks = corpus.read_packed, []

    def noted(chunk, *, out=None):
        chunks.append(chunk)
        return read(chunk, out=out)

    monkeypatch.setattr(corpus, "read_packed", noted)
    options = {"group": n_chunks, "train_batch_size": 2, "micro_batch_size": 2}
    delivered = in_order([take(corpus, cells_seen=30, stop_at=32, **options)])
    of_cells = np.searchsorted(corpus.chunk_rows, [row for row, *_ in delivered], side="right") - 1
    assert sorted(chunks) == np.unique(of_cells).tolist()


@pytest.mark.parametrize(("group", "lanes"), [(2, None), (2, (8, 8))])
@pytest.mark.parametrize("threads", [1, 3])
def test_without_prefetching_nothing_is_read_before_a_batch_needs_it(
    corpora, monkeypatch, group, lanes, threads
):
    corpus = Corpus(corpora[0].path)
    read, chunks = corpus.read_packed, []

    def noted(chunk, *, out=None):
        chunks.append(chunk)
        return read(chunk, out=out)

    monkeypatch.setattr(corpus, "read_packed", noted)
    with open_loader(
        corpus, group=group, lanes=lanes, train_batch_size=8, micro_batch_size=8,
        prefetch_batches=0, read_threads=threads,
    ) as loader:  # fmt: skip
        needed: set[int] = set()
        for number, step in enumerate(loader):
            rows = np.concatenate([micro.cell_ids for micro in step.micro_batches])
            needed |= set(np.searchsorted(corpus.chunk_rows, rows, side="right") - 1)
            # A group is read whole: its chunks are shuffled together.
            assert len(set(chunks) - needed) <= (0 if lanes else group)
            if number == 5:
                break


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "must be a multiple"),
        ({"micro_batch_size": 0}, "micro_batch_size 0: must be a whole number of 1 or more"),
        ({"rank": 1}, "rank 1: allowed are 0 to 0"),
        ({"prefetch_batches": -1}, "prefetch_batches -1"),
        ({"output": "arrow"}, "allowed are packed, csr, dense, dense_norm"),
        ({"output": "dense_norm"}, "dense_norm needs it"),
        ({"output": "csr", "target_sum": 1e4}, "would ignore it"),
        ({"on_damage": "ignore"}, "allowed are stop and skip"),
        ({"cells_seen": -1}, "cells_seen -1"),
        ({"split": "dev"}, "this corpus has train, validation, test"),
        ({"split": "test"}, " has no cells; splits with cells: train, validation; `python -m"),
        ({"columns": "nothing"}, "has no column 'nothing'"),
        ({"columns": ["dataset_id", "dataset_id"]}, "columns: 'dataset_id' comes twice"),
        ({"columns": [3]}, "columns: 3 is no text"),
        ({"weights": np.ones(2, np.int64)}, "has 3 datasets"),
        *(
            (
                {"output": "dense_norm", "target_sum": wrong},
                f"target_sum {wrong!r}: must be a finite",
            )
            for wrong in (0, -1.0, float("nan"), float("inf"), "1e4", True)
        ),
        *(
            ({name: wrong}, f"{name} {wrong!r}: must be a whole number")
            for name in (
                "train_batch_size",
                "micro_batch_size",
                "cells_seen",
                "rank",
                "world_size",
                "prefetch_batches",
                "stop_at",
                "memory_bytes",
                "read_threads",
            )
            for wrong in (-1, 2.0, "8", True)
        ),
        ({"train_batch_size": 0}, "train_batch_size 0: must be a whole number of 1 or more"),
        ({"memory_bytes": 0}, "memory_bytes 0: must be a whole number of 1 or more"),
        ({"cells_seen": 2**63}, f"from 0 to {2**62}"),
        ({"cells_seen": 9, "stop_at": 8}, "stop_at 8: the stream begins at cells_seen 9"),
        ({"seed": 1.5}, "seed 1.5: must be a whole number from 0"),
        ({"group": 2.0}, "group_chunks 2.0: must be a whole number"),
        ({"lanes": (4, "8")}, "batch '8': must be a whole number"),
    ],
)
def test_mistakes_are_refused(corpus, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_loader(corpus, **options)


def test_sizes_are_checked_before_the_order_is_made_of_them(corpus):
    for wrong in (0, 2.0, "8"):
        with pytest.raises(ValueError, match=f"train_batch_size {wrong!r}: must be a whole number"):
            CellLoader(corpus, train_batch_size=wrong)
    with CellLoader(corpus, train_batch_size=8, cells_seen=2**62 - 8) as loader:
        assert next(loader).n_cells == 8


@pytest.mark.parametrize("kind", [str, Path])
def test_a_corpus_may_be_given_by_its_path(corpus, kind):
    path = kind(corpus.path)
    stream = open_stream(path, seed=0, lanes=8, batch=8)
    with (
        CellLoader(path, train_batch_size=8, stream=stream) as one,
        CellLoader(corpus, train_batch_size=8, stream=stream) as other,
    ):
        assert next(one).cell_ids.tolist() == next(other).cell_ids.tolist()
    for wrong in (None, 3, corpus.cells):
        with pytest.raises(
            TypeError, match=r"corpus: got .*; give a sclong_ds\.Corpus, or the path"
        ):
            CellLoader(wrong, train_batch_size=8)
        with pytest.raises(TypeError, match=r"give a sclong_ds\.Corpus"):
            open_stream(wrong, seed=0, lanes=8, batch=8)


def test_log1p_normalise():
    counts = sparse.csr_matrix(np.array([[1, 0, 3], [0, 0, 0], [5, 5, 0]], dtype=np.uint32))
    x = log1p_normalise(counts, target_sum=1e4)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0], np.log1p([2500, 0, 7500]), rtol=1e-6)
    assert not x[1].any()
    np.testing.assert_allclose(x[2], np.log1p([5000, 5000, 0]), rtol=1e-6)
