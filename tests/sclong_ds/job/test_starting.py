"""A start says what it waits for, ends in time, and ends when it is asked to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, environment

from sclong_ds.report.status import describe, read_status
from sclong_ds.run_folder.heartbeats import read_heartbeats

HANGS = """
import sys, threading
from pathlib import Path
from sclong_ds.job.signals import StopRequest
from sclong_ds.job import starting

starting._WRITE_S = starting._FIRST_NOTICE_S = 0.1
starting.LEAST_TIMEOUT_S, starting._FILES_S = 0.0, 0.2
how, folder, timeout_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
if how == "with its files":
    starting.os.replace = lambda *_: threading.Event().wait()
run = starting.Starting(StopRequest(), rank=0, node="n1")
with run:
    run.of_run(folder, timeout_s=timeout_s)
    run.phase("rendezvous", "3 other ranks")
    run.waits("nobody")
    if how == "fails":
        import time
        while not list(folder.glob("heartbeat/*.json")):
            time.sleep(0.01)
        raise ValueError("no")
    # A lock that is held by its own thread: python waits in C, and its own handlers never run.
    lock = threading.Lock()
    lock.acquire()
    import ctypes, os
    print("hangs", flush=True)
    libc = ctypes.CDLL(None)
    while True:
        libc.sem_wait(ctypes.create_string_buffer(64)) if how == "in C" else lock.acquire()
"""


def start(how: str, folder: Path, *, timeout_s: float = 300.0) -> subprocess.Popen[str]:
    """Start a process that hangs in the middle of its start."""
    return subprocess.Popen(
        [sys.executable, "-c", HANGS, how, folder, str(timeout_s)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["in C", "in python", "with its files"])
def test_a_signal_ends_a_start_that_hangs(tmp_path: Path, how: str, number: signal.Signals) -> None:
    process = start(how, tmp_path / "run")
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert f"error: rank 0 (n1): stopped by {number.name} while starting" in said
    assert "phase 'rendezvous': waits for nobody since" in said
    assert how == "with its files" or not (tmp_path / "run").exists()


FILES_THAT_HANG = """
import ctypes, runpy, sys
from sclong_ds import input_checks
from sclong_ds.config import load

def hang(*_):
    print("hangs", flush=True)
    while True:  # a signal ends one wait
        ctypes.CDLL(None).sem_wait(ctypes.create_string_buffer(64))

setattr(*{"the configuration": (load, "load_config"), "the files": (input_checks, "check_inputs")}[
    sys.argv.pop()], hang)
runpy.run_module("sclong_ds.pretrain", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("what", ["the configuration", "the files"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_ends_while_it_reads_its_settings(
    tmp_path: Path, what: str, number: signal.Signals
) -> None:
    arguments = ("--config", "sclong_tiny", f"run.dir={tmp_path / 'run'}", "data.corpus=any")
    with subprocess.Popen(
        [sys.executable, "-c", FILES_THAT_HANG, *arguments, what], cwd=ROOT, text=True,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert f"stopped by {number.name} while starting, phase 'settings': waits for {what}" in said
    assert not (tmp_path / "run").exists()


def test_a_training_is_seen_and_ends_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "lib" / "torch").mkdir(parents=True)
    (tmp_path / "lib" / "torch" / "__init__.py").write_text("import time; time.sleep(600)")
    corpus, folder = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "sclong_ds.pretrain", "--config", "sclong_tiny",
         f"run.dir={folder}", f"data.corpus={corpus}", "model.gene_encoder=embedding"],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": f"{tmp_path / 'lib'}:{ROOT}"}, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while not read_heartbeats(folder / "heartbeat"):
        assert process.poll() is None
        time.sleep(0.02)
    status = read_status(folder)
    assert status.state == "starting"
    assert "starting     waits for the imports from" in describe(status)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "stopped by SIGTERM while starting, phase 'imports': waits for the imports" in said
    assert not folder.exists()


def test_a_training_without_its_libraries_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import libcudart_of_another_driver")
    (tmp_path / "corpus").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "sclong_ds.pretrain", "--config", "sclong_tiny",
         f"run.dir={tmp_path / 'run'}", f"data.corpus={tmp_path / 'corpus'}",
         "model.gene_encoder=embedding"],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: No module named 'libcudart_of_another_driver': ")
    assert f"{sys.executable} cannot import what training needs" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_start_that_was_killed_is_named(tmp_path: Path) -> None:
    process = start("in C", tmp_path / "run")
    while not (beats := list(tmp_path.glob("run/heartbeat/rank_*.json"))):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    os.utime(beats[0], (0, time.time() - 300))
    with pytest.raises(FileNotFoundError, match="rank 0 on n1 was last heard of 5 min ago, wait"):
        read_status(tmp_path / "run")


def test_a_start_that_hangs_is_said_shown_and_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("in C", folder, timeout_s=3.0)
    while not list(folder.glob("heartbeat/rank_*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    (beat,) = read_heartbeats(folder / "heartbeat").values()
    assert (beat.rank, beat.phase, beat.reading) == (0, "start: rendezvous", "nobody")
    status = read_status(folder)
    assert status.state == "starting"
    text = describe(status)
    assert "waits for nobody since " in text
    assert "(rank 0 on n1, rendezvous)" in text
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 71
    assert said.startswith("rank 0 (n1): starting, phase 'rendezvous': waits for nobody since")
    assert "no progress for 3 s while starting, phase 'rendezvous'" in said
    assert not folder.exists()


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    process = start("fails", tmp_path / "run")
    assert "ValueError: no" in process.communicate(timeout=60)[1]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text(json.dumps(1))
    start("fails", tmp_path / "run").communicate(timeout=60)
    assert (tmp_path / "run" / "mine").is_file()
    assert not list(tmp_path.glob("run/heartbeat/*"))
