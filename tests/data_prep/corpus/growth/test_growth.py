"""A corpus that grows by parts is the one that a finalize of everything makes, and stays put.

Covers `data_prep/corpus/growth/compact.py`, `data_prep/corpus/growth/digests.py`,
`data_prep/corpus/growth/earlier.py`, `data_prep/corpus/growth/part_list.py`,
`sclong_ds/annotations/joined_columns.py`, `sclong_ds/corpus/parts/gene_stats.py`,
`sclong_ds/corpus/parts/joined_cells.py` and `sclong_ds/corpus/parts/views.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cell_values import as_tuples
from scipy import sparse

import data_prep.annotations.columns as columns_module
import data_prep.corpus.growth.digests as digests_module
import data_prep.corpus.growth.earlier as earlier_module
import data_prep.corpus.growth.part_list as part_list_module
import data_prep.corpus.publish as publish_module
import data_prep.corpus.seal as seal_module
import sclong_ds.annotations.joined_columns as joined_columns_module
from data_prep.corpus.finalize import finalize
from data_prep.corpus.growth.compact import compact
from data_prep.verify.verify import verify
from sclong_ds.corpus.catalogue import SPLITS, read_catalogue
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import as_it_was, sample
from sclong_ds.loader.loader import CellLoader, open_stream

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]
SHARED = ("near_kept", "n_cells", "duplicates_dropped", "near_dropped", "split_cells", "n_donors")


@pytest.fixture
def made(counts: Counts, stage_corpus: Stage, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five datasets: with repeated cells, donors, other gene lists, columns and text.

    Ids of an ontology with and without values, donors by one name, the other and both, and texts
    and numbers of too many values in one dataset.
    """
    for module in (columns_module, joined_columns_module):
        monkeypatch.setattr(module, "MOST_BITS", 6)
    rng = np.random.default_rng(4)
    a, b = counts(1, 90), counts(2, 70)
    copied = sparse.vstack([counts(3, 40), a[:9], b[[5, 5, 60]]], format="csr")
    few = np.arange(600) < 500
    near = a[20:50].multiply(few).tocsr().astype(a.dtype)
    near.sort_indices()
    part = sparse.vstack([near, counts(5, 30).multiply(few).tocsr()], format="csr").astype(a.dtype)
    part.eliminate_zeros()
    matrices = {"a": a, "b": b, "c": copied, "d": part, "e": counts(6, 30)}
    sizes = {name: matrix.shape[0] for name, matrix in matrices.items()}
    donors = {n: [f"{n}{row % 7}" for row in range(size)] for n, size in sizes.items() if n != "e"}
    donors["b"][:5] = ["a1"] * 5
    obs = {
        name: {
            "cell_type": [f"type {t}" for t in rng.integers(0, 3 + number, size)],
            "cell_type_ontology_term_id": [f"CL:{name}"] * size if number % 2 else [""] * size,
            "age": [str(t) for t in rng.integers(20, 40, size)],
            "is_primary_data": [str(t) for t in rng.integers(0, 2, size) > 0],
        }
        for number, (name, size) in enumerate(sizes.items())
        if name != "b"
    }
    obs["b"] = {"cell_type_ontology_term_id": ["CL:b", "", "CL:d"] * 23 + [""]}
    obs["a"] |= {
        "note": [f"note {i}" for i in range(90)],
        "score": [repr(i / 7) for i in range(90)],
    }
    obs["c"] |= {"score": ["7", ""] * 26, "disease": ["flu", "none"] * 26}
    obs["d"]["donor_id"] = [f"other {row % 5}" for row in range(60)]
    obs["e"] |= {"donor_id": [f"e{row % 3}" for row in range(30)], "note": ["x"] * 30}
    obs["e"]["disease_ontology_term_id"] = ["MONDO:1", "MONDO:2"] * 15
    return stage_corpus(
        matrices, donors=donors, obs=obs, measured={"d": few}, name="all", chunk_entries=8192
    )


