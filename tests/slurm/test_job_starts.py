"""What pretrain.sh makes of signals, cancellation and crashes of the ranks.

The ranks here are a small program with the signals and exit statuses of sclong_ds.pretrain (75:
saved after a signal); the setting SCLONG_CONTAINER, a command in front of python, runs it instead.
The folder holds what a run of 10 steps has left, and the nodes are not checked first.
test_pretrain_job.py goes the same ways with real training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
RANK = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

if "sclong_ds.job.preflight" in sys.argv:
    sys.exit(0)
if "sclong_ds.pretrain" not in sys.argv:
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
folder, start_s, behaviour = Path({folder!r}), {start_s}, {behaviour!r}
rank, start = os.environ["RANK"], len(json.loads((folder / "run" / "restarts.json").read_text()))
own = "its own" if os.environ["MASTER_PORT"] != "1" else "another's"
print(f"rank {{rank}} of {{os.environ['WORLD_SIZE']}} at {{own}} port", flush=True)
if behaviour == f"done in start {{start}}":
    sys.exit(0)
if behaviour == "error":
    sys.exit(1)
(folder / f"started-{{rank}}").touch()
time.sleep(start_s)
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
(folder / f"ready-{{rank}}-{{start}}").touch()
if behaviour == "slow checkpoint" and rank == "0":
    time.sleep(5)  # the script has looked for checkpoints before
    with (folder / "run" / "events.jsonl").open("a") as events:
        row = {{"time": time.time(), "event": "checkpoint", "step": 20, "seconds": 50.0}}
        events.write(json.dumps(row) + "\\n")
if behaviour == "crash" and rank == "1":
    if start == 1:
        (folder / "run" / "checkpoints" / "step_00000020").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
while not asked:
    time.sleep(0.05)
if rank == "0":
    time.sleep(2)  # rank 0 is still writing when the other one has ended
    print("saved by rank 0", flush=True)
sys.exit(75)
"""


def _make_ranks(
    folder: Path, *, start_s: float = 0.0, behaviour: str = "", new: bool = False
) -> Path:
    """Write the program of the ranks and, unless new, what a run has left; returns the program."""
    program = folder / "rank"
    text = RANK.format(
        python=sys.executable, folder=str(folder), start_s=start_s, behaviour=behaviour
    )
    program.write_text(text)
    program.chmod(0o755)
    if not new:
        (folder / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    return program


def _submit(
    slurm: Any, folder: Path, *, options: tuple[str, ...] = (),
    settings: dict[str, str] | None = None,
    **ranks: Any,
) -> str:  # fmt: skip
    environment = {"SCLONG_CONTAINER": str(_make_ranks(folder, **ranks)), "SCLONG_PREFLIGHT": "0"}
    return slurm.sbatch(
        "pretrain.sh", "--config", "sclong_tiny", f"run.dir={folder / 'run'}",
        options=("--nodes=2", "--time=10", *options), env=environment | (settings or {}),
    )  # fmt: skip


def _wait_for(slurm: Any, job_id: str, folder: Path, mark: str) -> None:
    marks = [folder / mark.format(rank=rank) for rank in range(2)]
    slurm.wait_until(job_id, lambda: all(path.exists() for path in marks), timeout_s=60)


@pytest.mark.parametrize("name", ["USR1", "TERM", "preemption"])
def test_a_signal_lets_all_ranks_save_before_the_job_is_queued_again(
    slurm: Any, tmp_path: Path, name: str
) -> None:
    job_id = _submit(slurm, tmp_path, behaviour="done in start 2")
    _wait_for(slurm, job_id, tmp_path, "ready-{rank}-1")
    if name == "preemption":
        slurm.preempt()  # the ranks get TERM, the script nothing
    else:
        slurm.command("scancel", "--batch", f"--signal={name}", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    assert job.log.index("saved by rank 0") < job.log.index(f"job {job_id} is queued again")
    ports = [line.rsplit(":", 1)[1] for line in job.log.splitlines() if "rendezvous" in line]
    assert len(ports) == 2, job.log
    assert len(set(ports)) == 2, "a new start has a new port: the old one may still be taken"


def test_signals_before_the_ranks_listen_end_no_rank_and_are_not_lost(
    slurm: Any, tmp_path: Path
) -> None:
    job_id = _submit(slurm, tmp_path, start_s=4.0, settings={"SCLONG_REQUEUE": "0"})
    _wait_for(slurm, job_id, tmp_path, "started-{rank}")
    slurm.command("scancel", "--signal=TERM", job_id)  # to the ranks, as a preemption
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code) == ("FAILED", 75), job.log
    assert "saved by rank 0" in job.log


def test_a_run_is_asked_to_save_as_early_as_its_first_checkpoints_need_it(
    slurm: Any, tmp_path: Path
) -> None:
    # Of two minutes, 130 s are for saving as soon as a checkpoint has taken 50 s; before that 30 s,
    # so the script looks again after 45 s. --signal alone would come 70 s later.
    job_id = _submit(
        slurm, tmp_path, behaviour="slow checkpoint", options=("--time=2", "--signal=B:USR1@5"),
        settings={"SCLONG_REQUEUE": "0"},
    )  # fmt: skip
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 0), job.log
    assert "its checkpoints need it 130 s before the time limit" in job.log
    assert "saved by rank 0" in job.log


