"""A folder of files that are only read: on a disk, or behind a URL that fsspec understands.

    folder = Location("s3://bucket/corpus")          # or "CORPUS", "file:///CORPUS", "memory://..."
    folder.read_range("cells.zarr/gap/c/0", 0, 100)  # a part of a file, by one range request
    folder.local_path("genes.tsv")                   # a whole file, downloaded once

Files that are needed whole (catalogue, genes, row tables) are downloaded once into a cache, where
all processes of a machine share them: `cache_dir`, else $SCLONG_CACHE, else ~/.cache/sclong_ds.
Cells are read by ranges and never cached. fsspec is imported for a remote folder only.

A folder opened with a record of its files gives a process no file that differs from it: each is
compared when it is first asked for, and a damaged copy in the cache is downloaded once more. A file
that is not on record is not there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sclong_ds.files.atomic import locked, named_errors, partial_name, read_file
from sclong_ds.files.checksums import check_file
from sclong_ds.files.storage import CutError, UnusableUrlError, ask_storage

CACHE_VARIABLE = "SCLONG_CACHE"
_BLOCK_BYTES = 2**24
T = TypeVar("T")


class Location:
    """A folder, local or remote; opening it touches no file. Equal URLs are equal locations."""

    def __init__(
        self,
        url: str | Path,
        *,
        cache_dir: str | Path | None = None,
        version: str | None = None,
        files: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Name a folder.

        Args:
            url: Path, or fsspec URL.
            cache_dir: Where to keep downloaded files; unused for a local folder.
            version: Hash of the folder's content. With it a file in the cache is used without
                asking the server again; another version never finds it. Without it the server is
                asked for the file's state (size, entity tag or time of change) first.
            files: Size and CRC-32C of every file that is read whole; None: there is no record.
        """
        self.url = str(url) if isinstance(url, Path) else url.rstrip("/") or "/"
        self.version = version
        self._record = None if files is None else _Record(files)
        self._root = self.url
        """The folder whose copy the cache holds: the one this was reached from by `/`."""
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        path = self.url.removeprefix("file://")
        self.is_local = "://" not in path
        self._folder = Path(path) if self.is_local else None
        self._opened: tuple[int, Any, str] | None = None

    def __repr__(self) -> str:
        return f"Location({self.url!r})"

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        # Connections belong to a process: the copy makes its own.
        files = None if self._record is None else self._record.files
        return _unpickled, (self._root, self._inside, self._cache_dir, self.version, files)

    def __truediv__(self, name: str) -> Location:
        """Return the folder `name` inside this one."""
        inside = Location(f"{self.url}/{name}", cache_dir=self._cache_dir, version=self.version)
        inside._root, inside._record = self._root, self._record
        return inside

    @property
    def _inside(self) -> str:
        """Path from the folder that this was reached from by `/`; empty for that folder itself."""
        return self.url[len(self._root) + 1 :]

    def _full_name(self, name: str) -> str:
        """Return the name by which a file is on record."""
        return "/".join(part for part in (self._inside, name) if part)

    @property
    def folder(self) -> Path:
        """The folder on this machine.

        Raises:
            ValueError: It is not on this machine.
        """
        if self._folder is None:
            raise ValueError(f"{self.url}: needs a folder on this machine; copy it here first")
        return self._folder

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name; with a record, whether it has one."""
        if self._record is not None:
            return self._full_name(name) in self._record.files
        if self._folder is not None:
            return (self._folder / name).is_file()
        try:
            # isfile() says False of whatever fails.
            return self._ask(name, lambda files, path: bool(files.info(path)["type"] == "file"))
        except FileNotFoundError:
            return False

    def names(self) -> list[str]:
        """Return the sorted names of the files and folders directly inside.

        Raises:
            FileNotFoundError: No such folder.
        """
        if self._record is not None:
            above = self._full_name("x")[:-1]
            below = (n.removeprefix(above) for n in self._record.files if n.startswith(above))
            return sorted({name.partition("/")[0] for name in below})
        if self._folder is not None:
            return sorted(os.listdir(self._folder))
        entries = self._ask("", lambda files, path: list(files.ls(path, False)))
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in entries})

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: No such file.
        """
        if self._folder is not None:
            return (self._folder / name).stat().st_size
        return self._ask(name, lambda files, path: int(files.size(path)))

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is not the file that is on record.
        """
        if self._record is not None:
            return read_file(self.local_path(name))
        if self._folder is not None:
            return read_file(self._folder / name)
        return self._ask(name, lambda files, path: bytes(files.cat_file(path)))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return a part of a file; fewer bytes than `length` where the file ends before.

        No descriptor is kept, so that neither threads nor forked processes share one: opening a
        file costs little beside reading a chunk.

        Args:
            name: File inside the folder.
            start: First byte.
            length: Number of bytes.

        Raises:
            FileNotFoundError: No such file.
        """
        if self._folder is not None:
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with named_errors(self._folder / name):
                    return _read_at(handle, start, length)
            finally:
                os.close(handle)
        if length == 0:
            return b""

        def part(files: Any, path: str) -> bytes:
            data = bytes(files.cat_file(path, start=start, end=start + length))
            if len(data) > length:
                raise OSError(f"asked for {length} bytes, got {len(data)}: no range requests here")
            return data

        return self._ask(name, part)

    def local_path(self, name: str) -> Path:
        """Return a path of a whole file on this machine, downloading a remote one once.

        Any number of processes may ask at the same time: one downloads, the others wait for it.

        Args:
            name: File inside the folder.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is not the file that is on record.
        """
        full = self._full_name(name)
        if self._record is None or full in self._record.checked:
            return self._copy(name)
        if full not in self._record.files:
            raise FileNotFoundError(f"{self.url}/{name}: not on record in corpus.json")
        path = self._copy(name)
        try:
            self._record.check(path, full)
        except ValueError:
            if self._folder is not None:
                raise
            path = self._copy(name, damaged=path)
            self._record.check(path, full, of=f" (copy of {self.url}/{name})")
        return path

    def _copy(self, name: str, *, damaged: Path | None = None) -> Path:
        """Return a path of a file on this machine; another copy if the one there is damaged."""
        if self._folder is not None:
            return self._folder / name
        state = self.version or self._ask(
            name, lambda files, path: f"{files.ukey(path)} {files.size(path)}"
        )
        target = self._cached(name, state)
        if target.is_file() and damaged is None:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        # One process at a time; without locks several download, and a rename keeps that safe.
        with locked(target.with_name(f".{target.name}.lock")):
            if not target.is_file() or damaged is not None:
                self._ask(name, lambda files, path: _download(files, path, target))
        return target

    def _cached(self, name: str, state: str) -> Path:
        """Return the place of a file in the cache: one folder for each URL and state of it."""
        base = self._cache_dir or Path(
            os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sclong_ds"
        )
        key = hashlib.sha256(f"{self._root}\n{state}".encode()).hexdigest()[:16]
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", self._root)[-60:].strip("-")
        return base / f"{readable}-{key}" / self._inside / name

    def _ask(self, name: str, action: Callable[[Any, str], T]) -> T:
        """Ask the server until it answers or the time for that is over (`files.storage`).

        Every failure leaves as a named OSError.
        """
        where = f"{self.url}/{name}" if name else self.url

        def attempt() -> T:
            files, root = self._filesystem()
            return action(files, f"{root}/{name}" if name else root)

        return ask_storage(where, attempt)

    def _filesystem(self) -> tuple[Any, str]:
        # A forked process must not use the connections and event loop of its parent.
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                self._opened = (os.getpid(), *url_to_fs(self.url))
            except ImportError as error:
                raise UnusableUrlError(
                    f"{self.url}: reading this URL needs a package that is not installed "
                    f"({error}); install it with pip, or copy the folder to this machine"
                ) from None
            except ValueError as error:
                text = f"{self.url}: {error}; give a path or an fsspec URL"
                raise UnusableUrlError(text) from None
        return self._opened[1], self._opened[2].rstrip("/")


