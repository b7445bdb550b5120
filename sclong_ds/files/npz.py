"""npy and npz files: read so that any damage is one ValueError with the name, and written whole."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sclong_ds.files.atomic import read_file, whole_file

# A flipped bit of a zip header asks for a password or an unknown compression (RuntimeError), one of
# a shape for more memory than there is.
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_npz(path: str | Path, **arrays: ArrayLike) -> None:
    """Write arrays; a reader sees the old file or the new one.

    Args:
        path: Target, replaced if it exists.
        **arrays: By name.
    """
    with whole_file(path) as partial, partial.open("wb") as file:
        named: dict[str, Any] = arrays
        np.savez(file, **named)


def npz_bytes(**arrays: ArrayLike) -> bytes:
    """Return the content of an npz file of some arrays, for `write_atomic`."""
    content, named = io.BytesIO(), dict[str, Any](arrays)
    np.savez(content, **named)
    return content.getvalue()


def read_npz(path: str | Path, *, cure: str) -> dict[str, NDArray[Any]]:
    """Return all arrays of an npz file, by name.

    Args:
        path: The file.
        cure: What to do about a damaged file, for the message.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    found = _load(Path(path), cure)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (no npz file); {cure}")
    return found


def read_npy(path: str | Path, *, cure: str) -> NDArray[Any]:
    """Return the array of an npy file; as `read_npz`."""
    found = _load(Path(path), cure)
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path}: damaged (no npy file); {cure}")
    return found


def _load(path: Path, cure: str) -> Any:
    # From memory: a file that numpy cannot read would stay open.
    content = io.BytesIO(read_file(path))
    try:
        found = np.load(content)
        return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found
    except _DAMAGE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: damaged ({reason}); {cure}") from None
