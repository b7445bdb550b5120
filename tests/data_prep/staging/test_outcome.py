"""The verdict on a dataset: unfiltered barcodes, thresholds of cells, rounding, health."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.convert.convert import prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry
from data_prep.manifest.manifest import Dataset
from data_prep.staging.settings import Settings
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()
N_GENES = 2500
RNG = np.random.default_rng(12)
RATES = RNG.gamma(0.3, 1.0, N_GENES)
CELLS = RNG.poisson(2 * RATES, (40, N_GENES))
BARCODES = RNG.poisson(0.02 * RATES, (400, N_GENES))
"""Ambient counts: about 15 a barcode, where a cell has 1,500."""


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return GeneResolver(GENES)


def converted(
    folder: Path,
    values: np.ndarray,
    resolver: GeneResolver,
    *,
    name: str = "cells",
    settings: dict[str, int] | None = None,
    **options: object,
) -> LedgerEntry:
    """Convert a matrix with the given settings of the corpus and options of the manifest."""
    var = pd.DataFrame(index=list(GENES.ids[: values.shape[1]]))
    path = folder / f"{name}.h5ad"
    path.parent.mkdir(exist_ok=True)
    anndata.AnnData(sparse.csr_matrix(values.astype(np.float32)), var=var).write_h5ad(path)
    found = Settings(genes_hash=GENES.hash, **(settings or {}))
    corpus = folder / "-".join(["corpus", *map(str, (settings or {}).values())])
    prepare_corpus(corpus, genes=GENES, settings=found)
    dataset = Dataset(dataset_id=name, path=path, **options)
    return convert_dataset(dataset, corpus=corpus, settings=found, resolver=resolver)


@pytest.mark.thorough
def test_unfiltered_barcodes_are_excluded_unless_the_user_says_what_a_cell_is(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    values = np.vstack([BARCODES[:200], CELLS, BARCODES[200:]])
    entry = converted(tmp_path, values, resolver)
    assert entry["status"] == "excluded"
    assert "400 of 440 columns have fewer than 100 counts" in entry["reason"]
    assert "filtered_feature_bc_matrix" in entry["reason"]
    for settings, options in (
        ({"min_genes": 100}, {}),
        ({"min_counts": 200}, {}),
        ({}, {"min_genes": 100}),
        ({}, {"min_counts": 200}),
    ):
        entry = converted(tmp_path, values, resolver, settings=settings, **options)
        assert (entry["status"], entry["n_cells"]) == ("ok", 40)
        assert sum(entry["dropped_cells"].values()) == 400
        assert "an unfiltered matrix); 40 were kept" in entry["warnings"][0]
    everything = converted(tmp_path, values, resolver, min_genes=1)
    assert everything["n_cells"] + everything["dropped_cells"].get("without counts", 0) == 440


def test_a_name_that_says_raw_needs_less_to_be_unfiltered(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    values = np.vstack([CELLS, BARCODES[:25]])
    assert converted(tmp_path, values, resolver)["status"] == "ok"
    entry = converted(tmp_path, values, resolver, name="raw_feature_bc_matrix")
    assert entry["status"] == "excluded"
    assert "25 of 65 columns" in entry["reason"]


@pytest.mark.thorough
def test_the_default_threshold_is_said(tmp_path: Path, resolver: GeneResolver) -> None:
    values = CELLS.copy()
    values[3] = BARCODES[3]
    entry = converted(tmp_path, values, resolver)
    # A fiftieth of the 2,500 vocabulary genes that the file names.
    assert entry["min_genes"] == 50
    assert entry["dropped_cells"] == {"below min_genes": 1}
    genes = np.count_nonzero(np.delete(CELLS, 3, axis=0), axis=1)
    assert entry["median_genes"] == np.median(genes)
    entry = converted(tmp_path, values, resolver, settings={"min_genes": 7})
    assert (entry["min_genes"], entry["n_cells"]) == (7, 40)
    entry = converted(tmp_path, values, resolver, settings={"min_genes": 7}, min_genes=2000)
    assert entry["status"] == "excluded"
    assert "no cell is left: 40 below min_genes (min_genes 2000" in entry["reason"]


def test_cells_and_files_of_few_genes_are_reported(tmp_path: Path, resolver: GeneResolver) -> None:
    entry = converted(tmp_path, CELLS[:, :1500], resolver)
    assert entry["status"] == "ok"
    text = " ".join(entry["warnings"])
    assert f"names 1500 of {len(GENES)} genes of the vocabulary (5%)" in text
    assert "the median cell has" not in text
    shallow = np.where(np.arange(N_GENES) < 400, CELLS, 0)
    text = " ".join(converted(tmp_path, shallow, resolver)["warnings"])
    assert "genes of the vocabulary, fewer than 200" in text


def test_corrected_counts_are_rounded_where_asked_for(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    corrected = np.where(CELLS > 0, 0.93 * CELLS - 0.01, 0).astype(np.float32)
    entry = converted(tmp_path, corrected, resolver)
    assert entry["status"] == "excluded"
    assert "write counts = round:X" in entry["reason"]
    entry = converted(tmp_path, corrected, resolver, counts="round:X")
    assert entry["status"] == "ok"
    record = entry["rounded"]
    assert record is not None
    assert record["share_rounded"] == 1
    assert record["total_before"] == pytest.approx(corrected.sum(dtype=np.float64))
    assert record["total_after"] == np.rint(corrected).sum()
    assert 0 < record["largest_distance"] <= 0.5
    staged = CellStore(tmp_path / "corpus" / "staging" / "cells" / "cells.zarr")
    found = staged.rows(range(len(CELLS))).toarray()[:, :N_GENES]
    np.testing.assert_array_equal(found, np.rint(corrected))
    assert any("rounding changed the total" in warning for warning in entry["warnings"])


def test_what_is_not_counts_is_found_in_any_block(
    tmp_path: Path, resolver: GeneResolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.source.source.BLOCK_CELLS", 30)
    scaled = 1e4 * CELLS / CELLS.sum(axis=1, keepdims=True)
    for late, message in (
        (np.log1p(scaled), "log1p of cells scaled to 10000"),
        (np.minimum(CELLS, 1), "no other value than 1"),
        (np.rint(np.log1p(scaled)), "rounded logarithms"),
    ):
        values = np.vstack([CELLS, CELLS[:20], late[:30]])
        entry = converted(tmp_path, values, resolver)
        assert entry["status"] == "excluded", message
        assert message in entry["reason"]


def test_counts_of_one_gene_that_are_too_many_together_name_it(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    values = CELLS.astype(np.int64)
    values[3, 7] = 3_000_000_000
    names = [*GENES.ids[:N_GENES], f"{GENES.ids[7]}.2"]
    doubled = np.hstack([values, values[:, 7:8]])
    path = tmp_path / "twice.h5ad"
    anndata.AnnData(sparse.csr_matrix(doubled), var=pd.DataFrame(index=names)).write_h5ad(path)
    settings = Settings(genes_hash=GENES.hash)
    prepare_corpus(tmp_path / "corpus", genes=GENES, settings=settings)
    dataset = Dataset(dataset_id="twice", path=path)
    entry = convert_dataset(
        dataset, corpus=tmp_path / "corpus", settings=settings, resolver=resolver
    )
    assert entry["status"] == "failed"
    for part in ("twice.h5ad", "X: the count of", GENES.ids[7], "6000000000", "sum of 2 columns"):
        assert part in entry["reason"]