def with_datasets(made: Path, corpus: Path, names: str) -> Path:
    """Bring datasets into a folder, as a later convert does."""
    corpus.mkdir(exist_ok=True)
    for name in ("settings.json", "genes.tsv"):
        if not (corpus / name).exists():
            shutil.copyfile(made / name, corpus / name)
    for name in names:
        shutil.copytree(made / "staging" / name, corpus / "staging" / name)
        (corpus / "ledger").mkdir(exist_ok=True)
        shutil.copyfile(made / "ledger" / f"{name}.json", corpus / "ledger" / f"{name}.json")
    return corpus


def grown(made: Path, corpus: Path, steps: list[str], **options: str) -> Path:
    for names in steps:
        finalize(with_datasets(made, corpus, names), **options)
    return corpus


def at_once(made: Path, corpus: Path, like: Path, **options: str) -> Path:
    """Finalize all datasets at once by the rule of a split that is there."""
    with_datasets(made, corpus, "abcde")
    shutil.copyfile(like / "split.json", corpus / "split.json")
    finalize(corpus, **options)
    return corpus


def sums(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of change of every finished file."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0][0] != "."
    }


def cells_of(corpus: Corpus, split: str) -> Counter[tuple]:
    rows = corpus.split(split)
    origin = [corpus.datasets[code].dataset_id for code in corpus.row_dataset[rows]]
    names = ["cell_type", "age", "is_primary_data", "donor", "donor_id", "tissue", "note", "score"]
    names += ["cell_type_ontology_term_id", "disease", "disease_ontology_term_id"]
    obs = corpus.obs(rows, columns=names)
    texts = obs.astype(str).to_numpy().tolist()
    counts = as_tuples(corpus.rows(rows))
    return Counter(
        (name, row, *text, cell)
        for name, row, text, cell in zip(
            origin, corpus.row_source[rows].tolist(), map(tuple, texts), counts, strict=True
        )
    )


def assert_the_same(one: Corpus, other: Corpus) -> None:
    """The same cells in the same splits, and all that is told of them."""
    assert len(one) == len(other)
    for split in SPLITS:
        assert cells_of(one, split) == cells_of(other, split)
    mine, theirs = ({d.dataset_id: d for d in c.datasets} for c in (one, other))
    assert {*mine} == {*theirs}
    for name, info in mine.items():
        for key in SHARED:
            assert getattr(info, key) == getattr(theirs[name], key), (name, key)
    for name in ("held_out", "split_shares", "split_unit", "n_values", "duplicates_dropped"):
        assert one.catalogue[name] == other.catalogue[name], name
    for name, values in vars(one.gene_stats).items():
        np.testing.assert_allclose(values, getattr(other.gene_stats, name), rtol=1e-12)
        if np.asarray(values).dtype.kind == "i":
            np.testing.assert_array_equal(values, getattr(other.gene_stats, name))
    assert {*one.columns} == {*other.columns}
    assert one.columns.stored == other.columns.stored


@pytest.mark.parametrize(
    "steps", [["a", "b", "c", "d", "e"], ["ac", "bde"], ["bd", "e", "ac"], ["d", "abce"]]
)
def test_grown_is_finalized_at_once(made: Path, tmp_path: Path, steps: list[str]) -> None:
    options = {"near_duplicates": "keep"}
    folder = grown(made, tmp_path / "grown", steps, **options)
    corpus = Corpus(folder)
    assert len(corpus.parts) == len(steps)
    assert_the_same(corpus, Corpus(at_once(made, tmp_path / "once", folder, **options)))
    report = verify(folder)
    assert report["problems"] == []
    assert all(link["checked"] for link in report["links"][1:])


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


