"""`ui` finds the store of a folder of runs, and the pictures of one that was copied."""

from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sclong_ds.__main__ import main
from sclong_ds.run_folder.files import update_run_json
from sclong_ds.tracking.ui import serve, store_of, with_paths_of_here


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
