"""Readers of AnnData (h5ad and zarr), 10x Genomics HDF5 and loom files.

Matrices are sliced where they lie, so memory is one block: CSR and dense ones directly, CSC ones
(and AnnData that was stored gene by gene) through `gather_rows`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr
from anndata.io import read_elem
from scipy import sparse

from data_prep.source import (
    BLOCK_ENTRIES,
    Entries,
    Matrix,
    Source,
    StringArray,
    UnusableError,
    dense_blocks,
    gather_rows,
    row_blocks,
)

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_HUMAN_GENOME = re.compile(r"(?i)^(hg19|hg38|grch37|grch38|human|homo_sapiens)")
_GENE_EXPRESSION = "Gene Expression"
_CELL_NAMES = ("CellID", "obs_names", "cell_id", "barcode", "barcodes", "Barcode")

Open = Callable[[], AbstractContextManager[Any]]
"""Opens the root group (h5py or zarr); each pass over a matrix opens the file anew."""


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


def open_hdf5(path: Path, format: str, *, genome: str) -> Source:
    """Open an HDF5 dataset of a known format.

    Args:
        path: The file.
        format: h5ad, 10x_h5 or loom.
        genome: See `readers.open_source`.
    """

    def opened() -> AbstractContextManager[Any]:
        return h5py.File(path)

    if format == "h5ad":
        return _open_anndata(path, "h5ad", opened)
    if format == "loom":
        return _open_loom(path, opened)
    return _open_tenx(path, opened, genome)


def open_zarr(path: Path) -> Source:
    """Open an AnnData zarr folder.

    Args:
        path: The folder.
    """
    return _open_anndata(path, "zarr", lambda: nullcontext(zarr.open_group(path, mode="r")))


def _open_anndata(path: Path, format: str, opened: Open) -> Source:
    with opened() as root:
        if "obs" not in root or "var" not in root:
            raise ValueError(
                f"not AnnData: it holds {', '.join(sorted(root))}, expected obs and var"
            )
        obs, var = _frame(root, "obs"), _frame(root, "var")
        matrices = [_matrix(root, opened, "X", "X", var)] if "X" in root else []
        # Before AnnData 0.7 the raw matrix was stored as the groups "raw.X" and "raw.var".
        for where, genes in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
            if where in root and genes in root:
                matrices.append(_matrix(root, opened, "raw.X", where, _frame(root, genes)))
        layers = sorted(root["layers"]) if "layers" in root else []
        matrices += [
            _matrix(root, opened, f"layers/{name}", f"layers/{name}", var) for name in layers
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
        barcodes=_objects(obs.index),
        obs=obs.reset_index(drop=True),
        matrices=tuple(matrices),
    )


def _frame(root: Any, name: str) -> pd.DataFrame:
    """Read obs or var, in the layouts of all AnnData versions."""
    element = root[name]
    if getattr(element, "dtype", None) is not None and element.dtype.names:
        table = element[()]
        columns = {column: _decoded(table[column]) for column in table.dtype.names}
        index = columns.pop("index" if "index" in columns else table.dtype.names[0])
        return pd.DataFrame(columns, index=pd.Index(index, dtype=object))
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
        str(column): _decoded(values) for column, values in frame.items() if np.ndim(values) == 1
    }
    index_name = str(element.attrs.get("_index", "_index"))
    if index_name not in columns:
        raise ValueError(f"{name} has no index column '{index_name}'")
    index = columns.pop(index_name)
    return pd.DataFrame(columns, index=pd.Index(index, dtype=object))


def _gene_columns(var: pd.DataFrame) -> dict[str, StringArray]:
    """Return the index and all text columns of a gene table."""
    columns = {"index": _objects(var.index)}
    for name in var.columns:
        values = var[name]
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = values.astype(object)
        if values.dtype == object or isinstance(values.dtype, pd.StringDtype):
            columns[str(name)] = _objects(values.fillna(""))
    return columns


def _matrix(root: Any, opened: Open, name: str, where: str, var: pd.DataFrame) -> Matrix:
    element = root[where]
    genes = _gene_columns(var)
    if hasattr(element, "shape"):
        if len(element.shape) != 2:
            raise ValueError(f"{name} has {len(element.shape)} dimensions, expected 2")
        shape = (int(element.shape[0]), int(element.shape[1]))
        return Matrix(
            name=name, shape=shape, gene_columns=genes, blocks=lambda: _dense(opened, where, shape)
        )
    attributes = dict(element.attrs)
    kind = attributes.get("encoding-type", attributes.get("h5sparse_format", ""))
    kind = str(kind.decode() if isinstance(kind, bytes) else kind).removesuffix("_matrix")
    stored = attributes.get("shape", attributes.get("h5sparse_shape"))
    if kind not in ("csr", "csc") or stored is None:
        raise ValueError(
            f"{name} is stored as '{kind or 'unknown'}'; supported: dense, csr_matrix, csc_matrix"
        )
    shape = (int(stored[0]), int(stored[1]))
    read = _csr if kind == "csr" else _csc
    return Matrix(
        name=name, shape=shape, gene_columns=genes, blocks=lambda: read(opened, where, shape)
    )


def _dense(opened: Open, where: str, shape: tuple[int, int]) -> Iterator[sparse.csr_matrix]:
    with opened() as root:
        values = root[where]
        for start, stop in dense_blocks(*shape):
            yield sparse.csr_matrix(np.asarray(values[start:stop]))


def _pointers(group: Any, n_lines: int) -> npt.NDArray[np.int64]:
    row_ptr = np.asarray(group["indptr"][:]).astype(np.int64)
    n_values = group["data"].shape[0]
    if (
        len(row_ptr) != n_lines + 1
        or row_ptr[0] != 0
        or (np.diff(row_ptr) < 0).any()
        or row_ptr[-1] != n_values
    ):
        raise ValueError(
            f"the index pointers do not fit a matrix of {n_lines} lines and {n_values} values"
        )
    if group["indices"].shape != group["data"].shape:
        raise ValueError(
            f"{group['data'].shape[0]} values but {group['indices'].shape[0]} column numbers"
        )
    return row_ptr


def _csr(
    opened: Open, where: str, shape: tuple[int, int], columns: npt.NDArray[np.int64] | None = None
) -> Iterator[sparse.csr_matrix]:
    """Yield row blocks of a stored CSR matrix, optionally of some columns only."""
    with opened() as root:
        group = root[where]
        row_ptr = _pointers(group, shape[0])
        for start, stop in row_blocks(row_ptr):
            first, last = row_ptr[start], row_ptr[stop]
            indices = np.asarray(group["indices"][first:last]).astype(np.int64)
            block = sparse.csr_matrix(
                (np.asarray(group["data"][first:last]), indices, row_ptr[start : stop + 1] - first),
                shape=(stop - start, shape[1]),
            )
            block.check_format(full_check=True)
            yield block if columns is None else block[:, columns]


def _csc(opened: Open, where: str, shape: tuple[int, int]) -> Iterator[sparse.csr_matrix]:
    def entries() -> Iterator[Entries]:
        with opened() as root:
            group = root[where]
            pointers = _pointers(group, shape[1])
            for first in range(0, int(pointers[-1]), BLOCK_ENTRIES):
                last = min(first + BLOCK_ENTRIES, int(pointers[-1]))
                columns = np.searchsorted(pointers, np.arange(first, last), side="right") - 1
                rows = np.asarray(group["indices"][first:last]).astype(np.int64)
                yield rows, columns.astype(np.int64), np.asarray(group["data"][first:last])

    with opened() as root:
        n_entries = int(root[where]["data"].shape[0])
    return gather_rows(entries, shape=shape, n_entries=n_entries)


def _genome_groups(root: Any) -> list[str]:
    """Return the groups of a version 2 file, one per genome."""
    needed = {"barcodes", "data", "indices", "indptr", "shape"}
    return [
        name for name in root if isinstance(root[name], h5py.Group) and needed <= set(root[name])
    ]


def _open_tenx(path: Path, opened: Open, genome: str) -> Source:
    with opened() as root:
        if "matrix" in root:
            where, genes, kept = "matrix", *_tenx_features(root["matrix"]["features"], genome)
        else:
            where = pick_genome(_genome_groups(root), genome)
            group = root[where]
            genes = {"genes": _strings(group["genes"])}
            if "gene_names" in group:
                genes["gene_names"] = _strings(group["gene_names"])
            kept = None
        barcodes = _strings(root[where]["barcodes"])
        # 10x stores genes x cells by column, which is cells x genes by row.
        n_genes, n_cells = (int(size) for size in root[where]["shape"][:])
    n_named = len(next(iter(genes.values())))
    if n_cells != len(barcodes) or (kept is None and n_named != n_genes):
        raise ValueError(
            f"the matrix has {n_genes} genes and {n_cells} cells, "
            f"but {n_named} genes and {len(barcodes)} barcodes are named"
        )
    shape = (n_cells, n_genes)
    matrix = Matrix(
        name="X",
        shape=(n_cells, n_named),
        gene_columns=genes,
        blocks=lambda: _csr(opened, where, shape, columns=kept),
    )
    return Source(
        path=path, format="10x_h5", barcodes=barcodes, obs=_no_obs(barcodes), matrices=(matrix,)
    )


def _tenx_features(
    features: Any, genome: str
) -> tuple[dict[str, StringArray], npt.NDArray[np.int64] | None]:
    """Return the gene columns of a version 3 file and which features they are (None: all)."""
    columns = {"id": _strings(features["id"]), "name": _strings(features["name"])}
    keep = np.ones(len(columns["id"]), dtype=bool)
    if "feature_type" in features:
        keep &= expression_features(_strings(features["feature_type"]))
    if "genome" in features:
        genomes = _strings(features["genome"])
        names = sorted({str(name) for name in genomes[keep]} - {""})
        if len(names) > 1 or genome != "auto":
            # Cells of the other genome share the barcode list, so that nobody can choose for the
            # user.
            keep &= genomes == pick_genome(names, genome, guess=False)
    if keep.all():
        return columns, None
    return {name: values[keep] for name, values in columns.items()}, np.flatnonzero(keep)


def expression_features(types: StringArray) -> npt.NDArray[np.bool_]:
    """Return which 10x features are genes (and not antibodies, guides or peaks).

    Args:
        types: (n,) feature types.

    Raises:
        UnusableError: None is.
    """
    kept = types == _GENE_EXPRESSION
    if len(types) and not kept.any():
        raise UnusableError(
            f"no features of type '{_GENE_EXPRESSION}'; found: {', '.join(sorted(set(types))[:4])}"
        )
    return kept


def pick_genome(names: list[str], wanted: str, *, guess: bool = True) -> str:
    """Return the genome to read of a file that holds several.

    Args:
        names: The genomes of the file.
        wanted: The user's choice, or auto.
        guess: Whether auto may take the only human one of several.

    Raises:
        UnusableError: Several, and the choice is open.
        ValueError: The genome asked for is not there.
    """
    if wanted != "auto":
        if wanted not in names:
            raise ValueError(f"there is no genome '{wanted}'; the file holds {', '.join(names)}")
        return wanted
    human = [name for name in names if _HUMAN_GENOME.match(name)]
    if len(names) == 1:
        return names[0]
    if guess and len(human) == 1:
        return human[0]
    raise UnusableError(
        f"several genomes ({', '.join(names)}): "
        "name the one to keep in the manifest column 'genome'"
    )


def _open_loom(path: Path, opened: Open) -> Source:
    with opened() as root:
        n_genes, n_cells = (int(size) for size in root["matrix"].shape)
        genes = {
            name: values
            for name, values in _attributes(root["row_attrs"], n_genes).items()
            if values.dtype == object
        }
        cells = _attributes(root["col_attrs"], n_cells)
        layers = sorted(root["layers"]) if "layers" in root else []
    shape = (n_cells, n_genes)
    if not genes and n_genes:
        raise ValueError("the row attributes name no genes; expected Gene or Accession")
    named = next((name for name in _CELL_NAMES if name in cells), None)
    barcodes = _objects(cells.pop(named)) if named else _objects(map(str, range(n_cells)))
    places = {"X": "matrix"} | {f"layers/{name}": f"layers/{name}" for name in layers}
    return Source(
        path=path,
        format="loom",
        barcodes=barcodes,
        obs=pd.DataFrame(cells, index=range(n_cells)),
        matrices=tuple(
            _loom_matrix(opened, name, where, shape, genes) for name, where in places.items()
        ),
    )


def _loom_matrix(
    opened: Open, name: str, where: str, shape: tuple[int, int], genes: Mapping[str, StringArray]
) -> Matrix:
    def blocks() -> Iterator[sparse.csr_matrix]:
        with opened() as root:
            for start, stop in dense_blocks(*shape):
                yield sparse.csr_matrix(np.asarray(root[where][:, start:stop]).T)

    return Matrix(name=name, shape=shape, gene_columns=genes, blocks=blocks)


def _attributes(group: Any, size: int) -> dict[str, npt.NDArray[Any]]:
    """Return the one-dimensional attributes of a loom file, texts as objects."""
    return {name: _decoded(values[:]) for name, values in group.items() if values.shape == (size,)}


def _no_obs(barcodes: StringArray) -> pd.DataFrame:
    return pd.DataFrame(index=range(len(barcodes)))


def _strings(dataset: Any) -> StringArray:
    return _objects(_decoded(dataset[:]))


def _decoded(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return texts of any storage as an object array of str; numbers as they are."""
    values = np.asarray(values)
    if values.dtype.kind not in "SUO":
        return values
    return _objects(
        value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values
    )


def _objects(values: Any) -> StringArray:
    return np.array([str(value) for value in values], dtype=object)
