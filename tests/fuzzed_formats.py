"""Small matrices written in every format, and read by readers that share no code with ours."""

from __future__ import annotations

import csv
import gzip
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import hdf5plugin
import numpy as np
import pandas as pd
import zarr
from scipy import io, sparse


def write_anndata(path: Path, values: np.ndarray, make: Callable[[np.ndarray], Any]) -> Path:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(values.shape[0])])
    var = pd.DataFrame(index=[f"G{i}" for i in range(values.shape[1])])
    adata = anndata.AnnData(make(values), obs=obs, var=var)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".zarr":
            with anndata.settings.override(zarr_write_format=3 if "v3" in path.name else 2):
                adata.write_zarr(path)
        else:
            adata.write_h5ad(path, compression="gzip" if "gz" in path.name else None)
    return path


def write_mudata(path: Path, values: np.ndarray) -> Path:
    part = write_anndata(path.with_name("part.h5ad"), values, sparse.csr_matrix)
    with h5py.File(part) as source, h5py.File(path, "w") as root:
        source.copy(source, root, "mod/rna")
    part.unlink()
    return path


def write_zstd(path: Path, values: np.ndarray) -> Path:
    write_anndata(path, values, sparse.csr_matrix)
    with h5py.File(path, "r+") as root:
        for name in ("data", "indices"):
            stored = root["X"][name][:]
            del root["X"][name]
            root["X"].create_dataset(
                name, data=stored, chunks=(5,), maxshape=(None,), **hdf5plugin.Zstd()
            )
    return path


def write_zip(path: Path, values: np.ndarray) -> Path:
    folder = write_anndata(path.with_name("part_v3.zarr"), values, sparse.csr_matrix)
    shutil.make_archive(str(path.with_suffix("")), "zip", folder)
    shutil.rmtree(folder)
    return path


def write_spatialdata(path: Path, values: np.ndarray) -> Path:
    part = write_anndata(path.with_name("part_v3.zarr"), values, sparse.csr_matrix)
    zarr.open_group(path, mode="w").create_group("tables")
    part.rename(path / "tables" / "table")
    return path


def write_tenx(path: Path, values: np.ndarray) -> Path:
    packed = sparse.csr_matrix(values)
    with h5py.File(path, "w") as root:
        where = "matrix" if "v3" in path.name else "GRCh38"
        for name in ("data", "indices", "indptr"):
            root[f"{where}/{name}"] = getattr(packed, name)
        root[f"{where}/shape"] = values.shape[::-1]
        root[f"{where}/barcodes"] = np.array([f"cell{i}" for i in range(len(values))], "S8")
        genes = np.array([f"G{i}" for i in range(values.shape[1])], "S8")
        if where == "matrix":
            for name in ("id", "name"):
                root[f"matrix/features/{name}"] = genes
            types = np.array(["Gene Expression"] * len(genes), "S15")
            root["matrix/features/feature_type"] = types
        else:
            root["GRCh38/genes"] = genes
    return path


def write_mtx(path: Path, values: np.ndarray) -> Path:
    path.mkdir()
    field = "integer" if values.dtype.kind in "iu" else "real"
    text = path / "text.mtx"
    io.mmwrite(text, sparse.coo_matrix(values.T), field=field, symmetry="general", precision=17)
    parts = {
        "matrix.mtx": text.read_bytes(),
        "barcodes.tsv": "".join(f"cell{i}\n" for i in range(len(values))).encode(),
        "features.tsv" if "v3" in path.name else "genes.tsv": "".join(
            f"G{i}\tG{i}" + ("\tGene Expression\n" if "v3" in path.name else "\n")
            for i in range(values.shape[1])
        ).encode(),
    }
    text.unlink()
    for name, data in parts.items():
        packed = "gz" in path.name
        data = gzip.compress(data, mtime=0) if packed else data
        (path / f"{name}{'.gz' if packed else ''}").write_bytes(data)
    return path


def write_loom(path: Path, values: np.ndarray) -> Path:
    with h5py.File(path, "w") as root:
        options = {"compression": "gzip", "chunks": True} if "gz" in path.name else {}
        root.create_dataset("matrix", data=values.T, **options)
        root["row_attrs/Gene"] = [f"G{i}" for i in range(values.shape[1])]
        root["col_attrs/CellID"] = [f"cell{i}" for i in range(len(values))]
    return path


def write_npz(path: Path, values: np.ndarray) -> Path:
    make = sparse.csc_matrix if "csc" in path.name else sparse.csr_matrix
    sparse.save_npz(path, make(values), compressed="raw" not in path.name)
    names = "".join(f"G{i}\n" for i in range(values.shape[1]))
    path.with_name(f"{path.stem}.genes.txt").write_text(names)
    return path


def write_table(path: Path, values: np.ndarray) -> Path:
    cells = [f"cell{i}" for i in range(len(values))]
    frame = pd.DataFrame(values, index=cells, columns=[f"G{i}" for i in range(values.shape[1])])
    frame = frame.T if "genes" in path.name else frame
    text = frame.to_csv(sep="\t" if ".tsv" in path.name else ",").encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


