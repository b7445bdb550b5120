"""Row and column numbers of compressed matrices are compared as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from data_prep.readers.arrays import checked_indices, checked_pointers
from data_prep.readers.open import open_source

COUNTS = sparse.random(5, 7, density=0.6, random_state=0, format="csr")
COUNTS.data = np.arange(1.0, len(COUNTS.data) + 1)
Change = Callable[[np.ndarray], np.ndarray]


def with_first(value: int | float, dtype: str) -> Change:
    """Return what puts a value into the first place, in a type that holds it."""

    def change(stored: np.ndarray) -> np.ndarray:
        found = stored.astype(dtype)
        found[0] = value
        return found

    return change


OUTSIDE = {
    "wraps in 32 bits": with_first(2**32 + 1, "i8"),
    "wraps in 64 bits": with_first(2**63 + 1, "u8"),
    "negative": with_first(-1, "i8"),
    "beyond": with_first(7, "i8"),
    "half": with_first(0.5, "f8"),
    "nan": with_first(np.nan, "f8"),
}


def write_npz(folder: Path, kind: str, part: str, change: Change) -> Path:
    matrix = COUNTS.asformat(kind)
    members = {"indices": matrix.indices, "indptr": matrix.indptr, "data": matrix.data}
    members[part] = change(members[part])
    path = folder / "x.npz"
    np.savez(path, format=kind.encode(), shape=np.array(matrix.shape), **members)
    (folder / "x.genes.txt").write_text("".join(f"g{i}\n" for i in range(7)))
    return path


def write_tenx(folder: Path, kind: str, part: str, change: Change) -> Path:
    path = folder / "x.h5"
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["shape"], matrix["data"] = np.array([7, 5]), COUNTS.data.astype("i4")
        matrix["barcodes"] = np.array([f"c{i}" for i in range(5)], "S")
        for name in ("indices", "indptr"):
            stored = getattr(COUNTS, name)
            matrix[name] = change(stored) if name == part else stored
        for name in ("id", "name"):
            matrix[f"features/{name}"] = np.array([f"g{i}" for i in range(7)], "S")
    return path


def write_anndata(folder: Path, kind: str, part: str, change: Change) -> Path:
    obs, var = (pd.DataFrame(index=[f"{i}" for i in range(n)]) for n in COUNTS.shape)
    cells = anndata.AnnData(COUNTS.asformat(kind.removesuffix("z")), obs=obs, var=var)
    path = folder / "x"
    if not kind.endswith("z"):
        cells.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            stored = file[f"X/{part}"][:]
            del file[f"X/{part}"]
            file[f"X/{part}"] = change(stored)
        return path
    with anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        anndata.io.write_elem(zarr.open_group(path, mode="w"), "/", cells)
    group = zarr.open_group(path, mode="r+")["X"]
    stored = group[part][:]
    del group[part]
    group.create_array(part, data=change(stored))
    return path


FORMATS = {
    "h5ad csr": (write_anndata, "csr"),
    "h5ad csc": (write_anndata, "csc"),
    "zarr csr": (write_anndata, "csrz"),
    "10x": (write_tenx, "csr"),
    "npz csr": (write_npz, "csr"),
    "npz csc": (write_npz, "csc"),
}


def read(path: Path) -> np.ndarray:
    (matrix,) = open_source(path, gene_share=lambda names: 1.0).matrices
    return np.vstack([block.toarray() for block in matrix.blocks()])


@pytest.mark.parametrize("format", FORMATS)
def test_whole_numbers_of_any_type_are_read(tmp_path, format):
    write, kind = FORMATS[format]
    for part in ("indices", "indptr"):
        folder = tmp_path / part
        folder.mkdir()
        path = write(folder, kind, part, lambda stored: stored.astype("f8"))
        np.testing.assert_array_equal(read(path), COUNTS.toarray())


@pytest.mark.thorough
@pytest.mark.parametrize("wrong", OUTSIDE)
@pytest.mark.parametrize("format", FORMATS)
def test_indices_that_lie_outside_are_refused(tmp_path, format, wrong):
    write, kind = FORMATS[format]
    path = write(tmp_path, kind, "indices", OUTSIDE[wrong])
    with pytest.raises(ValueError, match=rf"{path.name}: .*(indices|whole number)"):
        read(path)


@pytest.mark.parametrize("format", FORMATS)
def test_pointers_between_two_values_are_refused(tmp_path, format):
    write, kind = FORMATS[format]
    path = write(tmp_path, kind, "indptr", lambda stored: stored + 0.25)
    with pytest.raises(ValueError, match=rf"{path.name}: the index pointers hold 0.25"):
        read(path)


def test_the_number_itself_is_named():
    with pytest.raises(ValueError, match="there is 4294967301"):
        checked_indices([1, 2**32 + 5], 7)
    with pytest.raises(ValueError, match="the index pointers are bool"):
        checked_pointers([False, True], n_lines=1, n_values=1)
    assert checked_indices(np.array([], "i4"), 7).dtype == np.int64
