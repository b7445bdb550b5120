"""Finalize: nothing lost, no duplicates, honest splits, uniform order, never half done.

Covers also `data_prep/corpus/publish.py`, `data_prep/corpus/build.py`,
`data_prep/corpus/job.py`, `data_prep/corpus/seal.py` and `data_prep/corpus/staged.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from cell_values import as_tuples
from scipy import sparse

import data_prep.corpus.build as build_module
import data_prep.corpus.near.kept_cells as near_module
import data_prep.corpus.publish as publish_module
import data_prep.corpus.seal as seal_module
from data_prep.corpus.finalize import finalize
from data_prep.ledger.ledger import read_entry, write_entry
from data_prep.ledger.pending import record_manifest
from data_prep.verify.verify import verify
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


def digests(corpus: Path) -> dict[str, str]:
    """SHA-256 of every finished file."""
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(corpus.rglob("*"))
        if path.is_file() and not path.relative_to(corpus).parts[0].startswith(".finalize-")
    }


def test_every_cell_is_there_once_with_its_origin(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three, not_ok={"d": "failed", "e": "excluded"})
    result = finalize(folder, seed=3)
    corpus = Corpus(folder)
    assert len(corpus) == result["n_cells"] == 430
    found = corpus.rows(range(430))
    names = [info.dataset_id for info in corpus.datasets]
    assert names == ["a", "b", "c"]
    for row in range(430):
        staged = (corpus.row_source[row] - 1) // 2
        expected = three[names[corpus.row_dataset[row]]][staged]
        assert as_tuples(found[row]) == as_tuples(expected)
    assert Counter(as_tuples(found)) == Counter(
        cell for matrix in three.values() for cell in as_tuples(matrix)
    )
    assert [entry["dataset_id"] for entry in result["unused"]] == ["d", "e"]
    assert result["unused"][0]["reason"] == "some reason"
    message = "2 of 5 datasets are left out (1 excluded, 1 failed)"
    assert any(message in warning for warning in result["warnings"])
    np.testing.assert_array_equal(corpus.row_total, np.asarray(found.sum(axis=1)).ravel())
    np.testing.assert_array_equal(corpus.row_nnz, np.diff(found.indptr))


@pytest.mark.thorough
def test_same_input_same_bytes(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stage_corpus(three, name="x"), stage_corpus(three, name="y")
    finalize(first, seed=5)
    # Memory limits decide how the work is cut, not what comes out, except last bits of means.
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "LEAST_BYTES", 3_000)
        patch.setattr("data_prep.passes.permute.BLOCK_ENTRIES", 500)
        finalize(second, seed=5)
    one, other = Corpus(first), Corpus(second)
    assert one.hash == other.hash
    for name, values in vars(one.gene_stats).items():
        np.testing.assert_allclose(getattr(other.gene_stats, name), values, rtol=1e-12)
    finalize(second, seed=5)
    assert digests(first) == digests(second)
    before = Corpus(first)
    order = as_tuples(before.rows(range(430)))
    finalize(first, seed=6)
    after = Corpus(first)
    assert after.hash != before.hash
    assert as_tuples(after.rows(range(430))) != order
    finalize(first, seed=5)
    assert digests(first) == digests(second)


def test_anndata_has_the_annotation_of_each_cell(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    donors = {"a": [f"p{row}" for row in range(240)]}
    three["a"] = sparse.vstack([three["a"][:239], three["a"][[0]]], format="csr")
    folder = stage_corpus(three, donors=donors)
    finalize(folder, split_by="dataset")
    corpus = Corpus(folder)
    wanted = np.random.default_rng(0).permutation(len(corpus))[:50]
    adata = corpus.to_anndata(wanted)
    assert adata.shape == (50, 600)
    assert as_tuples(adata.X) == as_tuples(corpus.rows(wanted))
    assert list(adata.var_names) == list(corpus.genes.ids)
    for row, (_, obs) in zip(wanted, adata.obs.iterrows(), strict=True):
        dataset = corpus.datasets[corpus.row_dataset[row]].dataset_id
        staged = (corpus.row_source[row] - 1) // 2
        assert (obs["dataset_id"], obs["barcode"]) == (dataset, f"{dataset}-{staged}")
        assert obs["donor"] == (f"p{staged}" if dataset == "a" else "")
    assert corpus.to_anndata([]).shape == (0, 600)
    here = wanted[corpus.row_dataset[wanted] == 1]
    corpus.to_anndata(here).write_h5ad(folder / "b.h5ad")
    measured = anndata.read_h5ad(folder / "b.h5ad").varm["measured"]
    assert list(measured.columns) == [corpus.datasets[1].dataset_id]
    assert measured.to_numpy().ravel().tolist() == corpus.measured_genes[1].tolist()
    assert list(corpus.to_anndata(wanted).varm["measured"].columns) == list("abc")


def test_folders_that_cannot_be_finalized(
    stage_corpus: Stage, counts: Counts, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="data_prep convert"):
        finalize(tmp_path / "absent")
    folder = stage_corpus({}, not_ok={"a": "failed", "b": "excluded"})
    with pytest.raises(ValueError, match=r"no usable dataset .*1 excluded, 1 failed.* status"):
        finalize(folder)
    folder = stage_corpus({"a": counts(1, 20)}, name="other")
    obs = folder / "staging" / "a" / "obs.parquet"
    obs.rename(obs.with_name("hidden"))
    with pytest.raises(ValueError, match=r"obs.parquet: missing; convert the dataset again"):
        finalize(folder)
    obs.with_name("hidden").rename(obs)
    (folder / "settings.json").write_text(json.dumps({"genes_hash": "0" * 64}))
    with pytest.raises(ValueError, match=r"restore genes\.tsv"):
        finalize(folder)
    os.rename(folder / "staging" / "a", folder / "staging" / "moved")
    (folder / "settings.json").unlink()
    with pytest.raises(FileNotFoundError, match="data_prep convert"):
        finalize(folder)


def test_datasets_that_were_never_converted_are_an_error(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three, not_ok={"d": "failed"})
    record_manifest(folder, list("abcdefghij"), tasks=4)
    message = (
        r"6 of 10 datasets not converted yet \(e, f, g, ...\): run convert again "
        r"\(task 0, 1, 2, 3 of 4; .* --allow-missing"
    )
    with pytest.raises(ValueError, match=message):
        finalize(folder)
    assert not (folder / "corpus.json").exists()
    result = finalize(folder, allow_missing=True)
    assert result["n_cells"] == 430
    statuses = [(entry["dataset_id"], entry["status"]) for entry in result["unused"]]
    assert statuses == [("d", "failed"), *((name, "pending") for name in "efghij")]
    assert "7 of 10 datasets are left out (1 failed, 6 pending)" in result["warnings"][-1]


def test_warnings_of_datasets_are_counted_and_named(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage_corpus(three)
    finalize(folder)
    assert "warnings about" not in caplog.text
    for name, warnings in {"a": ["few genes", "dates"], "c": ["few genes"]}.items():
        entry = read_entry(folder / "ledger" / f"{name}.json")
        write_entry(folder, entry | {"warnings": warnings})  # type: ignore[arg-type]
    finalize(folder)
    assert "3 warnings about 2 of the 3 datasets used: a (2), c (1); see: python -m" in caplog.text


def test_citations_come_with_the_corpus(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    entry = read_entry(folder / "ledger" / "a.json")
    entry["about"] = {"title": "of the file", "licence": "CC0"}
    entry["origin"] = {"title": "Of the manifest", "doi": "10.1234/x"}
    write_entry(folder, entry)
    finalize(folder)
    origin = Corpus(folder).datasets[0].origin
    assert origin == {"title": "Of the manifest", "doi": "10.1234/x", "licence": "CC0"}
    text = (folder / "CITATIONS.md").read_text()
    assert "| a | Of the manifest | CC0 |" in text
    assert "- b (" in text
    assert "CITATIONS.md" in Corpus(folder).catalogue["files"]
    assert verify(folder)["ok"]
    (folder / "CITATIONS.md").write_text(text + "mine\n")
    assert any("CITATIONS.md" in problem for problem in verify(folder)["problems"])


N_PRODUCTS = len(publish_module.PRODUCTS)


@pytest.mark.thorough
@pytest.mark.parametrize("crash_at", range(N_PRODUCTS + 1))
def test_killed_finalize_leaves_the_old_corpus_or_none(
    stage_corpus: Stage,
    three: dict[str, sparse.csr_matrix],
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int,
) -> None:
    """The process stops at the n-th move of a product; nothing after it runs, not even clean-up."""
    folder = stage_corpus(three)
    finalize(folder, seed=1)
    old = Corpus(folder).hash
    moves = 0
    real = {name: getattr(os, name) for name in ("rename", "replace")}

    class Killed(BaseException):
        pass

    def stop_at_move(name: str) -> Callable[..., None]:
        def move(source: str, target: str) -> None:
            nonlocal moves
            if str(folder / ".finalize-") in str(source) and Path(target).parent in (
                folder,
                Path(),
            ):
                if moves == crash_at:
                    raise Killed
                moves += 1
            real[name](source, target)

        return move

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(publish_module.os, name, stop_at_move(name))
        # The last move is that of the work folder, once the corpus is complete.
        with pytest.raises(Killed):
            finalize(folder, seed=2)
    if crash_at < N_PRODUCTS:
        with pytest.raises(FileNotFoundError, match="not finalized"):
            Corpus(folder)
    else:
        assert Corpus(folder).hash != old
    again = folder.with_name("again")
    shutil.copytree(folder, again)
    for seed, corpus in ((1, folder), (2, again)):
        finalize(corpus, seed=seed)
        assert (Corpus(corpus).hash == old) == (seed == 1)
        assert not list(corpus.glob(".finalize*"))


def test_failure_before_publishing_keeps_the_old_corpus(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stage_corpus(three)
    finalize(folder, seed=1)
    before = digests(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage is done again")

    steps = [
        (build_module, "digest_cells"), (near_module, "_write_near"),
        (build_module, "write_unit"), (build_module, "column_of"),
    ]  # fmt: skip
    for module, step in (*steps, (seal_module, "sync_tree")):
        with monkeypatch.context() as patch:
            patch.setattr(module, step, fail)
            with pytest.raises(OSError, match="disk full"):
                finalize(folder, seed=2)
        assert digests(folder) == before
    with monkeypatch.context() as patch:
        # None of the stages that were finished is done again.
        for module, step in steps:
            patch.setattr(module, step, not_again)
        patch.setattr(seal_module, "sync_tree", fail)
        with pytest.raises(OSError, match="disk full"):
            finalize(folder, seed=2)
    # What is of no use of them is.
    (path,) = folder.glob(".finalize-*/gene_stats.npz")
    path.write_bytes(path.read_bytes()[:-100])
    # What the failed runs have made is taken up, and gives what one run gives.
    assert len(list(folder.glob(".finalize-*"))) == 1
    hash_after = finalize(folder, seed=2)["hash"]
    finalize(folder, seed=1)
    assert digests(folder) == before
    assert finalize(folder, seed=2)["hash"] == hash_after


def test_changed_staging_is_not_mixed_with_old_work(
    stage_corpus: Stage,
    three: dict[str, sparse.csr_matrix],
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = stage_corpus(three)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(seal_module, "sync_tree", fail)
        with pytest.raises(OSError, match="disk full"):
            finalize(folder)
    three["b"] = counts(9, 126)
    renewed = stage_corpus(three, name="renewed")
    for name in ("staging", "ledger"):
        shutil.rmtree(folder / name)
        shutil.copytree(renewed / name, folder / name)
    assert finalize(folder)["hash"] == finalize(renewed)["hash"]


def test_two_at_a_time_are_refused(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    refused = []

    def second(stage: str, done: int, total: int) -> None:
        if not refused:
            refused.append(stage)
            with pytest.raises(ValueError, match="another finalize is at work here, or a convert"):
                finalize(folder, seed=2)

    finalize(folder, seed=1, progress=second)
    assert refused == ["check"]
    assert Corpus(folder).catalogue["options"]["seed"] == 1


def test_progress_reaches_the_end_of_every_stage(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    last: dict[str, tuple[int, int]] = {}

    def record(stage: str, done: int, total: int) -> None:
        assert last.get(stage, (0, total))[0] <= done <= total
        last[stage] = (done, total)

    finalize(stage_corpus(three), progress=record)
    assert list(last) == [stage for stage in build_module.STAGES if stage != "publish"]
    assert all(done == total for done, total in last.values())
