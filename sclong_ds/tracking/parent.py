"""The MLflow run that the runs of a sweep are shown below: made once, by whoever comes first.

`tracking.parent_run` is the id of an MLflow run, or the folder of a sweep
(`sclong_ds.sweep.folder`), whose parent is found in the store by the sweep's id.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sclong_ds.files.atomic import locked
from sclong_ds.run_folder.files import read_run_json
from sclong_ds.sweep.folder import Sweep, read_sweep

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
_SWEEP_TAG = "sweep_id"
_LOCK = ".parent.lock"
"""Not that of sweep.json: a server that hangs must not hold up tasks that begin."""


def parent_of(client: MlflowClient, experiment_id: str, named: str) -> str | None:
    """Return the id of a run's parent; that of a sweep is made if there is none, and runs again.

    Args:
        client: The store.
        experiment_id: Experiment of the run.
        named: `tracking.parent_run`.

    Raises:
        ValueError: A damaged sweep.json.
        OSError: The sweep's folder cannot be read.
    """
    if os.sep not in named:
        return named
    sweep = read_sweep(Path(named))
    if sweep is None:  # the task was copied from elsewhere
        return None
    with locked(sweep.folder / _LOCK):
        query = f"tags.{_SWEEP_TAG} = '{sweep.id}'"
        found = client.search_runs([experiment_id], query, max_results=1)
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        tasks = "\n".join(f"- `{name}`: `{words}`" for name, words in sweep.tasks.items())
        tags = {
            _SWEEP_TAG: sweep.id,
            "run_dir": str(sweep.folder.resolve()),
            "mlflow.note.content": f"Sweep in `{sweep.folder.resolve()}`:\n\n{tasks}",
        }
        made = client.create_run(experiment_id, run_name=sweep.folder.resolve().name, tags=tags)
        return str(made.info.run_id)


def end_parent(client: MlflowClient, parent: str, named: str) -> None:
    """End the parent of a sweep where the last of its runs has ended; args as `parent_of`.

    Args:
        client: The store.
        parent: Id of the parent.
        named: `tracking.parent_run`.
    """
    sweep = read_sweep(Path(named)) if os.sep in named else None
    if sweep is None:
        return
    states = _states(sweep)
    if states <= {"FINISHED", "FAILED", "KILLED"}:
        worst = next(s for s in ("FAILED", "KILLED", "FINISHED") if s in states)
        client.set_terminated(parent, worst)


def _states(sweep: Sweep) -> set[str]:
    """Return how the runs of a sweep are; one that has not begun is RUNNING."""
    folders = (sweep.folder / name for name in sweep.tasks)
    return {str(read_run_json(folder).get("status", "RUNNING")) for folder in folders}
