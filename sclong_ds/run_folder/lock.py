"""The lock that keeps a second job out of a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO


def lock_run_folder(run_dir: Path, *, wait_s: float) -> IO[str]:
    """Take the run folder for this process; the lock goes with the process, however it ends.

    Args:
        run_dir: Run folder.
        wait_s: How long to wait for a process that is still saving.

    Returns:
        The open lock file; keep it.

    Raises:
        ValueError: Another process is training there.
    """
    handle = (run_dir / ".lock").open("a+")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise ValueError(
                    f"run.dir={run_dir}: this file system has no locks; put run.dir on one that has"
                ) from None
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() > deadline:
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                handle.close()
                raise ValueError(
                    f"run.dir={run_dir}: another process is training there ({owner}); "
                    f"stop it or use another run.dir"
                ) from None
            time.sleep(0.5)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    return handle
