"""What pretrain.sh makes of signals, cancellation and crashes of the ranks.

The ranks here are a small program with the signals and exit statuses of sclong_ds.pretrain (75:
saved after a signal); the setting SCLONG_CONTAINER, a command in front of python, runs it instead.
The folder holds what a run of 10 steps has left, and the nodes are not checked first.
test_pretrain_job.py goes the same ways with real training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

RANK = """#!{python}
import os, signal, sys, time
from pathlib import Path

if "sclong_ds.pretrain" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
folder, start_s, behaviour = Path({folder!r}), {start_s}, {behaviour!r}
rank, life = os.environ["RANK"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
if behaviour == "second life" and life:
    sys.exit(0)
if behaviour == "error":
    sys.exit(1)
(folder / f"started-{{rank}}").touch()
time.sleep(start_s)
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
(folder / f"ready-{{rank}}").touch()
if behaviour == "crash" and rank == "1":
    if life == 0:
        (folder / "run" / "checkpoints" / "step_00000020").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
while not asked:
    time.sleep(0.05)
if rank == "0":
    time.sleep(2)  # rank 0 is still writing when the other one has ended
    print("saved by rank 0", flush=True)
sys.exit(75)
"""


def _submit(
    slurm: Any,
    folder: Path,
    *,
    start_s: float = 0.0,
    behaviour: str = "",
    minutes: int = 10,
    **settings: str,
) -> str:
    program = folder / "rank"
    text = RANK.format(
        python=sys.executable, folder=str(folder), start_s=start_s, behaviour=behaviour
    )
    program.write_text(text)
    program.chmod(0o755)
    (folder / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    environment = {"SCLONG_CONTAINER": str(program), "SCLONG_PREFLIGHT": "0", **settings}
    arguments = ("--config", "sclong_tiny", f"run.dir={folder / 'run'}")
    options = ("--nodes=2", f"--time={minutes}")
    return slurm.sbatch("pretrain.sh", *arguments, options=options, env=environment)


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


def test_slow_checkpoints_are_begun_earlier_and_without_requeue_the_job_ends_with_75(
    slurm: Any, tmp_path: Path
) -> None:
    # Twice 50 s and 30 s are not within the 120 s of --signal: asked at once, of two minutes.
    (tmp_path / "run").mkdir()
    row = {"time": 0.0, "event": "checkpoint", "step": 10, "seconds": 50.0}
    (tmp_path / "run" / "events.jsonl").write_text(json.dumps(row) + "\n")
    job = slurm.wait(_submit(slurm, tmp_path, minutes=2, SCLONG_REQUEUE="0"))
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 0), job.log
    assert "saved 130 s before the time limit" in job.log
    assert "saved by rank 0" in job.log


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Any, tmp_path: Path) -> None:
    job_id = _submit(slurm, tmp_path)
    _wait_for(slurm, job_id, tmp_path, "ready")
    slurm.command("scancel", job_id)  # the ranks get TERM, the script nothing
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.log
    assert "saved by rank 0" in job.log
    assert "it is not queued again" in job.log


def test_a_killed_rank_brings_the_job_back_until_no_life_makes_a_new_checkpoint(
    slurm: Any, tmp_path: Path
) -> None:
    # Rank 0 would wait for ever, as in a collective. The first life makes a checkpoint.
    job_id = _submit(
        slurm, tmp_path, behaviour="crash", SCLONG_STRAGGLER_S="1", SCLONG_MAX_STALLED="2"
    )
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("FAILED", 2), job.log
    assert job.exit_code not in (0, 75)
    assert job.log.count(f"job {job_id} is queued again") == 2
    assert f"error: job {job_id} made no new checkpoint in 2 starts in a row" in job.log
    lives = json.loads((tmp_path / "run" / "restarts.json").read_text())
    assert [(life["job"], life["step"]) for life in lives] == [
        (job_id, 10),
        (job_id, 20),
        (job_id, 20),
    ]


def test_a_training_that_ends_with_an_error_is_not_started_again(
    slurm: Any, tmp_path: Path
) -> None:
    job = slurm.wait(_submit(slurm, tmp_path, behaviour="error"))
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 0), job.log
    assert "error: the training ended by itself with status 1" in job.log
