"""Parts of remote files kept on this machine, under a number of bytes that its processes share.

Each part is one file with its length and CRC-32C, written under another name and renamed, so that a
killed process leaves nothing that is read as a part, and a part that has changed on the disk counts
as one that is not there. The bytes in use are one number in a file; one process at a time adds to
it and writes a part, so that all together never pass the limit.

An epoch reads every chunk of a corpus once, in a new order. A cache that drops the oldest parts for
new ones would then hold little of what comes next; one that keeps what it has until it is full
answers as large a share of every later epoch as fits. So parts of the same corpus are never dropped
for each other, and those of other corpora once they were not used for an hour.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from sclong_ds.files.atomic import is_partial, locked, whole_file

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<QI")  # length, crc32c
_UNUSED_S = 3600.0
_FULL_S = 600.0
_TOUCH_S = 300.0


class RangeCache:
    """Parts of the files of one corpus, beside those of others in the same folder."""

    def __init__(self, folder: str | Path, *, of: str, limit_bytes: int) -> None:
        """Touch nothing.

        Args:
            folder: Where all processes of the machine keep parts.
            of: Names the corpus and its content.
            limit_bytes: What everything in the folder may take, those of other corpora included.
        """
        self._folder, self._limit = Path(folder), limit_bytes
        self._of = hashlib.sha256(of.encode()).hexdigest()[:16]
        self._closed_until = 0.0

    def get(self, name: str, start: int, length: int) -> bytes | None:
        """Return a part, None if it is not kept.

        Args:
            name: File of the corpus.
            start: First byte; negative: counted from the end.
            length: Number of bytes.
        """
        path = self._path(name, start, length)
        try:
            with path.open("rb") as file:
                state, content = os.fstat(file.fileno()), file.read()
        except OSError:
            return None
        data = content[_HEAD.size :]
        if len(content) < _HEAD.size or _HEAD.unpack_from(content) != _head_of(data):
            log.warning("%s: changed on the disk; it is read from its source again", path)
            path.unlink(missing_ok=True)
            return None
        if time.time() - state.st_mtime > _TOUCH_S:
            os.utime(path)
        return data

    def put(self, name: str, start: int, length: int, data: bytes) -> None:
        """Keep a part if there is room for it; a failing disk ends the keeping, not the reading.

        Args:
            name: File of the corpus.
            start: First byte; negative: counted from the end.
            length: Number of bytes asked for.
            data: What came.
        """
        if time.monotonic() < self._closed_until:
            return
        path = self._path(name, start, length)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._folder / ".lock"):
                if path.exists() or not self._reserve(_HEAD.size + len(data)):
                    return
                with whole_file(path) as partial:
                    partial.write_bytes(_HEAD.pack(*_head_of(data)) + data)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            log.warning(
                "%s: cells of a remote corpus are not kept here (%s)",
                self._folder, "the disk is full" if full else error,
            )  # fmt: skip
            self._closed_until = time.monotonic() + _FULL_S

    def _path(self, name: str, start: int, length: int) -> Path:
        key = hashlib.sha256(f"{name}\n{start}\n{length}".encode()).hexdigest()[:32]
        return self._folder / self._of / key[:2] / key[2:]

    def _reserve(self, size: int) -> bool:
        """Add to the bytes in use; False: there is no room, and none is looked for for a while."""
        with (self._folder / "used").open("a+b") as file:
            file.seek(0)
            text = file.read()
            used = int(text) if text.isdigit() else None
            if used is None or used + size > self._limit:
                used = self._make_room(size)
            fits = used + size <= self._limit
            file.truncate(0)
            file.write(str(used + size if fits else used).encode())
        if not fits:
            self._closed_until = time.monotonic() + _FULL_S
        return fits

    def _make_room(self, size: int) -> int:
        """Drop what has not been used for long, and return the bytes that are really in use."""
        found, now = sorted(self._parts()), time.time()
        used = sum(state[1] for state in found)
        for changed, n, path in found:
            own = path.parent.parent.name == self._of and not is_partial(path)
            if used + size <= self._limit or now - changed < _UNUSED_S:
                break
            if not own:
                path.unlink(missing_ok=True)
                used -= n
        return used

    def _parts(self) -> Iterator[tuple[float, int, Path]]:
        """Yield time of last use, bytes and path of everything that is kept."""
        for corpus in self._folder.iterdir():
            for folder in corpus.iterdir() if corpus.is_dir() else ():
                for entry in os.scandir(folder):
                    try:
                        state = entry.stat()
                    except FileNotFoundError:
                        continue
                    yield state.st_mtime, state.st_size, Path(entry.path)


def _head_of(data: bytes) -> tuple[int, int]:
    return len(data), google_crc32c.value(data)