def read_anndata(path: Path) -> tuple[np.ndarray, list[str]]:
    read = anndata.read_zarr if path.is_dir() else anndata.read_h5ad
    adata = read(path)
    dense = adata.X.toarray() if sparse.issparse(adata.X) else np.asarray(adata.X)
    return dense, list(adata.var_names)


def read_mudata(path: Path) -> tuple[np.ndarray, list[str]]:
    with h5py.File(path) as root:
        adata = anndata.io.read_elem(root["mod/rna"])
    return adata.X.toarray(), list(adata.var_names)


def read_spatialdata(path: Path) -> tuple[np.ndarray, list[str]]:
    return read_anndata(path / "tables" / "table")


def read_tenx(path: Path) -> tuple[np.ndarray, list[str]]:
    with h5py.File(path) as root:
        group = root["matrix" if "matrix" in root else "GRCh38"]
        parts = tuple(group[name][:] for name in ("data", "indices", "indptr"))
        names = group["features/id"][:] if "features" in group else group["genes"][:]
        # A pointer or an index outside the matrix makes scipy read foreign memory.
        matrix = sparse.csr_matrix(parts, shape=tuple(group["shape"][:])[::-1])
        matrix.check_format(full_check=True)
        return matrix.toarray(), [name.decode() for name in names]


def read_mtx(path: Path) -> tuple[np.ndarray, list[str]]:
    names = (path / "features.tsv").read_text().splitlines()
    cells, genes = [], []
    lines = (path / "matrix.mtx").read_bytes().splitlines()
    lines = [line for line in lines[1:] if not line.startswith(b"%") and line.strip()]
    n_genes, n_cells, number = map(int, lines[0].split())
    fields = [line.split() for line in lines[1:]]
    if len(fields) != number or {len(line) for line in fields} - {3}:
        raise ValueError("number of entries")
    genes, cells = ([int(line[k]) - 1 for line in fields] for k in (0, 1))
    if fields and (min(genes) < 0 or min(cells) < 0):
        raise ValueError("an index below 1")
    dense = np.zeros((n_cells, n_genes))
    np.add.at(dense, (cells, genes), [float(line[2]) for line in fields])
    return dense, [name.split("\t")[0] for name in names]


def read_loom(path: Path) -> tuple[np.ndarray, list[str]]:
    with h5py.File(path) as root:
        names = [name.decode() for name in root["row_attrs/Gene"][:]]
        return root["matrix"][:].T, names


def read_table(path: Path) -> tuple[np.ndarray, list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t" if ".tsv" in path.name else ",")
    # As R writes it, without a name for the first column.
    if len(rows[0]) == len(header) + 1 and header[0].strip():
        header = ["", *header]
    if {len(row) for row in rows} != {len(header)}:
        raise ValueError("unequal lines")
    values = np.array([[float(field) for field in row[1:]] for row in rows])
    names = [row[0] for row in rows]
    return (values.T, names) if "genes" in path.name else (values, header[1:])


def as_anndata(make: Callable[[np.ndarray], Any]) -> Callable[[Path, np.ndarray], Path]:
    return lambda path, values: write_anndata(path, values, make)


Read = Callable[[Path], tuple[np.ndarray, list[str]]]
Write = Callable[[Path, np.ndarray], Path]
FORMATS: dict[str, tuple[Write, Read | None]] = {
    "csr.h5ad": (as_anndata(sparse.csr_matrix), read_anndata),
    "csr_gz.h5ad": (as_anndata(sparse.csr_matrix), read_anndata),
    "zstd.h5ad": (write_zstd, read_anndata),
    "csr.h5mu": (write_mudata, read_mudata),
    "csc.h5ad": (as_anndata(sparse.csc_matrix), read_anndata),
    "dense.h5ad": (as_anndata(np.asarray), read_anndata),
    "csr.zarr": (as_anndata(sparse.csr_matrix), read_anndata),
    "csr_v3.zarr": (as_anndata(sparse.csr_matrix), read_anndata),
    "csc.zarr": (as_anndata(sparse.csc_matrix), read_anndata),
    "dense_v3.zarr": (as_anndata(np.asarray), read_anndata),
    "csr.zarr.zip": (write_zip, None),
    "table.zarr": (write_spatialdata, read_spatialdata),
    "v2.h5": (write_tenx, read_tenx),
    "v3.h5": (write_tenx, read_tenx),
    "v2_mtx_gz": (write_mtx, None),
    "v3_mtx": (write_mtx, read_mtx),
    "v3_mtx_gz": (write_mtx, None),
    "plain.loom": (write_loom, read_loom),
    "gz.loom": (write_loom, read_loom),
    "csr.npz": (write_npz, None),
    "csc.npz": (write_npz, None),
    "csr_raw.npz": (write_npz, None),
    "cells.csv": (write_table, read_table),
    "genes.tsv": (write_table, read_table),
    "genes.csv.gz": (write_table, None),
}
"""Name of the file: its writer, and the independent reader where the format has no checksum."""