def test_where_a_job_may_not_queue_itself_it_is_submitted_again_until_it_is_done(
    slurm: Any, tmp_path: Path
) -> None:
    ranks = _make_ranks(tmp_path, behaviour="done in start 3")
    settings = {"SCLONG_CONTAINER": str(ranks), "SCLONG_PREFLIGHT": "0"}
    log = tmp_path / "log"
    command = ["bash", "slurm/resubmit.sh", "--nodes=2", f"--output={log}", "slurm/pretrain.sh"]
    with subprocess.Popen(
        [*command, "--config", "sclong_tiny", f"run.dir={tmp_path / 'run'}"],
        env=slurm.environment() | settings, cwd=ROOT, stderr=subprocess.PIPE, text=True,
    ) as loop:  # fmt: skip
        assert loop.stderr is not None
        first = loop.stderr.readline().strip()
        _wait_for(slurm, first, tmp_path, "ready-{rank}-1")
        slurm.command("scancel", "--batch", "--signal=USR1", first)
        ended = loop.stderr.readline()
        second = loop.stderr.readline().strip()
        _wait_for(slurm, second, tmp_path, "ready-{rank}-2")
        slurm.lose_node("n2")
        slurm.return_node("n2")
        rest = loop.stderr.read()
    assert ended == f"job {first}: FAILED, status 75\n"
    assert f"job {second}: NODE_FAIL" in rest
    assert loop.returncode == 0, rest
    assert rest.splitlines()[-1].endswith(": COMPLETED, status 0")
    starts = json.loads((tmp_path / "run" / "restarts.json").read_text())
    assert [start["id"].split(".")[0] for start in starts][:2] == [first, second]
    assert len({start["job"] for start in starts}) == 1, "the guard counts them as one training"
    assert log.read_text().count("start 1: ") == 3


def test_slurms_refusal_to_queue_a_job_again_ends_it_with_75(slurm: Any, tmp_path: Path) -> None:
    job_id = _submit(slurm, tmp_path, options=("--no-requeue",))
    _wait_for(slurm, job_id, tmp_path, "ready-{rank}-1")
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 0), job.log
    assert "exit 75, Slurm refused to queue the job again" in job.log


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Any, tmp_path: Path) -> None:
    job_id = _submit(slurm, tmp_path)
    _wait_for(slurm, job_id, tmp_path, "ready-{rank}-1")
    slurm.command("scancel", job_id)  # the ranks get TERM, the script nothing
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.log
    assert "saved by rank 0" in job.log
    assert f"job {job_id} was ended (" in job.log


