"""Run the project's commands as a user would: from the shell, on real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PORT = 20000 + os.getpid() % 20000
"""Where the ranks of a launcher meet."""


def run_module(
    *args: object, timeout: float = 600, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGS` from the checkout and return what it printed."""
    command = [sys.executable, "-m", *map(str, args)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode != 0:
        pytest.fail(
            f"{' '.join(command)}: exit {done.returncode}\n"
            f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        )
    return done


def environment() -> dict[str, str]:
    """Return the environment for child processes: CPU ranks with one thread each."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_"))}
    return inherited | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def deepspeed_command(ranks: int, *args: object) -> list[str]:
    """Return the command line that launches `python -m sclong_ds.pretrain ARGS` on some ranks."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [
        str(launcher),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(PORT),
        "--module",
        "sclong_ds.pretrain",
        *map(str, args),
    ]
