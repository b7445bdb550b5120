"""Files that are whole or absent, and their content hashes; standard library only."""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, never a part.

    Args:
        path: Target file; replaced if it exists.
        data: Whole content.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            # mkstemp makes files private; a corpus is read by other users of a shared file system.
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def local_path(text: str) -> Path:
    """Return a path of the command line; a URL would become a folder named `s3:`.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is a URL.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: must be a path on this machine, not a URL")
    return Path(text)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file's content.

    Args:
        path: The file; it is read in blocks.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: str | Path) -> None:
    """Flush every file and folder below `folder` to the disk.

    Args:
        folder: Folder about to be renamed to its final name.
    """
    for path in _walk(Path(folder)):
        sync_folder(path)


def sync_folder(path: str | Path) -> None:
    """Flush one folder (its list of names) or file to the disk.

    Args:
        path: Folder or file.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk(folder: Path) -> Iterable[Path]:
    yield folder
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent) / name for name in (*folders, *files))
