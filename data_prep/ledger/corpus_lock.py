"""Who may work in a corpus folder at the same time.

Any number of `convert` and `forget` share a folder, and so do the tasks of one `finalize`; the two
kinds keep each other out. `CORPUS/.locks/~corpus` is held, shared, by the first kind, and alone by
a finalize that is one command; `~tasks` is held, shared, by the tasks of a finalize, and says what
these are at. Whoever comes in holds `~entry` for as long as that takes. All of them are given back
by the system when a process ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sclong_ds.files.atomic import Lock, NoLocksError, locked

_OTHERS = "another finalize is at work here, or a convert or forget; wait for it"


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
        entry.release()
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
        entry.release()
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
        with Lock(_path(corpus, "~tasks")) as lock:
            if _is_first(corpus, lock):
                lock.note = json.dumps(begin())
            lock.take(shared=True)
            said = json.loads(lock.note)
            entry.release()
            yield said


def _is_first(corpus: Path, lock: Lock) -> bool:
    """Tell whether no other task is at work; the lock is held alone then."""
    try:
        return lock.take(wait_s=0)
    except NoLocksError:
        raise ValueError(
            f"{corpus}: this file system has no locks, which tasks need; run finalize as one "
            "command, with --jobs N for more than one process"
        ) from None


def _path(corpus: Path, name: str = "~corpus") -> Path:
    return corpus / ".locks" / name


def _no_tasks(corpus: Path) -> bool:
    with locked(_path(corpus, "~tasks"), wait=False) as free:
        return free


def _entry(corpus: Path) -> Lock:
    """Return the lock of whoever comes in; it can be given back before its block ends."""
    lock = Lock(_path(corpus, "~entry"))
    with suppress(NoLocksError):
        lock.take()
    return lock
