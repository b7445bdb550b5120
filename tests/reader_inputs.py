"""Matrices of all formats for the tests of readers."""

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import io, sparse

from data_prep.readers.open import open_source
from data_prep.source.source import (
    Source,
)

N_CELLS = 7


N_GENES = 11


COUNTS = np.random.default_rng(3).poisson(0.7, (N_CELLS, N_GENES)).astype(np.int32)


CELLS = [f"cell{i}" for i in range(N_CELLS)]


GENES = [f"G{i}" for i in range(N_GENES)]


def gene_share(names: np.ndarray) -> float:
    return float(np.mean([str(name).startswith("G") for name in names]))


def opened(path: Path, **options: str) -> Source:
    return open_source(path, gene_share=gene_share, **options)


def values(found: Source, name: str = "X") -> np.ndarray:
    matrix = next(matrix for matrix in found.matrices if matrix.name == name)
    return sparse.vstack(list(matrix.blocks())).toarray()


def table(matrix: object = COUNTS) -> anndata.AnnData:
    var = pd.DataFrame({"name": [f"n{i}" for i in range(N_GENES)]}, index=GENES)
    obs = pd.DataFrame({"donor": ["a", "b", "a", "b", "a", "b", "a"]}, index=CELLS)
    obs["donor"] = obs["donor"].astype("category")
    return anndata.AnnData(matrix, obs=obs, var=var)


def write_tenx_v3(path: Path, genomes: list[str], types: list[str]) -> Path:
    packed = sparse.csr_matrix(COUNTS)
    with h5py.File(path, "w") as root:
        group = root.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(packed, name)
        group["shape"], group["barcodes"] = [N_GENES, N_CELLS], np.array(CELLS, dtype="S")
        for name, column in (("id", GENES), ("name", GENES), ("genome", genomes)):
            group[f"features/{name}"] = np.array(column, dtype="S")
        group["features/feature_type"] = np.array(types, dtype="S")
    return path


def write_mtx(folder: Path, *, version: int, packed: bool = False, prefix: str = "") -> Path:
    folder.mkdir()
    io.mmwrite(folder / "m.mtx", sparse.coo_matrix(COUNTS.T), field="integer", symmetry="general")
    tail = "\tGene Expression" if version == 3 else ""
    parts = {
        "matrix.mtx": (folder / "m.mtx").read_text(),
        "barcodes.tsv": "".join(f"{name}\n" for name in CELLS),
        ("features.tsv" if version == 3 else "genes.tsv"): "".join(
            f"{name}\t{name}{tail}\n" for name in GENES
        ),
    }
    (folder / "m.mtx").unlink()
    for name, text in parts.items():
        data = gzip.compress(text.encode()) if packed else text.encode()
        (folder / f"{prefix}{name}{'.gz' if packed else ''}").write_bytes(data)
    return folder


def write_loom(path: Path) -> Path:
    with h5py.File(path, "w") as root:
        root["matrix"] = COUNTS.T
        root["layers/spliced"] = COUNTS.T + 1
        root["row_attrs/Gene"] = GENES
        root["row_attrs/length"] = np.arange(N_GENES)
        root["row_attrs/map/x"], root["col_attrs/map/x"] = 1, 1
        root["col_attrs/CellID"] = CELLS
        root["col_attrs/donor"] = [f"d{i % 2}" for i in range(N_CELLS)]
    return path


def table_text(separator: str, *, genes_in_rows: bool, corner: bool = True) -> str:
    rows, columns, data = (GENES, CELLS, COUNTS.T) if genes_in_rows else (CELLS, GENES, COUNTS)
    lines = [([""] if corner else []) + columns]
    lines += [[row, *map(str, line)] for row, line in zip(rows, data, strict=True)]
    return "".join(separator.join(line) + "\n" for line in lines)
