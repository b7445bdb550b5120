"""Reader of AnnData files: h5ad and zarr of all versions; X, raw.X and layers, sparse or dense.

MuData (its modality of genes) and SpatialData (its table) hold AnnData, and are read as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from data_prep.readers.arrays import (
    Blocks,
    Open,
    csc_blocks,
    csr_blocks,
    dense_matrix_blocks,
    part_inside,
    require_inside,
)
from data_prep.readers.columns import table_of, text_of
from data_prep.readers.containers import (
    HDF5_SIGNATURE,
    ZARR_MARKS,
    ZIP_SIGNATURE,
    anndata_place,
    failed_call,
    hdf5_root,
    missing_filter,
    writer_note,
    zarr_root,
    zipped_zarr,
)
from data_prep.readers.hdf5 import hdf5_kind
from data_prep.source.about import NAMES, about
from data_prep.source.source import Matrix, Reading, Source, StringArray, check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a matrix lies and what names its genes."""

    name: str
    """As users call it: X, raw.X or layers/NAME."""
    where: str
    genes: Mapping[str, StringArray]


def tell(path: Path, start: bytes | None) -> str | None:
    """Return h5ad or zarr if the content is one, else None.

    Args:
        path: File or folder.
        start: The first bytes of a file, of a compressed one decompressed; None for a folder.
    """
    if start is None:
        return "zarr" if any((path / name).is_file() for name in ZARR_MARKS) else None
    if start.startswith(HDF5_SIGNATURE):
        return "h5ad" if hdf5_kind(path) == "h5ad" else None
    is_zarr = start.startswith(ZIP_SIGNATURE) and zipped_zarr(path) is not None
    return "zarr" if is_zarr else None


def open_format(path: Path, format: str, reading: Reading) -> Source:
    """Open a dataset of a format that `tell` returned.

    Args:
        path: File or folder.
        format: The format.
        reading: How to read it.
    """
    opens = open_h5ad if format == "h5ad" else open_zarr
    return opens(path, scratch=reading.scratch)


def open_h5ad(path: Path, *, scratch: Path | None) -> Source:
    """Open an AnnData HDF5 file, or the modality of genes of a MuData file.

    Args:
        path: The file.
        scratch: See `readers.open_source`.
    """
    notes = writer_note(path)
    return _open_anndata(path, "h5ad", lambda where: hdf5_root(path, where), notes, scratch)


def open_zarr(path: Path, *, scratch: Path | None) -> Source:
    """Open an AnnData zarr folder, zipped or not, or the table of SpatialData.

    Args:
        path: The folder or zip file.
        scratch: See `readers.open_source`.
    """
    return _open_anndata(path, "zarr", lambda where: zarr_root(path, where), {}, scratch)


def _open_anndata(
    path: Path,
    format: str,
    group: Callable[[str], Open],
    notes: Mapping[str, str],
    scratch: Path | None,
) -> Source:
    with group("")() as root:
        place, others = anndata_place(root)
    opened = group(place)
    with opened() as root:
        for name in ("obs", "var", "X", "raw"):
            require_inside(root, name)
        obs = table_of(root, "obs")
        places, unread = _places(root)
        notes = {**notes, **others, **unread}
        matrices = [_matrix(root, opened, place, scratch) for place in places]
        stated = about(_texts(root))
    if not matrices:
        raise ValueError("the file holds no matrix: no X, raw.X or layers")
    for matrix in matrices:
        if matrix.shape != (len(obs.index), len(matrix.gene_columns["index"])):
            raise ValueError(
                f"{matrix.name} has the shape {matrix.shape}, "
                f"but there are {len(obs.index)} cells in obs "
                f"and {len(matrix.gene_columns['index'])} genes"
            )
    return Source(
        path=path,
        format=format,
        barcodes=obs.index,
        obs=obs.annotations(opened),
        matrices=tuple(matrices),
        notes=notes,
        about=stated,
    )


