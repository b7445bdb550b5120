"""Readers of 10x Genomics HDF5 and loom files, and what an HDF5 file is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from data_prep.readers.arrays import (
    Open,
    csr_blocks,
    dense_matrix_blocks,
    part_inside,
    require_inside,
    require_whole,
)
from data_prep.readers.columns import decoded, objects
from data_prep.readers.containers import (
    HDF5_SIGNATURE,
    failed_call,
    hdf5_file,
    hdf5_root,
    writer_note,
)
from data_prep.source.features import is_kind_column, pick_genome, require_names_only
from data_prep.source.source import (
    Annotations,
    Matrix,
    Reading,
    Source,
    StringArray,
    check_size,
)

_OTHER_FILES = (
    (
        {"barcode_idx", "count", "feature_idx"},
        "a molecule_info.h5 of Cell Ranger, which lists molecules; give the "
        "filtered_feature_bc_matrix.h5 (or folder) of the same run",
    ),
    (
        {"barcode", "umi", "gene"},
        "a molecule_info.h5 of Cell Ranger 2, which lists molecules; give the "
        "filtered_gene_bc_matrices_h5.h5 (or folder) of the same run",
    ),
    (
        {"assays", "cell.names"},
        "a SeuratDisk h5seurat file; write h5ad with SeuratDisk::Convert(FILE, dest = 'h5ad')",
    ),
)
"""What lies at the top of files that hold no matrix that is read, and what to do."""
_CELL_NAMES = ("CellID", "obs_names", "cell_id", "barcode", "barcodes", "Barcode")


def hdf5_kind(path: Path) -> str:
    """Return h5ad, 10x_h5 or loom.

    Args:
        path: A file with the HDF5 signature.

    Raises:
        ValueError: The file cannot be opened, or holds something else.
    """
    with hdf5_file(path) as root:
        names = set(root)
        if "row_attrs" in names and "matrix" in names:
            return "loom"
        if {"obs", "var"} <= names or ("mod" in names and "X" not in names):
            return "h5ad"
        if isinstance(root.get("matrix"), h5py.Group) or _genome_groups(root):
            return "10x_h5"
    for marks, what in _OTHER_FILES:
        if marks <= names:
            raise ValueError(what)
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


def tell(path: Path, start: bytes | None) -> str | None:
    """Return 10x_h5 or loom if the content is one, else None.

    Args:
        path: File or folder.
        start: The first bytes of a file, of a compressed one decompressed; None for a folder.
    """
    if start is None or not start.startswith(HDF5_SIGNATURE):
        return None
    kind = hdf5_kind(path)
    return None if kind == "h5ad" else kind


def open_format(path: Path, format: str, reading: Reading) -> Source:
    """Open a dataset of a format that `tell` returned.

    Args:
        path: File or folder.
        format: The format.
        reading: How to read it.
    """
    if format == "loom":
        return open_loom(path, scratch=reading.scratch)
    return open_tenx(path, genome=reading.genome)


def open_tenx(path: Path, *, genome: str) -> Source:
    """Open a 10x Genomics HDF5 file, version 2 or 3.

    Args:
        path: The file.
        genome: See `readers.open_source`; of version 2, which keeps each in a group of its own.

    Raises:
        UnusableError: Several genomes.
        ValueError: Sizes that do not fit.
    """
    notes = writer_note(path)
    with hdf5_file(path) as root:
        require_inside(root, "matrix")
        if "matrix" in root:
            where, genes = "matrix", _tenx_features(root["matrix"])
        else:
            where = pick_genome(_genome_groups(root), genome)
            group = part_inside(root, where)
            genes = {"genes": _strings(group, "genes")}
            if "gene_names" in group:
                genes["gene_names"] = _strings(group, "gene_names")
            genes["genome"] = np.full(len(genes["genes"]), where, dtype=object)
        barcodes = _strings(root[where], "barcodes")
        # 10x stores genes x cells by column, which is cells x genes by row.
        n_genes, n_cells = (int(size) for size in part_inside(root, f"{where}/shape")[:])
    n_named = len(next(iter(genes.values())))
    unequal = any(len(values) != n_named for values in genes.values())
    if n_cells != len(barcodes) or n_named != n_genes or unequal:
        raise ValueError(
            f"the matrix has {n_genes} genes and {n_cells} cells, "
            f"but {n_named} genes and {len(barcodes)} barcodes are named"
        )
    shape = (n_cells, n_genes)
    check_size(*shape)
    blocks, ranges = csr_blocks(hdf5_root(path), where, shape)
    matrix = Matrix(name="X", shape=shape, gene_columns=genes, blocks=blocks, ranges=ranges)
    return Source(
        path=path,
        format="10x_h5",
        barcodes=barcodes,
        obs=Annotations(n_cells, {}),
        matrices=(matrix,),
        notes=notes,
    )


def _tenx_features(matrix: Any) -> dict[str, StringArray]:
    """Return names, types and genomes of the features of a version 3 file."""
    features = part_inside(matrix, "features")
    columns = {"id": _strings(features, "id"), "name": _strings(features, "name")}
    for name in ("feature_type", "genome"):
        if name in features:
            columns[name] = _strings(features, name)
    return columns


def open_loom(path: Path, *, scratch: Path | None) -> Source:
    """Open a loom file.

    Args:
        path: The file.
        scratch: See `readers.open_source`.

    Raises:
        ValueError: No names of genes, or layers of another shape.
    """
    notes = writer_note(path)
    opened = hdf5_root(path)
    with opened() as root:
        require_inside(root, "matrix")
        n_genes, n_cells = _loom_shape(root["matrix"])
        # Genes first: cells may be many more, and what names them is read only if it fits.
        genes, unread = _gene_names(part_inside(root, "row_attrs"), n_genes)
        notes |= unread
        layers = sorted(part_inside(root, "layers")) if "layers" in root else []
        places = {"X": "matrix"} | {f"layers/{name}": f"layers/{name}" for name in layers}
        for name, where in places.items():
            if part_inside(root, where).shape != (n_genes, n_cells):
                raise ValueError(f"{name} has the shape {root[where].shape}, not that of matrix")
        attributes = part_inside(root, "col_attrs")
        # Those that are no lists stay: they cannot be read where they are asked for.
        cells = list(attributes)
        named = next((n for n in _CELL_NAMES if _is_list(attributes.get(n), n_cells)), None)
        if named is None:
            require_whole(root["matrix"], "matrix")
            barcodes = objects(map(str, range(n_cells)))
        else:
            barcodes = objects(_whole_attribute(root["col_attrs"], named))
    if not genes and n_genes:
        raise ValueError("the row attributes name no genes; expected Gene or Accession")
    shape = (n_cells, n_genes)
    found = {
        name: dense_matrix_blocks(opened, where, shape, cell_axis=1, scratch=scratch)
        for name, where in places.items()
    }
    return Source(
        path=path,
        format="loom",
        barcodes=barcodes,
        obs=_loom_obs(opened, [name for name in cells if name != named], n_cells),
        matrices=tuple(
            Matrix(name=name, shape=shape, gene_columns=genes, blocks=blocks, ranges=ranges)
            for name, (blocks, ranges) in found.items()
        ),
        notes=notes,
    )


def _loom_shape(matrix: Any) -> tuple[int, int]:
    if len(matrix.shape) != 2:
        raise ValueError(f"matrix has {len(matrix.shape)} dimensions, expected 2")
    n_genes, n_cells = (int(size) for size in matrix.shape)
    check_size(n_cells, n_genes)
    return n_genes, n_cells


def _gene_names(group: Any, n_genes: int) -> tuple[dict[str, StringArray], dict[str, str]]:
    """Return the text attributes of the genes, and why others cannot be read."""
    found, notes = {}, {}
    for name, values in group.items():
        if not _is_list(values, n_genes):
            notes[f"row_attrs/{name}"] = "it is no list with one value a gene"
            require_names_only(name, notes[f"row_attrs/{name}"])
            continue
        if values.dtype.kind not in "SUO" and not is_kind_column(name):
            continue
        try:
            found[name] = objects(_whole_attribute(group, name))
        except (ValueError, OSError) as error:
            if failed_call(error):
                raise
            reason = " ".join(str(error).split())
            require_names_only(name, reason)
            notes[f"row_attrs/{name}"] = reason
    return found, notes


def _is_list(values: Any, size: int) -> bool:
    """Return whether a part is a list of one value each, which may stand as a column."""
    return isinstance(values, h5py.Dataset) and values.shape in ((size,), (size, 1))


def _loom_obs(opened: Open, names: Sequence[str], n_cells: int) -> Annotations:
    def reader(name: str) -> Callable[[], pd.Series]:
        def column() -> pd.Series:
            with opened() as root:
                if not _is_list(root["col_attrs"][name], n_cells):
                    raise ValueError(f"col_attrs/{name} is no list with one value a cell")
                values = _whole_attribute(root["col_attrs"], name)
            return pd.Series(values, dtype=values.dtype)

        return column

    return Annotations(n_cells, {name: reader(name) for name in names})


def _whole_attribute(group: Any, name: str) -> npt.NDArray[Any]:
    """Return an attribute that was written as a whole, texts as objects."""
    require_whole(part_inside(group, name), f"{group.name}/{name}")
    return decoded(group[name][:].reshape(-1))


def _strings(group: Any, name: str) -> StringArray:
    dataset = part_inside(group, name)
    if getattr(dataset, "shape", None) is None or len(dataset.shape) != 1:
        raise ValueError(f"{dataset.name} is no list of names")
    check_size(dataset.shape[0], 0)
    require_whole(dataset, dataset.name)
    return objects(decoded(dataset[:]))
