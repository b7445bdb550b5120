"""Make the n-th system call of a kind below a folder fail, or kill the process there.

    restart_with_preload()              # once, first thing in a program
    calls = Calls(folder)
    outcome = in_child(lambda: main([...]), log=log, before=lambda: calls.arm("write", 3, ENOSPC))

The functions of libc are replaced by those of failing_calls.c, which LD_PRELOAD puts before them:
what HDF5, Arrow, Zarr and torch do in native code fails like what Python does. Calls are counted
over all processes that descend from the program. Work is done in forked children, so that the
imports are paid once and a crash, a kill or a hang costs one child.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("failing_calls.c")
KINDS = ("write", "fsync", "rename", "open", "read", "mkdir", "unlink", "truncate", "link")
"""As numbered in failing_calls.c."""
CHANGING = ("write", "fsync", "rename", "mkdir", "unlink", "truncate", "link")
"""Kinds that change what is on the disk: the moments that a kill can fall between."""
ERRORS = {
    "write": errno.ENOSPC, "fsync": errno.EIO, "rename": errno.EACCES, "open": errno.EACCES,
    "read": errno.EIO, "mkdir": errno.ENOSPC, "unlink": errno.EACCES, "truncate": errno.ENOSPC,
    "link": errno.EACCES,
}  # fmt: skip
"""The errno that a kind fails with."""
_VARIABLE = "FAILING_CALLS"


class _Shared(ctypes.Structure):
    """`struct shared` of failing_calls.c."""

    _fields_ = (
        ("armed", ctypes.c_int), ("error", ctypes.c_int), ("all_after", ctypes.c_int),
        ("padding", ctypes.c_int), ("at", ctypes.c_long), ("seen", ctypes.c_long),
        ("of", ctypes.c_long * len(KINDS)), ("failed", ctypes.c_long),
        ("below", ctypes.c_char * 1024), ("path", ctypes.c_char * 1024),
    )  # fmt: skip


def restart_with_preload(command: Sequence[str]) -> None:
    """Compile failing_calls.c and start this program again with it, unless that was done.

    Args:
        command: Arguments of Python that start the program.

    Raises:
        RuntimeError: The file cannot be compiled.
    """
    if _VARIABLE in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="failing_calls-"))
    library, shared = folder / "failing_calls.so", folder / "shared"
    compiler = os.environ.get("CC", "gcc")
    built = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if built.returncode:
        raise RuntimeError(f"{SOURCE} cannot be compiled by {compiler}: {built.stderr[-2000:]}")
    shared.write_bytes(bytes(mmap.PAGESIZE))
    preload = " ".join(filter(None, (str(library), os.environ.get("LD_PRELOAD"))))
    env = os.environ | {_VARIABLE: str(shared), "LD_PRELOAD": preload}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], env)


class Calls:
    """The calls below a folder: counted, and one of them failed.

    Args:
        folder: Absolute path without symbolic links; calls on what lies in it are counted.
    """

    def __init__(self, folder: Path) -> None:
        with open(os.environ[_VARIABLE], "r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._shared = _Shared.from_buffer(self._map)
        self._shared.armed = 0
        self._shared.below = f"{folder}/".encode()

    def arm(
        self, kinds: Sequence[str], at: int = 0, *, error: int = 0, all_after: bool = False
    ) -> None:
        """Begin to count from 0.

        Args:
            kinds: Kinds of calls that are counted.
            at: Number of the call that fails, from 1; 0: none does.
            error: errno that it fails with; 0: its process is killed instead.
            all_after: Whether those after it fail too, as on a disk that stays full.
        """
        shared = self._shared
        shared.armed, shared.seen, shared.failed, shared.path = 0, 0, 0, b""
        shared.of[:] = [0] * len(KINDS)
        shared.at, shared.error, shared.all_after = at, error, int(all_after)
        shared.armed = sum(1 << KINDS.index(kind) for kind in kinds)

    def disarm(self) -> None:
        """Let all calls pass uncounted."""
        self._shared.armed = 0

    @property
    def seen(self) -> dict[str, int]:
        """Calls counted, by kind."""
        return dict(zip(KINDS, self._shared.of, strict=True))

    @property
    def path(self) -> str:
        """What the first call that failed was for; empty if none did."""
        return os.fsdecode(self._shared.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a piece of work in a child ended."""

    result: Any
    """What it returned; None unless it did."""
    error: BaseException | None
    """What it raised, where that can be carried over."""
    trace: str
    """The traceback of what it raised."""
    signal: int
    """Signal that killed the child, or 0."""
    hung: bool
    """Whether it was killed because it took too long."""
    output: str
    """What it printed on stdout and stderr."""

    def describe(self) -> str:
        """Return one line that says how it ended."""
        if self.hung:
            return "took too long"
        if self.signal:
            return f"killed by signal {self.signal}"
        if self.error is not None:
            return f"{type(self.error).__name__}: {' '.join(str(self.error).split())}"
        return f"returned {self.result!r}"[:200]


def in_child(work: Callable[[], Any], *, log: Path, timeout_s: float = 60.0) -> Ended:
    """Do a piece of work in a forked child and wait for it; its own children end with it.

    Args:
        work: What to do; its result must be picklable.
        log: File for what it prints, overwritten.
        timeout_s: The child is killed after so many seconds.
    """
    answer = log.with_suffix(".pickle")
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _work_and_exit(work, log, answer)
    hung, status = False, None
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0005
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() > deadline:
            hung = True
            os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    result, error, trace = None, None, ""
    if answer.exists():
        result, error, trace = pickle.loads(answer.read_bytes())
    return Ended(
        result=result, error=error, trace=trace, hung=hung,
        signal=0 if hung or not os.WIFSIGNALED(status) else os.WTERMSIG(status),
        output=log.read_text(errors="replace") if log.exists() else "",
    )  # fmt: skip


def _work_and_exit(work: Callable[[], Any], log: Path, answer: Path) -> None:
    """Work in the child and leave the outcome in a file."""
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    found: tuple[Any, BaseException | None, str] = (None, None, "")
    try:
        found = (work(), None, "")
    except BaseException as error:  # noqa: BLE001 - the parent judges whatever was raised
        found = (None, error, traceback.format_exc())
    try:
        content = pickle.dumps(found)
    except (pickle.PicklingError, TypeError, AttributeError):
        content = pickle.dumps((None, RuntimeError(repr(found[1])), found[2]))
    part = answer.with_suffix(".part")
    part.write_bytes(content)
    part.replace(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
