"""One staged dataset: its cells are those of the source, what is lost is counted by reason.

Covers also `data_prep/counts/side_by_side.py`.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse
from staged_h5ad import (
    GENES,
    N_CELLS,
    N_GENES,
    SETTINGS,
    counts,
    obs_of,
    run,
    staged,
    write,
)

from data_prep.convert.convert import prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.genes.gene_names import GeneResolver, resolver_of
from data_prep.ledger.ledger import origin_of, read_ledger
from data_prep.manifest.manifest import Dataset, read_manifest
from data_prep.staging.settings import Settings

DEMO = Path(__file__).parents[3] / "data_prep" / "resources" / "demo"


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return resolver_of(GENES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    prepare_corpus(tmp_path / "corpus", genes=GENES, settings=SETTINGS)
    return tmp_path / "corpus"


def test_staged_cells_are_the_source_cells(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    matrix = counts()
    matrix[4] = 0
    matrix[7, 3] = 3_000_000_000
    donors = [f"d{i % 3}" for i in range(N_CELLS)]
    dataset = write(tmp_path / "a.h5ad", matrix, donor_id=donors, other=["x"] * N_CELLS)
    entry = run(dataset, corpus, resolver)
    assert entry["status"] == "ok"
    assert entry["n_cells"] == N_CELLS - 1
    assert entry["dropped_cells"] == {"without counts": 1}
    kept = [i for i in range(N_CELLS) if i != 4]
    cells = staged(corpus, "a")
    np.testing.assert_array_equal(cells.rows(range(len(kept))).toarray()[:, :N_GENES], matrix[kept])
    np.testing.assert_array_equal(cells.table("source_row"), kept)
    obs = obs_of(corpus, "a")
    assert obs.columns.tolist() == ["barcode", "donor_id"]
    assert obs["barcode"].tolist() == [f"cell{i}" for i in kept]
    assert obs["donor_id"].tolist() == [donors[i] for i in kept]
    assert read_ledger(corpus) == [entry]


def test_the_ledger_says_what_was_lost(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    matrix = counts()
    adata = anndata.AnnData(sparse.csr_matrix(np.hstack([matrix, matrix[:, :2] + 1])))
    adata.var_names = [*GENES.symbols[:N_GENES], "NOGENE1", "NOGENE2"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    entry = run(Dataset(dataset_id="a", path=tmp_path / "a.h5ad"), corpus, resolver)
    lost = (matrix[:, :2] + 1).sum(axis=0)
    assert entry["largest_losses"] == {"NOGENE1": lost[0], "NOGENE2": lost[1]}
    assert entry["counts_input"] == matrix.sum() + lost.sum()
    assert entry["counts_kept"] == pytest.approx(matrix.sum() / (matrix.sum() + lost.sum()))
    assert (entry["n_genes_input"], entry["n_genes_mapped"]) == (N_GENES + 2, N_GENES)


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (lambda matrix: np.log1p(matrix / matrix.sum(axis=1, keepdims=True)), "excluded", "log"),
        (lambda matrix: matrix - 1, "failed", "negative"),
        (lambda matrix: np.where(matrix == 1, np.nan, matrix), "failed", "NaN"),
        (lambda matrix: matrix * 0, "failed", "holds no counts"),
        (lambda matrix: matrix[:0], "failed", "0 cells"),
        (lambda matrix: matrix + (matrix > 0) * 2**32, "failed", "below 2^32"),
    ],
)
def test_unusable_values(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, change: object, status: str, reason: str
) -> None:
    entry = run(write(tmp_path / "a.h5ad", change(counts() * 1.0)), corpus, resolver)
    assert entry["status"] == status
    assert reason in entry["reason"]
    assert not (corpus / "staging" / "a").exists()


def test_another_organism_is_excluded(tmp_path: Path, corpus: Path, resolver: GeneResolver) -> None:
    path = write(tmp_path / "a.h5ad", counts()).path
    entry = run(Dataset(dataset_id="a", path=path, organism="mouse"), corpus, resolver)
    assert (entry["status"], entry["reason"][:32]) == (
        "excluded",
        "the manifest states organism mou",
    )


def test_the_donor_column_is_kept_as_donor(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    people = [f"p{i % 2}" for i in range(N_CELLS)]
    path = write(tmp_path / "a.h5ad", counts(), patient=people, sex=["f"] * N_CELLS).path
    entry = run(Dataset(dataset_id="a", path=path, donor_column="patient"), corpus, resolver)
    assert entry["obs_columns"] == ["sex", "donor"]
    assert obs_of(corpus, "a")["donor"].tolist() == people
    entry = run(Dataset(dataset_id="a", path=path, obs_columns="colour"), corpus, resolver)
    assert entry["status"] == "failed"
    assert "no cell annotation 'colour'; the file has patient, sex" in entry["reason"]


def test_cells_below_the_thresholds_are_dropped_by_reason(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    matrix = np.zeros((4, N_GENES), dtype=np.int64)
    matrix[1, :2], matrix[2, :5], matrix[3, :5] = 50, 1, 10
    settings = Settings(genes_hash=GENES.hash, min_genes=3, min_counts=6)
    prepare_corpus(tmp_path / "c", genes=GENES, settings=settings)
    dataset = write(tmp_path / "a.h5ad", matrix)
    entry = convert_dataset(dataset, corpus=tmp_path / "c", settings=settings, resolver=resolver)
    expected = {"without counts": 1, "below min_genes": 1, "below min_counts": 1}
    assert entry["dropped_cells"] == expected
    assert staged(tmp_path / "c", "a").table("source_row").tolist() == [3]
    dataset = write(tmp_path / "b.h5ad", matrix[:3])
    entry = convert_dataset(dataset, corpus=tmp_path / "c", settings=settings, resolver=resolver)
    assert entry["status"] == "excluded"
    assert "no cell is left" in entry["reason"]


def test_deep_and_dying_cells_are_dropped_by_reason(tmp_path: Path, resolver: GeneResolver) -> None:
    """The mitochondrial share counts genes that the vocabulary does not list (MT-RNR2)."""
    matrix = np.zeros((5, N_GENES), dtype=np.int64)
    matrix[:, :10] = 2
    matrix[1, 0] = 500
    mito = np.array([[0], [0], [5], [4], [30]])
    adata = anndata.AnnData(sparse.csr_matrix(np.hstack([matrix, mito])))
    adata.var_names = [*GENES.symbols[:N_GENES], "MT-RNR2"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    settings = Settings(genes_hash=GENES.hash, max_counts=100, max_mito_fraction=0.2)
    prepare_corpus(tmp_path / "c", genes=GENES, settings=settings)
    dataset = Dataset(dataset_id="a", path=tmp_path / "a.h5ad")
    entry = convert_dataset(dataset, corpus=tmp_path / "c", settings=settings, resolver=resolver)
    # 5 of 25 is the limit itself; 30 of 50 is above it.
    assert entry["dropped_cells"] == {"above max_counts": 1, "above max_mito_fraction": 1}
    assert entry["n_genes_mito"] == 1
    assert staged(tmp_path / "c", "a").table("source_row").tolist() == [0, 2, 3]


def test_datasets_that_lose_most_counts_are_excluded(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    matrix = counts()
    lost = 1000 * np.arange(1, N_CELLS + 1)[:, None]
    adata = anndata.AnnData(sparse.csr_matrix(np.hstack([matrix, lost])))
    adata.var_names = [*GENES.symbols[:N_GENES], "NOGENE"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    entry = run(Dataset(dataset_id="a", path=tmp_path / "a.h5ad"), corpus, resolver)
    assert entry["status"] == "excluded"
    assert (
        "of the counts fall on genes of the vocabulary (most are lost with NOGENE)"
        in (entry["reason"])
    )
    assert entry["largest_losses"] == {"NOGENE": lost.sum()}


def test_log1p_values_are_restored_where_the_manifest_asks_for_it(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    """One cell in 200 is not proven and dropped; one in 20 is too much."""
    matrix = np.random.default_rng(3).poisson(0.5, (200, N_GENES)).astype(np.int64)
    matrix[7] = np.where(matrix[7], 2 * matrix[7] + 1, 0)
    values = np.log1p(1e4 * matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
    dataset = write(tmp_path / "a.h5ad", values)
    assert run(dataset, corpus, resolver)["status"] == "excluded"
    inverted = dataclasses.replace(dataset, counts="invert_log1p")
    entry = run(inverted, corpus, resolver)
    assert (entry["status"], entry["dropped_cells"]) == ("ok", {"counts not proven": 1})
    assert entry["restored"].startswith("log1p of cells scaled to 10000, undone")
    np.testing.assert_array_equal(
        staged(corpus, "a").rows(range(199)).toarray()[:, :N_GENES], np.delete(matrix, 7, axis=0)
    )
    write(tmp_path / "a.h5ad", values[:20])
    entry = run(inverted, corpus, resolver)
    assert entry["status"] == "excluded"
    assert "the counts of 1 of 20 cells of X cannot be restored" in entry["reason"]


def test_columns_of_one_gene_are_summed_and_counted(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    matrix = counts()
    adata = anndata.AnnData(sparse.csr_matrix(np.hstack([matrix, matrix[:, :2]])))
    adata.var_names = [*GENES.symbols[:N_GENES], *GENES.ids[:2]]
    adata.write_h5ad(tmp_path / "a.h5ad")
    entry = run(Dataset(dataset_id="a", path=tmp_path / "a.h5ad"), corpus, resolver)
    assert entry["n_genes_summed"] == 4
    assert entry["gene_names"]["symbol"] == N_GENES
    assert entry["gene_names"]["ensembl"] == 2
    matrix[:, :2] *= 2
    np.testing.assert_array_equal(
        staged(corpus, "a").rows(range(N_CELLS)).toarray()[:, :N_GENES], matrix
    )


def test_cells_keep_what_the_manifest_names(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    path = write(tmp_path / "a.h5ad", counts(), kit=["v3"] * N_CELLS, label=["T"] * N_CELLS).path
    dataset = Dataset(dataset_id="a", path=path, assay_column="kit", cell_type_column="label")
    assert run(dataset, corpus, resolver)["obs_columns"] == ["assay", "cell_type"]
    assert obs_of(corpus, "a")["cell_type"].tolist() == ["T"] * N_CELLS
    missing = dataclasses.replace(dataset, sample_column="lane")
    assert "no cell annotation 'lane'" in run(missing, corpus, resolver)["reason"]


def test_a_dataset_that_is_not_used_counts_no_cells(
    tmp_path: Path, corpus: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = counts()
    matrix[4] = 0

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("data_prep.staging.dataset.write_obs", full)
    entry = run(write(tmp_path / "a.h5ad", matrix), corpus, resolver)
    assert (entry["status"], entry["reason"]) == ("failed", "disk full")
    assert (entry["n_cells"], entry["dropped_cells"], entry["n_cells_input"]) == (0, {}, N_CELLS)


def test_left_over_temporary_folders_are_removed(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    (corpus / "staging" / ".a~" / "cells.zarr").mkdir(parents=True)
    (corpus / "staging" / ".ab~").mkdir()
    run(write(tmp_path / "a.h5ad", counts()), corpus, resolver)
    assert sorted(path.name for path in (corpus / "staging").iterdir()) == [".ab~", "a"]


@pytest.mark.thorough
def test_demo_cells_of_three_formats_cover_the_same_genes(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    entries = {}
    for dataset in read_manifest(DEMO / "manifest.tsv"):
        entries[dataset.dataset_id] = run(dataset, corpus, resolver)
    sizes = {name: (entry["status"], entry["n_cells"]) for name, entry in entries.items()}
    assert sizes == {
        "immune_a": ("ok", 240),
        "immune_b": ("ok", 126),
        "immune_c": ("ok", 64),
        "immune_broken": ("failed", 0),
    }
    assert [entries[f"immune_{part}"]["format"] for part in "abc"] == ["h5ad", "10x_h5", "csv"]
    assert {entries[f"immune_{part}"]["n_genes_mapped"] for part in "abc"} == {23291}
    # The one file they were split from gives 773,641 non-zero counts. immune_b names 21 genes by
    # their id that the others name by two aliases; there the second alias yields, 16 values in all.
    assert sum(staged(corpus, f"immune_{part}").n_values for part in "abc") == 773_879
    assert list(obs_of(corpus, "immune_b").columns) == ["barcode"]
    assert json.loads((corpus / "settings.json").read_text())["genes_hash"] == GENES.hash


def test_what_the_file_states_of_its_source_is_recorded(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    cells = anndata.read_h5ad(dataset.path)
    cells.uns = {"title": "A title", "citation": "from ftp://me:5ec4e7@x.org/a", "doi": [1, 2]}
    cells.write_h5ad(dataset.path)
    entry = run(dataset, corpus, resolver)
    assert entry["about"] == {"title": "A title", "citation": "from ftp://x.org/a"}
    # Another line of the manifest for the same file: nothing is staged again.
    files = entry["files"]
    entry = run(dataclasses.replace(dataset, title="Mine", licence="CC0"), corpus, resolver)
    assert (entry["origin"], entry["files"]) == ({"title": "Mine", "licence": "CC0"}, files)
    assert read_ledger(corpus) == [entry]
    assert origin_of(entry)["title"] == "Mine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the versions of zarr
        cells.write_zarr(tmp_path / "a.zarr")
    again = run(Dataset(dataset_id="z", path=tmp_path / "a.zarr"), corpus, resolver)
    assert again["about"] == entry["about"]