def _texts(root: Any) -> dict[str, str]:
    """Return the texts of uns that tell where the file comes from; one that is odd is no loss."""
    found: dict[str, str] = {}
    for name in NAMES:
        try:
            value = part_inside(root, f"uns/{name}")[()]
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, AttributeError) as error:
            if failed_call(error):
                raise
            continue
        value = value.item() if isinstance(value, np.ndarray) and value.shape == () else value
        if isinstance(value, bytes | str):
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            # A surrogate stands for a byte that is no UTF-8.
            found[name] = text.encode(errors="replace").decode()
    return found


def _places(root: Any) -> tuple[list[_Place], dict[str, str]]:
    """Return where matrices lie, and which parts cannot be read."""
    genes, notes = table_of(root, "var").names(root)
    places = [_Place(name="X", where="X", genes=genes)] if "X" in root else []
    # Before AnnData 0.7 the raw matrix was stored as the groups "raw.X" and "raw.var".
    for where, frame in (("raw/X", "raw/var"), ("raw.X", "raw.var")):
        if where in root and frame in root:
            require_inside(root, frame)
            raw, unread = table_of(root, frame).names(root)
            notes |= {f"raw.{name}": reason for name, reason in unread.items()}
            places.append(_Place(name="raw.X", where=where, genes=raw))
    layers = sorted(part_inside(root, "layers")) if "layers" in root else []
    places += [
        _Place(name=f"layers/{name}", where=f"layers/{name}", genes=genes) for name in layers
    ]
    empty = [place for place in places if _is_null(part_inside(root, place.where))]
    notes |= {place.name: "nothing is stored (null)" for place in empty}
    return [place for place in places if place not in empty], notes


def _is_null(element: Any) -> bool:
    """Return whether a matrix is stored as None."""
    kind = text_of(element.attrs.get("encoding-type", ""))
    return kind == "null" or (hasattr(element, "shape") and element.shape is None)


def _matrix(root: Any, opened: Open, place: _Place, scratch: Path | None) -> Matrix:
    element = part_inside(root, place.where)
    is_array = hasattr(element, "shape")
    if is_array:
        if len(element.shape) != 2:
            raise ValueError(f"{place.name} has {len(element.shape)} dimensions, expected 2")
        kind, stored = "dense", element.shape
    else:
        attributes = dict(element.attrs)
        named = attributes.get("encoding-type", attributes.get("h5sparse_format", ""))
        kind = text_of(named).removesuffix("_matrix")
        stored = attributes.get("shape", attributes.get("h5sparse_shape"))
        if kind not in ("csr", "csc") or stored is None or np.shape(stored) != (2,):
            return _unread(root, place, f"is stored as '{kind or 'unknown'}'")
    shape = (int(stored[0]), int(stored[1]))
    check_size(*shape)
    parts = (
        [element]
        if is_array
        else [part_inside(element, name) for name in ("data", "indices", "indptr")]
    )
    lacking = next((found for part in parts if (found := missing_filter(part))), "")
    if lacking:
        cure = f"is compressed with HDF5 filter {lacking}: pip install hdf5plugin, or h5repack it"
        return _unread(root, place, cure)
    where, ranges = place.where, None
    blocks: Blocks
    if kind == "dense":
        blocks, ranges = dense_matrix_blocks(opened, where, shape, cell_axis=0, scratch=scratch)
    elif kind == "csr":
        blocks, ranges = csr_blocks(opened, where, shape)
    else:
        blocks = csc_blocks(opened, where, shape, scratch=scratch)
    return Matrix(
        name=place.name,
        shape=shape,
        gene_columns=place.genes,
        blocks=blocks,
        ranges=ranges,
        by_gene=kind == "csc",
    )


def _unread(root: Any, place: _Place, reason: str) -> Matrix:
    """Return a matrix that cannot be read; the others of the file can."""

    def blocks() -> Iterator[sparse.csr_matrix]:
        raise ValueError(
            f"{place.name} {reason}; supported: dense, csr_matrix, csc_matrix, with the filters "
            "of HDF5 and hdf5plugin"
        )
        yield

    n_cells = len(table_of(root, "obs").index)
    shape = (n_cells, len(place.genes["index"]))
    return Matrix(name=place.name, shape=shape, gene_columns=place.genes, blocks=blocks)
