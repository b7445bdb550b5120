"""Atomic files, lock files and content hashes; standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

_log = logging.getLogger(__name__)

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
_NO_COPY_EITHER = (errno.ENOENT, errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What the file system says where a copy is impossible or wrong, too; there are many ways to say
that it cannot give a file another name."""
_RANDOM_CHARS = 16 + len(".partial")
_LOOK_AGAIN_S = 0.2


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, never a part.

    The file gets the permissions that the umask leaves of 0666. A kill leaves at most a partial
    file, which `is_partial` tells from all products.

    Args:
        path: Target file; replaced if it exists.
        data: Whole content.
    """
    path = Path(path)
    temporary = partial_name(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with named_errors(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a new name to write a file to by a library; it appears when the block ends well.

    What a failing block has left is removed; a kill leaves at most a partial file.

    Args:
        path: The file's final name; replaced if it exists.
    """
    partial = partial_name(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(folder: str | Path) -> None:
    """Make a folder and try to write into it: before long work, whose result goes there.

    Args:
        folder: May exist.

    Raises:
        OSError: It cannot be made, or takes no file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with named_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no links.

    Args:
        source: The file.
        target: Its other name, which is not taken.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_COPY_EITHER:
            raise
        with whole_file(target) as copy:
            shutil.copyfile(source, copy)


def partial_name(path: str | Path) -> Path:
    """Return a new name beside a file, for its content until it is complete.

    Args:
        path: The file's final name.
    """
    path = Path(path)
    return path.with_name(f"{_partial_start(path)}{secrets.token_hex(8)}.partial")


def _partial_start(path: Path) -> str:
    """Return what the partial names of a file begin with; 255 bytes are the limit of a name."""
    return f".{os.fsencode(path.name)[:180].decode('utf-8', 'ignore')}."


def is_partial(path: str | Path) -> bool:
    """Tell whether a name is one of `partial_name`: what a killed process has left.

    Args:
        path: File or folder.
    """
    return _PARTIAL.fullmatch(Path(path).name) is not None


def remove_partials_of(path: str | Path) -> None:
    """Remove the partial files and folders that killed processes have left of one product.

    A process that is writing the same product now fails; the last one to begin wins.

    Args:
        path: The product's final name.
    """
    path = Path(path)
    start = _partial_start(path)
    if not path.parent.is_dir():
        return
    for name in os.listdir(path.parent):
        if is_partial(name) and name.startswith(start) and len(name) == len(start) + _RANDOM_CHARS:
            left = path.with_name(name)
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def listed(folder: str | Path) -> list[Path]:
    """Return what is in a folder, sorted; nothing where there is no such folder.

    `Path.glob` finds nothing in a folder that may not be read, as if it were empty.

    Args:
        folder: The folder.

    Raises:
        OSError: It cannot be listed.
    """
    try:
        with named_errors(folder):
            return sorted(Path(folder) / name for name in os.listdir(folder))
    except FileNotFoundError:
        return []


def files_below(folder: str | Path) -> list[Path]:
    """Return all files and links below a folder, sorted; nothing where there is no such folder.

    `Path.rglob` leaves out what is in a folder that may not be read, and tells nobody.

    Args:
        folder: The folder.

    Raises:
        OSError: A folder cannot be listed.
    """
    if not Path(folder).is_dir():
        return []
    found: list[str] = []
    folders = [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                inside = entry.is_dir(follow_symlinks=False)
                (folders if inside else found).append(entry.path)
    return sorted(Path(path) for path in found)


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Give an OSError that names no file, as those of read, write and fsync, a file's name.

    One that names a file without its folder, as those of shutil.rmtree, gets it too.

    Args:
        path: The file, or the folder that is worked on.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or os.sep in str(error.filename or ""):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_file(path: str | Path) -> bytes:
    """Return the content of a file; an error names it.

    Args:
        path: The file.
    """
    with named_errors(path):
        return Path(path).read_bytes()


def remove_partials(folder: str | Path) -> None:
    """Remove the partial files of killed processes directly inside a folder.

    Args:
        folder: A folder that no other process writes to now.
    """
    for path in Path(folder).iterdir():
        if is_partial(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class NoLocksError(OSError):
    """The file system has no locks."""


class Lock:
    """A lock file of processes; the lock ends with `release`, with the block, or with the process.

    A child forked while it is held holds it too, until it ends. The file is made if missing and
    never removed: a process that waits would hold a file that no other one can find.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # NFS gives an exclusive lock to files open for writing only, a shared one to reading.
        self._file = self._path.open("a+b")

    def take(self, *, shared: bool = False, wait_s: float = math.inf) -> bool:
        """Return whether this process holds the lock now; it may hold it already, of another kind.

        Who shares a lock and fails to have it alone at once may not share it any more.

        Args:
            shared: Share it with others that share it, instead of holding it alone.
            wait_s: How long to wait for those who hold it.

        Raises:
            NoLocksError: The file system has no locks.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._file, kind if wait_s == math.inf else kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= until:
                    return False
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    raise
                raise NoLocksError(error.errno, error.strerror, str(self._path)) from None
            time.sleep(_LOOK_AGAIN_S)

    @property
    def note(self) -> str:
        """What a holder has left for others to read: who it is, or what it does."""
        self._file.seek(0)
        return self._file.read().decode(errors="replace").strip()

    @note.setter
    def note(self, text: str) -> None:
        self._file.truncate(0)
        self._file.write(text.encode())
        self._file.flush()

    def sign(self) -> None:
        """Leave a note of which process holds the lock."""
        self.note = f"process {os.getpid()} on {os.uname().nodename}"

    def release(self) -> None:
        """Give the lock back; a second time changes nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def locked(path: str | Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file as long as the block runs; without locks, warn and continue.

    Args:
        path: The lock file.
        shared: Share it with others that share it, instead of holding it alone.
        wait: Wait for those who hold it.

    Yields:
        Whether it is held; False only where another process has it and `wait` is off.
    """
    with Lock(path) as lock:
        try:
            held = lock.take(shared=shared, wait_s=math.inf if wait else 0)
        except NoLocksError:
            held = True
            folder = Path(path).parent
            _log.warning("%s: this file system has no locks; start one process only", folder)
        yield held


def read_json(path: str | Path, *, cure: str) -> Any:
    """Read a JSON file that a program has written.

    Args:
        path: The file.
        cure: What to do about a damaged file, for the message.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a file (a folder, a pipe, which would wait for ever), or not JSON.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: not a file; {cure}")
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged (not JSON); {cure}") from None


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file's content.

    Args:
        path: The file; it is read in blocks.
    """
    with named_errors(path), Path(path).open("rb") as file:
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
        with named_errors(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def raise_error(error: OSError) -> None:
    """Raise an error: `onerror` of os.walk, which by itself leaves out what it cannot list."""
    raise error


def _walk(folder: Path) -> Iterable[Path]:
    yield folder
    for parent, folders, files in os.walk(folder, onerror=raise_error):
        yield from (Path(parent) / name for name in (*folders, *files))
