"""Small h5ad files of 20 cells and 300 genes, converted in this process."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from data_prep.convert.one_dataset import convert_dataset
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry
from data_prep.manifest.manifest import Dataset
from data_prep.staging.settings import Settings
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.obs_table import read_obs

GENES = GeneVocabulary.bundled()
SETTINGS = Settings(genes_hash=GENES.hash)
N_CELLS, N_GENES = 20, 300


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


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a corpus folder but those that killed runs leave unnamed."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }
