"""A corpus folder as convert leaves it, from matrices that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_prep.ledger.ledger import empty_entry, staged_files, write_entry
from data_prep.source.measured import MEASURED, pack
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.obs_table import write_obs

N_GENES = 600


def random_counts(seed: int, n_cells: int, n_genes: int = N_GENES) -> sparse.csr_matrix:
    """Counts of about 60 genes a cell, some above one byte; no two cells alike."""
    rng = np.random.default_rng(seed)
    matrix = sparse.random(n_cells, n_genes, density=0.1, format="csr", random_state=rng)
    matrix.data = rng.choice([1, 1, 1, 2, 3, 7, 255, 256, 70_000], size=matrix.nnz)
    matrix.sort_indices()
    return matrix


StageCorpus = Callable[..., Path]


@pytest.fixture
def stage_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageCorpus:
    """Return a function that writes settings, genes, ledger and staging of given datasets."""
    # Flushing hundreds of tiny files takes most of a test's time, and no test cuts the power.
    monkeypatch.setattr("os.fsync", lambda handle: None)

    def stage(
        datasets: Mapping[str, sparse.csr_matrix],
        *,
        donors: Mapping[str, Sequence[str]] | None = None,
        measured: Mapping[str, np.ndarray] | None = None,
        obs: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        not_ok: Mapping[str, str] | None = None,
        name: str = "corpus",
        chunk_entries: int = 4096,
    ) -> Path:
        corpus = tmp_path / name
        (corpus / "ledger").mkdir(parents=True)
        ids = tuple(f"ENSG{i:011d}" for i in range(N_GENES))
        genes = GeneVocabulary(
            ids, tuple(f"G{i}" for i in range(N_GENES)), ("non_coding",) * N_GENES
        )
        genes.write(corpus / "genes.tsv")
        (corpus / "settings.json").write_text(json.dumps({"genes_hash": genes.hash}))
        for dataset_id, matrix in datasets.items():
            folder = corpus / "staging" / dataset_id
            folder.mkdir(parents=True)
            with CellWriter(
                folder / "cells.zarr",
                n_genes=N_GENES,
                chunk_entries=chunk_entries,
                chunks_per_shard=4,
            ) as writer:
                # Odd rows only: the source had cells that were not staged.
                writer.append(matrix, source={"source_row": 2 * np.arange(matrix.shape[0]) + 1})
            table = {"barcode": [f"{dataset_id}-{row}" for row in range(matrix.shape[0])]}
            if donors and dataset_id in donors:
                table["donor"] = list(donors[dataset_id])
            table |= {name: list(texts) for name, texts in (obs or {}).get(dataset_id, {}).items()}
            write_obs(folder / "obs.parquet", pd.DataFrame(table))
            genes_of = (measured or {}).get(dataset_id, np.ones(N_GENES, bool))
            np.save(folder / MEASURED, pack(genes_of))
            entry = empty_entry(
                dataset_id, Path("x.h5ad"), organism="human", tissue="blood", settings_hash="s"
            )
            n_cells = matrix.shape[0]
            entry |= {"status": "ok", "n_cells": n_cells, "files": staged_files(folder)}
            entry["n_cells_input"] = 2 * n_cells
            write_entry(corpus, entry)
        for dataset_id, status in (not_ok or {}).items():
            entry = empty_entry(
                dataset_id, Path("y.h5ad"), organism="human", tissue="", settings_hash="s"
            )
            entry |= {"status": status, "reason": "some reason"}
            write_entry(corpus, entry)
        return corpus

    return stage


@pytest.fixture
def counts() -> Callable[..., sparse.csr_matrix]:
    """Return the function that draws count matrices."""
    return random_counts


@pytest.fixture
def three(counts: Callable[..., sparse.csr_matrix]) -> dict[str, sparse.csr_matrix]:
    return {"a": counts(1, 240), "b": counts(2, 126), "c": counts(3, 64)}
