"""Cells left out for their annotations: counted by condition, said, found again from the source."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.__main__ import main
from data_prep.convert import command
from data_prep.convert.convert import prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.corpus.finalize import finalize
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry
from data_prep.manifest.manifest import Dataset
from data_prep.staging.settings import Settings
from data_prep.verify.sources import check_sources
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary

_BUNDLED = GeneVocabulary.bundled()
GENES = GeneVocabulary(_BUNDLED.ids[:80], _BUNDLED.symbols[:80], _BUNDLED.classes[:80])
RESOLVER = GeneResolver(GENES)
SETTINGS = Settings(genes_hash=GENES.hash, min_genes=1, min_genes_mapped=1)
KINDS = ["cell", "nucleus", "na"]
N_CELLS = 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 cells: every third one of each suspension type, the last ten not primary."""
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, 80))
    obs = pd.DataFrame(
        {
            "suspension_type": pd.Categorical([KINDS[i % 3] for i in range(N_CELLS)]),
            "is_primary_data": np.arange(N_CELLS) < 20,
            "cell_type_ontology_term_id": "CL:0000084",
        },
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=list(GENES.ids))
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


def run(source: Path, where: str = "") -> LedgerEntry:
    corpus = source.parent / "corpus"
    prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    dataset = Dataset(dataset_id="a", path=source, where=where)
    return convert_dataset(dataset, corpus=corpus, settings=SETTINGS, resolver=RESOLVER)


def rows(source: Path) -> list[int]:
    store = CellStore(source.parent / "corpus" / "staging" / "a" / "cells.zarr")
    return store.table("source_row").tolist()


def test_cells_that_are_not_primary_are_left_out_and_it_is_said(source: Path) -> None:
    entry = run(source)
    assert rows(source) == list(range(20))
    assert entry["dropped_cells"] == {"not where is_primary_data!=False": 10}
    (said,) = [text for text in entry["warnings"] if "primary" in text]
    assert said.startswith("10 of 30 cells are not primary data")
    assert "where is_primary_data=True|False keeps them" in said
    assert {"suspension_type", "is_primary_data", "cell_type_ontology_term_id"} <= set(
        entry["obs_columns"]
    )
    entry = run(source, "is_primary_data=True|False")
    assert (entry["n_cells"], entry["dropped_cells"]) == (30, {})
    assert not [text for text in entry["warnings"] if "primary" in text]


@pytest.mark.thorough
def test_conditions_are_counted_and_cells_found_again(source: Path) -> None:
    entry = run(source, "suspension_type!=nucleus; is_primary_data=false")
    expected = [i for i in range(20, N_CELLS) if i % 3 != 1]
    assert rows(source) == expected
    assert entry["dropped_cells"] == {
        "not where suspension_type!=nucleus": 10,
        "not where is_primary_data=false": N_CELLS - 10 - len(expected),
    }
    corpus = source.parent / "corpus"
    finalize(corpus, split_by="cell", validation_fraction=0)
    found = check_sources(Corpus(corpus), N_CELLS)
    assert found.problems == []
    assert found.dropped > 0


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [float, int, str, object])
def test_truths_of_other_types_are_truths(source: Path, kind: type) -> None:
    adata = anndata.read_h5ad(source)
    primary = adata.obs["is_primary_data"]
    adata.obs["is_primary_data"] = (
        primary.map({True: "T", False: "F"}) if kind is object else (primary.astype(kind))
    )
    adata.obs["doublet"] = primary.astype(float)
    adata.write_h5ad(source)
    assert run(source)["dropped_cells"] == {"not where is_primary_data!=False": 10}
    assert rows(source) == list(range(20))
    run(source, "is_primary_data=False")
    assert rows(source) == list(range(20, N_CELLS))
    entry = run(source, "doublet!=1; is_primary_data=True|False")
    assert entry["dropped_cells"] == {"not where doublet!=1": 20}
    finalize(source.parent / "corpus", split_by="cell", validation_fraction=0)
    assert check_sources(Corpus(source.parent / "corpus"), N_CELLS).problems == []


