"""The folder of a sweep: a run folder for each task, and sweep.json, which names them.

    SWEEP_DIR/sweep.json      id, and the settings of every task
    SWEEP_DIR/task_001/       run folder of task 1

`sclong_ds.job.sweep` writes sweep.json; tracking and the commands that compare runs read it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sclong_ds.files.atomic import locked, write_atomic
from sclong_ds.files.sealed_json import read_object

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True, slots=True)
class Sweep:
    """What sweep.json says."""

    folder: Path
    """The folder of the sweep."""
    id: str
    """The same in all its tasks."""
    tasks: Mapping[str, str]
    """Name of a task's run folder to the settings that are its own."""


def task_name(number: int) -> str:
    """Return the name of the run folder of a task, counted from 1."""
    return f"task_{number:03d}"


def write_sweep(folder: Path, tasks: Mapping[str, str]) -> Sweep:
    """Write sweep.json, or bring it up to date; any number of tasks may do so at a time.

    Args:
        folder: The folder of the sweep; made if absent.
        tasks: Name of a task's run folder to the settings that are its own.

    Raises:
        ValueError: A sweep.json that is none.
        OSError: It cannot be written.
    """
    with locked(folder / ".sweep.lock"):
        known = read_sweep(folder)
        sweep = Sweep(folder, known.id if known else uuid.uuid4().hex, dict(tasks))
        if known is None or known.tasks != sweep.tasks:
            text = json.dumps({"id": sweep.id, "tasks": sweep.tasks}, indent=2)
            write_atomic(folder / SWEEP_FILE, f"{text}\n".encode())
    return sweep


def read_sweep(folder: Path) -> Sweep | None:
    """Return what sweep.json of a folder says, or None where there is none.

    Args:
        folder: The folder of the sweep.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.is_file():
        return None
    content = read_object(path)
    identity, tasks = content.get("id"), content.get("tasks")
    if not isinstance(identity, str) or not isinstance(tasks, dict):
        raise ValueError(f"{path}: not a sweep's; remove it, the next task writes it again")
    return Sweep(folder, identity, {str(name): str(text) for name, text in tasks.items()})


def task_folders(folder: Path) -> list[Path]:
    """Return the run folders that a folder stands for: a sweep's that are there, or itself.

    Args:
        folder: A run folder, or that of a sweep.

    Raises:
        ValueError: A sweep none of whose tasks has begun, or a damaged sweep.json.
    """
    sweep = read_sweep(folder)
    if sweep is None:
        return [folder]
    found = [folder / name for name in sweep.tasks if (folder / name / "run.json").is_file()]
    if not found:
        raise ValueError(f"{folder}: no task of this sweep of {len(sweep.tasks)} has begun yet")
    return found
