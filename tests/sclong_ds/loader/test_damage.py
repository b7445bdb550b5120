"""Cells that cannot be read stop the loop where they are met, or keep their place without counts.

Covers `sclong_ds/loader/reading.py`.
"""

import logging
import threading
import time

import numpy as np
import pytest
from loaded_cells import (
    counts_of,
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

from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.loader.threads import WAIT_WARNING_S

OUTPUTS = ("packed", "csr", "dense", "dense_norm")


@pytest.fixture
def damaged(tmp_path):
    """A corpus with a cut shard, and the rows that were in it."""
    corpus = make_corpus(tmp_path / "corpus", n_train=61, chunk_entries=150)
    (tmp_path / "corpus" / "cells.zarr" / "gap" / "c" / "1").write_bytes(b"cut")
    return corpus, range(int(corpus.chunk_rows[2]), int(corpus.chunk_rows[4]))


@pytest.mark.thorough
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


@pytest.mark.thorough
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


def test_a_missing_file_stops_the_loop_even_when_damage_is_skipped(damaged):
    corpus, _ = damaged
    (corpus.path / "cells.zarr" / "count" / "c" / "0").unlink()
    with (
        open_loader(corpus, on_damage="skip", stop_at=61) as loader,
        pytest.raises(DamagedChunk, match=r"count/c/0: .* the file is missing; restore"),
    ):
        list(loader)


def test_skipping_ends_where_much_is_damaged(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", n_train=400, chunk_entries=150)
    shards = sorted((tmp_path / "corpus" / "cells.zarr" / "gap" / "c").iterdir())
    for shard in shards[1:]:
        shard.write_bytes(b"cut")
    options = {"on_damage": "skip", "lanes": (8, 8), "seed": 1}
    with open_loader(corpus, **options) as loader:
        with pytest.raises(ValueError, match=r"of \d+ cells .* skipped, more than 10%; restore"):
            list(loader)
        position, skipped = loader.position, loader.skipped_cells
        assert 0.5 * position < skipped <= position < 400
        with pytest.raises(ValueError, match="more than 10%"):
            next(loader)
        assert (loader.position, loader.skipped_cells) == (position, skipped)


def test_a_little_damage_is_skipped_for_ever(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", n_train=400, chunk_entries=150)
    shard = tmp_path / "corpus" / "cells.zarr" / "gap" / "c" / "1"
    shard.write_bytes(b"cut")
    with open_loader(corpus, on_damage="skip", lanes=(8, 8), stop_at=2000) as loader:
        list(loader)
    assert 0 < loader.skipped_cells < 200


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


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_failure_behind_a_slow_chunk_arrives_with_it(corpora, monkeypatch, prefetch):
    corpus = Corpus(corpora[0].path)
    read, failed, begun = corpus.read_packed, threading.Event(), []

    def held(chunk, *, out=None):
        begun.append(chunk)
        if len(begun) == 1:
            assert failed.wait(10)
            time.sleep(0.2)  # until the thread of the failure has told
        elif len(begun) == 2:
            failed.set()
            raise OSError("no such shard")
        return read(chunk, out=out)

    monkeypatch.setattr(corpus, "read_packed", held)
    started = time.monotonic()
    with open_loader(
        corpus, group=4, train_batch_size=16, micro_batch_size=16, prefetch_batches=prefetch,
        read_threads=2,
    ) as loader, pytest.raises(OSError, match="no such shard"):  # fmt: skip
        next(iter(loader))
    assert time.monotonic() - started < WAIT_WARNING_S / 2


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
