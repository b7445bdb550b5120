"""Conversion: staging is exact, restartable and whole; one bad dataset costs only itself."""

import gzip
import json
import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep import convert as convert_module
from data_prep.convert import Settings, convert, convert_dataset, prepare_corpus
from data_prep.harmonize import GeneResolver
from data_prep.ledger import LedgerEntry, read_ledger
from data_prep.manifest import Dataset, read_manifest
from sclong_ds.genes import GeneVocabulary
from sclong_ds.store import CellStore

GENES = GeneVocabulary.bundled()
SETTINGS = Settings(genes_hash=GENES.hash)
N_CELLS, N_GENES = 20, 300
DEMO = Path(__file__).parents[2] / "data_prep" / "resources" / "demo"


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return GeneResolver(GENES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    prepare_corpus(tmp_path / "corpus", genes=GENES, settings=SETTINGS)
    return tmp_path / "corpus"


def counts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(0.5, (N_CELLS, N_GENES)).astype(np.int64)


def write(path: Path, matrix: np.ndarray, **obs: list[str]) -> Dataset:
    cells = [f"cell{i}" for i in range(len(matrix))]
    var = pd.DataFrame(index=list(GENES.symbols[:N_GENES]))
    adata = anndata.AnnData(sparse.csr_matrix(matrix), obs=pd.DataFrame(obs, index=cells), var=var)
    adata.write_h5ad(path)
    return Dataset(dataset_id=path.stem, path=path)


def run(dataset: Dataset, corpus: Path, resolver: GeneResolver) -> LedgerEntry:
    return convert_dataset(dataset, corpus=corpus, settings=SETTINGS, resolver=resolver)


def staged(corpus: Path, name: str) -> CellStore:
    return CellStore(corpus / "staging" / name / "cells.zarr")


def obs_of(corpus: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(corpus / "staging" / name / "obs.tsv.gz", sep="\t", dtype=str)


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


def test_a_done_dataset_is_skipped_until_its_file_or_options_change(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts(), batch=["b"] * N_CELLS)
    first = run(dataset, corpus, resolver)
    store = corpus / "staging" / "a" / "cells.zarr" / "zarr.json"
    stamp = store.stat().st_mtime_ns
    assert run(dataset, corpus, resolver) == first
    assert store.stat().st_mtime_ns == stamp
    other = Dataset(dataset_id="a", path=dataset.path, obs_columns="none")
    assert run(other, corpus, resolver)["obs_columns"] == []
    assert obs_of(corpus, "a").columns.tolist() == ["barcode"]
    write(tmp_path / "a.h5ad", counts(1))
    changed = run(other, corpus, resolver)
    assert changed["source_hash"] != first["source_hash"]
    np.testing.assert_array_equal(
        staged(corpus, "a").rows(range(N_CELLS)).toarray()[:, :N_GENES], counts(1)
    )


def test_a_failed_dataset_is_tried_again_and_leaves_nothing(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    assert run(dataset, corpus, resolver)["status"] == "ok"
    whole = dataset.path.read_bytes()
    dataset.path.write_bytes(whole[: len(whole) // 2])
    entry = run(dataset, corpus, resolver)
    assert (entry["status"], entry["n_cells"]) == ("failed", 0)
    assert list((corpus / "staging").iterdir()) == []
    dataset.path.write_bytes(whole)
    assert run(dataset, corpus, resolver)["status"] == "ok"
    dataset.path.unlink()
    entry = run(dataset, corpus, resolver)
    assert entry["status"] == "failed"
    assert "no such file" in entry["reason"]


def test_left_over_temporary_folders_are_removed(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    (corpus / "staging" / ".a~killed").mkdir()
    (corpus / "staging" / ".ab~other").mkdir()
    run(write(tmp_path / "a.h5ad", counts()), corpus, resolver)
    assert sorted(path.name for path in (corpus / "staging").iterdir()) == [".ab~other", "a"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, resolver: GeneResolver) -> None:
    dataset = write(tmp_path / "a.h5ad", counts(), batch=["b"] * N_CELLS)
    content = []
    for name in ("one", "two"):
        prepare_corpus(tmp_path / name, genes=GENES, settings=SETTINGS)
        run(dataset, tmp_path / name, resolver)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        content.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert content[0] == content[1]


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
    assert (entry["status"], entry["reason"][:30]) == ("excluded", "the manifest says organism mou")


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


def test_other_settings_are_refused_on_the_same_folder(corpus: Path) -> None:
    prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    other = Settings(genes_hash=GENES.hash, min_genes=200)
    with pytest.raises(ValueError, match="min_genes 1 there, 200 here"):
        prepare_corpus(corpus, genes=GENES, settings=other)
    assert GeneVocabulary.read(corpus / "genes.tsv").hash == GENES.hash


@pytest.mark.parametrize("field", ["min_genes", "min_counts", "min_genes_mapped"])
def test_senseless_settings(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} 0: must be 1 or more"):
        Settings(genes_hash="", **{field: 0})
    with pytest.raises(ValueError, match="between 0 and 1"):
        Settings(genes_hash="", min_share_mapped=1.5)


def test_a_killed_worker_costs_its_dataset_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_worker.py").write_text(
        "import os, signal\n"
        "from data_prep.convert import _work\n"
        "def work(dataset, corpus, settings):\n"
        "    if dataset.dataset_id == 'b':\n"
        "        (corpus / 'staging' / '.b~half').mkdir()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if dataset.dataset_id == 'c':\n"
        "        raise SystemExit(3)\n"
        "    _work(dataset, corpus, settings)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly_worker

    monkeypatch.setattr(convert_module, "_work", deadly_worker.work)
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abcd"]
    entries = convert(datasets, out=tmp_path / "c", genes=GENES, settings=SETTINGS, jobs=2)
    assert [entry["status"] for entry in entries] == ["ok", "failed", "failed", "ok"]
    assert "killed by signal 9" in entries[1]["reason"]
    assert "exit code 3" in entries[2]["reason"]
    assert sorted(os.listdir(tmp_path / "c" / "staging")) == ["a", "d"]
    assert read_ledger(tmp_path / "c") == entries


def test_a_damaged_ledger_entry_is_named_and_replaced(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    (corpus / "ledger" / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: not a ledger entry"):
        read_ledger(corpus)
    assert run(dataset, corpus, resolver)["status"] == "ok"
    assert read_ledger(corpus)[0]["status"] == "ok"


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
    assert {entries[f"immune_{part}"]["n_genes_mapped"] for part in "abc"} == {23238}
    # 772,641 non-zero counts of 430 cells: the number of the one file they were split from.
    assert sum(staged(corpus, f"immune_{part}").n_values for part in "abc") == 772_641
    with gzip.open(corpus / "staging" / "immune_b" / "obs.tsv.gz", "rt") as file:
        assert file.readline() == "barcode\n"
    assert json.loads((corpus / "settings.json").read_text())["genes_hash"] == GENES.hash
