"""Gene vectors: against the definition in dense numpy, on a small corpus that finalize made.

Covers also `data_prep/graph/gene_vectors_arguments.py`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from data_prep.corpus.finalize import finalize
from data_prep.graph import gene_vectors, gene_vectors_arguments
from data_prep.graph.gene_vectors import build_gene_vectors, read_presence
from data_prep.ledger.ledger import empty_entry, staged_files, write_entry
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.obs_table import write_obs

N_CELLS, N_GENES = 300, 40
SILENT, RARE = 5, 17


def stage(corpus: Path, counts: np.ndarray) -> None:
    """Put one dataset where convert puts it."""
    names = tuple(f"ENSG{i:011d}" for i in range(N_GENES))
    genes = GeneVocabulary(names, names, ("protein_coding",) * N_GENES)
    folder = corpus / "staging" / "cells"
    folder.mkdir(parents=True)
    (corpus / "ledger").mkdir()
    genes.write(corpus / "genes.tsv")
    (corpus / "settings.json").write_text(json.dumps({"genes_hash": genes.hash}))
    with CellWriter(folder / "cells.zarr", n_genes=N_GENES) as writer:
        rows = np.arange(len(counts))
        writer.append(csr_matrix(counts.astype(np.uint32)), source={"source_row": rows})
    barcodes = [f"cell{i}" for i in range(len(counts))]
    write_obs(folder / "obs.parquet", pd.DataFrame({"barcode": barcodes}))
    np.save(folder / "measured_genes.npy", np.packbits(np.ones(N_GENES, bool)))
    files = staged_files(folder)
    entry = empty_entry("cells", corpus, organism="human", tissue="", settings_hash="")
    write_entry(corpus, entry | {"status": "ok", "n_cells": len(counts), "files": files})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells of two kinds, so that genes of the same program occur together."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, N_CELLS)
    program = np.arange(N_GENES) % 2
    rate = np.where(kind[:, None] == program[None, :], 1.5, 0.2)
    counts = rng.poisson(rate)
    counts[:, SILENT] = 0
    counts[:, RARE] = 0
    counts[:2, RARE] = 1
    path = tmp_path_factory.mktemp("gene_vectors") / "corpus"
    stage(path, counts)
    finalize(path, validation_fraction=0.1, split_by="cell")
    return path


def dense_ppmi(corpus: Path, n_cells: int | None = None) -> np.ndarray:
    """The matrix by its definition; rows of genes below 3 cells are zero."""
    opened = Corpus(corpus)
    present = opened.rows(opened.split("train")[:n_cells]).toarray() > 0
    n = len(present)
    matrix = np.zeros((N_GENES, N_GENES))
    for g in range(N_GENES):
        for h in range(N_GENES):
            both = (present[:, g] & present[:, h]).sum()
            n_g, n_h = present[:, g].sum(), present[:, h].sum()
            if g != h and both and min(n_g, n_h) >= 3:
                matrix[g, h] = max(0.0, np.log(n * both / (n_g * n_h)))
    return matrix


@pytest.mark.parametrize("n_cells", [None, 100])
def test_vectors_are_the_truncated_svd_of_the_ppmi(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_cells: int | None
) -> None:
    monkeypatch.setattr(gene_vectors, "_GENES_PER_BLOCK", 7)
    monkeypatch.setattr(gene_vectors, "_CELLS_PER_READ", 64)
    out = tmp_path / "vectors.npy"
    report = build_gene_vectors(corpus, out=out, dim=6, max_cells=n_cells or 20_000)
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    assert vectors.shape == (N_GENES, 6)
    matrix = dense_ppmi(corpus, n_cells)
    left, values, _ = np.linalg.svd(matrix)
    # The sign of a singular vector is free; outer products of single columns do not depend on it.
    for k in range(6):
        wanted = values[k] * np.outer(left[:, k], left[:, k])
        np.testing.assert_allclose(np.outer(vectors[:, k], vectors[:, k]), wanted, atol=2e-5)
    assert report["counts"]["singular_values"] == pytest.approx(values[:6], rel=1e-4)
    assert report["counts"]["cells"] == (n_cells or len(Corpus(corpus).split("train")))


def test_genes_without_data_get_zeros_and_are_counted(corpus: Path, tmp_path: Path) -> None:
    report = build_gene_vectors(corpus, out=tmp_path / "v.npy", dim=4)
    vectors = np.load(tmp_path / "v.npy")
    assert np.flatnonzero(~vectors.any(axis=1)).tolist() == [SILENT, RARE]
    counts = report["counts"]
    assert counts["genes_without_data"] + counts["genes_below_min_cells"] == 2
    assert counts["genes_with_vector"] == N_GENES - 2
    everyone = build_gene_vectors(corpus, out=tmp_path / "all.npy", dim=4, min_cells=1)
    assert everyone["counts"]["genes_with_vector"] >= N_GENES - 2


def test_genes_of_one_program_are_alike(corpus: Path, tmp_path: Path) -> None:
    build_gene_vectors(corpus, out=tmp_path / "v.npy", dim=2)
    vectors = np.delete(np.load(tmp_path / "v.npy"), [SILENT, RARE], axis=0)
    program = np.delete(np.arange(N_GENES) % 2, [SILENT, RARE])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    same = program[:, None] == program[None, :]
    cosine = unit @ unit.T
    assert cosine[same].min() > cosine[~same].max()


def test_the_same_corpus_gives_the_same_bytes_and_leaves_nothing_else(
    corpus: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        build_gene_vectors(corpus, out=tmp_path / f"{name}.npy", dim=5)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    about = json.loads((tmp_path / "a.json").read_text())
    assert about["genes_hash"] == Corpus(corpus).genes.hash
    assert len(list(tmp_path.iterdir())) == 4


def test_more_dimensions_than_genes_leave_zero_columns(corpus: Path, tmp_path: Path) -> None:
    report = build_gene_vectors(corpus, out=tmp_path / "v.npy", dim=64)
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (N_GENES, 64)
    assert np.isfinite(vectors).all()
    assert report["counts"]["zero_columns"] == 64 - (N_GENES - 2)
    assert not vectors[:, N_GENES - 2 :].any()


def test_presence_counts_cells_exactly(corpus: Path) -> None:
    opened = Corpus(corpus)
    presence = read_presence(opened, max_cells=77)
    flags = np.unpackbits(presence.bits, axis=1)[:, :77].T.astype(bool)
    wanted = opened.rows(opened.split("train")[:77]).toarray() > 0
    np.testing.assert_array_equal(flags, wanted)
    np.testing.assert_array_equal(presence.cells_per_gene, wanted.sum(axis=0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "--dim: got 0"),
        ({"max_cells": 0}, ValueError, "--max-cells: got 0"),
        ({"min_cells": 1000}, ValueError, "0 genes occur in at least --min-cells 1000"),
        ({"out": "v.txt"}, ValueError, "npy file"),
        ({"out": "missing/v.npy"}, FileNotFoundError, "create it first"),
    ],
)
def test_bad_arguments_are_refused(
    corpus: Path, tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    arguments = {"out": "v.npy"} | change
    arguments["out"] = tmp_path / arguments["out"]
    with pytest.raises(error, match=message):
        build_gene_vectors(corpus, **arguments)
    assert not list(tmp_path.iterdir())


def test_command_prints_one_json_document(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    gene_vectors_arguments.add_arguments(parser)
    options = [str(corpus), "--dim", "4", "--out", str(tmp_path / "v.npy")]
    assert gene_vectors.run(parser.parse_args([*options, "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["dim"] == 4
    assert gene_vectors.run(parser.parse_args(options)) == 0
    assert "38 with a vector" in capsys.readouterr().out