def test_a_killed_rank_brings_the_job_back_until_no_life_makes_a_new_checkpoint(
    slurm: Any, tmp_path: Path
) -> None:
    # Rank 0 would wait for ever, as in a collective. The first start makes a checkpoint.
    job_id = _submit(
        slurm, tmp_path, behaviour="crash",
        settings={"SCLONG_STRAGGLER_S": "1", "SCLONG_MAX_STALLED": "2"},
    )  # fmt: skip
    job = slurm.wait(job_id)
    assert (job.state, job.restarts) == ("FAILED", 2), job.log
    assert job.exit_code not in (0, 75)
    assert job.log.count(f"job {job_id} is queued again") == 2
    assert f"error: job {job_id} made no new checkpoint in 2 starts in a row" in job.log
    starts = json.loads((tmp_path / "run" / "restarts.json").read_text())
    assert [(start["job"], start["step"]) for start in starts] == [
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


def test_an_error_of_srun_itself_brings_a_job_back_even_before_its_first_step(
    slurm: Any, tmp_path: Path
) -> None:
    # Slurm's srun, which the first start's check and the second's training send to no job; after
    # each the script asks it for a step that does nothing.
    srun = tmp_path / "srun"
    srun.write_text(
        f"#!/bin/bash\necho x >> {tmp_path}/calls\n"
        f'case $(wc -l < {tmp_path}/calls) in 1|4) set -- --jobid=999999 "$@";; esac\n'
        f'exec {shutil.which("srun")} "$@"\n'
    )
    srun.chmod(0o755)
    job_id = _submit(
        slurm, tmp_path, behaviour="done in start 3", new=True,
        settings={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SCLONG_PREFLIGHT": "60"},
    )  # fmt: skip
    job = slurm.wait(job_id)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 2), job.log
    assert job.log.count("srun failed (status 69, see above)") == 2


def test_a_step_that_slurm_refuses_ends_the_job_with_its_reason(slurm: Any, tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/bash\nexec {shutil.which("srun")} --distribution=nonsense "$@"\n')
    srun.chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = slurm.wait(_submit(slurm, tmp_path, settings=settings))
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 69, 0), job.log
    (line,) = [line for line in job.log.splitlines() if line.startswith("error: Slurm refuses")]
    assert "distribution" in line
    assert "submit the corrected command" in line


@pytest.mark.parametrize("wrong", ["a mistyped SCLONG_VENV", "--export=NONE without .venv"])
def test_a_wrong_environment_ends_in_a_line(slurm: Any, tmp_path: Path, wrong: str) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    options = ["sbatch", "--parsable", f"--output={slurm.folder}/jobs/%x-%j.out"]
    env, said = {"SCLONG_VENV": "/no/such/venv"}, "SCLONG_VENV=/no/such/venv has no bin/python"
    if wrong.startswith("--export"):
        options, env, said = [*options, "--export=NONE"], {}, "cannot import torch, deepspeed and"
    arguments = ("slurm/pretrain.sh", "--config", "sclong_tiny", f"run.dir={tmp_path / 'run'}")
    job = slurm.wait(slurm.command(*options, *arguments, env=env, cwd=tmp_path))
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0)
    (line, *_) = lines = job.log.partition("\n--- ")[0].strip().splitlines()
    assert len(lines) == 1, job.log
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "run").exists()


KERNEL = """
import os, subprocess, sys, threading

# As `sclong_ds.train` leaves the process of a notebook in which it trained.
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1",
               "TORCH_EXTENSIONS_DIR": "/elsewhere"}

def run_cell():
    done = subprocess.run(["bash", "-c", sys.argv[1]], stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, check=True)
    print(done.stdout, flush=True)

cell = threading.Thread(target=run_cell)
cell.start()
cell.join()
"""
"""A notebook on a node: a kernel in a step, whose threads run what is written in cells."""
STEP = ("srun", "--cpu-bind=map_cpu:0", "--mem-bind=local", "--exact")


@pytest.mark.parametrize(
    "within", [("bash", "-c"), (*STEP, "bash", "-c"), (*STEP, sys.executable, "-c", KERNEL)],
    ids=["salloc", "srun", "notebook"],
)  # fmt: skip
def test_a_job_submitted_from_inside_an_interactive_one_trains(
    slurm: Any, tmp_path: Path, within: tuple[str, ...]
) -> None:
    """What salloc, a step in it, or a kernel in the step leaves is not the new job's."""
    program = _make_ranks(tmp_path, behaviour="done in start 1")
    submit = (
        "env; SLURM_MEM_PER_NODE=99999999 sbatch --parsable --nodes=2 --time=10 "
        f"--output={slurm.folder}/jobs/%x-%j.out slurm/pretrain.sh --config sclong_tiny "
        f"run.dir={tmp_path / 'run'}"
    )
    said = slurm.command(
        "salloc", "--nodes=1", "--ntasks=1", "--time=5", "--distribution=cyclic", *within,
        submit, env={"SCLONG_CONTAINER": str(program), "SCLONG_PREFLIGHT": "0"},
    )  # fmt: skip
    leaked = {line.partition("=")[0] for line in said.splitlines()}
    in_a_step = "srun" in within
    expected = {"SLURM_CPU_BIND", "SLURM_MEM_BIND"} if in_a_step else {"SLURM_DISTRIBUTION"}
    assert expected | ({"MASTER_PORT"} if KERNEL in within else set()) <= leaked
    job = slurm.wait(said.split()[-1])
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.log
    ranks = sorted(line for line in job.log.splitlines() if line.startswith("rank "))
    assert ranks == ["rank 0 of 2 at its own port", "rank 1 of 2 at its own port"], job.log
