"""`ui` finds the store of a folder of runs, and the pictures of one that was copied."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from launching import ROOT, environment

from sclong_ds.__main__ import main
from sclong_ds.run_folder.files import update_run_json
from sclong_ds.tracking.ui import serve, store_of, with_paths_of_here

SHOWN = """
import sys
from sclong_ds.tracking import ui

ui._pages = lambda uri, server: [server]
sys.exit(ui.serve("sqlite:///any", port=ui.free_port(), open_it=False))
"""
SERVER = """
import http.server, os, subprocess, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

worker = subprocess.Popen(["sleep", "1000"])
with open(os.environ["NUMBERS"], "w") as file:
    print(os.getpid(), worker.pid, file=file)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
"""Stands for `mlflow server`, which has workers."""


def write_store(folder: Path, *uris: str) -> Path:
    """Write what `ui` itself reads of MLflow's tables."""
    folder.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        store.execute("create table runs (artifact_uri)")
        store.executemany("insert into runs values (?)", [(uri,) for uri in uris])
        store.commit()
    return folder / "mlflow.db"


def uris_of(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as store:
        return [uri for (uri,) in store.execute("select artifact_uri from runs order by rowid")]


def test_runs_that_lie_where_they_were_made_are_shown_as_they_are(tmp_path: Path) -> None:
    here = tmp_path / "mlartifacts" / "1" / "a" / "artifacts"
    here.mkdir(parents=True)
    file = write_store(tmp_path, here.as_uri(), "mlflow-artifacts:/1/b/artifacts")
    assert with_paths_of_here(file, tmp_path / "scratch") == file


def test_copied_runs_show_their_files_and_keep_their_store(tmp_path: Path) -> None:
    there = "file:///cluster/my%20runs/mlartifacts/1"
    found = tmp_path / "runs" / "mlartifacts" / "1" / "a" / "artifacts"
    found.mkdir(parents=True)
    others = ["s3://bucket/mlartifacts/1/b/artifacts", f"{there}/not_copied/artifacts"]
    file = write_store(tmp_path / "runs", f"{there}/a/artifacts", *others)
    before, scratch = file.read_bytes(), tmp_path / "scratch"
    scratch.mkdir()
    shown = with_paths_of_here(file, scratch)
    assert shown.parent == scratch
    assert uris_of(shown) == [found.as_uri(), *others]
    assert file.read_bytes() == before


def test_the_store_of_a_folder_of_runs_or_of_a_run_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    update_run_json(run, mlflow_tracking_uri="http://host:5000")
    assert store_of(run) == store_of(run.parent) == "http://host:5000"
    file = write_store(run.parent)
    assert store_of(run) == store_of(run.parent) == f"sqlite:///{file}"


def test_what_cannot_be_shown_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["ui", str(tmp_path / "absent")]) == 1
    assert "absent: no such folder; give the one that holds the runs" in capsys.readouterr().err
    assert main(["ui", str(tmp_path)]) == 1
    assert "no mlflow.db in it" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["ui", str(tmp_path)]) == 1
    assert "mlflow is not installed" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}: Address already in use; give another"):
            serve(f"sqlite:///{tmp_path / 'mlflow.db'}", port=port, open_it=False)


@pytest.mark.parametrize("sent", [["INT"], ["TERM"], ["HUP"], ["INT", "INT"]], ids="-".join)
def test_the_server_ends_with_the_command_however_that_is_ended(
    tmp_path: Path, sent: list[str]
) -> None:
    (tmp_path / "mlflow.py").write_text(SERVER)
    numbers = tmp_path / "numbers"
    # As a shell's script starts what it puts into the background: SIGINT is ignored.
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "-", sys.executable, "-c", SHOWN]
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "NUMBERS": str(numbers)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment() | paths, stdout=subprocess.PIPE, text=True,
        # The tests may themselves run under nohup, whose children ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    printed = [process.stdout.readline() for _ in range(2)]
    started = [int(number) for number in numbers.read_text().split()]
    try:
        assert printed[1] == "Ctrl-C ends the server.\n"
        assert all(_runs(number) for number in started)
        for name in sent:
            process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.wait(timeout=60) == 0
        assert not any(_runs(number) for number in started)
    finally:
        process.kill()
        process.communicate()
        for number in started:
            if _runs(number):
                os.kill(number, signal.SIGKILL)


def _runs(number: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
