"""Which files make up a dataset, and the hash that tells whether they changed.

Hashing reads all of them. `CORPUS/.seen/DATASET.json` keeps the hash beside a digest of path,
inode, size and times of every file: where these are as before, nothing is read. It is a memory and
no record: without it everything is hashed again.

Symbolic links are followed, to files and to folders: version control of data (DVC, git-annex) keeps
links in the tree and the content elsewhere, and what is read is what must be hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

from sclong_ds.files.atomic import (
    file_sha256,
    raise_error,
    read_json,
    remove_partials_of,
    write_atomic,
)

FileState = tuple[str, int, int, int, int]
"""Path, inode, bytes, and times of the last change of content and of anything, in ns."""
SETTLED_S = 2.0
"""A file that changed within so many seconds may change again without another time: file systems
count time in steps of up to 2 s."""
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
    if path.suffix == ".npz" or _is_npz(path):
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


def _is_npz(path: Path) -> bool:
    """Return whether a file is one of scipy.sparse.save_npz, whatever its name."""
    try:
        with zipfile.ZipFile(path) as packed:
            return "indptr.npy" in packed.namelist()
    except zipfile.BadZipFile:
        return False


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


def source_state(path: Path, *, gene_list: Path | None = None) -> list[FileState]:
    """Return what tells files that were written to from those that were not.

    Args:
        path: File or folder, as in a manifest.
        gene_list: See `open_source`.

    Raises:
        FileNotFoundError: No such file or folder.
    """
    state: list[FileState] = []
    for file in source_files(path, gene_list=gene_list):
        # Opening asks a network file system for the state of now.
        with file.open("rb") as opened:
            about = os.fstat(opened.fileno())
        times = about.st_mtime_ns, about.st_ctime_ns
        state.append((str(file), about.st_ino, about.st_size, *times))
    return state


def state_digest(state: list[FileState]) -> str:
    """Return the SHA-256 (hex) over the state of files; empty where one has just changed.

    Args:
        state: Of `source_state`, read before the files were hashed.
    """
    newest = max((max(times) for _, _, _, *times in state), default=0)
    if newest > time.time_ns() - SETTLED_S * 10**9:
        return ""
    return hashlib.sha256(repr(state).encode()).hexdigest()


def remembered_hash(corpus: Path, dataset_id: str, state: list[FileState]) -> str | None:
    """Return the hash of files of the same state, None where it is not known.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
        state: Of `source_state`.
    """
    try:
        found = read_json(_seen(corpus, dataset_id), cure="")
    except (ValueError, OSError):
        return None
    digest = state_digest(state)
    if not digest or not isinstance(found, dict) or found.get("state") != digest:
        return None
    known = found.get("source_hash")
    return known if isinstance(known, str) else None


def remember_hash(corpus: Path, dataset_id: str, state: list[FileState], found_hash: str) -> None:
    """Keep the hash of files, unless one of them has just changed.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
        state: Of `source_state`, read before the files were hashed.
        found_hash: Of `source_hash`.
    """
    digest, path = state_digest(state), _seen(corpus, dataset_id)
    if digest:
        path.parent.mkdir(exist_ok=True)
        remove_partials_of(path)
        content = {"state": digest, "source_hash": found_hash}
        write_atomic(path, (json.dumps(content) + "\n").encode())


def _seen(corpus: Path, dataset_id: str) -> Path:
    return corpus / ".seen" / f"{dataset_id}.json"


def fetched_hash(path: Path, sha256: str) -> str:
    """Return the `source_hash` of one file whose own hash is known, without reading it.

    Args:
        path: The file.
        sha256: Of its content, hex.
    """
    return hashlib.sha256(f"{path.name}\0{sha256}\n".encode()).hexdigest()


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
