"""One process at a time trains in a run folder."""

from __future__ import annotations

import subprocess
import sys

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
    assert "another process is training there" in done.stderr
    held.close()