class _Record:
    """What the files of a folder are on record with, and those compared in this process."""

    def __init__(self, files: Mapping[str, Sequence[int]]) -> None:
        self.files = files
        self.checked: set[str] = set()

    def check(self, path: Path, name: str, *, of: str = "") -> None:
        """Compare a file with its record; raises as `check_file`."""
        size, crc32c = self.files[name]
        cure = f"restore the file{of}, or run: python -m data_prep finalize on the corpus"
        check_file(path, (size, crc32c), cure=cure)
        self.checked.add(name)


def _unpickled(
    url: str,
    inside: str,
    cache_dir: Path | None,
    version: str | None,
    files: Mapping[str, Sequence[int]] | None,
) -> Location:
    root = Location(url, cache_dir=cache_dir, version=version, files=files)
    return root / inside if inside else root


def _read_at(handle: int, start: int, length: int) -> bytes:
    data = os.pread(handle, length, start)
    # One call may give less than there is: after a signal, and never more than 2 GB.
    while 0 < len(data) < length:
        more = os.pread(handle, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def _download(files: Any, path: str, target: Path) -> None:
    """Copy a remote file to its place in the cache, whole or not at all."""
    temporary = partial_name(target)
    try:
        with temporary.open("xb") as copy, files.open(path, "rb") as source:
            while block := source.read(_BLOCK_BYTES):
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
        found, expected = temporary.stat().st_size, files.size(path)
        if found != expected:
            raise CutError(f"{found} of {expected} bytes arrived")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
