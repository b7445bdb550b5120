"""What the pictures of a validation are drawn from, between the run and the process that draws.

The run writes `plots/step_N.npz` (`write_data`); `sclong_ds.report.draw` takes it (`take_data`),
which renames it to `step_N.drawing.npz`, and removes it when the pictures are there. What a process
that was killed has left is drawn by the next start of the run (`put_back`); the pictures of steps
that the run goes back behind are removed (`drop_after`). What was drawn is recorded beside it
(`seal_pictures`), and compared before it is shown (`sound_pictures`). Needs numpy alone.
`Artist` starts that process, one at a time, while training continues.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.atomic import read_file, write_atomic
from sclong_ds.files.checksums import file_crc32c
from sclong_ds.files.sealed_json import CHECKSUM, read_sound, write_sealed
from sclong_ds.run_folder.files import PLOTS_DIR, picture_steps

log = logging.getLogger(__name__)

PICTURES_FILE = "pictures.json"
RANK_COLUMNS = (
    "perf/data_wait_s",
    "perf/forward_s",
    "perf/backward_s",
    "perf/optimizer_s",
    "perf/step_time_s",
    "mem/peak_gib",
)
"""What is known of each rank: means per step."""

Data = Mapping[str, NDArray[Any]]


def write_data(run_dir: Path, step: int, data: Data) -> None:
    """Write the arrays of a validation.

    Args:
        run_dir: Run folder.
        step: Optimizer step.
        data: Arrays by name, without Python objects.
    """
    folder = run_dir / PLOTS_DIR
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(data)
    np.savez(buffer, **arrays)
    write_atomic(folder / f"step_{step:08d}.npz", buffer.getvalue())


def pending(run_dir: Path) -> list[Path]:
    """Return the files that are to be drawn, by step."""
    files = (run_dir / PLOTS_DIR).glob("step_*.npz")
    return sorted(file for file in files if re.fullmatch("step_[0-9]+", file.stem))


def take_data(file: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Mark a file as being drawn, and return its new name and its arrays.

    Raises:
        ValueError: It is damaged; it was set aside.
    """
    taken = file.with_suffix(".drawing.npz")
    file.rename(taken)
    try:
        with taken.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            data = dict(arrays)
        if "predicted_true" not in data:
            raise ValueError("predicted_true is missing")
        return taken, data
    except (ValueError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        aside = file.with_suffix(".damaged")
        taken.replace(aside)
        raise ValueError(f"{file}: damaged ({error}); set aside as {aside.name}") from None


def put_back(run_dir: Path) -> None:
    """Let what a killed process was drawing be drawn again."""
    for file in (run_dir / PLOTS_DIR).glob("step_*.drawing.npz"):
        file.rename(file.with_name(file.name.replace(".drawing", "")))


def drop_after(run_dir: Path, step: int) -> None:
    """Remove pictures, drawn or waiting, of validations after a step; show the newest left.

    Args:
        run_dir: Run folder.
        step: Step that the run continues from.
    """
    folder = run_dir / PLOTS_DIR
    for file in pending(run_dir):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()
    drawn = picture_steps(run_dir)
    late = [at for at in drawn if at > step]
    for at in late:
        shutil.rmtree(drawn.pop(at))
    if late:
        for picture in folder.glob("*.png"):
            picture.unlink()
        if drawn:
            show(run_dir, drawn[max(drawn)])


def show(run_dir: Path, pictures: Path) -> None:
    """Copy the pictures of a validation to where the newest lie."""
    for picture in pictures.glob("*.png"):
        write_atomic(run_dir / PLOTS_DIR / picture.name, read_file(picture))


def seal_pictures(folder: Path) -> None:
    """Record size and CRC-32C of the pictures of a validation, in `PICTURES_FILE` beside them.

    Args:
        folder: Their folder.
    """
    write_sealed(
        folder / PICTURES_FILE,
        {p.name: [p.stat().st_size, file_crc32c(p)] for p in sorted(folder.glob("*.png"))},
    )


def sound_pictures(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the pictures of a validation that are as they were drawn, and what the others are.

    Those of earlier versions have no record, and nothing is said about them.

    Args:
        folder: Their folder.
    """
    found = sorted(folder.glob("*.png"))
    record = read_sound(folder / PICTURES_FILE)
    if not record:
        return tuple(found), ()
    drawn = {folder / name: value for name, value in record.items() if name != CHECKSUM}
    problems = [f"{path}: missing, although it was drawn" for path in drawn if not path.is_file()]
    sound = []
    for path in found:
        if drawn.get(path) == [path.stat().st_size, file_crc32c(path)]:
            sound.append(path)
        else:
            problems.append(f"{path}: not the picture that was drawn; left out")
    return tuple(sound), tuple(problems)


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
                "the pictures of the last validation are not drawn within %.0f s: %s",
                wait_s, self._cure,
            )  # fmt: skip
            self._process.kill()
            self._process.wait()
            put_back(self._run_dir)

    def _is_busy(self) -> bool:
        """Tell whether a process is at work; one that failed is reported once."""
        if self._process is None:
            return False
        status = self._process.poll()
        if status is None:
            return True
        self._process = None
        if status < 0:  # as by the signal that stops the whole job
            log.info("drawing pictures was ended by signal %d: %s", -status, self._cure)
        elif status > 0:
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
    def _cure(self) -> str:
        """What draws the pictures that are missing."""
        return f"a resumed run draws them, or python -m sclong_ds.report.draw {self._run_dir}"

    @property
    def _log_file(self) -> Path:
        return self._run_dir / PLOTS_DIR / "pictures.log"