def test_values_that_do_not_occur_or_are_no_truths_are_said(source: Path) -> None:
    entry = run(source, "suspension_type!=nuclei|na")
    assert entry["notes"] == {
        "where suspension_type!=nuclei|na": "no cell has 'nuclei'; suspension_type holds 'cell', "
        "'na', 'nucleus'"
    }
    adata = anndata.read_h5ad(source)
    adata.obs["is_primary_data"] = ["True"] * 20 + ["False"] * 5 + ["no"] * 5
    adata.write_h5ad(source)
    entry = run(source)
    assert entry["n_cells"] == 25
    text = "is_primary_data holds 'False', 'True', 'no': not all are True or False"
    assert [said for said in entry["warnings"] if said.startswith(text)]
    assert entry["notes"] == {"where is_primary_data!=False": text}


@pytest.mark.thorough
def test_a_cell_lost_beside_conditions_is_found(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.staging import dataset as staging

    right = staging.unwanted_cells

    def wrong(obs: object, where: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        found, notes = right(obs, where)  # type: ignore[arg-type]
        mask = next(iter(found.values()))
        mask[3], mask[25] = True, False
        return found, notes

    monkeypatch.setattr(staging, "unwanted_cells", wrong)
    run(source)
    corpus = source.parent / "corpus"
    finalize(corpus, split_by="cell", validation_fraction=0)
    problems = check_sources(Corpus(corpus), 10_000).problems
    there = "a: row 25 of the source is there, though it is not where is_primary_data!=False"
    assert there in problems


def test_a_condition_that_cannot_be_asked_fails_the_dataset(source: Path) -> None:
    entry = run(source, "tissue=blood")
    assert entry["status"] == "failed"
    assert "where 'tissue=blood': there are 0 cell annotations 'tissue'" in entry["reason"]
    entry = run(source, "suspension_type=tissue")
    assert entry["status"] == "excluded"
    assert "no cell is left: 30 not where suspension_type=tissue" in entry["reason"]


def test_the_option_is_for_datasets_whose_line_says_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Dataset] = []

    def convert(datasets: tuple[Dataset, ...], **options: object) -> list[LedgerEntry]:
        taken.extend(datasets)
        return []

    monkeypatch.setattr(command, "convert", convert)
    manifest = source.parent / "m.tsv"
    manifest.write_text("dataset_id\tpath\twhere\na\ta.h5ad\t\nb\ta.h5ad\tsex=female\n")
    line = ["convert", str(manifest), "--out", str(source.parent / "corpus"), "--where"]
    assert main([*line, "sex=male"]) == 0
    assert [dataset.where for dataset in taken] == ["sex=male", "sex=female"]
    with pytest.raises(SystemExit):
        main([*line, "sex"])
    assert "where 'sex': not a condition" in capsys.readouterr().err
    manifest.write_text("dataset_id\tpath\twhere\na\ta.h5ad\tsex<3\n")
    assert main(line[:-1]) == 1
    assert "line 2: where 'sex<3': not a condition" in capsys.readouterr().err


def test_a_folder_of_the_staging_before_goes_on(source: Path) -> None:
    run(source)
    path = source.parent / "corpus" / "settings.json"
    now = path.read_text()
    path.write_text(json.dumps(json.loads(now) | {"staging_version": 2}))
    prepare_corpus(path.parent, genes=GENES, settings=SETTINGS)
    assert path.read_text() == now
    for change in ({"genes_sha256": "0" * 64}, {"min_counts": 7}):
        path.write_text(json.dumps(json.loads(now) | {"staging_version": 2} | change))
        with pytest.raises(ValueError, match=f"begun with other settings .{next(iter(change))}"):
            prepare_corpus(path.parent, genes=GENES, settings=SETTINGS)
