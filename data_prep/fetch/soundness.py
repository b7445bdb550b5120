"""Whether a file that came is whole: opened as what its name says it is."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from pathlib import Path

_HDF5 = re.compile(r"(?i)\.(h5ad|h5mu|h5|hdf5|loom)$")
_PAGE = re.compile(rb"(?i)\s*<(!doctype|html|head|\?xml|error)")
_BLOCK = 1 << 20


def check_sound(path: Path, *, name: str) -> None:
    """Refuse a file that is not what its name says, or not to its end.

    Sums of the content that no format carries are not compared: only the SHA-256 of a lock file
    can tell a byte that changed inside of HDF5.

    Args:
        path: The file.
        name: Its final name, whose ending tells the format.

    Raises:
        ValueError: What is wrong with it.
    """
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        raise ValueError("the file is empty")
    if _PAGE.match(start):
        raise ValueError("a web page or an error message of the server, not a file of data")
    try:
        if name.lower().endswith(".gz"):
            _read_gzip(path)
        elif name.lower().endswith(".zip"):
            _read_zip(path)
        elif _HDF5.search(name):
            _open_hdf5(path)
        elif b"\0" in start:
            raise ValueError("binary, not a table")
    except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"damaged or not whole ({' '.join(str(error).split())[:200]})") from error


def _read_gzip(path: Path) -> None:
    with gzip.open(path) as file:
        while file.read(_BLOCK):
            pass


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"damaged ({damaged} in the zip file)")


def _open_hdf5(path: Path) -> None:
    import h5py

    # HDF5 compares the length of the file with the one that it holds.
    with h5py.File(path, "r", locking=False) as file:
        if not list(file):
            raise ValueError("an HDF5 file without content")
