"""Opens the containers that matrices lie in: HDF5 files, zarr folders and zipped zarr folders.

HDF5 is opened for reading and without a lock, so that a file that another process holds open for
writing can be read all the same; its source hash tells whether it changed meanwhile. Compression
filters other than gzip and LZF come from hdf5plugin. AnnData may lie inside of something larger:
the modality `rna` of MuData, the table of SpatialData. Consolidated metadata of zarr are not
believed: a part that was written again after them is not in them.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import zarr
from zarr.storage import ZipStore

from data_prep.readers.arrays import MAX_CHUNK_BYTES, Open

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
ZIP_SIGNATURE = b"PK\x03\x04"
ZARR_MARKS = ("zarr.json", ".zgroup", ".zattrs")
_METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata")
MAX_METADATA_BYTES = 2**26
"""Of one metadata file of zarr; those of atlases with thousands of arrays take 1 MB."""
_RNA = ("rna", "gex", "geneexpression", "gene", "genes", "scrna", "transcriptome")
"""Names of the modality of genes in MuData, without case and punctuation."""


_OF_THE_SYSTEM = frozenset({
    errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM,
    errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBADF, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EREMOTEIO, errno.ESHUTDOWN,
})  # fmt: skip
"""Numbers of errors that say nothing about what is in a file."""


def failed_call(error: BaseException | None) -> OSError | None:
    """Return the failure of the operating system behind an error, or None: the file is damaged.

    A part that a disk or server did not deliver now must not count as one that cannot be read.

    Args:
        error: What a library raised; HDF5 hides the number in its text.
    """
    while error is not None:
        said = re.search(r"errno = (\d+), error message = '", str(error))
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number in _OF_THE_SYSTEM:
            return OSError(number, os.strerror(number))
        error = error.__cause__
    return None


@contextmanager
def hdf5_file(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for reading.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be opened; the message names the cause and, if there is one, the cure.
    """
    _load_filters()
    try:
        file = _without_lock(path)
    except OSError as error:
        raise ValueError(_diagnosis(path, error)) from error
    with file:
        yield file


def _without_lock(path: Path) -> Any:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # This process has it open already, with a lock; both must be opened in the same way.
        if "locking" not in str(error):
            raise
        return h5py.File(path, "r")


def hdf5_root(path: Path, where: str = "") -> Open:
    """Return what opens a group of an HDF5 file.

    Args:
        path: The file.
        where: The group; the root if empty.
    """

    @contextmanager
    def opened() -> Iterator[Any]:
        with hdf5_file(path) as file:
            yield file[where] if where else file

    return opened


def zarr_root(path: Path, where: str = "") -> Open:
    """Return what opens a group of a zarr folder, zipped or not.

    Args:
        path: The folder or zip file.
        where: The group; the root if empty.
    """
    if path.is_dir():
        _check_metadata(path)
        return lambda: _zarr_group(path, where)
    inside = zipped_zarr(path)
    if inside is None:
        raise ValueError("a zip file without a zarr group at its top")
    return lambda: _zipped_group(path, "/".join(part for part in (inside, where) if part))


@contextmanager
def _zarr_group(path: Path, where: str) -> Iterator[Any]:
    yield zarr.open_group(path, mode="r", path=where or None, use_consolidated=False)


@contextmanager
def _zipped_group(path: Path, where: str) -> Iterator[Any]:
    with ZipStore(path, mode="r") as store:
        yield zarr.open_group(store, mode="r", path=where or None, use_consolidated=False)


def zipped_zarr(path: Path) -> str | None:
    """Return the folder of a zip file in which a zarr group lies ('' for the top), or None.

    Args:
        path: A zip file.

    Raises:
        ValueError: A member claims more than any chunk or metadata file may take.
    """
    with zipfile.ZipFile(path) as packed:
        entries = packed.infolist()
    tops = {entry.filename.split("/")[0] for entry in entries}
    names = {entry.filename for entry in entries}
    places = ["", *(f"{top}/" for top in tops if len(tops) == 1)]
    for place in places:
        if any(f"{place}{mark}" in names for mark in ZARR_MARKS):
            for entry in entries:
                is_metadata = entry.filename.endswith(_METADATA)
                most = MAX_METADATA_BYTES if is_metadata else MAX_CHUNK_BYTES
                if entry.file_size > most:
                    raise ValueError(
                        f"{entry.filename} claims {entry.file_size} bytes; at most {most} are read"
                    )
            return place.rstrip("/")
    return None


