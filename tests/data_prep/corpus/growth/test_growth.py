"""A corpus that grows by parts is the one that a finalize of everything makes, and stays put.

Covers `data_prep/corpus/growth/earlier.py` and `data_prep/corpus/growth/part_list.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from grown_corpora import Killed, assert_the_same, at_once, grown, sums, with_datasets
from scipy import sparse

import data_prep.corpus.growth.earlier as earlier_module
import data_prep.corpus.growth.part_list as part_list_module
import data_prep.corpus.seal as seal_module
from data_prep.corpus.finalize import finalize
from data_prep.verify.verify import verify
from sclong_ds.corpus.catalogue import read_catalogue
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize("tasks", [2, 3])
def test_tasks_add_the_same_part(made: Path, tmp_path: Path, tasks: int) -> None:
    one = grown(made, tmp_path / "one", ["ab", "cd"])
    other = grown(made, tmp_path / "other", ["ab"])
    with_datasets(made, other, "cd")
    for task in range(tasks):
        finalize(other, task=task, tasks=tasks)
    assert {n: d for n, (d, _) in sums(other).items()} == {n: d for n, (d, _) in sums(one).items()}


def test_too_many_parts_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier_module, "MOST_PARTS", 2)
    monkeypatch.setattr(part_list_module, "MANY_PARTS", 2)
    folder = grown(made, tmp_path / "grown", ["a", "b"])
    assert any("2 parts" in text for text in read_catalogue(folder)["warnings"])
    with pytest.raises(ValueError, match=r"has 2 parts.*data_prep compact"):
        grown(made, folder, ["c"])
