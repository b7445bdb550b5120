"""Chosen cells of h5ad, zarr, 10x HDF5 and loom files, read cell by cell: the slow second way.

`verify_sources.py` compares what this module finds with a finished corpus. It shares no code with
`readers*.py`, so that a fault there cannot hide itself here: plain loops over what h5py and zarr
return, one cell (or one stretch of stored values) at a time. Nothing is added up and no name is
looked at.

Formats: https://anndata.readthedocs.io (on-disk format), 10x Genomics "HDF5 Feature-Barcode Matrix
Format", https://linnarssonlab.org/loompy/format
"""

from __future__ import annotations

import importlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
import zarr.storage

STRETCH = 2**20
"""Stored values that are looked at together where the values of a cell are scattered."""
CELL_NAMES = ("CellID", "obs_names", "cell_id", "barcode", "barcodes", "Barcode")
"""Column attributes of loom that name the cells, the first that is there."""

_RNA = ("rna", "gex", "geneexpression", "gene", "genes", "scrna", "transcriptome")
"""Names of the modality of genes in MuData."""

Stored = dict[int, list[tuple[int, Any]]]
"""By cell: (feature, value) of each stored value, as it is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSource:
    """The features of a source and some of its cells."""

    n_cells: int
    """Cells of the source."""
    features: Mapping[str, list[str]]
    """Every text column about the features, by name, in file order."""
    stored: Mapping[str, Stored]
    """By matrix (X, raw.X, layers/NAME): the values of the cells asked for."""
    barcodes: Mapping[int, str]
    """Names of these cells."""
    annotations: Mapping[int, Mapping[str, str]]
    """Their annotations, by the column of the source."""


def plain_anndata(
    path: Path, *, rows: Sequence[int], matrices: Sequence[str], columns: Sequence[str]
) -> PlainSource:
    """Read cells of an AnnData file or folder.

    Args:
        path: h5ad file or zarr folder.
        rows: Cells, by their row in the source.
        matrices: X, raw.X or layers/NAME; all of one gene table.
        columns: Annotations to read.
    """
    with _opened(path) as top:
        root = _anndata_group(top)
        index = _index_name(root["obs"])
        # Before AnnData 0.7 the raw matrix was stored as the groups "raw.X" and "raw.var".
        raw = "raw/" if "raw" in root and isinstance(_kind(root["raw"]), str) else "raw."
        table = root[f"{raw}var" if matrices[0] == "raw.X" else "var"]
        names = _field_names(table)
        features = {
            name: _texts(root, table, name, None) for name in names if _is_text(table, name)
        }
        own = _index_name(table)
        features = {"index": _texts(root, table, own, None)} | {
            name: values for name, values in features.items() if name != own
        }
        n_cells = int(_field(root["obs"], index).shape[0])
        stored = {
            name: _stored(root[f"{raw}X" if name == "raw.X" else name], rows) for name in matrices
        }
        barcodes = dict(zip(rows, _texts(root, root["obs"], index, rows), strict=True))
        texts = {name: _texts(root, root["obs"], name, rows) for name in columns}
    return PlainSource(
        n_cells=n_cells,
        features=features,
        stored=stored,
        barcodes=barcodes,
        annotations=_by_row(rows, texts),
    )


def plain_tenx(path: Path, *, rows: Sequence[int], genome: str) -> PlainSource:
    """Read cells of a 10x Genomics HDF5 file.

    Args:
        path: The file.
        rows: Cells, by their place among the barcodes.
        genome: Group of a file of version 2 with several, or auto.
    """
    with _opened(path) as root:
        groups = [name for name in root if "indptr" in root[name]]
        human = [name for name in groups if name.lower().startswith(("grch", "hg", "human"))]
        # Groups that are not named after the human genome count only where there is one alone.
        where = genome if genome in groups else (human if len(groups) > 1 else groups)[0]
        group = root[where]
        table = group["features"] if "features" in group else group
        wanted = ("id", "name", "genes", "gene_names", "feature_type", "genome")
        features = {
            name: [_text(value) for value in table[name][:]] for name in wanted if name in table
        }
        return PlainSource(
            n_cells=int(group["barcodes"].shape[0]),
            features=features,
            stored={"X": _of_lines(group, rows)},
            barcodes={row: _text(group["barcodes"][row]) for row in rows},
            annotations={row: {} for row in rows},
        )


def plain_loom(
    path: Path, *, rows: Sequence[int], matrices: Sequence[str], columns: Sequence[str]
) -> PlainSource:
    """Read cells of a loom file.

    Args:
        path: The file.
        rows: Cells, by their column in the file.
        matrices: X (the main matrix) or layers/NAME.
        columns: Column attributes to read.
    """
    with _opened(path) as root:
        attributes = root["col_attrs"]
        n_features, n_cells = root["matrix"].shape
        features = {
            name: [_text(value) for value in values[:].ravel()]
            for name, values in root["row_attrs"].items()
            if getattr(values, "shape", None) in ((n_features,), (n_features, 1))
            and values.dtype.kind in "SO"
        }
        lists = ((n_cells,), (n_cells, 1))
        named = [n for n in CELL_NAMES if n in attributes and attributes[n].shape in lists]
        barcodes = {
            row: _text(_single(attributes[named[0]], row)) if named else str(row) for row in rows
        }
        stored: dict[str, Stored] = {}
        for name in matrices:
            matrix = root["matrix" if name == "X" else name]
            stored[name] = {row: _nonzero(matrix[:, row]) for row in rows}
        texts = {name: [_text(_single(attributes[name], row)) for row in rows] for name in columns}
    return PlainSource(
        n_cells=n_cells,
        features=features,
        stored=stored,
        barcodes=barcodes,
        annotations=_by_row(rows, texts),
    )


def _single(values: Any, row: int) -> Any:
    """Return a value of a list, or of one that stands as a column."""
    return values[row] if len(values.shape) == 1 else values[row, 0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.is_dir():
        yield zarr.open_group(path, mode="r", use_consolidated=False)
    elif zipfile.is_zipfile(path):
        with zarr.storage.ZipStore(path, mode="r") as store:
            names = {name.split("/")[0] for name in zipfile.ZipFile(path).namelist()}
            top = next(iter(names)) if len(names) == 1 else ""
            yield zarr.open_group(store, mode="r", path=top or None, use_consolidated=False)
    else:
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")
        # A lock that a writer left does not change what is read.
        with h5py.File(path, "r", locking=False) as root:
            yield root


def _anndata_group(root: Any) -> Any:
    """Return where AnnData lies: at the top, in MuData below mod, in SpatialData below tables."""
    if "mod" in root and "X" not in root:
        names = [n for n in root["mod"] if re.sub("[^a-z]", "", n.lower()) in _RNA]
        return root["mod"][names[0]]
    if "obs" in root:
        return root
    tables = root["tables" if "tables" in root else "table"]
    return tables["table" if "table" in tables else next(iter(tables))]


def _by_row(rows: Sequence[int], texts: Mapping[str, list[str]]) -> dict[int, dict[str, str]]:
    return {
        row: {name: values[place] for name, values in texts.items()}
        for place, row in enumerate(rows)
    }


def _stored(matrix: Any, rows: Sequence[int]) -> Stored:
    """Return the values of cells of a dense, CSR or CSC matrix."""
    if hasattr(matrix, "shape"):
        return {row: _nonzero(matrix[row, :]) for row in rows}
    kind = matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", ""))
    if _text(kind).startswith("csr"):
        return _of_lines(matrix, rows)
    return _scattered(matrix, rows)


def _nonzero(values: Any) -> list[tuple[int, Any]]:
    return [(int(place), values[place]) for place in np.flatnonzero(values != 0)]


def _of_lines(matrix: Any, rows: Sequence[int]) -> Stored:
    """Return the values of cells that are stored one cell after the other."""
    found: Stored = {}
    for row in rows:
        start, stop = (int(pointer) for pointer in matrix["indptr"][row : row + 2])
        features, values = matrix["indices"][start:stop], matrix["data"][start:stop]
        found[row] = [(int(f), value) for f, value in zip(features, values, strict=True)]
    return found


def _scattered(matrix: Any, rows: Sequence[int]) -> Stored:
    """Return the values of cells of a matrix that is stored gene after gene."""
    found: Stored = {row: [] for row in rows}
    pointers = matrix["indptr"][:].astype(np.int64)
    wanted = np.array(sorted(rows), dtype=np.int64)
    for start in range(0, int(pointers[-1]), STRETCH):
        cells = matrix["indices"][start : start + STRETCH].astype(np.int64)
        inside = np.flatnonzero(np.isin(cells, wanted))
        values = matrix["data"][start : start + STRETCH] if len(inside) else None
        for place in inside:
            feature = int(np.searchsorted(pointers, start + place, side="right")) - 1
            found[int(cells[place])].append((feature, values[place]))  # type: ignore[index]
    return found


def _kind(element: Any) -> str | None:
    """Return what AnnData says an element is; None for what is stored without a value."""
    kind = _text(element.attrs.get("encoding-type", ""))
    return None if kind == "null" else kind


def _index_name(table: Any) -> str:
    if _is_record(table):
        return "index" if "index" in table.dtype.names else str(table.dtype.names[0])
    return _text(table.attrs.get("_index", "_index"))


def _is_record(table: Any) -> bool:
    return bool(getattr(getattr(table, "dtype", None), "names", None))


def _field_names(table: Any) -> list[str]:
    if _is_record(table):
        return list(table.dtype.names)
    return [name for name in table if not name.startswith("__")]


def _field(table: Any, name: str) -> Any:
    """Return a column of a table, of what its values can be taken."""
    column = table[name]
    if hasattr(column, "shape"):
        return column
    return column["codes" if "codes" in column else "values"]


def _is_text(table: Any, name: str) -> bool:
    column = table[name]
    if hasattr(column, "shape"):
        return column.dtype.kind in "SUOT" or "categories" in getattr(column, "attrs", {})
    values = column["categories"] if "categories" in column else column.get("values")
    return values is not None and hasattr(values, "shape") and values.dtype.kind in "SUOT"


def _texts(root: Any, table: Any, name: str, rows: Sequence[int] | None) -> list[str]:
    """Return a column of obs or var as texts, of some rows or of all (None)."""
    take: Callable[[Any], list[Any]] = (
        (lambda values: list(values[:]))
        if rows is None
        else (lambda values: [values[row] for row in rows])
    )
    column = table[name]
    if _is_record(table) or (hasattr(column, "shape") and "categories" not in column.attrs):
        return [_text(value) for value in take(column)]
    if hasattr(column, "shape"):
        # AnnData 0.7: the codes are the column, and point to where the names are.
        place = column.attrs["categories"]
        names = root[place] if isinstance(place, h5py.Reference) else table[place]
        return [_category(names, code) for code in take(column)]
    if "codes" in column:
        categories = column["categories"]
        names = categories if hasattr(categories, "shape") else categories["values"]
        if rows is None:
            names = names[:]
        return [_category(names, code) for code in take(column["codes"])]
    values, missing = take(column["values"]), take(column["mask"])
    return ["" if gone else _text(value) for value, gone in zip(values, missing, strict=True)]


def _category(names: Any, code: Any) -> str:
    return _text(names[int(code)]) if int(code) >= 0 else ""


def _text(value: Any) -> str:
    """Return a stored value as the corpus writes it: missing is the empty text."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if (
        value is None
        or value is np.ma.masked
        or (isinstance(value, np.floating) and value != value)
    ):
        return ""
    return str(value)
