"""The port at which ranks meet: another one where it is the default, a line where it is taken."""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sclong_ds.files.atomic import write_atomic

DEFAULT_PORT = "29500"
"""Of the launcher `deepspeed`: two runs on one machine would both take it."""
_WAIT_S = 300.0


def free_port() -> int:
    """Return a port of this machine that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def own_port(rank: int) -> Iterator[None]:
    """Give the ranks of one `deepspeed` launcher on one machine a free port of their own.

    Only where nobody asked for a port. Rank 0 chooses it and writes it to a file that is named by
    the launcher's process, where the others read it; it is removed when all have joined.

    Args:
        rank: This rank.

    Raises:
        TimeoutError: Rank 0 wrote none.
    """
    # The launcher counts its machines in CROSS_SIZE; other launchers do not set it.
    alone = os.environ.get("CROSS_SIZE") == "1" and os.environ.get("MASTER_PORT") == DEFAULT_PORT
    if not alone:
        yield
        return
    path = _port_file()
    if rank == 0:
        os.environ["MASTER_PORT"] = str(free_port())
        write_atomic(path, os.environ["MASTER_PORT"].encode())
    else:
        os.environ["MASTER_PORT"] = _read_port(path)
    try:
        yield
    finally:
        if rank == 0:
            path.unlink(missing_ok=True)


def _port_file() -> Path:
    """Return the file of this launcher: its process number alone may be that of an older one.

    Its start is counted in ticks since the machine's, which no change of the clock moves.
    """
    launcher = os.getppid()
    stat = Path(f"/proc/{launcher}/stat").read_text(encoding="ascii", errors="replace")
    began = stat.rpartition(")")[2].split()[19]  # Field 22; the name before it may hold spaces.
    return Path(tempfile.gettempdir()) / f"sclong-{os.getuid()}-port-{launcher}-{began}"


def _read_port(path: Path) -> str:
    """Wait for the file and return the port in it."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            # Anybody may write into the folder of temporary files.
            if path.stat().st_uid == os.getuid():
                return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise TimeoutError(errno.ETIMEDOUT, f"rank 0 wrote no port to {path} for {_WAIT_S:.0f} s")


@contextmanager
def port_named(place: str) -> Iterator[None]:
    """Turn torch's page about a port that is taken into a line.

    Args:
        place: Address and port at which the ranks meet.

    Raises:
        OSError: The port is taken.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not re.search("EADDRINUSE|address already in use", str(error), re.IGNORECASE):
            raise
        raise OSError(
            errno.EADDRINUSE,
            f"the port of {place} is taken, perhaps by another run on this machine: give another "
            f"one (deepspeed --master_port N, torchrun --master-port N, or MASTER_PORT=N)",
        ) from None
