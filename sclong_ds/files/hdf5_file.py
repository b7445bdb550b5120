"""A new HDF5 file that appears whole or not at all, whatever fails while it is written.

HDF5 writes late and out of order, and h5py drops the errors of objects that it closes by itself:
a write that failed once (a disk that was full for a moment) left a file with holes and no error.
Here HDF5 writes through a Python file that remembers the first failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sclong_ds.files.atomic import named_errors, remove_partials_of, whole_file

if TYPE_CHECKING:
    import h5py


class WatchedFile:
    """A binary file that keeps its first error instead of raising it; for h5py's `fileobj` driver.

    h5py 3.16 crashes when an error is raised to it while it closes a file.

    Args:
        file: Unbuffered file, open for reading and writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error, if there was one: nothing that was written since is of use.

        Raises:
            OSError: What failed.
        """
        if self._error is not None:
            raise self._error

    def write(self, data: memoryview) -> int:
        """Write all bytes."""
        with self._kept():
            self.write_whole(data)
        return len(data)

    def write_whole(self, data: memoryview) -> None:
        """Write all bytes; a file may take fewer at a time."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def read(self, size: int = -1) -> bytes:
        """Return bytes from the position on; h5py tells a file by this method."""
        return self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        """Read into a buffer; after its end the file reads as zeros."""
        rest = memoryview(buffer)
        with self._kept():
            while rest and (count := self._file.readinto(rest)):  # type: ignore[attr-defined]
                rest = rest[count:]
        rest[:] = bytes(len(rest))
        return len(buffer)

    def truncate(self, size: int) -> int:
        """Set the size of the file in bytes."""
        with self._kept():
            self._file.truncate(size)
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error


@contextmanager
def new_hdf5(out: Path) -> Iterator[tuple[h5py.File, WatchedFile]]:
    """Open a new HDF5 file under a temporary name, and move it into place when all went well.

    Args:
        out: Its final name; replaced if it exists.

    Yields:
        The file, and what it is written to, whose `check` ends long work that has failed already.

    Raises:
        OSError: The file could not be written; what was there before is untouched.
    """
    import h5py

    remove_partials_of(out)
    with (
        whole_file(out) as partial,
        named_errors(out),
        partial.open("xb+", buffering=0) as raw,
    ):
        watched = WatchedFile(raw)
        try:
            with h5py.File(watched, "w") as file:
                yield file, watched
        except (OSError, RuntimeError, ValueError, KeyError):
            # HDF5's own message, about a file with holes, hides that of the disk.
            watched.check()
            raise
        watched.check()
        os.fsync(raw.fileno())
