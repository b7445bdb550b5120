"""The sqlite store is made once, and one that is not whole is named.

Covers also `sclong_ds/tracking/client.py`.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from launching import ROOT, environment

from sclong_ds.files.atomic import partial_name
from sclong_ds.tracking.client import new_client, sqlite_file
from sclong_ds.tracking.store import make_store

ONE_RUN = """
import sys
from sclong_ds.tracking.client import new_client, sqlite_file
client = new_client(sys.argv[1])
sys.stdin.readline()
run = client.create_run("0", run_name=sys.argv[2])
client.log_metric(run.info.run_id, "loss", float(sys.argv[2]))
"""


@pytest.mark.parametrize("form", ["sqlite:///{}", "sqlite+pysqlite:///{}?timeout=60"])
def test_runs_that_begin_together_are_all_recorded(tmp_path: Path, form: str) -> None:
    uri = form.format(tmp_path / "runs" / "mlflow.db")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_RUN, uri, str(number)],
            cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.communicate("\n")[1].count("Error") == 0
        assert process.returncode == 0
    found = new_client(uri).search_runs(["0"])
    assert sorted(run.data.metrics["loss"] for run in found) == [0, 1, 2, 3]
    names = {p.name for p in (tmp_path / "runs").iterdir()} - {"mlflow.db-wal", "mlflow.db-shm"}
    assert names == {".mlflow.db.lock", "mlflow.db"}


def test_an_address_names_its_file() -> None:
    file = Path("/a b/c.db")
    for uri in ("sqlite:////a b/c.db", "sqlite+pysqlite:////a b/c.db", "sqlite:////a b/c.db?a=1"):
        assert sqlite_file(uri) == file
    assert sqlite_file("sqlite:///c.db?timeout=9") == Path("c.db").resolve()
    for uri in ("http://h", "postgresql:///c.db", "sqlite://", "sqlite:///:memory:", "/a/c.db"):
        assert sqlite_file(uri) is None


def test_a_store_that_was_not_made_to_its_end_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as store:
        store.execute("create table experiments (a)")
        store.execute("create table alembic_version (version_num)")
        store.commit()
    with pytest.raises(ValueError, match=r"mlflow.db was not made to its end: move it away"):
        make_store(file)


def test_another_file_is_no_store(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"some text " * 1000)
    with pytest.raises(ValueError, match=r"mlflow.db is not an sqlite store"):
        make_store(file)


def test_a_store_that_a_kill_left_half_made_is_made_again(tmp_path: Path) -> None:
    """What lies under the temporary name is no store of anybody."""
    partial_name(tmp_path / "mlflow.db").write_bytes(b"half")
    make_store(tmp_path / "mlflow.db")
    make_store(tmp_path / "mlflow.db")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]
