"""What is read of a corpus of parts is what one corpus of the same cells holds.

Covers `sclong_ds/annotations/joined_columns.py`, `sclong_ds/corpus/parts/gene_stats.py`,
`sclong_ds/corpus/parts/joined_cells.py` and `sclong_ds/corpus/parts/views.py`.
"""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cell_values import as_tuples
from grown_corpora import grown, with_datasets
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.corpus.growth.compact import compact
from data_prep.verify.verify import verify
from sclong_ds.corpus.catalogue import SPLITS, read_catalogue
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import as_it_was, sample
from sclong_ds.loader.loader import CellLoader, open_stream


def test_an_address_may_end_with_a_slash(made: Path, tmp_path: Path) -> None:
    folder = grown(made, tmp_path / "grown", ["a", "b"])
    corpus = Corpus(f"{folder}/")
    # Of an object store, another key with two of them.
    assert corpus.parts[1].location.url == f"{folder}/parts/000001"


def test_chosen_rows_of_a_table_need_no_whole_one(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(grown(made, tmp_path / "grown", ["ab", "c"]))
    rows = np.random.default_rng(0).integers(len(corpus), size=50)
    for name in (*corpus.cells.tables, "row_total", "row_nnz", "row_entries"):
        table = corpus.cells.table(name)
        found = corpus.cells.rows_of(name, rows)
        assert found.dtype == table.dtype
        np.testing.assert_array_equal(found, table[rows])
        assert len(corpus.cells.rows_of(name, rows[:0])) == 0
    assert corpus.row_dataset.max() == 2
    monkeypatch.setattr(type(corpus.cells), "table", None)
    assert len(corpus.obs(rows[:3])) == 3


@pytest.mark.thorough
def test_a_sample_takes_of_every_part_what_it_has_of_the_split(made: Path, tmp_path: Path) -> None:
    corpus = Corpus(grown(made, tmp_path / "grown", ["ab", "c", "de"]))
    for split in SPLITS:
        rows = corpus.split(split)
        n_in_part = np.array([len(part.splits[split]) for part in corpus.parts])
        ends = np.cumsum(n_in_part)
        for n_cells in (0, 1, 7, 20, len(rows) - 1, len(rows), len(rows) + 5):
            found = sample(corpus, split, n_cells)
            n_found = min(max(n_cells, 0), len(rows))
            assert len(found) == n_found
            assert (np.diff(found) > 0).all()
            assert np.isin(found, rows).all()
            part = np.searchsorted(ends, found - (rows[0] if len(rows) else 0), side="right")
            share = np.bincount(part, minlength=3) - n_in_part * n_found / max(1, len(rows))
            assert (abs(share) < 1).all()
    (alone,) = (part for part in corpus.parts[:1])
    np.testing.assert_array_equal(sample(alone, "train", 9), alone.split("train")[:9])


@pytest.mark.thorough
def test_a_corpus_as_it_was_before_it_grew(made: Path, tmp_path: Path) -> None:
    folder = grown(made, tmp_path / "grown", ["ab"])
    before = [Corpus(shutil.copytree(folder, tmp_path / "first"))]
    grown(made, folder, ["c"])
    before.append(Corpus(shutil.copytree(folder, tmp_path / "second")))
    grown(made, folder, ["de"])
    now = Corpus(folder)
    assert as_it_was(now, now.hash) is now
    for old in before:
        found = as_it_was(now, old.hash)
        assert (found.hash, found.splits, len(found)) == (old.hash, old.splits, len(old))
        assert [d.dataset_id for d in found.datasets] == [d.dataset_id for d in old.datasets]
        rows = np.arange(len(old))
        assert as_tuples(found.rows(rows)) == as_tuples(old.rows(rows))
        for name in ("row_dataset", "row_source", "row_total"):
            np.testing.assert_array_equal(getattr(found, name), getattr(old, name))
        assert found.obs(rows, columns=["cell_type", "age"]).equals(
            old.obs(rows, columns=["cell_type", "age"])
        )
        np.testing.assert_array_equal(found.chunk_rows, old.chunk_rows)
        np.testing.assert_allclose(found.gene_stats.mean_expressed, old.gene_stats.mean_expressed)
    with pytest.raises(ValueError, match="another corpus by now"):
        as_it_was(before[0], now.hash)


@pytest.mark.thorough
@pytest.mark.parametrize("damage", ["missing", "cut", "other", "catalogue"])
def test_a_damaged_part_is_named(made: Path, tmp_path: Path, damage: str) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "c", "d"])
    part = folder / "parts" / "000001"
    if damage == "missing":
        shutil.rmtree(part)
    elif damage == "cut":
        shard = next((part / "cells.zarr" / "gap" / "c").iterdir())
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "other":
        shutil.rmtree(part)
        shutil.copytree(folder / "parts" / "000002", part)
    else:
        text = (part / "corpus.json").read_bytes()
        (part / "corpus.json").write_bytes(text.replace(b"blood", b"brain"))
    problems = verify(folder)["problems"]
    assert any("000001" in text for text in problems), problems
    if damage == "cut":
        with pytest.raises(ValueError, match=r"parts/000001/cells\.zarr"):
            Corpus(folder).rows(range(len(Corpus(folder))))
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=r"part 1 of 3.*restore it"):
            Corpus(folder)


