"""Draws pictures in a process of its own while training continues."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from sclong_ds.run_folder.files import PLOTS_DIR
from sclong_ds.run_folder.pending_pictures import Data, drop_after, pending, put_back, write_data

log = logging.getLogger(__name__)


class Artist:
    """Draws pictures in a process of its own, one at a time: validations wait in files."""

    def __init__(self, run_dir: Path, *, step: int) -> None:
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None
        put_back(run_dir)
        drop_after(run_dir, step)

    def draw(self, step: int, data: Data) -> None:
        """Write what is to be drawn, and start a process unless one is at work."""
        try:
            write_data(self._run_dir, step, data)
        except OSError as error:  # a full disk, on this rank alone
            log.error("the pictures of step %d are not drawn: %s", step, error)
            return
        self._start()

    def finish(self, *, wait_s: float) -> None:
        """Wait until all is drawn, and end the process when that takes longer."""
        deadline = time.monotonic() + wait_s
        while self._is_busy() or pending(self._run_dir):
            if time.monotonic() >= deadline:
                break
            self._start()
            time.sleep(0.1)
        if self._process is not None and self._is_busy():
            log.info(
                "pictures that are missing: a resumed run draws them, or python -m "
                "sclong_ds.report.draw %s", self._run_dir,
            )  # fmt: skip
            self._process.kill()
            self._process.wait()

    def _is_busy(self) -> bool:
        """Tell whether a process is at work; one that failed is reported once."""
        if self._process is None:
            return False
        status = self._process.poll()
        if status is None:
            return True
        self._process = None
        if status != 0:
            log.warning("pictures were not drawn (status %d): see %s", status, self._log_file)
        return False

    def _start(self) -> None:
        if self._is_busy() or not pending(self._run_dir):
            return
        place = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        # It shares the node with training: one thread, and behind it.
        threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        try:
            with self._log_file.open("wb") as output:
                self._process = subprocess.Popen(
                    ["nice", "-n", "10",
                     sys.executable, "-m", "sclong_ds.report.draw", self._run_dir],
                    env=os.environ | place | threads, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
        except OSError as error:  # a full disk, no memory: the next validation tries again
            log.error("pictures are not drawn now: %s", error)

    @property
    def _log_file(self) -> Path:
        return self._run_dir / PLOTS_DIR / "pictures.log"