def test_columns_that_an_old_part_left_out_are_none(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # Earlier versions do not list them.
        real = seal_module.write_index
        patch.setattr(seal_module, "write_index", lambda *args: real(*args[:3]))
        folder = grown(made, tmp_path / "grown", ["ab"])
    corpus = Corpus(grown(made, folder, ["e"]))
    assert "note" not in corpus.columns
    assert {*corpus.obs(columns=["note"])["note"]} == {"", "x", *(f"note {i}" for i in range(90))}
    assert verify(folder)["problems"] == []


@pytest.mark.parametrize("rule", ["primary", "drop"])
def test_new_cells_meet_the_rule_of_near_duplicates(made: Path, tmp_path: Path, rule: str) -> None:
    folder = grown(made, tmp_path / "grown", ["abce", "d"], near_duplicates=rule)
    one = Corpus(at_once(made, tmp_path / "once", folder, near_duplicates=rule))
    corpus = Corpus(folder)
    new = [{d.dataset_id: d for d in c.datasets}["d"] for c in (corpus, one)]
    assert new[0].near_dropped == new[1].near_dropped
    assert new[0].near_dropped
    extra = len(corpus) - len(one)
    told = [w for w in corpus.catalogue["warnings"] if "earlier parts are near duplicates" in w]
    assert [w.partition(" ")[0] for w in told] == ([str(extra)] if extra else [])
    finalize(folder, near_duplicates=rule, whole=True)
    assert Corpus(folder).hash == one.hash


def test_growth_writes_none_of_the_files_that_are_there(made: Path, tmp_path: Path) -> None:
    folder = grown(made, tmp_path / "grown", ["ab"])
    kept = sums(folder)
    for number, name in enumerate("cd"):
        grown(made, folder, [name])
        now = sums(folder)
        moved = {n for n in kept if now.get(n) != kept[n]}
        assert moved == {"corpus.json", "split.json"} or moved == {"corpus.json"}
        assert {n.split("/")[0] for n in now.keys() - kept.keys()} == {
            "parts", "ledger", "staging",
        }  # fmt: skip
        assert (folder / f"parts/00000{number + 1}/corpus.json").is_file()
        kept = now
    assert finalize(folder)["hash"] == Corpus(folder).hash
    assert sums(folder) == kept


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


def test_the_digests_of_parts_are_kept_and_read_in_pieces(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "CELLS_OF_UNIT", 50)
    folder = grown(made, tmp_path / "grown", ["ab", "d"])
    shape = np.load(folder / "parts" / "000000.digests.npy").shape
    assert shape == (160, 2)
    grown(made, folder, ["c"])
    info = next(d for d in Corpus(folder).datasets if d.dataset_id == "c")
    assert info.duplicates_dropped == 9 + 3


def test_a_part_without_cells(made: Path, tmp_path: Path) -> None:
    folder = grown(made, tmp_path / "grown", ["ab"])
    with_datasets(made, folder, "c")
    store = folder / "staging" / "c"
    shutil.rmtree(store)
    shutil.copytree(folder / "staging" / "a", store)
    text = (folder / "ledger" / "a.json").read_text()
    from data_prep.ledger.ledger import read_entry, write_entry

    entry = read_entry(folder / "ledger" / "a.json")
    entry["dataset_id"] = "c"
    write_entry(folder, entry)
    assert (folder / "ledger" / "a.json").read_text() == text
    catalogue = finalize(folder)
    assert catalogue["datasets"][-1]["n_cells"] == 0
    assert len(Corpus(folder)) == 160
    assert verify(folder)["problems"] == []


@pytest.mark.parametrize("change", ["convert", "forget", "options", "split"])
def test_what_changed_makes_one_corpus_again(made: Path, tmp_path: Path, change: str) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "c"])
    with_datasets(made, folder, "d")
    options = {}
    if change == "forget":
        (folder / "ledger" / "b.json").unlink()
        shutil.rmtree(folder / "staging" / "b")
    elif change == "convert":
        from data_prep.ledger.ledger import read_entry, write_entry

        entry = read_entry(folder / "ledger" / "b.json")
        entry["reason"] = "made again"
        write_entry(folder, entry)
    elif change == "options":
        options = {"codec": "none"}
    else:
        options = {"seed": 9}
    finalize(folder, **options)
    assert not Corpus(folder).parts
    assert not (folder / "parts").exists()
    assert verify(folder)["problems"] == []