def damaged(path: Path, how: str) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "cut" else content)
    return path


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "how", "new"),
    [
        ("cells.zarr/gap/c/0", "missing", ""),
        ("cells.zarr/count/c/0", "changed", "d"),
        ("parts/000001/cells.zarr/gap/c/0", "cut", "d"),
        ("parts/000001/cells.zarr/count/c/0", "changed", ""),
        ("parts/000001/obs/c.parquet", "changed", ""),
        ("parts/000001/corpus.json", "changed", ""),
        ("obs/a.parquet", "missing", "d"),
    ],
)
def test_finalize_refuses_a_damaged_part_and_says_what_makes_it_again(
    made: Path, tmp_path: Path, name: str, how: str, new: str
) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "c"])
    catalogue = (folder / "corpus.json").read_bytes()
    with_datasets(made, folder, new)
    path = damaged(folder / name, how)
    with pytest.raises(ValueError, match=r"compact") as caught:
        finalize(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert (folder / "corpus.json").read_bytes() == catalogue
    compact(folder)
    assert verify(folder)["ok"]


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_task_of_finalize_misses_a_shard(made: Path, tmp_path: Path, how: str) -> None:
    """Plain finalize makes a corpus without parts again in any case."""
    folder = grown(made, tmp_path / "one", ["ab"])
    before = read_catalogue(folder)
    damaged(folder / "cells.zarr" / "gap" / "c" / "0", how)
    assert finalize(folder, tasks=1) == before
    assert verify(folder)["ok"]


@pytest.mark.thorough
def test_damage_is_of_the_same_cells_however_it_is_met(made: Path, tmp_path: Path) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "c"])
    path = damaged(folder / "parts" / "000001" / "cells.zarr" / "gap" / "c" / "0", "missing")
    corpus = Corpus(folder)
    found = []
    for chunk, (first, stop) in enumerate(pairwise(corpus.chunk_rows.tolist())):
        for read in (
            lambda chunk=chunk: corpus.read_packed(chunk),
            lambda cells=range(first, stop): corpus.rows(cells),
            lambda cell=stop - 1: corpus[cell],
        ):
            try:
                read()
            except DamagedChunk as error:
                place = error.path, error.chunk, error.first_cell, error.last_cell
                found.append(place == (str(path), chunk, first, stop - 1))
    assert found == [True] * 3 * sum(len(cells) > 0 for cells in corpus.parts[1].splits.values())


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_see_every_cell_of_all_parts_once_an_epoch(
    made: Path, tmp_path: Path, ranks: int
) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "c", "de"])
    corpus = pickle.loads(pickle.dumps(Corpus(folder)))
    train = corpus.splits["train"]
    wanted = as_tuples(corpus.rows(range(len(corpus))))
    stream = open_stream(corpus, seed=3, lanes=8, batch=16)
    seen: Counter[int] = Counter()
    for rank in range(ranks):
        with CellLoader(
            corpus, stream=stream, rank=rank, world_size=ranks, train_batch_size=16,
            stop_at=len(train), output="csr", prefetch_batches=0,
        ) as loader:  # fmt: skip
            for step in loader:
                for micro in step.micro_batches:
                    seen.update(micro.cell_ids.tolist())
                    c = micro.counts
                    shape = (len(micro.cell_ids), corpus.n_genes)
                    got = sparse.csr_matrix((c.data, c.indices, c.indptr), shape=shape)
                    assert as_tuples(got) == [wanted[i] for i in micro.cell_ids.tolist()]
    assert seen == Counter(range(train.start, train.stop))
