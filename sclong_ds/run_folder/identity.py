"""Which run a folder holds and what runs it: ids, starts, commit, environment, node."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import subprocess
import uuid
from pathlib import Path
from typing import Any

from sclong_ds.run_folder.files import RUN_FILE, now, read_run_json, recorded_ids, update_run_json

log = logging.getLogger(__name__)

# What decides the numbers of a run, as recorded in run.json.
_PACKAGES = (
    "sclong_ds", "torch", "deepspeed", "triton", "torch-geometric", "numpy", "zarr", "anndata",
    "mlflow",
)  # fmt: skip


def take_over_ids(run_dir: Path, checkpoint: Path) -> None:
    """Stay the run that a checkpoint belongs to when the run folder has lost its run.json."""
    if not (run_dir / RUN_FILE).exists() and (checkpoint / RUN_FILE).exists():
        log.warning("%s: missing; made again from %s", run_dir / RUN_FILE, checkpoint.name)
        update_run_json(run_dir, **recorded_ids(checkpoint))


def record_start(
    run_dir: Path, *, resumed: bool, step: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Write into run.json who runs, on what, and how often the run was restarted; return it.

    Args:
        run_dir: Run folder; `run_id` and `created` of an existing run.json are kept.
        resumed: Whether training continues from a checkpoint; adds one to `restarts`.
        step: Step that this start continues from.
        world_size: Number of ranks.
    """
    old, job = read_run_json(run_dir), os.environ.get("SLURM_JOB_ID")
    if "mlflow_pictures" in old:  # those of later steps are drawn, and sent, again
        update_run_json(run_dir, mlflow_pictures=min(old["mlflow_pictures"], step))
    start = {
        "time": now(),
        "step": step,
        "world_size": world_size,
        "host": platform.node(),
        "slurm_job_id": job,
    }
    return update_run_json(
        run_dir,
        run_id=old.get("run_id") or uuid.uuid4().hex,
        mlflow_run_id=old.get("mlflow_run_id"),
        mlflow_tracking_uri=old.get("mlflow_tracking_uri"),
        slurm_job_id=job,
        starts=[*old.get("starts", []), start],
        commit=git_commit(),
        created=old.get("created") or now(),
        restarts=int(old.get("restarts", 0)) + int(resumed),
        status="RUNNING",
        ended=None,
        environment=environment(),
    )


def git_commit() -> str:
    """Return the commit of this checkout (`-dirty` if edited), or the version if it is none."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            return done.stdout.strip()
    return f"version {_version('sclong_ds') or 'unknown'}"


def environment() -> dict[str, str]:
    """Return host, platform, Python and the versions of the packages that shape a run."""
    found = {name: _version(name) for name in _PACKAGES}
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": str(os.cpu_count()),
        **{name: version for name, version in found.items() if version},
    }


def installed_packages() -> str:
    """Return `name==version` lines of everything that is installed, sorted."""
    found = {
        f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions() if d.name
    }
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def node_name() -> str:
    """Return this node's name: Slurm's, where it has one, for several may be one host."""
    return os.environ.get("SLURMD_NODENAME") or platform.node() or "node"
