"""Small datasets in every container that convert reads, written value by value from triples.

Sparse containers hold the triples as they come: unsorted, repeated, with explicit zeros. What a
dataset truly holds is added up here in plain Python.
"""

from __future__ import annotations

import csv
import gzip
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

ANNDATA = tuple(
    f"{file}_{layout}" for file in ("h5ad", "zarr2", "zarr3") for layout in ("csr", "csc", "dense")
)
CONTAINERS = (
    *ANNDATA,
    "tenx2",
    "tenx3",
    "mtx",
    "mtx_gz",
    "mtx_transposed",
    "loom",
    "npz_csr",
    "npz_csc",
    "csv_cells",
    "csv_genes_gz",
    "tsv_genes",
)
SPARSE = tuple(
    name for name in CONTAINERS if name.endswith(("csr", "csc")) or name.startswith(("tenx", "mtx"))
)
"""Containers that can hold a place twice."""
TEXT = tuple(name for name in CONTAINERS if name.startswith(("mtx", "csv", "tsv")))
WITH_OBS = (*ANNDATA, "loom")
WITH_TYPES = (*ANNDATA, "loom", "tenx3", "mtx", "mtx_gz", "mtx_transposed")
WITH_GENOMES = (*ANNDATA, "loom", "tenx3")
EXPRESSION = "Gene Expression"

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A dataset to write."""

    n_cells: int
    triples: Sequence[Triple]
    """(cell, feature, value), in the order in which they are stored."""
    ids: Sequence[str]
    """Name of each feature, in the first column that names them."""
    symbols: Sequence[str] | None = None
    """A second name of each."""
    types: Sequence[str] | None = None
    genomes: Sequence[str] | None = None
    dtype: str = "<i4"
    pointers: str = "<i8"
    """Type of index pointers and indices."""
    barcodes: Sequence[str] = ()
    obs: pd.DataFrame = field(default_factory=pd.DataFrame)
    layers: Mapping[str, Sequence[Triple]] = field(default_factory=dict)
    """Further matrices of AnnData, by where they lie (layers/NAME, raw.X)."""

    @property
    def names(self) -> list[str]:
        """Barcodes."""
        return list(self.barcodes or [f"cell{n}" for n in range(self.n_cells)])

    def totals(self, triples: Sequence[Triple] | None = None) -> dict[tuple[int, int], int]:
        """Return what every place holds, exactly."""
        places: Counter[tuple[int, int]] = Counter()
        for cell, feature, value in self.triples if triples is None else triples:
            places[cell, feature] += value
        return dict(places)

    def dense(self, triples: Sequence[Triple] | None = None) -> np.ndarray:
        """Return cells x features in the type of the file."""
        values = np.zeros((self.n_cells, len(self.ids)), dtype=self.dtype)
        for place, value in self.totals(triples).items():
            values[place] = value
        return values


def write(container: str, folder: Path, made: Made) -> Path:
    """Write a dataset; return the path for a manifest.

    Args:
        container: One of CONTAINERS.
        folder: An empty folder.
        made: What to write.
    """
    # A chunk of zeros that is not written looks like one that was lost, and is refused.
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
        warnings.simplefilter("ignore")
        if container in ANNDATA:
            return _write_anndata(container, folder, made)
        if container.startswith("tenx"):
            return _write_tenx(folder / "cells.h5", made, version=int(container[-1]))
        if container.startswith("mtx"):
            return _write_mtx(folder / "mtx", made, container)
        if container == "loom":
            return _write_loom(folder / "cells.loom", made)
        if container.startswith("npz"):
            return _write_npz(folder / "cells.npz", made, container[-3:])
        return _write_table(folder, made, container)


def _compressed(made: Made, triples: Sequence[Triple], *, by_cell: bool) -> dict[str, np.ndarray]:
    line, other = (0, 1) if by_cell else (1, 0)
    n_lines = made.n_cells if by_cell else len(made.ids)
    ordered = sorted(triples, key=lambda triple: triple[line])
    lengths = np.bincount([triple[line] for triple in ordered], minlength=n_lines)
    return {
        "data": np.array([triple[2] for triple in ordered], dtype=made.dtype),
        "indices": np.array([triple[other] for triple in ordered], dtype=made.pointers),
        "indptr": np.concatenate(([0], np.cumsum(lengths))).astype(made.pointers),
    }


def _put(group: Any, name: str, values: np.ndarray) -> Any:
    if isinstance(group, h5py.Group):
        return group.create_dataset(name, data=values)
    if len(values):
        return group.create_array(name, data=values)
    return group.create_array(name, shape=values.shape, dtype=values.dtype)


def _put_matrix(root: Any, where: str, made: Made, triples: Sequence[Triple], layout: str) -> None:
    if layout == "dense":
        array = _put(root, where, made.dense(triples))
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        return
    group = root.create_group(where)
    group.attrs.update({"encoding-type": f"{layout}_matrix", "encoding-version": "0.1.0"})
    shape = (made.n_cells, len(made.ids))
    group.attrs["shape"] = np.array(shape) if isinstance(root, h5py.Group) else list(shape)
    for name, values in _compressed(made, triples, by_cell=layout == "csr").items():
        _put(group, name, values)


def _write_anndata(container: str, folder: Path, made: Made) -> Path:
    file, layout = container.split("_")
    var = pd.DataFrame(index=pd.Index(list(made.ids), dtype=object))
    for name, values in (
        ("gene_symbols", made.symbols),
        ("feature_types", made.types),
        ("genome", made.genomes),
    ):
        if values is not None:
            var[name] = pd.Series(list(values), index=var.index, dtype=object)
    obs = made.obs.set_axis(pd.Index(made.names, dtype=object), axis=0)
    path = folder / ("cells.h5ad" if file == "h5ad" else "cells.zarr")
    is_hdf5 = file == "h5ad"
    version = {} if is_hdf5 else {"zarr_format": int(file[-1])}
    root = h5py.File(path, "w") if is_hdf5 else zarr.open_group(path, mode="w", **version)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    anndata.io.write_elem(root, "obs", obs)
    anndata.io.write_elem(root, "var", var)
    _put_matrix(root, "X", made, made.triples, layout)
    for where, triples in made.layers.items():
        place = "raw/X" if where == "raw.X" else where
        root.require_group(place.split("/")[0])
        _put_matrix(root, place, made, triples, layout)
        if where == "raw.X":
            anndata.io.write_elem(root, "raw/var", var)
    if is_hdf5:
        root.close()
    return path


def _bytes(texts: Sequence[str]) -> np.ndarray:
    return np.array([text.encode() for text in texts], dtype="S")


def _write_tenx(path: Path, made: Made, *, version: int) -> Path:
    with h5py.File(path, "w") as root:
        group = root.create_group("matrix" if version == 3 else "GRCh38")
        for name, values in _compressed(made, made.triples, by_cell=True).items():
            group[name] = values
        group["shape"] = np.array([len(made.ids), made.n_cells], dtype=np.int32)
        group["barcodes"] = _bytes(made.names)
        names = {"id": made.ids, "name": made.symbols or made.ids}
        if version == 2:
            group["genes"], group["gene_names"] = _bytes(names["id"]), _bytes(names["name"])
            return path
        features = group.create_group("features")
        columns = names | {"feature_type": made.types or [EXPRESSION] * len(made.ids)}
        columns |= {"genome": made.genomes or ["GRCh38"] * len(made.ids)}
        for name, texts in columns.items():
            features[name] = _bytes(texts)
        features["_all_tag_keys"] = _bytes(["genome"])
    return path


def _number(value: int, dtype: str) -> str:
    return str(value) if np.dtype(dtype).kind in "iu" else f"{value}.0"


def _write_mtx(path: Path, made: Made, container: str) -> Path:
    path.mkdir()
    kind = "integer" if np.dtype(made.dtype).kind in "iu" else "real"
    sizes = [len(made.ids), made.n_cells]
    places = [(feature + 1, cell + 1, value) for cell, feature, value in made.triples]
    if "transposed" in container:
        sizes, places = sizes[::-1], [(cell, feature, v) for feature, cell, v in places]
    lines = [f"%%MatrixMarket matrix coordinate {kind} general", "%"]
    lines += [" ".join(map(str, [*sizes, len(places)]))]
    lines += [f"{row} {column} {_number(value, made.dtype)}" for row, column, value in places]
    features: list[Sequence[str]] = [made.ids, made.symbols or made.ids]
    if made.types is not None:
        features.append(made.types)
    rows = ["\t".join(row) for row in zip(*features, strict=True)]
    parts = {
        "matrix.mtx": lines,
        "barcodes.tsv": made.names,
        "genes.tsv" if made.types is None else "features.tsv": rows,
    }
    for name, texts in parts.items():
        data = "".join(f"{text}\n" for text in texts).encode()
        packed = container.endswith("gz")
        (path / f"{name}{'.gz' * packed}").write_bytes(
            gzip.compress(data, mtime=0) if packed else data
        )
    return path


def _write_loom(path: Path, made: Made) -> Path:
    strings = h5py.string_dtype()
    with h5py.File(path, "w") as root:
        root["matrix"] = made.dense().T
        root.create_group("layers")
        for where, triples in made.layers.items():
            root[where] = made.dense(triples).T
        columns = {"Accession": made.ids, "Gene": made.symbols}
        columns |= {"feature_types": made.types, "genome": made.genomes}
        for name, texts in columns.items():
            if texts is not None:
                root.create_dataset(f"row_attrs/{name}", data=list(texts), dtype=strings)
        root.create_dataset("col_attrs/CellID", data=made.names, dtype=strings)
        for name in made.obs.columns:
            values = made.obs[name].to_numpy()
            options = {"dtype": strings} if values.dtype == object else {}
            root.create_dataset(f"col_attrs/{name}", data=values, **options)
    return path


def _write_npz(path: Path, made: Made, layout: str) -> Path:
    parts = _compressed(made, made.triples, by_cell=layout == "csr")
    np.savez_compressed(
        path, format=layout.encode(), shape=np.array([made.n_cells, len(made.ids)]), **parts
    )
    columns = [made.ids] if made.symbols is None else [made.ids, made.symbols]
    rows = ["\t".join(row) + "\n" for row in zip(*columns, strict=True)]
    path.with_name(f"{path.stem}.genes.tsv").write_text("".join(rows), encoding="utf-8")
    return path


def _write_table(folder: Path, made: Made, container: str) -> Path:
    kind = container[:3]
    values, lines, titles = made.dense(), made.names, list(made.ids)
    if "genes" in container:
        values, lines, titles = values.T, titles, lines
    text = io.StringIO()
    table = csv.writer(text, delimiter="," if kind == "csv" else "\t", lineterminator="\n")
    table.writerow(["", *titles])
    for name, row in zip(lines, values.tolist(), strict=True):
        table.writerow([name, *(_number(int(value), made.dtype) for value in row)])
    packed = container.endswith("gz")
    path = folder / f"cells.{kind}{'.gz' * packed}"
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return path


def scipy_sum(path: Path, layout: str) -> sparse.csr_matrix:
    """Return X of an h5ad or zarr, or an npz, added up by scipy in int64.

    Args:
        path: The file.
        layout: csr or csc.
    """
    make = sparse.csr_matrix if layout == "csr" else sparse.csc_matrix
    if path.suffix == ".npz":
        with np.load(path) as members:
            parts = [members[name] for name in ("data", "indices", "indptr")]
            shape = tuple(members["shape"])
    else:
        root = h5py.File(path) if path.is_file() else zarr.open_group(path, mode="r")
        parts = [root["X"][name][:] for name in ("data", "indices", "indptr")]
        shape = tuple(root["X"].attrs["shape"])
    data, *places = parts
    matrix = make((data.astype(np.int64), *(part.astype(np.int64) for part in places)), shape=shape)
    matrix.sum_duplicates()
    return matrix.tocsr()
