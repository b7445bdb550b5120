"""One process at a time trains in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from launching import (
    ROOT,
)

from sclong_ds.run_folder.lock import lock_run_folder


def test_two_runs_cannot_share_a_folder(tmp_path):
    held = lock_run_folder(tmp_path, wait_s=0)
    code = (
        "from pathlib import Path; from sclong_ds.run_folder.lock import lock_run_folder; "
        f"lock_run_folder(Path({str(tmp_path)!r}), wait_s=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"another process is training there (process {os.getpid()} on " in done.stderr
    held.release()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"no locks; put run\.dir on one that has"):
        lock_run_folder(tmp_path, wait_s=0)
