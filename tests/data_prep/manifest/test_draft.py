"""Drafts of manifests: every dataset of a tree is found once, the rest is explained."""

import gzip
import shutil
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from data_prep.manifest.draft import Draft, draft_manifest, format_manifest
from data_prep.manifest.manifest import read_manifest
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()
N_CELLS, N_GENES = 12, 250
COUNTS = np.random.default_rng(0).poisson(0.7, (N_CELLS, N_GENES)) + np.eye(N_CELLS, N_GENES)
COUNTS = COUNTS.astype(np.int32)
CELLS = [f"cell{i}" for i in range(N_CELLS)]
SYMBOLS, IDS = list(GENES.symbols[:N_GENES]), list(GENES.ids[:N_GENES])
LOGGED = np.log1p(1e4 * COUNTS / COUNTS.sum(axis=1, keepdims=True)).astype(np.float32)


def annotated(
    matrix: np.ndarray = COUNTS, genes: list[str] = IDS, **obs: object
) -> anndata.AnnData:
    frame = pd.DataFrame(obs, index=CELLS)
    return anndata.AnnData(sparse.csr_matrix(matrix), obs=frame, var=pd.DataFrame(index=genes))


def write_mtx(folder: Path, prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    io.mmwrite(folder / f"{prefix}matrix.mtx", sparse.coo_matrix(COUNTS.T))
    (folder / f"{prefix}barcodes.tsv").write_text("\n".join(CELLS) + "\n")
    lines = [f"{gene}\t{symbol}\n" for gene, symbol in zip(IDS, SYMBOLS, strict=True)]
    (folder / f"{prefix}genes.tsv").write_text("".join(lines))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder tree as people have them: all formats, several traps, other files in between."""
    top = tmp_path_factory.mktemp("tree")
    (top / "study one").mkdir()
    annotated(
        tissue=["liver"] * N_CELLS, Patient=["p"] * N_CELLS, batch=["b"] * N_CELLS
    ).write_h5ad(top / "study one" / "cells.h5ad")
    with anndata.settings.override(zarr_write_format=3), warnings.catch_warnings():
        # anndata announces another default for chunks; zarr's consolidated metadata is a draft.
        warnings.filterwarnings("ignore", message="zarr v3 autosharding|Consolidated metadata")
        annotated(genes=SYMBOLS).write_zarr(top / "study one" / "cells.zarr")
    annotated(LOGGED, SYMBOLS).write_h5ad(top / "logged.h5ad")
    annotated(genes=[s.capitalize() for s in SYMBOLS]).write_h5ad(top / "mouse.h5ad")
    write_mtx(top / "sample" / "filtered")
    write_mtx(top / "geo", "GSM1_")
    write_mtx(top / "geo", "GSM2_")
    table = pd.DataFrame(COUNTS, index=CELLS, columns=SYMBOLS)
    table.to_csv(top / "table.csv.gz")
    table.T.to_csv(top / "table.tsv", sep="\t")
    with h5py.File(top / "tenx.h5", "w") as file:
        group, by_gene = file.create_group("GRCh38"), sparse.csr_matrix(COUNTS)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(by_gene, name)
        group["shape"] = np.array([N_GENES, N_CELLS])
        for name, values in (("barcodes", CELLS), ("genes", IDS), ("gene_names", SYMBOLS)):
            group[name] = np.array(values, dtype="S")
    with h5py.File(top / "cells.loom", "w") as file:
        file["matrix"] = COUNTS.T
        file["row_attrs/Gene"] = np.array(SYMBOLS, dtype="S")
        file["col_attrs/CellID"] = np.array(CELLS, dtype="S")
    sparse.save_npz(top / "cells_merged_0_to_12.npz", sparse.csr_matrix(LOGGED))
    (top / "genes.txt").write_text("\n".join(IDS) + "\n")
    whole = (top / "logged.h5ad").read_bytes()
    (top / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    (top / "half").mkdir()
    shutil.copy(top / "geo" / "GSM1_barcodes.tsv", top / "half" / "barcodes.tsv")
    (top / "README.txt").write_text("no table\n")
    (top / "figure.pdf").write_bytes(b"%PDF")
    (top / "metadata.csv").write_text("cell,age\ncell1,7\ncell2,8\n")
    (top / ".hidden").mkdir()
    (top / ".hidden" / "cells.h5ad").write_bytes(whole)
    return top


@pytest.fixture(scope="module")
def draft(tree: Path) -> Draft:
    return draft_manifest(tree, genes=GENES, relative_to=tree)


@pytest.mark.thorough
def test_every_format_is_found_once(draft: Draft) -> None:
    found = {dataset["path"]: dataset["format"] for dataset in draft["datasets"]}
    assert found == {
        "cells.loom": "loom",
        "cells_merged_0_to_12.npz": "scipy_npz",
        "logged.h5ad": "h5ad",
        "mouse.h5ad": "h5ad",
        "table.csv.gz": "csv",
        "table.tsv": "tsv",
        "tenx.h5": "10x_h5",
        "geo/GSM1_matrix.mtx": "10x_mtx",
        "geo/GSM2_matrix.mtx": "10x_mtx",
        "sample/filtered": "10x_mtx",
        "study one/cells.h5ad": "h5ad",
        "study one/cells.zarr": "zarr",
    }
    assert {dataset["n_cells"] for dataset in draft["datasets"]} == {N_CELLS}
    assert {dataset["n_genes"] for dataset in draft["datasets"]} == {N_GENES}


def test_ids_are_made_from_paths_and_unique(draft: Draft) -> None:
    ids = {dataset["path"]: dataset["dataset_id"] for dataset in draft["datasets"]}
    assert ids["sample/filtered"] == "sample-filtered"
    assert ids["cells.loom"] == "cells"
    assert ids["table.csv.gz"] == "table.csv.gz"
    assert ids["table.tsv"] == "table.tsv"
    assert ids["study one/cells.h5ad"] == "study_one-cells.h5ad"
    assert len({name.lower() for name in ids.values()}) == len(ids)


def test_each_dataset_is_described(draft: Draft) -> None:
    by_path = {dataset["path"]: dataset for dataset in draft["datasets"]}
    first = by_path["study one/cells.h5ad"]
    assert (first["counts"], first["gene_column"], first["id_type"]) == ("X", "index", "ensembl")
    assert (first["organism"], first["tissue"]) == ("human", "liver")
    assert first["candidates"] == {"donor": ["Patient"], "sample": ["batch"]}
    assert first["note"] == ""
    assert by_path["table.tsv"]["id_type"] == "symbol"
    assert by_path["table.tsv"]["gene_names"]["symbol"] == N_GENES
    for name in ("logged.h5ad", "cells_merged_0_to_12.npz"):
        assert by_path[name]["counts"] == "auto"
        assert "log1p of cells scaled to 10000" in by_path[name]["note"]
        assert "write counts = invert_log1p:X to restore them" in by_path[name]["note"]
    assert by_path["mouse.h5ad"]["organism"].startswith(("mouse", "rat"))
    assert "the vocabulary is human" in by_path["mouse.h5ad"]["note"]


def test_the_rest_is_explained(draft: Draft) -> None:
    unreadable = {problem["path"]: problem["reason"] for problem in draft["unreadable"]}
    assert sorted(unreadable) == ["cut.h5ad", "half/barcodes.tsv"]
    assert "damaged" in unreadable["cut.h5ad"]
    assert "there is no matrix.mtx" in unreadable["half/barcodes.tsv"]
    skipped = {problem["path"] for problem in draft["skipped"]}
    assert skipped == {"README.txt", "figure.pdf", "genes.txt", "metadata.csv"}


def test_the_manifest_is_read_back_and_always_the_same(tree: Path, draft: Draft) -> None:
    text = format_manifest(draft)
    assert format_manifest(draft_manifest(tree, genes=GENES, relative_to=tree)) == text
    path = tree.parent / "manifest.tsv"
    path.write_text(text)
    datasets = read_manifest(path)
    assert [dataset.dataset_id for dataset in datasets] == [
        dataset["dataset_id"] for dataset in draft["datasets"]
    ]
    assert {dataset.donor_column for dataset in datasets} == {"", "Patient"}
    assert "# not read: cut.h5ad: " in text
    assert "# skipped: README.txt (" in text
    assert "figure.pdf" not in text


def test_linked_folders_are_read_once_and_archives_are_listed(tmp_path: Path) -> None:
    top, far = tmp_path / "top", tmp_path / "far"
    top.mkdir()
    write_mtx(far / "sample")
    (top / "linked").symlink_to(far)
    (top / "twice").symlink_to(far)
    (far / "up").symlink_to(top)
    for name in ("seurat.rds", "RAW.tar", "a.h5seurat", "b.csv.zip"):
        (top / name).write_bytes(b"x")
    draft = draft_manifest(top, genes=GENES, relative_to=top)
    assert [item["dataset_id"] for item in draft["datasets"]] == ["linked-sample"]
    text = format_manifest(draft)
    for name in ("seurat.rds", "RAW.tar", "a.h5seurat", "b.csv.zip"):
        assert f"# skipped: {name} (not read: unpack or export it)" in text


def test_quotation_marks_survive_the_manifest(tmp_path: Path) -> None:
    annotated(tissue=['"left" lung'] * N_CELLS).write_h5ad(tmp_path / "a.h5ad")
    path = tmp_path / "m.tsv"
    path.write_text(format_manifest(draft_manifest(tmp_path, genes=GENES, relative_to=tmp_path)))
    assert read_manifest(path)[0].tissue == '"left" lung'


def test_a_dataset_folder_itself_and_names_that_manifests_cannot_hold(tmp_path: Path) -> None:
    write_mtx(tmp_path / "one")
    draft = draft_manifest(tmp_path / "one", genes=GENES, relative_to=tmp_path)
    assert [(item["dataset_id"], item["path"]) for item in draft["datasets"]] == [("one", "one")]
    odd = tmp_path / "two" / ("x" * 150 + "\tname.csv.gz")
    odd.parent.mkdir()
    odd.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    draft = draft_manifest(tmp_path / "two", genes=GENES)
    assert draft["datasets"] == []
    assert "rename it" in draft["unreadable"][0]["reason"]
