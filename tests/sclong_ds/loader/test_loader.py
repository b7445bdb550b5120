"""The loader: every rank gets its share of one stream, from any position, whatever happens.

Covers also `sclong_ds/corpus/transform.py`, `sclong_ds/loader/batches.py`,
`sclong_ds/loader/reading.py`, `sclong_ds/loader/shares.py`, `sclong_ds/loader/threads.py`.
"""

import gc
import logging
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sclong_ds.corpus.byte_code import PackedCells, decode
from sclong_ds.corpus.catalogue import write_catalogue
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.loader import threads as loading
from sclong_ds.loader.loader import CellLoader, most_lanes, open_stream
from sclong_ds.loader.order import ONE
from sclong_ds.loader.weights import ColumnWeights

GENES = 40
OUTPUTS = ("packed", "csr", "dense", "dense_norm")
DATASET = {
    "duplicates_dropped": 0, "split_cells": {}, "n_genes_mapped": None, "counts_kept": None,
    "organism": None, "tissue": None, "format": None, "source": None, "source_hash": None,
}  # fmt: skip


def counts_of(n_cells):
    """Counts of many sizes; some cells have none."""
    rng = np.random.default_rng(5)
    counts = rng.poisson(0.4, (n_cells, GENES)) * rng.choice([1, 3, 300, 70_000], (n_cells, GENES))
    counts[rng.random(n_cells) < 0.1] = 0
    return counts.astype(np.uint32)


def make_corpus(folder, *, n_train, n_validation=0, chunk_entries=200, chunks_per_shard=2):
    folder.mkdir()
    counts = counts_of(n_train + n_validation)
    options = {"chunk_entries": chunk_entries, "chunks_per_shard": chunks_per_shard}
    with CellWriter(folder / "cells.zarr", n_genes=GENES, **options) as writer:
        for rows in (slice(0, n_train), slice(n_train, None)):
            n = len(counts[rows])
            source = {"dataset": (np.arange(n) % 3).astype(np.uint32)}
            writer.append(sparse.csr_matrix(counts[rows]), source=source)
            writer.end_chunk()
    n = len(counts)
    splits = {"train": [0, n_train], "validation": [n_train, n], "test": [n, n]}
    datasets = [{"dataset_id": f"d{i}", "n_cells": 1, **DATASET} for i in range(3)]
    about = {"hash": "", "genes_hash": "", "n_cells": n, "splits": splits, "datasets": datasets}
    write_catalogue(folder, about)
    return Corpus(folder)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """One with many small chunks and one with few large ones; both with a validation split."""
    folder = tmp_path_factory.mktemp("corpora")
    return [
        make_corpus(folder / "small", n_train=61, n_validation=10, chunk_entries=150),
        make_corpus(folder / "large", n_train=90, n_validation=7, chunk_entries=900),
    ]


@pytest.fixture
def corpus(corpora):
    return corpora[0]


def order_of(group=2, lanes=None):
    """Arguments of `open_stream` for either order."""
    return {"group_chunks": group} if lanes is None else {"lanes": lanes[0], "batch": lanes[1]}


def open_loader(corpus, *, seed=0, group=2, lanes=None, weights=None, split="train", **options):
    order = order_of(group, lanes)
    stream = open_stream(corpus, split=split, seed=seed, weights=weights, **order)
    defaults = {
        "cells_seen": 0, "rank": 0, "world_size": 1, "train_batch_size": 8, "micro_batch_size": 4,
        "prefetch_batches": 2,
    }  # fmt: skip
    return CellLoader(corpus, stream=stream, **(defaults | options))


def dense(counts):
    """Counts of any output but dense_norm as a fresh dense array."""
    if isinstance(counts, np.ndarray):
        return counts.copy()
    if sparse.issparse(counts):
        return counts.toarray()
    return decode(counts.gap, counts.count, counts.row_entries, GENES).toarray()


def visits(batch):
    return list(
        zip(batch.cell_ids.tolist(), batch.epochs.tolist(), batch.passes.tolist(), strict=True)
    )


def take(corpus, steps=None, *, check=True, **options):
    """Return the visits of each micro-batch of each step; checks what belongs to the cells."""
    truth = counts_of(len(corpus))
    got = []
    with open_loader(corpus, **options) as loader:
        for step in loader:
            for b in step.micro_batches if check else ():
                assert np.array_equal(dense(b.counts), truth[b.cell_ids])
                assert b.skipped.shape == b.cell_ids.shape
                assert not b.skipped.any()
            got.append([visits(b) for b in step.micro_batches])
            if len(got) == steps:
                break
    return got


def in_order(ranks):
    """Put the micro-batches of all ranks back together into the global stream."""
    return [v for step in zip(*ranks, strict=True) for micro in zip(*step, strict=True)
            for batch in micro for v in batch]  # fmt: skip


