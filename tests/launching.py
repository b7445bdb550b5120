"""Run the project's commands as a user would: from the shell, on real processes."""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

import pytest
import small_runs

ROOT = Path(__file__).parents[1]
PORT = 20000 + os.getpid() % 20000
"""Where the ranks of a launcher meet."""
FORKED = ("sclong_ds.pretrain",)
"""Modules that `run_module` runs by a fork: their imports take longer than all else they do."""


def run_module(
    *args: object, timeout: float = 600, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ARGS` from the checkout and return what it printed.

    Those of FORKED run without the time of their imports.
    """
    command = [sys.executable, "-m", *map(str, args)]
    if args[0] in FORKED:
        done = run_forked(command[1:], timeout=timeout)
    else:
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


@cache
def fork_server() -> str:
    """Start `fork_server.py`, which ends with this process; returns the path of its socket."""
    folder = Path(tempfile.mkdtemp(prefix="sclong-fork-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "socket"
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(path)], cwd=ROOT,
        env=environment(), stdin=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.communicate)
    while not path.exists():
        assert server.poll() is None, "fork_server.py does not start"
        time.sleep(0.02)
    return str(path)


class Forked:
    """A program that `fork_server.py` runs, with the methods of `subprocess.Popen` that tests use.

    Args:
        arguments: Of Python: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
        env: The whole environment.
        stdout: File for the output.
        stderr: File for the errors.
    """

    def __init__(
        self, arguments: Sequence[str], *, env: dict[str, str], stdout: IO[bytes], stderr: IO[bytes]
    ) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(fork_server())
        request = json.dumps({"arguments": [*arguments], "env": env}).encode()
        outputs = [stdout.fileno(), stderr.fileno()]
        socket.send_fds(self._server, [len(request).to_bytes(4)], outputs)
        self._server.sendall(request)
        self._told = self._server.makefile("rb", buffering=0)
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        """Return the exit status, minus the number of the signal that killed it; None: it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, at most so many seconds, and return the exit status."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], timeout)[0]:
            self.returncode = int(self._told.readline())
            self._told.close()
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the program."""
        self.send_signal(signal.SIGKILL)


def run_forked(arguments: Sequence[str], *, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a program of Python by a fork to its end."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        program = Forked(arguments, env=environment(), stdout=stdout, stderr=stderr)
        try:
            status = program.wait(timeout)
        finally:
            program.kill()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess([*arguments], status, *texts)


def start_ranks(n_ranks: int, command: Sequence[object], *, log: Path) -> list[Forked]:
    """Start the ranks of a run as `small_runs.start_ranks` does, without the time of imports."""
    with log.open("ab") as output:
        return [
            Forked([*map(str, command)], env=env, stdout=output, stderr=output)
            for env in small_runs.environments(n_ranks)
        ]


def train(command: Sequence[object], *, n_ranks: int, log: Path) -> None:
    """Run a command on some ranks to its end, as `small_runs.train` does."""
    small_runs.train([*map(str, command)], n_ranks=n_ranks, log=log, start=start_ranks)