def without(folder: Path, name: str) -> None:
    """Forget a dataset."""
    (folder / "ledger" / f"{name}.json").unlink()
    shutil.rmtree(folder / "staging" / name)


@pytest.mark.parametrize("gone", ["b", "ab"])
def test_a_dataset_that_comes_back_is_written_once(made: Path, tmp_path: Path, gone: str) -> None:
    options = {"near_duplicates": "keep"}
    folder = grown(made, tmp_path / "grown", ["a", "b", "e"], **options)
    for name in gone:
        without(folder, name)
    finalize(folder, **options)
    grown(made, folder, [gone, "cd"], **options)
    assert [d.dataset_id for d in Corpus(folder).datasets] == ["a", "b", "e", "c", "d"]
    assert_the_same(Corpus(folder), Corpus(at_once(made, tmp_path / "once", folder, **options)))
    assert verify(folder)["problems"] == []


def set_status(folder: Path, name: str, status: str) -> None:
    """Write what became of a dataset that finalize does not use."""
    from data_prep.ledger.ledger import write_entry

    entry = json.loads((folder / "ledger" / "a.json").read_text())
    files = {"files": {}, "n_cells": 0}
    write_entry(folder, {**entry, "dataset_id": name, "status": status, "reason": "x"} | files)


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_dataset_that_failed_leaves_the_parts(
    made: Path, tmp_path: Path, tasks: int | None
) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "c"])
    before, files = read_catalogue(folder), sums(folder)
    for status in ("failed", "excluded"):
        set_status(folder, "z", status)
        for _ in range(2):
            catalogue = finalize(folder, tasks=tasks)
            assert catalogue["hash"] == before["hash"]
            assert [(u["dataset_id"], u["status"]) for u in catalogue["unused"]] == [("z", status)]
            told = [text for text in catalogue["warnings"] if text not in before["warnings"]]
            assert told == [
                f"1 of 4 datasets are left out (1 {status}); see: python -m data_prep status"
            ]
            now = sums(folder)
            assert {n for n in now if now[n] != files.get(n)} == {"corpus.json", "ledger/z.json"}
            assert verify(folder)["problems"] == []
    (folder / "ledger" / "z.json").unlink()
    assert finalize(folder) == before


@pytest.mark.parametrize(
    ("steps", "new", "files"),
    [
        (["ab"], "c", "cells.zarr"),
        (["ab", "c"], "d", "cells.zarr/gap/c"),
        (["ab", "c"], "e", "cells.zarr/row_total"),
        (["ab", "c"], "e", "measured_genes.npy"),
    ],
)
def test_staged_files_of_earlier_parts_are_compared_before_they_are_read(
    made: Path, tmp_path: Path, stage_corpus: Stage, counts: Counts, steps: list[str], new: str,
    files: str,
) -> None:  # fmt: skip
    """Another store whose own checksums hold: the ledger alone tells that it is another."""
    folder = with_datasets(made, grown(made, tmp_path / "grown", steps), new)
    other = stage_corpus({"a": counts(9, 90)}, name="other", chunk_entries=8192) / "staging" / "a"
    mine, before = folder / "staging" / "a", sums(folder)
    if (other / files).is_dir():
        shutil.rmtree(mine / files)
        shutil.copytree(other / files, mine / files)
    else:
        np.save(mine / files, np.load(mine / files) & 1)
    with pytest.raises(ValueError, match=r"staging/a/.*convert the dataset again"):
        finalize(folder)
    now = sums(folder)
    assert {n for n in before if now.get(n) != before[n] and not n.startswith("staging")} == set()


