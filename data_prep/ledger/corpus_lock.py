"""Who may work in a corpus folder at the same time.

Any number of `convert` and `forget` share a folder, and so do the tasks of one `finalize`; the two
kinds keep each other out. `CORPUS/.locks/~corpus` is held, shared, by the first kind, and alone by
a finalize that is one command; `~tasks` is held, shared, by the tasks of a finalize, and says what
these are at. Whoever comes in holds `~entry` for as long as that takes. All of them are given back
by the system when a process ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import locked

_OTHERS = "another finalize is at work here, or a convert or forget; wait for it"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def shared_corpus(corpus: Path) -> Iterator[None]:
    """Keep `finalize` out of a corpus folder while it is changed; any number share it.

    Args:
        corpus: The corpus folder.

    Raises:
        ValueError: A finalize is at work there.
    """
    with _entry(corpus) as entry, locked(_path(corpus), shared=True, wait=False) as held:
        if not held or not _no_tasks(corpus):
            raise ValueError(f"{corpus}: finalize is at work here; wait for it and start again")
        entry.close()
        yield


@contextmanager
def alone_in_corpus(corpus: Path) -> Iterator[None]:
    """Keep everybody else out of a corpus folder.

    Args:
        corpus: The corpus folder.

    Raises:
        ValueError: Somebody is at work there.
    """
    with _entry(corpus) as entry, locked(_path(corpus), wait=False) as held:
        if not held or not _no_tasks(corpus):
            raise ValueError(f"{corpus}: {_OTHERS}")
        entry.close()
        yield


@contextmanager
def tasks_in_corpus(corpus: Path, begin: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Keep out of a corpus folder everybody but other tasks of the same work.

    Args:
        corpus: The corpus folder.
        begin: Called by the first of the tasks, while no other one can come in; says what they are
            at, as JSON has it.

    Yields:
        What the first one has said.

    Raises:
        ValueError: Somebody else is at work there, or the file system has no locks.
    """
    with _entry(corpus) as entry:
        with locked(_path(corpus), wait=False) as held:
            if not held:
                raise ValueError(f"{corpus}: {_OTHERS}")
        with _path(corpus, "~tasks").open("a+b") as file:
            if _is_first(corpus, file.fileno()):
                said = begin()
                file.truncate(0)
                file.write(json.dumps(said).encode())
                file.flush()
            fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(0)
            said = json.loads(file.read())
            entry.close()
            yield said


def _is_first(corpus: Path, file: int) -> bool:
    """Tell whether no other task is at work; the lock is held alone then."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ValueError(
            f"{corpus}: this file system has no locks, which tasks need; run finalize as one "
            "command, with --jobs N for more than one process"
        ) from None
    return True


def _path(corpus: Path, name: str = "~corpus") -> Path:
    return corpus / ".locks" / name


def _no_tasks(corpus: Path) -> bool:
    with locked(_path(corpus, "~tasks"), wait=False) as free:
        return free


class _Entry:
    """The lock of whoever comes in; it can be given back before its block ends."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        lock.__enter__()

    def close(self) -> None:
        """Let the next one in."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None


@contextmanager
def _entry(corpus: Path) -> Iterator[_Entry]:
    entry = _Entry(locked(_path(corpus, "~entry")))
    try:
        yield entry
    finally:
        entry.close()
