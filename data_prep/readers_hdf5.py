"""Readers of 10x Genomics HDF5 and loom files, and what an HDF5 file is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from data_prep.features import pick_genome
from data_prep.readers_arrays import csr_blocks, dense_matrix_blocks
from data_prep.source import Matrix, Source, StringArray

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CELL_NAMES = ("CellID", "obs_names", "cell_id", "barcode", "barcodes", "Barcode")


def hdf5_kind(path: Path) -> str:
    """Return h5ad, 10x_h5 or loom.

    Args:
        path: A file with the HDF5 signature.

    Raises:
        ValueError: The file cannot be opened, or holds something else.
    """
    try:
        with h5py.File(path) as root:
            names = set(root)
            if "row_attrs" in names and "matrix" in names:
                return "loom"
            if "obs" in names and "var" in names:
                return "h5ad"
            if isinstance(root.get("matrix"), h5py.Group) or _genome_groups(root):
                return "10x_h5"
    except OSError as error:
        raise ValueError(f"a damaged HDF5 file, most likely cut short ({error})") from error
    raise ValueError(
        f"an HDF5 file with {', '.join(sorted(names)[:6]) or 'nothing'}; "
        "expected AnnData (X, obs, var), 10x (matrix, or a group per genome) "
        "or loom (matrix, row_attrs)"
    )


def _genome_groups(root: Any) -> list[str]:
    """Return the groups of a version 2 file, one per genome."""
    needed = {"barcodes", "data", "indices", "indptr", "shape"}
    return [
        name for name in root if isinstance(root[name], h5py.Group) and needed <= set(root[name])
    ]


def open_tenx(path: Path, *, genome: str) -> Source:
    """Open a 10x Genomics HDF5 file, version 2 or 3.

    Args:
        path: The file.
        genome: See `readers.open_source`; of version 2, which keeps each in a group of its own.

    Raises:
        UnusableError: Several genomes.
        ValueError: Sizes that do not fit.
    """
    with h5py.File(path) as root:
        if "matrix" in root:
            where, genes = "matrix", _tenx_features(root["matrix"]["features"])
        else:
            where = pick_genome(_genome_groups(root), genome)
            group = root[where]
            genes = {"genes": _strings(group["genes"])}
            if "gene_names" in group:
                genes["gene_names"] = _strings(group["gene_names"])
            genes["genome"] = np.full(len(genes["genes"]), where, dtype=object)
        barcodes = _strings(root[where]["barcodes"])
        # 10x stores genes x cells by column, which is cells x genes by row.
        n_genes, n_cells = (int(size) for size in root[where]["shape"][:])
    n_named = len(next(iter(genes.values())))
    unequal = any(len(values) != n_named for values in genes.values())
    if n_cells != len(barcodes) or n_named != n_genes or unequal:
        raise ValueError(
            f"the matrix has {n_genes} genes and {n_cells} cells, "
            f"but {n_named} genes and {len(barcodes)} barcodes are named"
        )
    shape = (n_cells, n_genes)
    blocks = csr_blocks(lambda: h5py.File(path), where, shape)
    matrix = Matrix(name="X", shape=shape, gene_columns=genes, blocks=blocks)
    return Source(
        path=path, format="10x_h5", barcodes=barcodes, obs=_no_obs(barcodes), matrices=(matrix,)
    )


def _tenx_features(features: Any) -> dict[str, StringArray]:
    """Return names, types and genomes of the features of a version 3 file."""
    columns = {"id": _strings(features["id"]), "name": _strings(features["name"])}
    for name in ("feature_type", "genome"):
        if name in features:
            columns[name] = _strings(features[name])
    return columns


def open_loom(path: Path, *, scratch: Path | None) -> Source:
    """Open a loom file.

    Args:
        path: The file.
        scratch: See `readers.open_source`.

    Raises:
        ValueError: No names of genes, or layers of another shape.
    """

    def opened() -> AbstractContextManager[Any]:
        return h5py.File(path)

    with opened() as root:
        n_genes, n_cells = (int(size) for size in root["matrix"].shape)
        genes = {
            name: values
            for name, values in _attributes(root["row_attrs"], n_genes).items()
            if values.dtype == object
        }
        cells = _attributes(root["col_attrs"], n_cells)
        layers = sorted(root["layers"]) if "layers" in root else []
        places = {"X": "matrix"} | {f"layers/{name}": f"layers/{name}" for name in layers}
        for name, where in places.items():
            if root[where].shape != (n_genes, n_cells):
                raise ValueError(f"{name} has the shape {root[where].shape}, not that of matrix")
    if not genes and n_genes:
        raise ValueError("the row attributes name no genes; expected Gene or Accession")
    named = next((name for name in _CELL_NAMES if name in cells), None)
    barcodes = objects(cells.pop(named)) if named else objects(map(str, range(n_cells)))
    shape = (n_cells, n_genes)
    return Source(
        path=path,
        format="loom",
        barcodes=barcodes,
        obs=pd.DataFrame(cells, index=range(n_cells)),
        matrices=tuple(
            Matrix(
                name=name,
                shape=shape,
                gene_columns=genes,
                blocks=dense_matrix_blocks(opened, where, shape, cell_axis=1, scratch=scratch),
            )
            for name, where in places.items()
        ),
    )


def _attributes(group: Any, size: int) -> dict[str, npt.NDArray[Any]]:
    """Return the one-dimensional attributes of a loom file, texts as objects."""
    return {name: decoded(values[:]) for name, values in group.items() if values.shape == (size,)}


def _no_obs(barcodes: StringArray) -> pd.DataFrame:
    return pd.DataFrame(index=range(len(barcodes)))


def _strings(dataset: Any) -> StringArray:
    return objects(decoded(dataset[:]))


def decoded(values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return texts of any storage as an object array of str; numbers as they are.

    Args:
        values: Bytes (UTF-8), texts or numbers.
    """
    found = np.asarray(values)
    if found.dtype.kind not in "SUO":
        return found
    return objects(value.decode("utf-8") if isinstance(value, bytes) else value for value in found)


def objects(values: Iterable[object]) -> StringArray:
    """Return values as an object array of str.

    Args:
        values: Of any type.
    """
    return np.array([str(value) for value in values], dtype=object)
