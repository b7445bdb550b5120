"""Extensions are loaded in turns, whatever a process that was killed left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from sclong_ds.engine import extensions
from sclong_ds.engine.extensions import alone, extensions_folder, processes_with

HOLDS = """
import os, sys, time
file = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("held", flush=True)
time.sleep(600)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Hold torch's lock file as torch does, in another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, path], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_that_a_killed_process_left_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    process = hold(lock)
    assert processes_with(lock) == [process.pid]
    told: list[str] = []

    def waits(what: str) -> None:
        told.append(what)
        assert lock.exists()
        if len(told) == 3:
            process.kill()
            process.communicate()

    with alone(lock.parent, waits=waits):
        assert not lock.exists()
    assert told == [f"{lock}, which process {process.pid} holds"] * 3
    assert f"{lock}: a process that is gone left it; removed" in caplog.text


def test_processes_take_turns_and_a_killed_one_does_not_hold_up_the_others(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; "
        "from sclong_ds.engine.extensions import alone\n"
        "with alone(Path(sys.argv[1]), waits=print):\n    print('alone', flush=True)\n"
        "    (Path(sys.argv[1]) / 'lock').touch()\n    time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "op"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "alone\n"
    told: list[str] = []

    def waits(what: str) -> None:
        told.append(what)
        if len(told) == 2:
            process.kill()
            process.communicate()

    with alone(tmp_path / "op", waits=waits):
        assert not (tmp_path / "op" / "lock").exists()
    assert f"process {process.pid} on {os.uname().nodename} is loading" in told[0]


def test_a_folder_per_environment_and_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = set()
    for environment in ("a", "b"):
        monkeypatch.setattr(sys, "prefix", str(tmp_path / environment))
        (tmp_path / environment).mkdir()
        for user in ("ada", "ben"):
            monkeypatch.setattr(extensions, "_user", lambda user=user: user)
            found.add(extensions_folder())
        monkeypatch.setattr(extensions.os, "access", lambda *_: False)
        found.add(extensions_folder())
        monkeypatch.undo()
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(found) == 6
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "told"))
    assert extensions_folder() == tmp_path / "told"
