"""Which files make up a dataset, and the hash that tells whether they changed.

Symbolic links are followed, to files and to folders: version control of data (DVC, git-annex) keeps
links in the tree and the content elsewhere, and what is read is what must be hashed.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from sclong_ds.files.atomic import file_sha256, raise_error

MAX_FILES = 10**7
"""Of one dataset; a zarr folder of 100 million cells in small chunks has 10^6."""


def source_files(path: Path, *, gene_list: Path | None = None) -> list[Path]:
    """Return the files that make up a dataset, sorted; below a folder, links are followed.

    Args:
        path: File or folder, as in a manifest.
        gene_list: See `open_source`.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: More than MAX_FILES, or an npz file without a gene list.
    """
    if path.is_dir():
        return sorted(_files_below(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".npz":
        # The readers import every library of formats, which other files need not wait for here.
        from data_prep.readers.npz import gene_list_file
        from data_prep.readers.open import readable

        with readable(path):
            return [path, gene_list_file(path, gene_list)]
    if "matrix.mtx" not in path.name:
        return [path]
    # The barcodes and features beside a matrix file carry the same sample name in front.
    prefix = path.name[: path.name.index("matrix.mtx")]
    beside = path.parent.iterdir()
    return sorted(file for file in beside if file.is_file() and file.name.startswith(prefix))


def source_hash(path: Path, *, gene_list: Path | None = None) -> str:
    """Return the SHA-256 (hex) over the names and contents of the files of a dataset.

    Args:
        path: File or folder, as in a manifest.
        gene_list: See `open_source`.

    Raises:
        FileNotFoundError: No such file or folder.
    """
    total = hashlib.sha256()
    for file in source_files(path, gene_list=gene_list):
        name = file.relative_to(path) if path.is_dir() else file.name
        total.update(f"{name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def _files_below(folder: Path) -> list[Path]:
    """Return the files below a folder; where links lead back to a folder above, they end."""
    found: list[Path] = []
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for parent, folders, names in os.walk(folder, onerror=raise_error, followlinks=True):
        place = os.stat(parent)
        key = (place.st_dev, place.st_ino)
        path_to = above.pop(parent, frozenset())
        if key in path_to:
            folders.clear()
            continue
        above |= {os.path.join(parent, name): path_to | {key} for name in folders}
        found += [file for name in names if (file := Path(parent, name)).is_file()]
        if len(found) > MAX_FILES:
            raise ValueError(f"{folder} holds more than {MAX_FILES} files; links in circles?")
    return found
