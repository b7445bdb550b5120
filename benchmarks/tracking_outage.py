"""What becomes of metrics while the MLflow server is down, hangs, is killed, or its disk is full.

    python -m benchmarks.tracking_outage [--steps 30] [--work DIR] [--json OUT]

Runs a tracker against a real `mlflow server` that goes through six phases of as many steps each:
not there yet, healthy, hanging (stopped by a signal, connections open), killed, running on a full
disk (its writes fail), healthy again. Prints, by phase, how many values were logged, and
at the end what the server's database holds: missing and doubled values must be 0, in order. Exit
status 1: they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.environment import write_result
from sclong_ds.config.load import load_config
from sclong_ds.run_folder.files import SYSTEM_DIR, read_run_json, read_samples
from sclong_ds.run_folder.rows import read_every_row
from sclong_ds.tracking.tracker import Tracker

PHASES = ("not there", "healthy", "hanging", "killed", "disk full", "healthy again")
NAMES = ("train/loss", "train/grad_norm", "train/lr", "cells_seen", "perf/cells_per_s")
_START_S = 120.0
# An outage must not take the benchmark minutes; a run keeps its own, longer ones.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "4", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Values by what became of them."""

    logged: int
    """Values in metrics.jsonl and system/NODE.jsonl."""
    replayed: int
    """Those of metrics.jsonl that were logged while the server could not take them."""
    missing: int
    """Not in the server's database."""
    doubled: int
    """Times a value is there once more."""
    out_of_order: int
    """Values of metrics.jsonl that were stored after one of a later step."""
    warnings: int
    """Times the log said that MLflow does not record."""


class Server:
    """An `mlflow server` with an sqlite store, which can be started again on the same port.

    Args:
        folder: Where its database and artifacts are.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database, self._folder = folder / "server.db", folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Tracking URI."""
        return f"http://127.0.0.1:{self._port}"

    def start(self, *, full_disk: bool = False) -> None:
        """Start it and wait until it answers.

        Args:
            full_disk: It cannot write beyond the middle of its database.
        """
        command = [
            str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port",
            str(self._port), "--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}",
            "--artifacts-destination", str(self._folder / "artifacts"),
        ]  # fmt: skip
        limit = self.database.stat().st_size // 2 if full_disk else None

        def limit_files() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        # The output of a full disk's server goes nowhere: a file of its own would be full too.
        output = Path(os.devnull) if full_disk else self._folder / "server.log"
        with output.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=limit_files, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlflow server did not start: {self._folder}/server.log")
            time.sleep(0.2)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it."""
        if self._process is not None:
            self.send(number)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Let MLflow's calls give up after 4 seconds."""
    before = {name: os.environ.get(name) for name in _PATIENCE}
    os.environ.update(_PATIENCE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_outage(work: Path, *, steps: int) -> tuple[Counts, dict[str, bool]]:
    """Go through all phases; returns the counts, and whether each phase got rows through.

    Args:
        work: Folder for the run and the server.
        steps: Optimizer steps of each phase.
    """
    server = Server(work / "server")
    settings = {
        "tracking.uri": server.uri,
        "tracking.flush_every_n_steps": 5,
        "tracking.system_metrics_every_s": 0.2,
        "tracking.picture_cells": "null",
    }
    config = load_config("sclong_tiny", [f"{k}={v}" for k, v in settings.items()])
    tracker = _Impatient(config.tracking, work / "run", enabled=True, samples_node=True)
    passed: dict[str, bool] = {}
    try:
        with patience():
            tracker.start(params={}, tags={}, artifacts=[], resumed=False)
            for number, phase in enumerate(PHASES):
                _enter(server, phase)
                before = _synced(work / "run")
                for step in range(number * steps + 1, (number + 1) * steps + 1):
                    tracker.log(step, {name: float(step) for name in NAMES})
                    time.sleep(0.02)
                tracker.settle()
                passed[phase] = _synced(work / "run") > before
                if phase == "hanging":
                    server.send(signal.SIGCONT)
            tracker.finish("FINISHED")
    finally:
        server.stop()
    return _count(work / "run", server.database, steps, passed, tracker.warnings), passed


class _Impatient(Tracker):
    """A tracker that tries again at once, and counts its warnings."""

    warnings = 0

    def settle(self) -> None:
        """Wait until a flush has succeeded, or a second one in a row has failed."""
        for _ in range(3):
            if self._pending is not None and self._pending.exception() is None:
                break
            self._flush()

    def _collect(self, *, wait_s: float) -> None:
        before = self._in_trouble
        super()._collect(wait_s=wait_s)
        self._retry_at = 0.0
        self.warnings += self._in_trouble and not before


def _enter(server: Server, phase: str) -> None:
    """Bring the server into a phase."""
    if phase == "healthy":
        server.start()
    elif phase == "hanging":
        server.send(signal.SIGSTOP)
    elif phase == "killed":
        server.stop()
    elif phase == "disk full":
        server.start(full_disk=True)
    elif phase == "healthy again":
        server.stop()
        server.start()


def _synced(run_dir: Path) -> int:
    return sum(read_run_json(run_dir).get("mlflow_synced", {}).values())


def _count(
    run_dir: Path, database: Path, steps: int, passed: dict[str, bool], warnings: int
) -> Counts:
    rows = read_every_row(run_dir)
    for file in (run_dir / SYSTEM_DIR).glob("*.jsonl"):
        rows += read_samples(file)
    wanted = [
        (name, round(row["time"] * 1000), int(row["step"]), value)
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    ]
    with contextlib.closing(sqlite3.connect(database)) as store:
        stored = store.execute("SELECT key, timestamp, step, value FROM metrics").fetchall()
        order = store.execute("SELECT step FROM metrics WHERE key = ? ORDER BY rowid", NAMES[:1])
        in_order = [step for (step,) in order]
    late = sum(b < a for a, b in itertools.pairwise(in_order))
    outages = sum(not through for through in passed.values())
    return Counts(
        logged=len(wanted),
        replayed=outages * steps * len(NAMES),
        missing=len(set(wanted) - set(stored)),
        doubled=len(stored) - len(set(stored)) + len(set(stored) - set(wanted)),
        out_of_order=late,
        warnings=warnings,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run it, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="steps of each phase")
    parser.add_argument("--work", type=Path, help="folder (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        counts, passed = run_outage(args.work or Path(temporary), steps=args.steps)
    for phase, through in passed.items():
        print(f"{phase:<14} {args.steps * len(NAMES):>6} values logged, "
              f"{'sent' if through else 'kept in the run folder'}")  # fmt: skip
    print("  ".join(f"{name} {value:,}" for name, value in asdict(counts).items()))
    if args.json:
        result = {"steps": args.steps * len(passed), "counts": asdict(counts), "passed": passed}
        write_result(args.json, "tracking_outage", result)
    return int(bool(counts.missing or counts.doubled or counts.out_of_order))


if __name__ == "__main__":
    sys.exit(main())
