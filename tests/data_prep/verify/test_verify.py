"""Verify: silent on a good corpus, and no changed byte stays unseen.

Covers also `data_prep/verify/files.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.verify.files import (
    CHUNKS,
    FILES,
    INPUTS,
    LEDGER,
    ORIGIN,
    SOURCES,
    STAGED,
    SUMS,
    links_text,
)
from data_prep.verify.verify import verify
from sclong_ds.corpus.catalogue import FORMAT_VERSION, read_catalogue, write_catalogue
from sclong_ds.corpus.corpus import Corpus

GOLDEN = Path(__file__).parents[2] / "golden"
OLDEST = GOLDEN / "corpus_version_1"
Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


@pytest.fixture
def corpus(stage_corpus: Stage, counts: Counts) -> Path:
    donors = {"b": [f"p{row % 5}" for row in range(30)]}
    datasets = {"a": counts(1, 50), "b": counts(2, 30), "c": counts(3, 16)}
    folder = stage_corpus(datasets, donors=donors, not_ok={"d": "failed"})
    finalize(folder, split_by="dataset")
    return folder


def files_of(corpus: Path) -> list[Path]:
    files = (path for path in corpus.rglob("*") if path.is_file())
    return sorted(path for path in files if ".locks" not in path.parts)


def test_a_good_corpus(corpus: Path) -> None:
    report = verify(corpus)
    assert report["problems"] == []
    assert report["ok"] is True
    assert (report["n_cells"], report["n_genes"]) == (96, 600)
    assert report["n_values"] == Corpus(corpus).rows(range(96)).nnz
    assert report["hash"] == Corpus(corpus).hash
    assert report["n_files"] == len(files_of(corpus))
    assert json.loads(json.dumps(report)) == report


@pytest.mark.thorough
def test_every_file_is_covered(corpus: Path) -> None:
    """A flipped bit is reported with the name of its file."""
    files = files_of(corpus)
    assert len(files) > 40
    for path in files:
        raw = path.read_bytes()
        name = path.relative_to(corpus).as_posix()
        for position in {len(raw) // 3, len(raw) - 1}:
            path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            report = verify(corpus)
            assert not report["ok"], f"{name} byte {position}"
            assert any(name in problem for problem in report["problems"]), f"{name} byte {position}"
            assert all("\n" not in problem for problem in report["problems"])
        path.write_bytes(raw)
    assert verify(corpus)["ok"]


def test_missing_and_foreign_files(corpus: Path) -> None:
    chunk = corpus / "cells.zarr" / "gap" / "c" / "0"
    raw = chunk.read_bytes()
    chunk.unlink()
    assert any("gap/c/0: missing" in problem for problem in verify(corpus)["problems"])
    chunk.write_bytes(raw)
    (corpus / "cells.zarr" / "gap" / "c" / "1").write_bytes(b"")
    assert verify(corpus)["problems"] == ["cells.zarr/gap/c/1: not part of the corpus"]


def test_staging_may_be_removed(corpus: Path) -> None:
    shutil.rmtree(corpus / "staging")
    assert verify(corpus)["ok"]


def test_folder_that_is_not_finalized(corpus: Path, tmp_path: Path) -> None:
    (corpus / "corpus.json").unlink()
    for folder in (corpus, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="data_prep finalize"):
            verify(folder)


def seal(corpus: Path, **changes: object) -> None:
    """Make all checksums fit what is on disk, as a faulty finalize would."""
    catalogue = read_catalogue(corpus)
    del catalogue["files"]  # taken from what is on disk
    path = corpus / "checksums.json"
    checksums = json.loads(path.read_bytes())
    for name in checksums["files"]:
        content = (corpus / name).read_bytes()
        checksums["files"][name] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(checksums))
    catalogue["checksums_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_catalogue(corpus, catalogue | changes)


def change_table(corpus: Path, name: str, dtype: str, change: Callable[[np.ndarray], None]) -> None:
    path = corpus / "cells.zarr" / name / "c" / "0"
    values = np.fromfile(path, dtype)
    change(values)
    values.tofile(path)


def swap_last(values: np.ndarray) -> None:
    values[[0, -1]] = values[[-1, 0]]


def add_one(values: np.ndarray) -> None:
    values[3] += 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "dtype", "change", "message"),
    [
        ("row_total", "<i8", add_one, "row_total: wrong for cell 3"),
        ("row_nnz", "<u4", add_one, "row_nnz: wrong for cell 3"),
        ("row_entries", "<u4", add_one, "cells.zarr: cells 0 to"),
        ("dataset", "<u4", swap_last, "cells in train, corpus.json records"),
        ("obs_row", "<i8", lambda v: v.fill(0), "used twice"),
        ("obs_row", "<i8", lambda v: np.add(v, 90, out=v), "without annotation"),
    ],
)
def test_wrong_content_behind_right_checksums(
    corpus: Path, name: str, dtype: str, change: Callable[[np.ndarray], None], message: str
) -> None:
    change_table(corpus, name, dtype, change)
    seal(corpus)
    problems = verify(corpus)["problems"]
    assert any(message in problem for problem in problems), problems


@pytest.mark.thorough
def test_wrong_splits(corpus: Path) -> None:
    catalogue = read_catalogue(corpus)
    for splits in (
        {"train": [0, 80], "validation": [79, 96], "test": [96, 96]},
        {"train": [0, 80], "validation": [80, 95], "test": [95, 95]},
    ):
        seal(corpus, splits=splits)
        assert any("do not cover" in problem for problem in verify(corpus)["problems"])
    seal(corpus, splits={"train": [0, 79], "validation": [79, 96], "test": [96, 96]})
    assert any("inside a chunk" in problem for problem in verify(corpus)["problems"])
    seal(corpus, splits=catalogue["splits"])
    assert verify(corpus)["ok"]


def test_a_donor_on_both_sides(corpus: Path) -> None:
    finalize(corpus, split_by="donor", validation_fraction=0.3)
    assert verify(corpus)["ok"]

    opened = Corpus(corpus)
    of_b = opened.row_dataset[:] == 1
    train, validation = (opened.split(name) for name in ("train", "validation"))
    pair = [train[of_b[train]][0], validation[of_b[validation]][0]]

    def swap_donors(values: np.ndarray) -> None:
        values[pair] = values[pair[::-1]]

    change_table(corpus, "obs_row", "<i8", swap_donors)
    seal(corpus)
    assert any("cells in train, validation" in problem for problem in verify(corpus)["problems"])


def test_duplicates_and_statistics(
    stage_corpus: Stage, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = counts(1, 20)
    folder = stage_corpus(
        {"a": sparse.vstack([matrix, matrix[[4]]], format="csr"), "b": counts(2, 9)}
    )

    def find_none(*_: object) -> np.ndarray:
        return np.zeros(0, np.uint64)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.corpus.build.repeated_in", find_none)
        finalize(folder)
    assert any("1 cells repeat others" in problem for problem in verify(folder)["problems"])
    finalize(folder)
    with np.load(folder / "gene_stats.npz") as stats:
        arrays = dict(stats)
    arrays["mean_expressed"][7] *= 1.001
    np.savez(folder / "gene_stats.npz", **arrays)
    seal(folder)
    assert verify(folder)["problems"] == [
        "gene_stats.npz: mean_expressed does not fit the training cells"
    ]


def links_of(report: dict) -> dict[str, tuple[bool, int]]:
    return {link["link"]: (link["checked"], link["files"]) for link in report["links"]}


def test_the_report_says_which_links_were_checked(corpus: Path) -> None:
    report = verify(corpus)
    unchecked = [link for link in report["links"] if not link["checked"]]
    assert [link["link"] for link in unchecked] == [SOURCES]
    assert "--sources N" in unchecked[0]["reason"]
    found = links_of(report)
    on_record = read_catalogue(corpus)["files"]
    assert found[FILES] == (True, len(on_record))
    assert found[SUMS] == (True, len(on_record) - 1 + 2)  # checksums.json; a shard of each stream
    assert found[LEDGER] == (True, 4)
    assert found[ORIGIN] == (True, 3)
    assert found[CHUNKS] == (True, 2)
    assert len(links_text(report["links"]).splitlines()) == len(report["links"])
    one = {"link": "a -> b", "checked": True, "files": 1, "reason": None}
    assert links_text([one]) == "  a -> b: checked, 1 file"
    shutil.rmtree(corpus / "staging")
    shutil.rmtree(corpus / "ledger")
    later = links_of(verify(corpus))
    gone = {STAGED, LEDGER, ORIGIN}
    assert {name for name in found if found[name] != later[name]} == {*gone, INPUTS}
    assert not any(later[name][0] for name in gone)


def test_links_behind_damage_are_not_called_checked(corpus: Path) -> None:
    (corpus / "corpus.json").write_bytes(b"{}")
    assert not any(link["checked"] for link in verify(corpus)["links"])
    found = links_of(verify(OLDEST))
    assert found[SUMS][0]
    assert not found[FILES][0]
    assert not found[CHUNKS][0]


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_every_version_is_verified(tmp_path: Path, version: int) -> None:
    shutil.copytree(GOLDEN / f"corpus_version_{version}", tmp_path / "corpus")
    (tmp_path / "corpus" / "expected.json").unlink()
    assert verify(tmp_path / "corpus")["problems"] == []
    change_table(tmp_path / "corpus", "source_row", "<i8", add_one)
    assert verify(tmp_path / "corpus")["problems"][0].startswith("cells.zarr/source_row")


@pytest.mark.parametrize("staged", [True, False])
def test_origin_behind_right_checksums(corpus: Path, staged: bool) -> None:
    """A cell that claims another row of its source: against staging, else against its dataset."""
    if not staged:
        shutil.rmtree(corpus / "staging")
    opened = Corpus(corpus)
    here = np.flatnonzero(np.asarray(opened.row_dataset) == 0)

    def move_one(values: np.ndarray) -> None:
        values[here[3]] = values[here[7]] if not staged else values[here[3]] - 1

    change_table(corpus, "source_row", "<i8", move_one)
    seal(corpus)
    problems = verify(corpus)["problems"]
    expected = "not as staged for cell" if staged else "impossible rows of dataset a"
    assert any(f"source_row: {expected}" in problem for problem in problems), problems


def test_counts_of_a_gene_that_was_not_measured(corpus: Path) -> None:
    measured = np.load(corpus / "measured_genes.npy")
    gene = int(Corpus(corpus).rows([0]).indices[0])
    dataset = int(Corpus(corpus).row_dataset[0])
    measured[dataset, gene // 8] &= ~np.uint8(1 << gene % 8)
    np.save(corpus / "measured_genes.npy", measured)
    seal(corpus)
    assert any("of a gene not measured" in problem for problem in verify(corpus)["problems"])