def anndata_place(root: Any) -> tuple[str, dict[str, str]]:
    """Return where AnnData lies in an opened file ('' for the top), and what is not read.

    Args:
        root: The root group.

    Raises:
        ValueError: Nowhere, or in several places; the message states what the file holds.
    """
    names = set(root)
    if "mod" in names and "X" not in names:
        inside = sorted(root["mod"])
        fits = [name for name in inside if re.sub(r"[^a-z]", "", name.lower()) in _RNA]
        if len(fits) != 1:
            raise ValueError(
                f"MuData with the modalities {', '.join(inside) or 'none'}; expected one that is "
                "named rna: write the one of genes to an h5ad file"
            )
        others = {f"mod/{name}": "a modality that is not genes" for name in inside}
        others.pop(f"mod/{fits[0]}")
        return f"mod/{fits[0]}", others
    if {"obs", "var"} <= names:
        return "", {}
    for group in ("tables", "table"):
        if group in names and not hasattr(root[group], "shape"):
            inside = sorted(root[group])
            found = ["table"] if "table" in inside else inside
            if len(found) == 1 and {"obs", "var"} <= set(root[group][found[0]]):
                others = {f"{group}/{name}": "another table" for name in inside}
                others.pop(f"{group}/{found[0]}")
                return f"{group}/{found[0]}", others
            raise ValueError(
                f"SpatialData with the tables {', '.join(inside) or 'none'}; expected one that is "
                "named table: name the folder of the one to read as the path"
            )
    raise ValueError(f"not AnnData: it holds {', '.join(sorted(names))}, expected obs and var")


def missing_filter(array: Any) -> str:
    """Return the number of a compression filter that is not installed, or ''.

    Args:
        array: zarr or h5py array.
    """
    if not isinstance(array, h5py.Dataset):
        return ""
    plist = array.id.get_create_plist()
    numbers = [plist.get_filter(place)[0] for place in range(plist.get_nfilters())]
    return next((str(number) for number in numbers if not h5py.h5z.filter_avail(number)), "")


def _load_filters() -> None:
    """Register the filters of hdf5plugin, where it is installed."""
    try:
        importlib.import_module("hdf5plugin")
    except ImportError:
        return


def _diagnosis(path: Path, error: OSError) -> str:
    """Return why HDF5 cannot open a file, from what it says."""
    text = " ".join(str(error).split())
    if "h5clear" in text or "already open for write" in text:
        return (
            "the file was not closed by its writer (or is being written); if nobody writes it: "
            f"h5clear -s {path.name}, then check that it is whole"
        )
    cut = re.search(r"eof = (\d+).*stored_eof = (\d+)", text)
    if cut:
        return f"a damaged HDF5 file, most likely cut short ({cut[1]} of {cut[2]} bytes are there)"
    if isinstance(error, PermissionError):
        return f"it may not be read ({text})"
    return f"a damaged HDF5 file, most likely cut short ({text})"


def _check_metadata(path: Path) -> None:
    """Refuse metadata files that are too large to be parsed; those of the three upper levels."""
    upper = [path]
    folders = [path]
    for _ in range(2):
        upper = [Path(entry) for folder in upper for entry in os.scandir(folder) if entry.is_dir()]
        folders += upper
    for folder in folders:
        for name in _METADATA:
            file = folder / name
            size = file.stat().st_size if file.is_file() else 0
            if size > MAX_METADATA_BYTES:
                raise ValueError(
                    f"{file.relative_to(path)} holds {size} bytes; metadata of at most "
                    f"{MAX_METADATA_BYTES} bytes are read"
                )


def writer_note(path: Path) -> dict[str, str]:
    """Return a note if another process holds an HDF5 file open for writing.

    Args:
        path: The file.
    """
    try:
        with h5py.File(path, "r", locking="best-effort"):
            return {}
    except BlockingIOError:
        return {"file": "open for writing in another process while it was read"}
    except OSError:
        return {}
