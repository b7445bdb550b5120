"""Reader of AnnData files: h5ad and zarr of all versions; X, raw.X and layers, sparse or dense."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem

from data_prep.readers_arrays import (
    Open,
    csc_blocks,
    csr_blocks,
    dense_matrix_blocks,
    require_whole,
)
from data_prep.readers_hdf5 import decoded, objects
from data_prep.source import Matrix, Source, StringArray


def open_h5ad(path: Path, *, scratch: Path | None) -> Source:
    """Open an AnnData HDF5 file.

    Args:
        path: The file.
        scratch: See `readers.open_source`.
    """

    def opened() -> AbstractContextManager[Any]:
        return h5py.File(path)

    return _open_anndata(path, "h5ad", opened, scratch)


def open_zarr(path: Path, *, scratch: Path | None) -> Source:
    """Open an AnnData zarr folder.

    Args:
        path: The folder.
        scratch: See `readers.open_source`.
    """

    def opened() -> AbstractContextManager[Any]:
        return nullcontext(zarr.open_group(path, mode="r"))

    return _open_anndata(path, "zarr", opened, scratch)


def _open_anndata(path: Path, format: str, opened: Open, scratch: Path | None) -> Source:
    with opened() as root:
        if "obs" not in root or "var" not in root:
            raise ValueError(
                f"not AnnData: it holds {', '.join(sorted(root))}, expected obs and var"
            )
        obs, var = _frame(root, "obs"), _gene_columns(_frame(root, "var"))
        places = [("X", "X", var)] if "X" in root else []
        # Before AnnData 0.7 the raw matrix was stored as the groups "raw.X" and "raw.var".
        for where, frame in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
            if where in root and frame in root:
                places.append(("raw.X", where, _gene_columns(_frame(root, frame))))
        layers = sorted(root["layers"]) if "layers" in root else []
        places += [(f"layers/{name}", f"layers/{name}", var) for name in layers]
        matrices = [
            _matrix(root, opened, name, where, genes, scratch) for name, where, genes in places
        ]
    if not matrices:
        raise ValueError("the file holds no matrix: no X, raw.X or layers")
    for matrix in matrices:
        if matrix.shape != (len(obs), len(matrix.gene_columns["index"])):
            raise ValueError(
                f"{matrix.name} has the shape {matrix.shape}, "
                f"but there are {len(obs)} cells in obs "
                f"and {len(matrix.gene_columns['index'])} genes"
            )
    return Source(
        path=path,
        format=format,
        barcodes=objects(obs.index),
        obs=obs.reset_index(drop=True),
        matrices=tuple(matrices),
    )


def _frame(root: Any, name: str) -> pd.DataFrame:
    """Read obs or var, in the layouts of all AnnData versions."""
    element = root[name]
    index_name = str(element.attrs.get("_index", "_index"))
    if getattr(element, "dtype", None) is not None and element.dtype.names:
        table = element[()]
        columns = {column: decoded(table[column]) for column in table.dtype.names}
        index = columns.pop("index" if "index" in columns else table.dtype.names[0])
        return pd.DataFrame(columns, index=pd.Index(index, dtype=object))
    if index_name in element:
        require_whole(element[index_name], f"{name}/{index_name}")
    with warnings.catch_warnings():
        # Files of AnnData before 0.7 are read all the same.
        warnings.filterwarnings(
            "ignore", message="Element '.*' was written without encoding metadata"
        )
        warnings.filterwarnings("ignore", category=FutureWarning, module="anndata")
        frame = read_elem(element)
    if isinstance(frame, pd.DataFrame):
        return frame
    columns = {
        str(column): decoded(values) for column, values in frame.items() if np.ndim(values) == 1
    }
    if index_name not in columns:
        raise ValueError(f"{name} has no index column '{index_name}'")
    index = columns.pop(index_name)
    return pd.DataFrame(columns, index=pd.Index(index, dtype=object))


def _gene_columns(var: pd.DataFrame) -> dict[str, StringArray]:
    """Return the index and all text columns of a gene table."""
    columns = {"index": objects(var.index)}
    for name in var.columns:
        values = var[name]
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = values.astype(object)
        if values.dtype == object or isinstance(values.dtype, pd.StringDtype):
            columns[str(name)] = objects(values.fillna(""))
    return columns


def _matrix(
    root: Any,
    opened: Open,
    name: str,
    where: str,
    genes: Mapping[str, StringArray],
    scratch: Path | None,
) -> Matrix:
    element = root[where]
    if hasattr(element, "shape"):
        if len(element.shape) != 2:
            raise ValueError(f"{name} has {len(element.shape)} dimensions, expected 2")
        shape = (int(element.shape[0]), int(element.shape[1]))
        blocks = dense_matrix_blocks(opened, where, shape, cell_axis=0, scratch=scratch)
        return Matrix(name=name, shape=shape, gene_columns=genes, blocks=blocks)
    attributes = dict(element.attrs)
    kind = attributes.get("encoding-type", attributes.get("h5sparse_format", ""))
    kind = str(kind.decode() if isinstance(kind, bytes) else kind).removesuffix("_matrix")
    stored = attributes.get("shape", attributes.get("h5sparse_shape"))
    if kind not in ("csr", "csc") or stored is None:
        raise ValueError(
            f"{name} is stored as '{kind or 'unknown'}'; supported: dense, csr_matrix, csc_matrix"
        )
    shape = (int(stored[0]), int(stored[1]))
    blocks = (
        csr_blocks(opened, where, shape)
        if kind == "csr"
        else csc_blocks(opened, where, shape, scratch=scratch)
    )
    return Matrix(name=name, shape=shape, gene_columns=genes, blocks=blocks)
