"""Finds the run folders that a command names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sclong_ds.run_folder.record import RunRecord, read_run
from sclong_ds.run_folder.sweep import run_folders
from sclong_ds.tracking.client import find_run_dir


def find_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read runs by their folders or ids; raises as `read_run` and `find_run_dir`.

    The folder of a sweep stands for its runs.

    Raises:
        ValueError: A run is named twice.
    """
    folders: dict[Path, str] = {}
    for name in names:
        named = (Path(name) if Path(name).is_dir() else find_run_dir(name)).resolve()
        for folder in run_folders(named):
            if folder in folders:
                raise ValueError(f"{folders[folder]} and {name} are the same run; name it once")
            folders[folder] = name
    return [read_run(folder) for folder in folders]
