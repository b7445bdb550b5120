"""Annotations of several datasets as columns of the corpus: value for value those of the tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import data_prep.corpus.build as build_module
from data_prep.annotations import columns as module
from data_prep.corpus.finalize import finalize
from data_prep.ledger.ledger import read_entry, staged_files, write_entry
from data_prep.verify.verify import verify
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.files.obs_table import read_obs, write_obs


def annotate(
    corpus: Path, dataset: str, columns: Mapping[str, Any], *, tissue: str = ""
) -> pd.DataFrame:
    """Give the staged cells of a dataset more annotations; return all of them."""
    folder = corpus / "staging" / dataset
    frame = read_obs(folder / "obs.parquet").assign(**columns)
    write_obs(folder / "obs.parquet", frame)
    entry = read_entry(corpus / "ledger" / f"{dataset}.json")
    write_entry(corpus, entry | {"files": staged_files(folder), "tissue": tissue})  # type: ignore[arg-type]
    return frame


@pytest.fixture
def annotated(stage_corpus: Any, counts: Any) -> Path:
    """Three datasets of 24 cells that name different things in different ways."""
    corpus = stage_corpus({name: counts(i, 24) for i, name in enumerate("abc")})
    some = ["", "T cell", "B cell"] * 8
    ids = ["", "CL:2", "CL:1"] * 8
    annotate(corpus, "a", {
        "cell_type": some, "cell_type_ontology_term_id": ids, "donor_id": ["7"] * 24,
        "is_primary_data": ["True", "False"] * 12, "tissue": ["lung", ""] * 12,
    }, tissue="from the manifest")  # fmt: skip
    annotate(corpus, "b", {
        "cell_type": some, "donor": [f"d{i % 2}" for i in range(24)],
        "age": [str(i % 5) for i in range(23)] + [""],
    }, tissue="liver")  # fmt: skip
    annotate(corpus, "c", {"note": [f"007{i}" for i in range(24)], "age": ["0.5"] * 24})
    return corpus


def test_columns_hold_what_the_tables_hold(annotated: Path) -> None:
    finalize(annotated, validation_fraction=0.3)
    corpus = Corpus(annotated)
    text = corpus.obs()
    assert {*corpus.columns} == {
        "dataset_id", "age", "cell_type", "cell_type_ontology_term_id", "donor", "donor_id",
        "is_primary_data", "note", "tissue",
    }  # fmt: skip
    for name in ("age", "cell_type", "cell_type_ontology_term_id", "is_primary_data", "note"):
        assert corpus.columns[name].texts().tolist() == text[name].tolist(), name
    donors = [a or b for a, b in zip(text["donor"], text["donor_id"], strict=True)]
    for name in ("donor", "donor_id"):
        assert corpus.columns[name].texts().tolist() == donors
    # Dataset a names its tissue, also where it is not known; b has that of the manifest, c none.
    of_b = np.where(text["dataset_id"] == "b", "liver", text["tissue"])
    assert corpus.columns["tissue"].texts().tolist() == of_b.tolist()
    kinds = {name: column.kind for name, column in corpus.columns.items()}
    assert (kinds["age"], kinds["is_primary_data"]) == ("number", "truth")
    assert (kinds["donor"], kinds["note"]) == ("text", "text")


def test_chosen_columns_of_chosen_cells_are_typed(annotated: Path) -> None:
    finalize(annotated, validation_fraction=0.3)
    corpus = Corpus(annotated)
    names = ["cell_type", "age", "is_primary_data", "dataset_id", "barcode"]
    rows = np.array([50, 3, 3, 17])
    found, text = corpus.obs(rows, columns=names), corpus.obs(rows)
    assert list(found.columns) == names
    assert found.index.tolist() == ["50", "3", "3", "17"]
    assert str(found["cell_type"].dtype) == "category"
    assert found["age"].dtype == np.float64
    assert found["cell_type"].astype(object).fillna("").tolist() == text["cell_type"].tolist()
    for name in ("dataset_id", "barcode"):
        assert found[name].astype(str).tolist() == text[name].tolist()
    assert corpus.obs(slice(5, 8), columns=["age"]).index.tolist() == ["5", "6", "7"]
    with pytest.raises(ValueError, match=r"no cell annotation 'celltype'.*cell_type"):
        corpus.obs(rows, columns=["celltype"])
    assert list(corpus.obs(rows, columns="cell_type")) == ["cell_type"]
    with pytest.raises(ValueError, match="columns: 'age' comes twice; give each column once"):
        corpus.obs(rows, columns=["age", "age"])
    with pytest.raises(IndexError, match="there are cells 0 to 71"):
        corpus.obs([72], columns=["age"])


def test_what_is_different_in_every_cell_is_no_column(
    annotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BITS", 3)
    numbers = [repr(i / 7) for i in range(23)] + [""]
    annotate(annotated, "b", {"score": numbers})
    catalogue = finalize(annotated, validation_fraction=0.3)
    corpus = Corpus(annotated)
    assert any("no columns of the corpus: note;" in text for text in catalogue["warnings"])
    assert "note" not in corpus.columns
    score = corpus.columns["score"]
    assert score.values is None
    assert score.texts().tolist() == corpus.obs()["score"].tolist()
    # They can be read all the same, also of cells whose dataset lacks them.
    assert corpus.obs(columns=["note"])["note"].tolist() == corpus.obs()["note"].tolist()
    of_a = np.flatnonzero(corpus.row_dataset == 0)[:3]
    assert corpus.obs(of_a, columns=["note"])["note"].tolist() == ["", "", ""]


@pytest.mark.thorough
def test_a_dataset_with_both_donor_columns_keeps_both(
    annotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotate(annotated, "a", {"donor": ["x", "y"] * 12})
    finalize(annotated, validation_fraction=0.3)
    corpus = Corpus(annotated)
    text = corpus.obs()
    for name, other in (("donor", "donor_id"), ("donor_id", "donor")):
        # Dataset b has `donor` alone.
        expected = [a or b for a, b in zip(text[name], text[other], strict=True)]
        assert corpus.columns[name].texts().tolist() == expected
    assert verify(annotated)["problems"] == []
    # As earlier versions wrote it: the name that a dataset lacks has no values.
    plan = module.plan_columns
    monkeypatch.setattr(build_module, "plan_columns", lambda tables: [
        p if p.also else replace(p, sources=(p.name,)) for p in plan(tables)
    ])  # fmt: skip
    shutil.rmtree(annotated / "columns")
    (annotated / "corpus.json").unlink()
    finalize(annotated, validation_fraction=0.3)
    corpus = Corpus(annotated)
    assert corpus.columns["donor_id"].texts().tolist() == text["donor_id"].tolist()
    assert verify(annotated)["problems"] == []


def test_verify_finds_a_wrong_code(annotated: Path) -> None:
    finalize(annotated, validation_fraction=0.3)
    report = verify(annotated)
    assert report["ok"], report["problems"]
    link = next(link for link in report["links"] if link["link"].startswith("columns"))
    assert (link["checked"], link["files"]) == (True, 7)
    for number in range(6):
        path = annotated / "columns" / f"{number:04d}.codes"
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        problems = verify(annotated)["problems"]
        assert any(f"columns/{number:04d}.codes: damaged" in problem for problem in problems)
        path.write_bytes(content)


def test_numbers_are_those_that_are_written_in_the_usual_way() -> None:
    for text in ("7", "-3", "0.5", "1e-05", "1e+22"):
        assert module._is_number(text), text
    for text in ("007", "1_000", "nan", "inf", " 7", "7.50", "1e400", "x", "+1"):
        assert not module._is_number(text), text
