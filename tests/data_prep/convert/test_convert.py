"""Conversion: staging is exact, restartable and whole; one bad dataset costs only itself."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.convert import workers as workers_module
from data_prep.convert.convert import convert, prepare_corpus
from data_prep.convert.one_dataset import convert_dataset
from data_prep.counts.candidates import choose_counts
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry, dataset_lock, read_ledger
from data_prep.ledger.pending import read_pending, record_manifest
from data_prep.manifest.manifest import Dataset, read_manifest
from data_prep.source.source import Matrix
from data_prep.staging.dataset import Settings, forget
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.obs_table import read_obs

GENES = GeneVocabulary.bundled()
SETTINGS = Settings(genes_hash=GENES.hash)
N_CELLS, N_GENES = 20, 300
ROOT = Path(__file__).parents[3]
DEMO = ROOT / "data_prep" / "resources" / "demo"


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
    return read_obs(corpus / "staging" / name / "obs.parquet")


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
    entry = run(Dataset(dataset_id="b", path=tmp_path / "b.h5ad"), corpus, resolver)
    assert entry["status"] == "failed"
    assert "no such file" in entry["reason"]


def test_what_is_staged_survives_a_source_that_cannot_be_reached(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    run(dataset, corpus, resolver)
    before = content(corpus)
    dataset.path.rename(tmp_path / "away")
    kept = run(dataset, corpus, resolver)
    assert kept["status"] == "ok"
    assert kept["reason"].startswith("source not reachable, kept as staged (")
    assert content(corpus) == before
    # With other options it cannot be right, yet nothing is lost.
    other = dataclasses.replace(dataset, obs_columns="none")
    entry = run(other, corpus, resolver)
    assert (entry["status"], entry["n_cells"]) == ("failed", 0)
    assert entry["reason"].endswith("what is staged was made with other options")
    assert content(corpus) == before
    # A disk that is not mounted is often an empty folder.
    dataset.path.mkdir()
    assert "no file in this folder" in run(dataset, corpus, resolver)["reason"]
    assert content(corpus) == before


def test_a_worker_that_dies_before_it_begins_leaves_what_is_staged(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    run(dataset, corpus, resolver)
    before = content(corpus)
    died = workers_module.write_failure(dataset, "killed", corpus, SETTINGS)
    assert (died["status"], content(corpus)) == ("failed", before)


def test_a_name_is_not_taken_over_by_other_files(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    options = {"out": corpus, "genes": GENES, "settings": SETTINGS}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    dataset = write(tmp_path / "one" / "a.h5ad", counts(1))
    run(dataset, corpus, resolver)
    before = content(corpus)
    other = write(tmp_path / "two" / "a.h5ad", counts(2))
    fresh = write(tmp_path / "fresh.h5ad", counts(3))
    with pytest.raises(ValueError, match=r"'a' is already .*one/a.h5ad in this corpus; rename .*"):
        convert([fresh, other], **options)
    assert content(corpus) == before
    # Another convert may have staged the name since this one looked.
    assert "add --replace" in run(other, corpus, resolver)["reason"]
    assert content(corpus) == before
    # A moved file is the same dataset; a changed one is staged again.
    (tmp_path / "three").mkdir()
    path = dataset.path.rename(tmp_path / "three" / "a.h5ad")
    moved = Dataset(dataset_id="a", path=path)
    assert run(moved, corpus, resolver)["n_cells"] == N_CELLS
    assert content(corpus) == before
    replaced = convert([other], replace=True, **options)[0]
    assert (replaced["status"], replaced["path"]) == ("ok", str(other.path))
    np.testing.assert_array_equal(
        staged(corpus, "a").rows(range(N_CELLS)).toarray()[:, :N_GENES], counts(2)
    )


def test_two_processes_at_one_dataset_stage_it_once(tmp_path: Path, corpus: Path) -> None:
    """The first waits, half done, until the second had time to do harm."""
    write(tmp_path / "a.h5ad", counts())
    (tmp_path / "race.py").write_text(
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from data_prep.convert import convert; from data_prep.staging import dataset as staging\n"
        "from data_prep.genes.gene_names import GeneResolver\n"
        "from data_prep.manifest.manifest import Dataset\n"
        "from sclong_ds.corpus.genes import GeneVocabulary\n"
        "folder, name = Path(sys.argv[1]), sys.argv[2]\n"
        "real = staging.write_obs\n"
        "def slow(obs, path):\n"
        "    with (folder / 'staged.txt').open('a') as file:\n"
        "        file.write(name)\n"
        "    while name == 'first' and not (folder / 'go').exists():\n"
        "        time.sleep(0.01)\n"
        "    real(obs, path)\n"
        "staging.write_obs = slow\n"
        "genes = GeneVocabulary.bundled()\n"
        "options = dict(settings=convert.Settings(genes_hash=genes.hash))\n"
        "options |= dict(corpus=folder / 'corpus', resolver=GeneResolver(genes))\n"
        "dataset = Dataset(dataset_id='a', path=folder / 'a.h5ad')\n"
        "(folder / f'{name}.begins').touch()\n"
        "print(json.dumps(convert.convert_dataset(dataset, **options)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "race.py"), str(tmp_path), name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def see(process: subprocess.Popen[str], trace: str) -> None:
        while process.poll() is None and not (tmp_path / trace).exists():
            time.sleep(0.01)
        assert process.poll() is None

    first = start("first")
    see(first, "staged.txt")
    second = start("second")
    see(second, "second.begins")
    with contextlib.suppress(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)
    (tmp_path / "go").touch()
    entries = [json.loads(process.communicate()[0]) for process in (first, second)]
    assert entries[0] == entries[1] == read_ledger(corpus)[0]
    assert entries[0]["status"] == "ok"
    assert (tmp_path / "staged.txt").read_text() == "first"
    assert len(staged(corpus, "a")) == N_CELLS


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


def test_forgotten_datasets_are_gone_until_a_manifest_lists_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abc"]
    corpus, options = tmp_path / "c", {"genes": GENES, "settings": SETTINGS}
    convert(datasets, out=corpus, task=1, tasks=2, **options)
    with pytest.raises(ValueError, match="no dataset 'x'"):
        forget(corpus, ["b", "x"])
    with dataset_lock(corpus, "b"), pytest.raises(ValueError, match="a convert is at dataset 'b'"):
        forget(corpus, ["b"])
    assert [entry["dataset_id"] for entry in read_ledger(corpus)] == ["b"]
    forget(corpus, ["a", "b"])
    assert read_ledger(corpus) == []
    assert list((corpus / "staging").iterdir()) == []
    # The task of the one that is left is still its place in the manifest.
    assert [(p.dataset_id, p.task) for p in read_pending(corpus, [])] == [("c", 0)]
    with caplog.at_level("INFO"):
        convert(datasets[:1], out=corpus, **options)
    assert "1 datasets of this corpus are not in this manifest: c (" in caplog.text
    assert [entry["dataset_id"] for entry in read_ledger(corpus)] == ["a"]


def test_left_over_temporary_folders_are_removed(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    (corpus / "staging" / ".a~" / "cells.zarr").mkdir(parents=True)
    (corpus / "staging" / ".ab~").mkdir()
    run(write(tmp_path / "a.h5ad", counts()), corpus, resolver)
    assert sorted(path.name for path in (corpus / "staging").iterdir()) == [".ab~", "a"]


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


def test_other_settings_are_refused_on_the_same_folder(corpus: Path) -> None:
    prepare_corpus(corpus, genes=GENES, settings=SETTINGS)
    other = Settings(genes_hash=GENES.hash, min_genes=200)
    with pytest.raises(ValueError, match="min_genes the default there, 200 here"):
        prepare_corpus(corpus, genes=GENES, settings=other)
    assert GeneVocabulary.read(corpus / "genes.tsv").hash == GENES.hash


def test_blocks_that_were_looked_at_are_not_read_again() -> None:
    passes = []

    def blocks() -> Iterator[sparse.csr_matrix]:
        passes.append(0)
        for first in range(0, N_CELLS, 5):
            passes[-1] += 1
            yield sparse.csr_matrix(counts()[first : first + 5] * (first > 0))

    matrix = Matrix(name="X", shape=(N_CELLS, N_GENES), gene_columns={}, blocks=blocks)
    chosen = choose_counts([matrix]).matrix
    # The first block is empty and proves nothing.
    assert passes == [2]
    first, second = (sparse.vstack(list(chosen.blocks())) for _ in range(2))
    assert passes == [4, 4]
    assert (first != second).nnz == 0
    np.testing.assert_array_equal(first.toarray()[5:], counts()[5:])


@pytest.mark.parametrize("field", ["min_genes", "min_counts", "min_genes_mapped"])
def test_senseless_settings(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} 0: must be 1 or more"):
        Settings(genes_hash="", **{field: 0})
    with pytest.raises(ValueError, match="between 0 and 1"):
        Settings(genes_hash="", min_share_mapped=1.5)
    with pytest.raises(ValueError, match="max_mito_fraction -1"):
        Settings(genes_hash="", max_mito_fraction=-1)
    with pytest.raises(ValueError, match="max_counts 5: must be min_counts 9 or more"):
        Settings(genes_hash="", min_counts=9, max_counts=5)


def test_a_killed_worker_costs_its_dataset_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker does several datasets; the one at which it dies fails, those around it do not."""
    (tmp_path / "deadly_worker.py").write_text(
        "import os, signal\n"
        "from data_prep.convert import workers\n"
        "def work(pipe, corpus, settings, limits):\n"
        "    real = workers.convert_dataset\n"
        "    def deadly(dataset, **options):\n"
        "        with (corpus / 'workers.txt').open('a') as file:\n"
        "            file.write(f'{dataset.dataset_id} {os.getpid()}\\n')\n"
        "        if dataset.dataset_id == 'b':\n"
        "            (corpus / 'staging' / '.b~').mkdir()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        if dataset.dataset_id == 'd':\n"
        "            raise SystemExit(3)\n"
        "        return real(dataset, **options)\n"
        "    workers.convert_dataset = deadly\n"
        "    workers._work(pipe, corpus, settings, limits)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly_worker

    monkeypatch.setattr(workers_module, "_work", deadly_worker.work)
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abcdef"]
    entries = convert(datasets, out=tmp_path / "c", genes=GENES, settings=SETTINGS)
    assert [entry["status"] for entry in entries] == ["ok", "failed", "ok", "failed", "ok", "ok"]
    assert "killed by signal 9" in entries[1]["reason"]
    assert "exit code 3" in entries[3]["reason"]
    assert sorted(os.listdir(tmp_path / "c" / "staging")) == ["a", "c", "e", "f"]
    assert read_ledger(tmp_path / "c") == entries
    lines = (tmp_path / "c" / "workers.txt").read_text().split()
    worker = dict(zip(lines[::2], lines[1::2], strict=True))
    assert worker["a"] == worker["b"] != worker["c"] == worker["d"] != worker["e"] == worker["f"]
    # The dead ones are tried again, by two workers that are replaced after every dataset.
    monkeypatch.undo()
    monkeypatch.setattr(workers_module, "DATASETS_PER_WORKER", 1)
    again = convert(datasets, out=tmp_path / "c", genes=GENES, settings=SETTINGS, jobs=2)
    assert [entry["status"] for entry in again] == ["ok"] * 6
    assert read_ledger(tmp_path / "c") == again


def test_tasks_that_never_ran_leave_their_datasets_pending(tmp_path: Path) -> None:
    datasets = [write(tmp_path / f"{name}.h5ad", counts()) for name in "abcde"]
    options = {"out": tmp_path / "c", "genes": GENES, "settings": SETTINGS}
    entries = convert(datasets, task=1, tasks=3, **options)
    assert [entry["dataset_id"] for entry in entries] == ["b", "e"]
    pending = read_pending(tmp_path / "c", entries)
    assert [(p.dataset_id, p.task, p.tasks) for p in pending] == [
        ("a", 0, 3), ("c", 2, 3), ("d", 0, 3),
    ]  # fmt: skip
    # All at once instead of the other tasks.
    assert [e["dataset_id"] for e in convert(datasets, **options)] == list("abcde")
    assert not read_pending(tmp_path / "c", read_ledger(tmp_path / "c"))


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a corpus folder but those that killed runs leave unnamed."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def test_killed_at_any_time_and_started_again_gives_the_same_bytes(
    tmp_path: Path, resolver: GeneResolver
) -> None:
    """SIGKILL hits the whole command when the first trace of each stage of its work shows."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    prepare_corpus(straight, genes=GENES, settings=SETTINGS)
    record_manifest(straight, ["a", "b"], tasks=1)
    for name in "ab":
        matrix = np.tile(counts(ord(name)), (20, 1))
        run(write(tmp_path / f"{name}.h5ad", matrix, batch=["b"] * 400), straight, resolver)
    manifest = tmp_path / "m.tsv"
    manifest.write_text("dataset_id\tpath\na\ta.h5ad\nb\tb.h5ad\n")
    command = [sys.executable, "-m", "data_prep", "convert", str(manifest), "--out", str(killed)]
    for trace in ("genes.tsv", "staging/.a~*", "ledger/a.json", "staging/.b~*/*"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(killed.glob(trace)):
            time.sleep(0.001)
        assert process.poll() is None, f"{trace} was never seen"
        process.kill()
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert content(killed) == content(straight)
    assert sorted(os.listdir(killed / "staging")) == ["a", "b"]


def test_a_damaged_ledger_entry_is_named_and_replaced(
    tmp_path: Path, corpus: Path, resolver: GeneResolver
) -> None:
    dataset = write(tmp_path / "a.h5ad", counts())
    (corpus / "ledger" / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json: damaged \(not JSON\)"):
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
    assert {entries[f"immune_{part}"]["n_genes_mapped"] for part in "abc"} == {23285}
    # The one file they were split from gives 773,641 non-zero counts. immune_b names 21 genes by
    # their id that the others name by two aliases; there the second alias yields, 16 values in all.
    assert sum(staged(corpus, f"immune_{part}").n_values for part in "abc") == 773_625
    assert list(obs_of(corpus, "immune_b").columns) == ["barcode"]
    assert json.loads((corpus / "settings.json").read_text())["genes_hash"] == GENES.hash
