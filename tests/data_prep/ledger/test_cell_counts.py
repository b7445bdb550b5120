"""manifest, finalize and the report count the same cells by the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.__main__ import main
from data_prep.ledger.cell_counts import NEAR, REPEATS, cell_counts


def write(folder: Path, name: str, counts: np.ndarray, **obs: list[str]) -> None:
    ids = [f"ENSG{i:011d}" for i in range(counts.shape[1])]
    anndata.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(obs, index=[f"{name}{i}" for i in range(len(counts))]),
        var=pd.DataFrame(index=ids),
    ).write_h5ad(folder / f"{name}.h5ad")


def folder_of_odd_files(root: Path) -> tuple[Path, Path]:
    """Files whose cells fail in every way that is counted, and their gene list."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (50, 400))
    counts[:, 399] = 1
    raw = root / "raw"
    raw.mkdir()
    first = counts.copy()
    first[:5, 20:] = 0  # too few genes
    tissue = ["blood"] * 30 + ["lung"] * 20
    types = ["B cell"] * 10 + ["T cell"] * 40
    write(raw, "a", first, cell_type=types, tissue=tissue, assay=["10x"] * 50)
    second = np.concatenate([counts[5:11], rng.poisson(1.0, (10, 400))])  # six repeats
    write(raw, "b", second, assay=["Drop-seq"] * 16)
    part = counts[20:44, :390]  # copies without ten genes, half of them known as such
    write(raw, "c", part, is_primary_data=["False"] * 12 + ["True"] * 12)
    write(raw, "d", np.log1p(rng.poisson(1.0, (10, 400)) / 3.0))  # no counts
    genes = root / "genes.tsv"
    lines = [f"ENSG{i:011d}\tG{i}\tprotein_coding" for i in range(400)]
    genes.write_text("\n".join(["ensembl_id\tsymbol\tclass", *lines]) + "\n")
    return raw, genes


def test_three_commands_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, genes = folder_of_odd_files(tmp_path)
    manifest, corpus, page = tmp_path / "m.tsv", tmp_path / "corpus", tmp_path / "qc.html"
    assert main(["manifest", str(raw), "--genes", str(genes), "--out", str(manifest)]) == 0
    assert "4 datasets of 100 cells to be read" in capsys.readouterr().err
    arguments = ["--genes", str(genes), "--min-genes", "60", "--min-genes-mapped", "50"]
    main(["convert", str(manifest), "--out", str(corpus), *arguments])
    capsys.readouterr()
    assert main(["finalize", str(corpus), "--near-duplicates", "drop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cells = found["cells"]
    assert cells["read"] == 100
    assert cells["kept"] == found["n_cells"]
    assert cells["in_datasets_left_out"] == 10
    assert cells["read"] == cells["kept"] + sum(cells["dropped"].values()) + 10
    assert cells["dropped"] == {
        "not where is_primary_data!=False": 12,
        "near duplicate of another cell": 12,
        "repeats another cell": 6,
        "below min_genes": 5,
    }
    assert main(["report", str(corpus), "--out", str(page), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cells"] == cells
    # Of near duplicates the primary one stays: twelve of c, for twelve T cells of the lung.
    assert report["annotations"]["cell_type"] == {"T cell": 28, "": 22, "B cell": 5}
    assert report["annotations"]["tissue"] == {"blood": 25, "": 22, "lung": 8}
    assert main(["finalize", str(corpus), "--near-duplicates", "drop"]) == 0
    assert "100 cells read = 55 kept + 35 dropped" in capsys.readouterr().out
    text = page.read_text()
    assert "100 cells read = 55 kept + 35 dropped" in text
    for title in ("Cells by tissue", "Cells by assay", "Cells by cell type"):
        assert title in text


def test_a_corpus_counts_only_what_it_holds_of_what_is_staged_now() -> None:
    entry: Any = {
        "dataset_id": "a", "status": "ok", "n_cells_input": 12, "n_cells": 10,
        "dropped_cells": {"below min_genes": 2}, "source_hash": "x",
    }  # fmt: skip
    # Older corpora know no near duplicates.
    info = {"dataset_id": "a", "n_cells": 7, "duplicates_dropped": 3, "source_hash": "x"}
    counts = cell_counts([entry], {"datasets": [info]})
    assert (counts.kept, counts.dropped) == (7, {"below min_genes": 2, REPEATS: 3})
    counts = cell_counts([entry], {"datasets": [info | {"near_dropped": 1}]})
    assert (counts.kept, counts.dropped) == (7, {"below min_genes": 2, REPEATS: 2, NEAR: 1})
    # Converted again since.
    for other in ({"n_cells": 8}, {"source_hash": "y"}):
        counts = cell_counts([entry], {"datasets": [info | other]})
        assert (counts.kept, counts.dropped) == (10, {"below min_genes": 2})
    assert cell_counts([entry], {"datasets": [info | {"source_hash": None}]}).kept == 7