@pytest.mark.parametrize("shape", [(159, 2), (161, 2), (160, 3)])
def test_kept_digests_of_another_number_of_cells_are_refused(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    np.save(tmp_path / "kept.npy", np.zeros(shape, np.uint64))
    for start in (0, 100):
        unit = digests_module.DigestUnit(
            first=start, n_cells=60, kept=tmp_path / "kept.npy", start=start, n_kept=160
        )
        with pytest.raises(ValueError, match=r"kept\.npy.*160 staged cells"):
            digests_module.read_kept(unit)


def test_compact_makes_what_finalize_makes_of_everything(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = grown(made, tmp_path / "grown", ["ab", "cd", "e"], near_duplicates="drop")
    grown_cells = Corpus(folder)
    once = at_once(made, tmp_path / "once", folder, near_duplicates="drop")
    with monkeypatch.context() as patch:
        # Killed when the old corpus is gone and the new one is not there yet.
        real = publish_module.write_atomic
        patch.setattr(
            publish_module,
            "write_atomic",
            lambda path, data: dying(path) if path.name == "corpus.json" else real(path, data),
        )
        with pytest.raises(Killed):
            compact(folder)
    assert not (folder / "corpus.json").exists()
    compact(folder)
    assert Corpus(folder).hash == Corpus(once).hash
    assert not (folder / "parts").exists()
    assert len(grown_cells.parts) == 3
    assert verify(folder)["problems"] == []
    files = sums(folder)
    assert compact(folder)["hash"] == Corpus(once).hash
    assert sums(folder) == files
    with pytest.raises(FileNotFoundError, match="not finalized"):
        compact(made)


def dying(path: Path) -> None:
    raise Killed(path)


class Killed(BaseException):
    """As SIGKILL: nothing is put in order after it."""


def test_killed_at_any_write_the_old_corpus_stays_or_the_new_one_is_there(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = grown(made, tmp_path / "begun", ["ab"])
    wanted = grown(made, shutil.copytree(begun, tmp_path / "wanted"), ["cd"])
    hashes = {read_catalogue(begun)["hash"], read_catalogue(wanted)["hash"]}
    files = {name: digest for name, (digest, _) in sums(wanted).items()}
    seen, kills = set(), 0
    for name in ("replace", "rename"):
        for number in range(0, 400, 23):
            folder = shutil.copytree(begun, tmp_path / f"{name}-{number}")
            with_datasets(made, folder, "cd")
            real, calls = getattr(os, name), iter(range(10**6))

            def dying(*arguments: object, last=number, real=real, calls=calls) -> None:
                if next(calls) >= last:
                    raise Killed
                real(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, dying)
                try:
                    finalize(folder)
                except Killed:
                    kills += 1
                else:
                    break
            found = Corpus(folder)
            assert found.hash in hashes
            seen.add(found.hash)
            assert [p for p in verify(folder)["problems"] if "not part of" not in p] == []
            finalize(folder)
            assert {n: digest for n, (digest, _) in sums(folder).items()} == files
            shutil.rmtree(folder)
    assert kills > 4
    assert read_catalogue(begun)["hash"] in seen


@pytest.mark.parametrize("tasks", [2, 3])
def test_tasks_add_the_same_part(made: Path, tmp_path: Path, tasks: int) -> None:
    one = grown(made, tmp_path / "one", ["ab", "cd"])
    other = grown(made, tmp_path / "other", ["ab"])
    with_datasets(made, other, "cd")
    for task in range(tasks):
        finalize(other, task=task, tasks=tasks)
    assert {n: d for n, (d, _) in sums(other).items()} == {n: d for n, (d, _) in sums(one).items()}


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


def test_too_many_parts_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier_module, "MOST_PARTS", 2)
    monkeypatch.setattr(part_list_module, "MANY_PARTS", 2)
    folder = grown(made, tmp_path / "grown", ["a", "b"])
    assert any("2 parts" in text for text in read_catalogue(folder)["warnings"])
    with pytest.raises(ValueError, match=r"has 2 parts.*data_prep compact"):
        grown(made, folder, ["c"])


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
