"""The lock that keeps a second job out of a run folder."""

from __future__ import annotations

from pathlib import Path

from sclong_ds.files.atomic import Lock, NoLocksError


def lock_run_folder(run_dir: Path, *, wait_s: float) -> Lock:
    """Take the run folder for this process; the lock goes with the process, however it ends.

    Args:
        run_dir: Run folder, made if missing.
        wait_s: How long to wait for a process that is still saving.

    Returns:
        The lock; keep it.

    Raises:
        ValueError: Another process is training there.
    """
    lock = Lock(run_dir / ".lock")
    try:
        held = lock.take(wait_s=wait_s)
    except NoLocksError:
        lock.release()
        raise ValueError(
            f"run.dir={run_dir}: this file system has no locks; put run.dir on one that has"
        ) from None
    if not held:
        owner = lock.note or "unknown"
        lock.release()
        raise ValueError(
            f"run.dir={run_dir}: another process is training there ({owner}); stop it or use "
            "another run.dir"
        )
    lock.sign()
    return lock
