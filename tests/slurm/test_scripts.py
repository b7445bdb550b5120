"""The job scripts are sound shell, and refuse wrong submissions with one clear line."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
LOGIN = ("env.sh", "pipeline.sh", "resubmit.sh")
"""For the login node."""
JOBS = [script for script in SCRIPTS if script.name not in LOGIN]
PATH_OF_A_SITE = re.compile(r"/(home|scratch|gpfs|lustre|data|work|mnt)/")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None and not os.environ.get("CI"):
        pytest.skip("shellcheck is not installed")
    assert shellcheck is not None
    done = subprocess.run(
        [shellcheck, "--external-sources", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", JOBS, ids=lambda p: p.name)
def test_headers_name_no_cluster(script: Path) -> None:
    text = script.read_text()
    headers = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    site = {"account", "partition", "qos", "constraint", "nodelist", "mail-user", "gres", "time"}
    assert {"job-name", "output", "requeue"} <= set(headers)
    assert not site & set(headers)
    assert not PATH_OF_A_SITE.search(text)


@pytest.mark.parametrize("script", JOBS, ids=lambda p: p.name)
def test_outside_the_project_stops_with_status_2(script: Path, tmp_path: Path) -> None:
    # sbatch runs a copy in its spool folder: where the script lies says nothing of the project.
    copy = shutil.copy(script, tmp_path / "slurm_script")
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", copy, "argument"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} is not the project")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "printed"),
    [
        ("SLURM_GPUS_ON_NODE=4 SLURM_JOB_GPUS=0,1 gpus_on_node", "4"),
        ("SLURM_JOB_GPUS=0,3,5 gpus_on_node", "3"),  # Slurm before 20.11
        ("gpus_on_node", "0"),
        ("sum_of_counts 4", "4"),
        ("sum_of_counts a100:8", "8"),
        ("sum_of_counts a100:2,h100:6", "8"),
    ],
)
def test_gpus_are_counted_as_old_and_new_slurm_name_them(call: str, printed: str) -> None:
    functions = r"sed -n '/^gpus_on_node()/,/^}/p; /^sum_of_counts()/,/^}/p' slurm/pretrain.sh"
    done = subprocess.run(
        ["bash", "-euc", f'eval "$({functions})"; {call}'], env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == printed


def _call(
    commands: str, *, programs: dict[str, str], folder: Path, script: str = "pretrain.sh",
    **variables: str,
) -> str:  # fmt: skip
    """Run commands with the functions of a script and some programs; returns what they print."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    functions = f"sed '/^main() {{/,/^}}/d; s/^main .*//; s/^readonly //' slurm/{script}"
    done = subprocess.run(
        ["bash", "-c", f'eval "$({functions})"; sleep() {{ :; }}; {commands}'],
        env={"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "CALLS": f"{folder}/calls"}
        | variables,
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    return done.stdout


SCONTROL = """
echo "$*" >> $CALLS
if (($(wc -l < $CALLS) <= SILENT)); then
  echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1
fi
if [[ $1 == show ]]; then
  echo "JobId=7 JobState=$STATE Requeue=1 Restarts=0 EndTime=$(date --date="25 seconds" +%FT%T) A=b"
fi
"""


@pytest.mark.parametrize(
    ("silent", "state", "printed"),
    [
        (0, "RUNNING", "job 7 is queued again"),
        (1, "RUNNING", "job 7 is queued again"),
        (4, "RUNNING", "job 7 is queued again"),
        (0, "CANCELLED", "job 7 was ended (CANCELLED): submit the same command to continue"),
        (1, "COMPLETING", "job 7 was ended (COMPLETING): submit the same command to continue"),
        (10**6, "", "exit 75, Slurm refused to queue the job again"),
    ],
)
def test_a_controller_that_gives_no_answer_is_asked_again(
    tmp_path: Path, silent: int, state: str, printed: str
) -> None:
    answer_s = 1 if silent > 10 else 100
    commands = f"restarts() {{ :; }}; SCLONG_REQUEUE=1 ANSWER_S={answer_s}; finish 75; echo went on"
    programs = {"scontrol": SCONTROL}
    said = _call(commands, programs=programs, folder=tmp_path, SILENT=str(silent), STATE=state)
    assert said.startswith(printed)
    assert len(said.splitlines()) == 1
    requeued = (tmp_path / "calls").read_text().count("requeue 7")
    assert requeued == (0 if "ended" in printed else 1 if silent < 10 else requeued)


@pytest.mark.parametrize("silent", [0, 3])
def test_a_chain_of_jobs_goes_on_when_the_controller_was_away(tmp_path: Path, silent: int) -> None:
    settings = {"SILENT": str(silent), "STATE": "NODE_FAIL"}
    programs = {"scontrol": SCONTROL}
    said = _call(
        "job_state 7", programs=programs, folder=tmp_path, script="resubmit.sh", **settings
    )
    assert said == "NODE_FAIL\n"


def test_an_unanswered_request_leaves_who_watches_the_time_limit_at_work(tmp_path: Path) -> None:
    commands = "restarts() { echo 30; }; trap : USR1; ask_in_time & wait $!; wait"
    said = _call(
        commands, programs={"scontrol": SCONTROL}, folder=tmp_path, SILENT="2", STATE="RUNNING"
    )
    assert said.startswith("asking the run to save: its checkpoints need it 30 s before")
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


@pytest.mark.parametrize(("gpus", "option"), [(0, None), (4, "--gres=gpu:4")])
def test_a_step_asks_for_gpus_as_every_slurm_knows(
    tmp_path: Path, gpus: int, option: str | None
) -> None:
    commands = (
        "SCLONG_NODES=n1 nodes=1 LOCAL_WORLD_SIZE=2 cpus_per_rank=1 "
        f"SCLONG_GPUS_ON_NODE={gpus} launch module 5"
    )
    programs = {"srun": 'echo "$@"; env'}
    said = _call(commands, programs=programs, folder=tmp_path, SLURM_GPUS_PER_TASK="1")
    asked = [word for word in said.split() if word.startswith(("--g", "SLURM_GPU"))]
    assert asked == ([option] if option else [])


def test_what_leaked_from_the_job_it_was_submitted_in_does_not_reach_srun(tmp_path: Path) -> None:
    leaked = {
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "SLURM_MEM_BIND_LIST": "0x1", "SLURM_MEM_PER_CPU": "10", "SLURM_MEM_PER_NODE": "20",
        "SLURM_DISTRIBUTION": "cyclic", "SLURM_HINT": "nomultithread", "SLURM_STEP_ID": "0",
        "SLURM_NTASKS_PER_CORE": "1", "SLURM_NTASKS_PER_TRES": "1", "SLURM_GPUS_PER_NODE": "8",
        "SLURM_GRES": "gpu:8", "SLURM_TRES_PER_TASK": "gres:gpu:1", "SLURM_TIMELIMIT": "1",
        "SLURM_STDOUTMODE": "/elsewhere", "SLURM_HOSTFILE": "/elsewhere", "SRUN_EXPORT_ENV": "NONE",
        "SRUN_CPUS_PER_TASK": "9", "SLURM_CLUSTERS": "other",
    }  # fmt: skip
    said = _call(
        "SCLONG_NODES=n1 nodes=1 LOCAL_WORLD_SIZE=2 cpus_per_rank=1 SCLONG_GPUS_ON_NODE=0 "
        "launch module 5",
        programs={"srun": "env"}, folder=tmp_path, SLURM_NNODES="1", **leaked,
    )  # fmt: skip
    names = {line.partition("=")[0] for line in said.splitlines()}
    assert not names & leaked.keys()
    assert {"SLURM_JOB_ID", "SLURM_NNODES"} <= names


@pytest.mark.parametrize(
    ("srun", "silent", "said"),
    [
        ("echo srun: error: CPU binding outside of job step allocation >&2; exit 69", 0,
         "srun: error: CPU binding outside of job step allocation"),
        ("echo srun: unrecognized option 'x' >&2; exit 69", 1, "srun: unrecognized option x"),
        ("exit 0", 0, ""),
        ("echo srun: error: Unable to create step: Unable to contact slurm controller >&2; exit 69",
         0, ""),
        ("echo srun: error: Task launch for StepId=7.0 failed on node n2 >&2; exit 69", 0, ""),
        ("echo srun: error: Unable to create step: Requested nodes are busy >&2; exit 69", 0, ""),
        ("echo srun: error: whatever >&2; exit 69", 10**6, ""),
        ("echo x >> $CALLS.srun; (($(wc -l < $CALLS.srun) == 2)) || { echo a >&2; exit 69; }",
         0, ""),
    ],
)  # fmt: skip
def test_a_refusal_of_srun_is_told_from_what_passes(
    tmp_path: Path, srun: str, silent: int, said: str
) -> None:
    commands = (
        "SCLONG_NODES=n1 nodes=1 LOCAL_WORLD_SIZE=2 cpus_per_rank=1 SCLONG_GPUS_ON_NODE=0 "
        f"ANSWER_S={1 if silent > 10 else 100}; refusal"
    )
    programs = {"scontrol": SCONTROL, "srun": srun}
    found = _call(commands, programs=programs, folder=tmp_path, SILENT=str(silent), STATE="RUNNING")
    assert found.strip() == said


def test_a_node_that_hangs_is_no_refusal_and_holds_up_no_requeue(tmp_path: Path) -> None:
    commands = (
        "SCLONG_NODES=n1 nodes=1 LOCAL_WORLD_SIZE=2 cpus_per_rank=1 SCLONG_GPUS_ON_NODE=0 "
        "ANSWER_S=1; refusal"
    )
    hangs = "/usr/bin/sleep 100; echo srun: error: whatever >&2; exit 69"
    programs = {"scontrol": SCONTROL, "srun": hangs}
    assert not _call(commands, programs=programs, folder=tmp_path, SILENT="0", STATE="RUNNING")


@pytest.mark.parametrize(
    ("array", "name"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3")],
)
def test_a_task_of_an_array_speaks_for_itself_alone(
    tmp_path: Path, array: dict[str, str], name: str
) -> None:
    programs = {"scontrol": SCONTROL, "scancel": SCONTROL}
    _call("requeue; show_job", programs=programs, folder=tmp_path, SILENT="0", STATE="R", **array)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"requeue {name}", f"show job --oneliner {name}",
    ]  # fmt: skip


def test_env_sourced_in_a_shell_serves_sbatch_and_never_ends_the_shell(tmp_path: Path) -> None:
    settings = {"PATH": "/usr/bin:/bin", "SCLONG_VENV": sys.prefix, "SBATCH_ACCOUNT": "lab"}
    script = (
        f"source {ROOT}/slurm/env.sh && env | grep ^SBATCH_ && command -v python\n"
        "SCLONG_MODULES=cuda\n"
        f"source {ROOT}/slurm/env.sh; echo status $? $-"
    )
    done = subprocess.run(
        ["bash", "-c", script], env=settings, capture_output=True, text=True, cwd=tmp_path
    )
    account, python, last = done.stdout.splitlines()
    assert (account, python) == ("SBATCH_ACCOUNT=lab", f"{sys.prefix}/bin/python")
    assert last.startswith("status 2 ")
    assert "u" not in last.split()[2], "an unset variable would end commands of the user's shell"
    assert "error: SCLONG_MODULES='cuda'" in done.stderr


@pytest.mark.parametrize("wrong", ["missing", "empty", "other"])
def test_an_environment_that_cannot_train_is_one_line(tmp_path: Path, wrong: str) -> None:
    """A folder that is mistyped, one that is no environment, and a python without the libraries."""
    venv = tmp_path / wrong
    if wrong == "empty":
        venv.mkdir()
    if wrong == "other":
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to("/usr/bin/python3")
    done = subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/env.sh; echo status $?"],
        env={"PATH": "/usr/bin:/bin", "SCLONG_VENV": str(venv)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "status 2\n"
    (line,) = done.stderr.splitlines()
    said = "cannot import torch" if wrong == "other" else f"SCLONG_VENV={venv} has no bin/python"
    assert said in line


def test_pretrain_outside_of_slurm_says_how_to_submit(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "pretrain.sh"], env={"PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "sbatch slurm/pretrain.sh --config" in done.stderr


@pytest.mark.slurm
def test_pretrain_without_arguments_fails_with_status_2(slurm: Any) -> None:
    job = slurm.wait(slurm.sbatch("pretrain.sh"))
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert "error: no arguments" in job.log


def _show(folder: Path) -> Path:
    """Return a command to put in front of python, which shows what a rank is given."""
    show = folder / "show"
    variables = (
        "$RANK/$WORLD_SIZE $SLURMD_NODENAME $LOCAL_RANK/$LOCAL_WORLD_SIZE $OMP_NUM_THREADS "
        "[$CUDA_VISIBLE_DEVICES]"
    )
    show.write_text(
        "#!/bin/bash\n"
        f'if [[ $* != *sclong_ds.pretrain* ]]; then exec {sys.executable} "${{@:2}}"; fi\n'
        f'echo "rank {variables} $MASTER_ADDR"; printf "<%s>" "$@"; echo\n'
    )
    show.chmod(0o755)
    return show


@pytest.mark.slurm
def test_nodes_among_which_the_batch_cannot_be_shared_out_stay_idle(
    slurm: Any, tmp_path: Path
) -> None:
    # Two cells: one for each GPU of a node. `--gpus` counts those of all nodes.
    arguments = ("--config", "sclong_tiny", f"run.dir={tmp_path}/run", "engine.train_batch_size=2")
    options = ("--nodes=2", "--gpus=4", "--cpus-per-task=2")
    environment = {"SCLONG_CONTAINER": str(_show(tmp_path))}
    job = slurm.wait(slurm.sbatch("pretrain.sh", *arguments, options=options, env=environment))
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert "n[1-2], 1 x 2 ranks" in job.log
    assert "only 1 of 2 nodes are used: engine.train_batch_size" in job.log
    verdict = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert (verdict["ok"], [rank["node"] for rank in verdict["ranks"]]) == (True, ["n1", "n1"])
    found = sorted(line for line in job.log.splitlines() if line.startswith("rank "))
    assert found == [f"rank {rank}/2 n1 {rank}/2 1 [0,1] 127.0.0.1" for rank in range(2)]


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("options", "settings", "nodes", "ranks_per_node", "cpus"),
    [
        (("--nodes=2",), {}, 2, 1, 1),
        (("--nodes=2", "--cpus-per-task=2"), {"SCLONG_RANKS_PER_NODE": "2"}, 2, 2, 1),
        (("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2"), {}, 2, 2, 1),
        (("--nodes=2", "--gpus-per-task=1", "--ntasks-per-node=2"), {}, 2, 2, 1),
        (("--nodes=1", "--gres=gpu:1", "--cpus-per-task=2"), {}, 1, 1, 2),
        (("--nodes=2", "--gpus=4", "--cpus-per-task=2"), {}, 2, 2, 1),
        (("--nodes=2", "--gpus=4", "--ntasks-per-gpu=1"), {}, 2, 2, 1),
        (("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1"), {}, 2, 2, 1),
        (
            ("--nodes=2", "--gpus=4", "--gpu-bind=single:1", "--cpus-per-task=2"),
            {},
            2,
            2,
            1,
        ),
    ],
)
def test_ranks_follow_the_allocation(
    slurm: Any, tmp_path: Path, options: tuple[str, ...], settings: dict[str, str],
    nodes: int, ranks_per_node: int, cpus: int,
) -> None:  # fmt: skip
    show = _show(tmp_path)
    arguments = ("--config", "sclong_tiny", f"run.dir={tmp_path}/c d")
    environment = settings | {"SCLONG_CONTAINER": str(show), "SCLONG_PREFLIGHT": "0"}
    job = slurm.wait(slurm.sbatch("pretrain.sh", *arguments, options=options, env=environment))
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    world = nodes * ranks_per_node
    # Each rank sees all GPUs of its node.
    gpus = any("gpu" in option for option in options)
    visible = ",".join(map(str, range(ranks_per_node))) if gpus else ""
    expected = [
        f"rank {node * ranks_per_node + local}/{world} n{node + 1} "
        f"{local}/{ranks_per_node} {cpus} [{visible}] 127.0.0.1"
        for node in range(nodes)
        for local in range(ranks_per_node)
    ]
    found = sorted(line for line in job.log.splitlines() if line.startswith("rank "))
    assert found == expected
    command = "<python><-u><-m><sclong_ds.pretrain><--config><sclong_tiny>"
    assert job.log.count(f"{command}<run.dir={tmp_path}/c d>") == world


@pytest.mark.slurm
def test_a_wrong_configuration_ends_the_job(slurm: Any) -> None:
    job = slurm.wait(slurm.sbatch("pretrain.sh", "--config", "no_such_preset"))
    assert job.state == "FAILED"
    assert job.exit_code in (1, 2)
    assert job.restarts == 0
    assert "no_such_preset: no such preset or file" in job.log


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            ("--nodes=2",),
            {"SCLONG_RANKS_PER_NODE": "4"},
            "error: 4 ranks per node, but only 1 CPUs",
        ),
        (("--nodes=2", "--gpus=3", "--cpus-per-task=2"), {}, "ask with --gpus-per-node"),
        ((), {"SCLONG_MODULES": "cuda"}, "error: SCLONG_MODULES='cuda'"),
    ],
)
def test_an_impossible_submission_is_refused_before_the_launch(
    slurm: Any, options: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    job = slurm.wait(
        slurm.sbatch("pretrain.sh", "--config", "sclong_tiny", options=options, env=settings)
    )
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert message in job.log


def test_a_taken_port_gives_the_next(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        python = {"python": f'exec {sys.executable} "$@"'}
        said = _call(f"free_port {port}", programs=python, folder=tmp_path, SCLONG_CONTAINER="")
    first = int(said.split()[0])
    assert port < first < port + 15


def test_compiled_files_are_of_one_user_and_environment(tmp_path: Path) -> None:
    found = []
    for container in ("", "env"):
        settings = {"SCLONG_VENV": sys.prefix, "SCLONG_CONTAINER": container}
        done = subprocess.run(
            ["bash", "-c", f"source {ROOT}/slurm/env.sh && echo $TORCH_EXTENSIONS_DIR"],
            env={"PATH": "/usr/bin:/bin", "SCLONG_SCRATCH": str(tmp_path), **settings},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(done.stdout.strip())
    assert all(re.match(rf"{tmp_path}/{os.getuid()}-\d+/torch$", folder) for folder in found)
    assert len(set(found)) == 2