def in_stream(corpus, n, *, start=0, **options):
    """Return the first n visits of the stream itself."""
    batches = open_stream(corpus, **options).batches(start, size=n, stop=start + n)
    return [
        v for b in batches
        for v in zip(b.rows.tolist(), b.epochs.tolist(), b.passes.tolist(), strict=True)
    ]  # fmt: skip


WEIGHTS = np.array([ONE // 2, ONE * 7 // 4, ONE])


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
    for options in ({}, {"lanes": (4, 8), "world_size": 2, "rank": 1}):
        options |= {"columns": ["dataset_id"], "stop_at": 24}
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
    with pytest.raises(ValueError, match=r"data\.loader_memory .* set it to at least"):
        open_loader(many_cells, lanes=(64, 64), train_batch_size=64, memory_bytes=2_000_000)


def test_errors_of_finish_reach_the_training_loop(corpus):
    with open_loader(corpus, finish=lambda batch: 1 // 0) as loader:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(loader)
    assert loader.position == 0


def go_on(loader, results):
    """In another process: continue for four steps."""
    with loader:
        results.send([visits(b) for _ in range(4) for b in next(loader).micro_batches])


FORK = """
import os, pickle, sys
loader = pickle.load(sys.stdin.buffer)
def ids(steps):
    return [next(loader).cell_ids.tolist() for _ in range(steps)]
def fork():
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    print(ids(3), flush=True)
    loader.close()
    sys.exit()
fork()
print(ids(2), flush=True)
fork()
print(ids(3), flush=True)
"""


def test_a_loader_can_be_carried_over_forks_and_left_open(corpus):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        input=pickle.dumps(open_loader(corpus)), capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    with open_loader(corpus) as loader:
        steps = [next(loader).cell_ids.tolist() for _ in range(5)]
    shown = [steps[:3], steps[:2], steps[2:5], steps[2:5]]
    assert done.stdout.decode().splitlines() == [str(part) for part in shown]


def test_a_loader_can_be_sent_to_a_spawned_process(corpus):
    with open_loader(corpus, weights=WEIGHTS) as loader:
        next(loader)
        spawn = multiprocessing.get_context("spawn")
        results, their_end = spawn.Pipe(duplex=False)
        process = spawn.Process(target=go_on, args=(loader, their_end))
        process.start()
        their_end.close()
        got = results.recv()
        process.join()
        assert got == [visits(b) for _ in range(4) for b in next(loader).micro_batches]


def cell_threads():
    return [t for t in threading.enumerate() if t.name.startswith("cells-")]


def test_nothing_starts_before_the_first_step_and_nothing_stays_after_close(corpus):
    loader = open_loader(corpus, prefetch_batches=1, read_threads=3)
    assert not cell_threads()
    next(loader)
    assert len(cell_threads()) == 4
    loader.close()
    loader.close()
    assert not cell_threads()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_forgotten_loader_takes_its_threads_along(corpus):
    loader = open_loader(corpus)
    next(loader)
    del loader
    gc.collect()
    for thread in cell_threads():
        thread.join(timeout=10)
    assert not cell_threads()


def test_an_interrupted_wait_loses_no_step(corpus, monkeypatch):
    straight = take(corpus, 4)
    loader = open_loader(corpus)
    got = [[visits(b) for b in next(loader).micro_batches] for _ in range(2)]
    next_step = loading.LoaderThreads.next_step

    def interrupted(threads):
        next_step(threads)
        raise KeyboardInterrupt

    monkeypatch.setattr(loading.LoaderThreads, "next_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    monkeypatch.undo()
    with loader:
        got += [[visits(b) for b in next(loader).micro_batches] for _ in range(2)]
    assert got == straight


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


def test_a_chunk_with_too_few_cells_is_an_error(corpora, monkeypatch):
    corpus = Corpus(corpora[0].path)
    read = corpus.read_packed

    def cut(chunk, *, out=None):
        cells = read(chunk, out=out)
        tables = (cells.row_entries, cells.row_nnz, cells.row_total)
        return cells if chunk else PackedCells(cells.gap, cells.count, *(t[:-1] for t in tables))

    monkeypatch.setattr(corpus, "read_packed", cut)
    with pytest.raises(ValueError, match=r"chunk 0 of .* too few for the rows"):
        take(corpus, stop_at=60)


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


def test_a_long_wait_says_what_is_being_read(corpora, monkeypatch, caplog):
    corpus = Corpus(corpora[0].path)
    read, go = corpus.read_packed, threading.Event()

    def slow(chunk, *, out=None):
        assert go.wait(timeout=30)
        return read(chunk, out=out)

    monkeypatch.setattr(corpus, "read_packed", slow)
    monkeypatch.setattr(loading, "WAIT_WARNING_S", 0.05)
    loader = open_loader(corpus)
    with caplog.at_level(logging.WARNING):
        timer = threading.Timer(0.5, go.set)
        timer.start()
        next(loader)
        timer.join()
    loader.close()
    waits = [r.getMessage() for r in caplog.records if "waiting for cells" in r.getMessage()]
    assert len(waits) >= 2
    assert "reading chunk" in waits[0]
    assert str(corpus.path) in waits[0]
    assert loader.waited_s > 0.2


@pytest.fixture
def damaged(tmp_path):
    """A corpus without one of its shards, and the rows that were in it."""
    corpus = make_corpus(tmp_path / "corpus", n_train=61, chunk_entries=150)
    (tmp_path / "corpus" / "cells.zarr" / "gap" / "c" / "1").unlink()
    return corpus, range(int(corpus.chunk_rows[2]), int(corpus.chunk_rows[4]))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("group", "lanes"), [(1, None), (3, None), (2, (2, 8)), (2, (8, 8))])
def test_damage_stops_the_loop_where_it_is_met_and_says_where(damaged, group, lanes, prefetch):
    """All batches before it are given, however far ahead its chunk was read."""
    corpus, lost = damaged
    rows = [row for row, *_ in in_stream(corpus, 61, seed=0, **order_of(group, lanes))]
    whole = next(i for i, row in enumerate(rows) if row in lost) // 8 * 8
    with open_loader(corpus, group=group, lanes=lanes, prefetch_batches=prefetch) as loader:
        delivered = []
        with pytest.raises(DamagedChunk, match=r"gap/c/1.*restore"):  # noqa: PT012
            while True:
                delivered += [i for b in next(loader).micro_batches for i in b.cell_ids]
        assert loader.position == len(delivered) == whole
        assert delivered == rows[:whole]
        # The next call tries again.
        with pytest.raises(DamagedChunk):
            next(loader)


@pytest.mark.parametrize("output", OUTPUTS)
def test_skipped_cells_keep_their_place_without_counts(damaged, output, caplog):
    corpus, lost = damaged
    truth = counts_of(61)
    truth[lost.start : lost.stop] = 0
    target_sum = 1e4 if output == "dense_norm" else None
    ranks = []
    for rank in range(2):
        loader = open_loader(
            corpus, rank=rank, world_size=2, micro_batch_size=2, on_damage="skip", stop_at=122,
            output=output, target_sum=target_sum,
        )  # fmt: skip
        skipped, got = 0, []
        with caplog.at_level(logging.WARNING), loader:
            for step in loader:
                for b in step.micro_batches:
                    expected = truth[b.cell_ids]
                    if target_sum:
                        expected = log1p_normalise(
                            sparse.csr_matrix(expected), target_sum=target_sum
                        )
                    assert np.array_equal(dense(b.counts), expected)
                    assert b.skipped.tolist() == [int(i) in lost for i in b.cell_ids]
                assert step.skipped == sum(b.skipped.sum() for b in step.micro_batches)
                skipped += step.skipped
                got.append([visits(b) for b in step.micro_batches])
        assert loader.skipped_cells == skipped
        ranks.append(got)
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 2  # both ranks are of this process
    assert all("gap/c/1" in w for w in warnings)
    assert in_order(ranks) == in_stream(corpus, 122, seed=0, group_chunks=2)


def test_cells_that_do_not_decode_stop_the_loop_even_when_damage_is_skipped(corpora, monkeypatch):
    corpus = Corpus(corpora[0].path)
    read = corpus.read_packed

    def changed(chunk, *, out=None):
        cells = read(chunk, out=out)
        cells.gap[:] = 255
        return cells

    monkeypatch.setattr(corpus, "read_packed", changed)
    with (
        open_loader(corpus, output="dense", on_damage="skip") as loader,
        pytest.raises(ValueError, match="damaged"),
    ):
        next(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, "must be a multiple"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"rank": 1}, "rank 1: allowed are 0 to 0"),
        ({"prefetch_batches": -1}, "prefetch_batches -1"),
        ({"output": "arrow"}, "allowed are packed, csr, dense, dense_norm"),
        ({"output": "dense_norm"}, "dense_norm needs it"),
        ({"output": "csr", "target_sum": 1e4}, "would ignore it"),
        ({"on_damage": "ignore"}, "allowed are stop and skip"),
        ({"cells_seen": -1}, "cells_seen -1"),
        ({"split": "dev"}, "this corpus has train, validation, test"),
        ({"split": "test"}, "has no cells"),
        ({"weights": np.ones(2, np.int64)}, "has 3 datasets"),
    ],
)
def test_mistakes_are_refused(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        open_loader(corpus, **options)


def test_log1p_normalise():
    counts = sparse.csr_matrix(np.array([[1, 0, 3], [0, 0, 0], [5, 5, 0]], dtype=np.uint32))
    x = log1p_normalise(counts, target_sum=1e4)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x[0], np.log1p([2500, 0, 7500]), rtol=1e-6)
    assert not x[1].any()
    np.testing.assert_allclose(x[2], np.log1p([5000, 5000, 0]), rtol=1e-6)
