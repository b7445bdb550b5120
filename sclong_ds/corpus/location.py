"""A folder of files that are only read: on a disk, or behind a URL that fsspec understands.

    folder = Location("s3://bucket/corpus")          # or "CORPUS", "file:///CORPUS", "memory://..."
    folder.read_range("cells.zarr/gap/c/0", 0, 100)  # a part of a file, by one range request
    folder.local_path("genes.tsv")                   # a whole file, downloaded once

Files that are needed whole (catalogue, genes, row tables) are downloaded once into a cache, where
all processes of a machine share them: `cache_dir`, else $SCLONG_CACHE, else ~/.cache/sclong_ds.
Cells are read by ranges (`sclong_ds.remote.ranges`), which are kept in the same place where that is
asked for (`sclong_ds.remote.range_cache`). fsspec is imported for a remote folder only.

A folder opened with a record of its files gives a process no file that differs from it: each is
compared when it is first asked for, and a damaged copy in the cache is downloaded once more. A file
that is not on record is not there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from sclong_ds.files.atomic import locked, named_errors, read_file, sync_folder, whole_file
from sclong_ds.files.checksums import check_file
from sclong_ds.remote.range_cache import RangeCache
from sclong_ds.remote.ranges import RangeRequests, client_options, try_once
from sclong_ds.remote.storage import CutError, UnusableUrlError, ask_storage

CACHE_VARIABLE = "SCLONG_CACHE"
_FETCHED_AT_ONCE = 16
_FIRST_PAUSE_S = 0.1  # of a range: its batch waits, and only its own few bytes are asked for again
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
        kept_bytes: int = 0,
    ) -> None:
        """Name a folder.

        Args:
            url: Path, or fsspec URL.
            cache_dir: Where to keep downloaded files; unused for a local folder.
            version: Hash of the folder's content. With it a file in the cache is used without
                asking the server again; another version never finds it. Without it the server is
                asked for the file's state (size, entity tag or time of change) first.
            files: Size and CRC-32C of every file that is read whole; None: there is no record.
            kept_bytes: What the cache may hold of files that are read in parts, of all corpora
                together; it holds none of a folder without a version.
        """
        self.url = str(url) if isinstance(url, Path) else url.rstrip("/") or "/"
        self.version = version
        self._record = None if files is None else _Record(files)
        self._root = self.url
        """The folder whose copy the cache holds: the one this was reached from by `/`."""
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        path = self.url.removeprefix("file://")
        self.is_local = "://" not in path
        self._kept_bytes, self._kept = kept_bytes, None
        if kept_bytes > 0 and version is not None and not self.is_local:
            self._kept = RangeCache(
                self._base / "cells", of=f"{self.url}\n{version}", limit_bytes=kept_bytes
            )
        self._folder = Path(path) if self.is_local else None
        self._opened: tuple[int, Any, str, RangeRequests] | None = None

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
        options = self._cache_dir, self.version, files, self._kept_bytes
        return _unpickled, (self._root, self._inside, *options)

    def __truediv__(self, name: str) -> Location:
        """Return the folder `name` inside this one."""
        inside = Location(f"{self.url}/{name}", cache_dir=self._cache_dir, version=self.version)
        inside._root, inside._record, inside._kept = self._root, self._record, self._kept
        inside._kept_bytes = self._kept_bytes
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

    def read_range(self, name: str, start: int, length: int, *, fresh: bool = False) -> bytes:
        """Return a part of a file; fewer bytes than `length` where the file ends before.

        No descriptor is kept, so that neither threads nor forked processes share one: opening a
        file costs little beside reading a chunk.

        Args:
            name: File inside the folder.
            start: First byte.
            length: Number of bytes.
            fresh: Ask for it even if it is in the cache, where it may be damaged.

        Raises:
            FileNotFoundError: No such file.
        """
        if self._folder is not None:
            path = f"{self._folder}/{name}"  # `/` of Path takes as long as opening the file
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with named_errors(path):
                    return _read_at(handle, start, length)
            finally:
                os.close(handle)
        return b"" if length == 0 else self._part(name, start, length, fresh=fresh)

    def read_end(self, name: str, length: int, *, fresh: bool = False) -> bytes:
        """Return the last bytes of a file, by one request; fewer where it has no more.

        Args:
            name: File inside the folder.
            length: Number of bytes, at least 1.
            fresh: As for `read_range`.

        Raises:
            FileNotFoundError: No such file.
        """
        if self._folder is not None:
            return self.read_range(name, max(0, self.size(name) - length), length)
        return self._part(name, -length, length, fresh=fresh)

    def _part(self, name: str, start: int, length: int, *, fresh: bool) -> bytes:
        """Return a part of a remote file, from its end where `start` is negative."""
        full = self._full_name(name)
        if self._kept is not None and not fresh:
            kept = self._kept.get(full, start, length)
            if kept is not None:
                return kept

        def attempt() -> bytes:
            _, root, ranges = self._filesystem()
            data = ranges.read(f"{root}/{name}", start, None if start < 0 else start + length)
            if len(data) > length:
                raise UnusableUrlError(
                    f"{self.url}/{name}: asked for {length} bytes, got {len(data)}: this server "
                    "does not answer range requests, by which cells are read; serve the corpus by "
                    "one that does (S3, nginx, Apache), or copy it to this machine"
                )
            return data

        return ask_storage(f"{self.url}/{name}", attempt, first_pause_s=_FIRST_PAUSE_S)

    def keep_part(self, name: str, start: int, length: int, data: bytes) -> None:
        """Put a part of a remote file, that was found to be sound, into the cache if there is one.

        Args:
            name: File inside the folder.
            start: First byte; negative: counted from the end.
            length: Number of bytes.
            data: The part.
        """
        if self._kept is not None:
            self._kept.put(self._full_name(name), start, length, data)

    @property
    def requests(self) -> int:
        """Requests for parts of files that this process has sent to the server of this folder."""
        own = self._opened is not None and self._opened[0] == os.getpid()
        return self._opened[3].asked if own and self._opened is not None else 0

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

    def fetch(self, names: Iterable[str]) -> None:
        """Download files that will be needed, several at a time; what fails is said at their use.

        Args:
            names: Files inside the folder; those not on record are left out.
        """
        if self._record is None or self._folder is not None:
            return

        left = iter([name for name in names if self.exists(name)])

        def work() -> None:
            for name in left:
                with suppress(OSError, ValueError):
                    self._copy(name)

        # Daemons: a process can end while a server does not answer.
        threads = [Thread(target=work, daemon=True) for _ in range(_FETCHED_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

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
                known = (
                    None if self._record is None else self._record.files[self._full_name(name)][0]
                )
                self._ask(name, lambda files, path: _download(files, path, target, size=known))
        return target

    @property
    def _base(self) -> Path:
        """The folder of all caches."""
        return self._cache_dir or Path(
            os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "sclong_ds"
        )

    def _cached(self, name: str, state: str) -> Path:
        """Return the place of a file in the cache: one folder for each URL and state of it."""
        key = hashlib.sha256(f"{self._root}\n{state}".encode()).hexdigest()[:16]
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", self._root)[-60:].strip("-")
        return self._base / f"{readable}-{key}" / self._inside / name

    def _ask(self, name: str, action: Callable[[Any, str], T]) -> T:
        """Ask the server until it answers or the time for that is over (`remote.storage`).

        Every failure leaves as a named OSError.
        """
        where = f"{self.url}/{name}" if name else self.url

        def attempt() -> T:
            files, root, _ = self._filesystem()
            return action(files, f"{root}/{name}" if name else root)

        return ask_storage(where, attempt)

    def _filesystem(self) -> tuple[Any, str, RangeRequests]:
        # A forked process must not use the connections and event loop of its parent.
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                files, root = url_to_fs(self.url, **client_options(self.url))
            except ImportError as error:
                raise UnusableUrlError(
                    f"{self.url}: reading this URL needs a package that is not installed "
                    f"({error}); install it with pip, or copy the folder to this machine"
                ) from None
            except ValueError as error:
                text = f"{self.url}: {error}; give a path or an fsspec URL"
                raise UnusableUrlError(text) from None
            try_once(files)
            self._opened = os.getpid(), files, root.rstrip("/"), RangeRequests(files)
        return self._opened[1:]


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
    kept_bytes: int,
) -> Location:
    root = Location(url, cache_dir=cache_dir, version=version, files=files, kept_bytes=kept_bytes)
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


def _download(files: Any, path: str, target: Path, *, size: int | None) -> None:
    """Copy a remote file to its place in the cache, whole or not at all."""
    with whole_file(target) as temporary:
        files.get_file(path, str(temporary))
        found = temporary.stat().st_size
        # A file that is another than on record is no cut one.
        if found != size and found != (expected := files.size(path)):
            raise CutError(f"{found} of {expected} bytes arrived")
        sync_folder(temporary)
