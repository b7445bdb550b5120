"""A real two-node Slurm on one machine, for the tests of slurm/.

Run: `pytest -m slurm tests/slurm`, as root or any user (the daemons then run as that user).
Needs the Debian packages slurm-wlm and munge; without them the tests are skipped, or fail where
the environment variable CI is set. Starts its own munged (own key and socket), one slurmctld and
two slurmd (`-N n1`, `-N n2`) on free ports, with all files in one temporary folder, and stops them
by process id. A Slurm that the machine already runs is not touched.
Source: https://slurm.schedmd.com/programmer_guide.html (multiple slurmd support).
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
GRACE_S = 60
"""Time that a preempted job gets before Slurm ends it, s."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
NODE_STATES = ("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T")
FINAL_STATES = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
    }
)


def _program(name: str) -> str | None:
    """Return the path of a program; the daemons live in sbin, which is not on every user's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


@dataclasses.dataclass(frozen=True)
class Job:
    """What Slurm and the job's log show of one job."""

    id: str
    state: str
    exit_code: int
    restarts: int
    log: str


@dataclasses.dataclass(frozen=True)
class SlurmCluster:
    """Handle of the running two-node cluster; `folder` holds its configuration, state and logs."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)

    def command(self, *args: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Run a Slurm client command against this cluster.

        Args:
            *args: Program and arguments.
            env: Variables added to the environment.
            cwd: Working folder.

        Returns:
            Standard output, stripped.

        Raises:
            AssertionError: The command failed; the message holds its output.
        """
        done = subprocess.run(
            args,
            env=self.environment() | dict(env or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (
            f"{' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        """Return the environment of a login shell: without the variables of an outer Slurm job."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SCLONG_", "OMP_", "MLFLOW_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        # The jobs run on the interpreter that runs the tests, wherever its environment is, and on
        # the CPU: both nodes would take the same GPU.
        here = {"SCLONG_VENV": sys.prefix, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return env | here | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def sbatch(
        self,
        script: str,
        *args: object,
        options: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Submit `slurm/SCRIPT args` from the project root and return the job id."""
        log = self.folder / "jobs" / "%x-%j.out"
        command = ["sbatch", "--parsable", f"--output={log}", *options, f"slurm/{script}"]
        return self.command(*command, *map(str, args), env=env).split(";")[0]

    def preempt(self, nodes: str = ",".join(NODES)) -> None:
        """Take nodes for a moment for a job that goes first."""
        log = f"--output={self.folder}/jobs/urgent-%j.out"
        number = f"--nodes={len(nodes.split(','))}"
        options = ("--partition=urgent", number, f"--nodelist={nodes}", "--exclusive", log)
        self.command("sbatch", *options, "--wrap=sleep 1")

    def kill_ranks(self, node: str) -> None:
        """Kill (SIGKILL) everything that jobs run on a node."""
        for process in self._processes(node):
            process.kill()

    def lose_node(self, node: str) -> None:
        """Play a power failure: kill all that runs on a node; Slurm is told, as by a monitor."""
        processes = self._processes(node)
        steps = {p.parent() for p in processes} - set(processes)
        self.daemons[f"slurmd-{node}"].kill()
        self.daemons[f"slurmd-{node}"].wait()
        for process in (*steps, *processes):
            if process is not None:
                process.kill()
        self.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def return_node(self, node: str) -> None:
        """Start a lost node again; jobs may use it when this returns."""
        _start_daemon(self, f"slurmd-{node}")
        state = (*NODE_STATES, f"--nodes={node}")
        _wait_until(lambda: not self.command(*state).startswith("down"), self.folder)

    def _processes(self, node: str) -> list[psutil.Process]:
        """Return the processes of jobs on a node, by the environment that Slurm gives them."""
        mine = {"SLURM_CONF": str(self.folder / "slurm.conf"), "SLURMD_NODENAME": node}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mine.items() <= process.environ().items():
                    found.append(process)
        return found

    def fields(self, job_id: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints for a job or one task of an array."""
        text = self.command("scontrol", "show", "job", "--oneliner", job_id).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def log(self, job_id: str) -> str:
        """Return what the job has written so far."""
        return "\n".join(
            path.read_text(errors="replace")
            for path in sorted((self.folder / "jobs").glob(f"*-{job_id}.out"))
        )

    def wait(self, job_id: str, *, timeout_s: float = 240.0) -> Job:
        """Wait until a job is over, without holding a requeued job back, and return its outcome."""
        deadline = time.monotonic() + timeout_s
        released = 0
        while True:
            fields = self.fields(job_id)
            state = fields["JobState"].split(",")[0]
            if state in FINAL_STATES:
                code = int(fields["ExitCode"].split(":")[0])
                log = self.log(fields["JobId"])
                if state != "COMPLETED":
                    log = f"{log}\n{daemon_logs(self.folder)}"
                return Job(job_id, state, code, int(fields["Restarts"]), log)
            held = state == "PENDING" and fields.get("Reason") == "BeginTime"
            if held and int(fields["Restarts"]) > released and self.nodes_are_clean():
                self.release(job_id)
                released = int(fields["Restarts"])
            assert time.monotonic() < deadline, (
                f"job {job_id} still {state} after {timeout_s} s\n"
                f"{self.log(fields['JobId'])}\n{daemon_logs(self.folder)}"
            )
            time.sleep(0.2)

    def nodes_are_clean(self) -> bool:
        """Tell whether no node has anything of a job, ended jobs included."""
        states = self.command(*NODE_STATES).split()
        return not [s for s in states if s.startswith(("alloc", "mixed", "compl", "draining"))]

    def wait_until_requeued(self, job_id: str) -> None:
        """Wait until a job may begin its next start; Slurm holds it back for two minutes.

        A start that begins while a node still ends the one before, or in the same second, fails
        without a word ("Job credential revoked" in slurmctld.log): the node then refuses all that
        was issued to the job so far.
        """
        self.wait_until(
            job_id,
            lambda: self.fields(job_id).get("Reason") == "BeginTime" and self.nodes_are_clean(),
        )

    def release(self, job_id: str) -> None:
        """Let a requeued job begin now."""
        self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now+1")

    def wait_until(
        self, job_id: str, condition: Callable[[], bool], *, timeout_s: float = 240.0
    ) -> None:
        """Wait until a condition holds while the job runs; fail when the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            state = self.fields(job_id)["JobState"]
            if state in FINAL_STATES or time.monotonic() > deadline:
                pytest.fail(f"job {job_id} is {state}, too early or too late\n{self.log(job_id)}")
            time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Start the cluster once per session; both nodes are idle when the first test gets it."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        message = f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    # Not pytest's tmp_path: munged refuses a folder that others cannot enter, and the path of its
    # socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="sclong-slurm-"))
    folder.chmod(0o755)
    cluster = SlurmCluster(folder)
    try:
        _write_configuration(folder)
        _start_daemons(cluster)
        yield cluster
        cluster.command("scancel", f"--user={getpass.getuser()}")
        _wait_until(lambda: _all_idle(cluster), folder)
    finally:
        _stop(cluster.daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _write_configuration(folder: Path) -> None:
    """Write munge.key and slurm.conf (and cgroup.conf where this version needs one)."""
    for name in ("state", "jobs", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(1 + len(NODES))
    user = getpass.getuser()
    settings = {
        "ClusterName": "sclong",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.sock'}",
        "CredType": "cred/munge",
        "SlurmctldPort": ports[0],
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        # The tests need neither cgroups nor accounting, and containers seldom offer the former.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        # Each node has two CPUs and two GPUs, whatever the machine has. The GPUs are only counted
        # (nobody opens their devices), so that the layout of ranks can be tested anywhere.
        "GresTypes": "gpu",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "sched_interval=2,bf_interval=2",
        "ReturnToService": 2,
        "JobRequeue": 1,
        "KillWait": 30,
        "MinJobAge": 3600,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for node, port in zip(NODES, ports[1:], strict=True):
        address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
        lines.append(f"NodeName={node} {address} CPUs=2 Gres=gpu:2 State=UNKNOWN")
    # Jobs of the partition `urgent` take the nodes of those in `all`, which get some time to save.
    partition = f"Nodes={','.join(NODES)} MaxTime=INFINITE State=UP"
    lines.append(f"PartitionName=all {partition} Default=YES PriorityTier=1 GraceTime={GRACE_S}")
    lines.append(f"PartitionName=urgent {partition} PriorityTier=2 PreemptMode=OFF")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    version = subprocess.run(
        [_program("slurmd") or "slurmd", "-V"], capture_output=True, text=True, check=True
    ).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (23, 11):
        # Newer slurmd loads a cgroup plugin even where nothing uses it, unless told not to.
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def _free_ports(count: int) -> list[int]:
    """Return different TCP ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _start_daemons(cluster: SlurmCluster) -> None:
    """Start munged, slurmctld and the two slurmd, and wait until both nodes are idle."""
    _start_daemon(cluster, "munged")
    _wait_until((cluster.folder / "munge.sock").exists, cluster.folder)
    for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
        _start_daemon(cluster, name)
    _wait_until(lambda: _all_idle(cluster), cluster.folder)


def _start_daemon(cluster: SlurmCluster, name: str) -> None:
    """Start one daemon in the foreground, with its own log."""
    folder, conf = cluster.folder, str(cluster.folder / "slurm.conf")
    command, _, node = name.partition("-")
    munge = [f"--{file}-file={folder}/munge.{file}" for file in ("key", "pid", "seed")]
    arguments = {
        "munged": ["--foreground", f"--socket={folder}/munge.sock", *munge],
        "slurmctld": ["-D", "-f", conf],
        "slurmd": ["-D", "-N", node, "-f", conf],
    }
    program = _program(command)
    assert program is not None
    with (folder / f"{name}.log").open("ab") as log:
        cluster.daemons[name] = subprocess.Popen(
            [program, *arguments[command]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"SLURM_CONF": conf},
            cwd=folder,
        )


def _wait_until(condition: Callable[[], bool], folder: Path, *, timeout_s: float = 60.0) -> None:
    """Wait until a condition of the cluster holds; fail with the daemons' logs otherwise."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"the cluster is not ready after {timeout_s} s\n{daemon_logs(folder)}")
        time.sleep(0.3)


def _all_idle(cluster: SlurmCluster) -> bool:
    # The controller may not answer yet, which is an error of sinfo.
    done = subprocess.run(NODE_STATES, env=cluster.environment(), capture_output=True, text=True)
    return done.stdout.split() == ["idle"] * len(NODES)


def daemon_logs(folder: Path) -> str:
    """Return the end of every daemon's log."""
    return "\n".join(
        f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}"
        for p in sorted(folder.glob("*.log"))
    )


def _stop(daemons: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Stop the daemons that this session started, the last one first."""
    for daemon in reversed(daemons.values()):
        if daemon.poll() is None:
            daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
