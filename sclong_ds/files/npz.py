"""Reading npy and npz files: damage of any kind is one ValueError that names the file."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.atomic import read_file

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
