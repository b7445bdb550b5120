"""What pretrain.sh makes of signals, cancellation and crashes of the ranks.

The ranks here are a small program with the signals and exit statuses of sclong_ds.pretrain (75:
saved after a signal); the setting SCLONG_CONTAINER, a command in front of python, runs it instead.
test_pretrain_job.py goes the same ways with real training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

RANK = """#!{python}
import os, signal, sys, time
from pathlib import Path

folder, start_s, behaviour = Path({folder!r}), {start_s}, {behaviour!r}
rank = os.environ["RANK"]
if behaviour == "second life" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    sys.exit(0)
(folder / f"started-{{rank}}").touch()
time.sleep(start_s)
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
(folder / f"ready-{{rank}}").touch()
if behaviour == "crash" and rank == "1":
    sys.exit(9)
while not asked:
    time.sleep(0.05)
if rank == "0":
    time.sleep(2)  # rank 0 is still writing when the other one has ended
    print("saved by rank 0", flush=True)
sys.exit(75)
"""


def _submit(
    slurm: Any, folder: Path, *, start_s: float = 0.0, behaviour: str = "", **settings: str
) -> str:
    program = folder / "rank"
    text = RANK.format(
        python=sys.executable, folder=str(folder), start_s=start_s, behaviour=behaviour
    )
    program.write_text(text)
    program.chmod(0o755)
    environment = {"SCLONG_CONTAINER": str(program), **settings}
    arguments = ("--config", "sclong_tiny")
    return slurm.sbatch("pretrain.sh", *arguments, options=("--nodes=2",), env=environment)


def _wait_for(slurm: Any, job_id: str, folder: Path, mark: str) -> None:
    marks = [folder / f"{mark}-{rank}" for rank in range(2)]
    slurm.wait_until(job_id, lambda: all(path.exists() for path in marks), timeout_s=60)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_lets_all_ranks_save_before_the_job_is_queued_again(
    slurm: Any, tmp_path: Path, name: str
) -> None:
    job_id = _submit(slurm, tmp_path, behaviour="second life")
    _wait_for(slurm, job_id, tmp_path, "ready")
    slurm.command("scancel", "--batch", f"--signal={name}", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    assert job.log.index("saved by rank 0") < job.log.index(f"job {job_id} is queued again")
    ports = [line.rsplit(":", 1)[1] for line in job.log.splitlines() if "rendezvous" in line]
    assert len(ports) == 2, job.log
    assert len(set(ports)) == 2, "a new life has a new port: the old one may still be taken"


def test_a_signal_before_the_ranks_listen_is_not_lost(slurm: Any, tmp_path: Path) -> None:
    job_id = _submit(slurm, tmp_path, start_s=4.0, SCLONG_REQUEUE="0")
    _wait_for(slurm, job_id, tmp_path, "started")
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code) == ("FAILED", 75), job.log
    assert "saved by rank 0" in job.log


def test_without_permission_to_requeue_the_job_ends_with_75(slurm: Any, tmp_path: Path) -> None:
    job_id = _submit(slurm, tmp_path, SCLONG_REQUEUE="0")
    _wait_for(slurm, job_id, tmp_path, "ready")
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 0), job.log


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Any, tmp_path: Path) -> None:
    job_id = _submit(slurm, tmp_path)
    _wait_for(slurm, job_id, tmp_path, "ready")
    slurm.command("scancel", job_id)  # the ranks get TERM, the script nothing
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.log
    assert "saved by rank 0" in job.log
    assert "it is not queued again" in job.log


def test_a_dead_rank_ends_the_job_and_is_not_requeued(slurm: Any, tmp_path: Path) -> None:
    # Rank 0 would wait for ever, as in a collective.
    job_id = _submit(slurm, tmp_path, behaviour="crash", SCLONG_STRAGGLER_S="2")
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("FAILED", 0), job.log
    assert job.exit_code not in (0, 75)
    assert "task 1: Exited with exit code 9" in job.log
