"""The files of a run folder: what is recorded of a start, and read again.

Covers also `sclong_ds/run_folder/identity.py`.
"""

import json
import math
import random
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sclong_ds.run_folder import identity
from sclong_ds.run_folder.files import RunFolder, read_events, read_run_json, update_run_json
from sclong_ds.run_folder.identity import git_commit, record_start
from sclong_ds.run_folder.rows import read_metrics


def test_rows_come_back_by_step_with_full_precision(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(0, {"val/mse": np.float32(0.5)})
        folder.append_metrics(1, {"train/loss": loss, "cells_seen": 4})
        folder.append_event("checkpoint", step=1, path=Path("checkpoints/1"), norm=np.float32(2))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["train/loss"] == loss
    assert isinstance(rows[1]["cells_seen"], int)
    assert rows[0]["val/mse"] == 0.5
    (event,) = read_events(tmp_path)
    assert (event["event"], event["path"], event["norm"]) == ("checkpoint", "checkpoints/1", 2.0)


def test_what_a_run_went_back_behind_is_left_out(tmp_path: Path) -> None:
    """Its first start came to step 9 and was resumed after step 2 and its validation."""
    with RunFolder(tmp_path) as folder:
        for step in range(1, 10):
            folder.append_metrics(step, {"train/loss": 9.0})
            folder.append_metrics(step, {"val/mse": 8.0})
        folder.append_metrics(3, {"train/loss": 1.0})
    rows = read_metrics(tmp_path)
    assert [(r["step"], r.get("train/loss"), r.get("val/mse")) for r in rows] == [
        (1, 9.0, None), (1, None, 8.0), (2, 9.0, None), (2, None, 8.0), (3, 1.0, None),
    ]  # fmt: skip


def test_a_row_takes_little_memory(tmp_path: Path) -> None:
    names = [f"perf/figure_{k}" for k in range(26)]
    with RunFolder(tmp_path) as folder:
        for step in range(500):
            folder.append_metrics(step, dict.fromkeys(names, step + 0.5))
    read_metrics(tmp_path)  # what is read once for all
    tracemalloc.start()
    rows = read_metrics(tmp_path)
    per_row, _ = (n / len(rows) for n in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert rows[3] == {"step": 3, "time": rows[3]["time"], **dict.fromkeys(names, 3.5)}
    assert per_row < 28 * 8 + 500, "dicts took 4,200 bytes"


def test_torn_last_line_is_ignored_and_then_cut_off(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(1, {"train/loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 2, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(2, {"train/loss": 2.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        b"oops\n", b"5\n", b'{"train/loss": 1.0}\n', b"\x00\x00\n", b"\xff\xfe\n", b"\n",
        b"[" * 100_000 + b"\n", b'{"step": "2", "time": 0}\n', b'{"step": 2, "time": NaN}\n',
        b'{"step": 2, "time": 0, "train/loss": "high"}\n', b'{"step": 1e400, "time": 0}\n',
        b'{"step": 2, "time": 0, "train/loss": 1' + b"0" * 400 + b"}\n",
    ],
)  # fmt: skip
def test_a_damaged_line_is_left_out_and_reported(
    tmp_path: Path, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [b'{"step": %d, "train/loss": 1.0, "time": 0}\n' % step for step in (1, 3)]
    (tmp_path / "metrics.jsonl").write_bytes(bad.join(rows))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    (record,) = caplog.records
    assert record.message == (
        f"{tmp_path}/metrics.jsonl: damaged lines ignored: 1 (line 2); all others are used"
    )


def test_a_flipped_bit_costs_its_row_at_most(tmp_path: Path) -> None:
    """Two rows, where it joins two lines; no other value ever changes."""
    with RunFolder(tmp_path) as folder:
        for step in range(1, 6):
            folder.append_metrics(step, {"train/loss": step / 7, "train/lr": 1e-3})
    path = tmp_path / "metrics.jsonl"
    whole, expected = path.read_bytes(), [dict(row) for row in read_metrics(tmp_path)]
    assert [row["train/loss"] for row in expected] == [step / 7 for step in range(1, 6)]
    rng = random.Random(0)
    for bit in (rng.randrange(8 * len(whole)) for _ in range(300)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        found = [dict(row) for row in read_metrics(tmp_path)]
        assert len(found) >= 3
        assert all(row in expected for row in found)


def test_rows_of_earlier_versions_come_before_those_with_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = b'{"step": 1, "train/loss": 0.5, "time": 0}\n'
    path.write_bytes(old)
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(2, {"train/loss": 0.25})
    assert [row["train/loss"] for row in read_metrics(tmp_path)] == [0.5, 0.25]
    # A row that lost its checksum is not one of an earlier version.
    path.write_bytes(path.read_bytes() + old.replace(b"1", b"3", 1))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_run_json_is_set_aside_and_made_again_from_the_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = record_start(tmp_path, resumed=False)["run_id"]
    path = tmp_path / "run.json"
    saved = tmp_path / "checkpoints" / "step_00000004"
    saved.mkdir(parents=True)
    (saved / "run.json").write_bytes(path.read_bytes())
    for damage in (path.read_bytes().replace(b'"RUNNING"', b'"RUNNINF"'), b"{", b"\xff", b"[1]"):
        path.write_bytes(damage)
        assert read_run_json(tmp_path)["run_id"] == ids
        assert "status" not in read_run_json(tmp_path)
    assert "identified by its newest checkpoint" in caplog.text
    again = record_start(tmp_path, resumed=True)
    assert again["run_id"] == ids
    assert read_run_json(tmp_path) == again
    assert (tmp_path / "run.json.damaged").read_bytes() == b"[1]"


def test_a_run_json_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run_id": "abc", "restarts": 1}')
    assert read_run_json(tmp_path) == {"run_id": "abc", "restarts": 1}
    update_run_json(tmp_path, status="FINISHED")
    assert read_run_json(tmp_path)["run_id"] == "abc"


def test_each_non_finite_value_is_read_as_it_was_with_an_event(tmp_path: Path) -> None:
    odd = {"a": math.nan, "b": -math.inf, "c": math.inf}
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(4, odd)
        folder.append_event("skipped_step", step=4, grad_norm=math.inf)
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "events.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = read_metrics(tmp_path)
    assert str({name: row[name] for name in odd}) == str(odd)
    event, skipped = read_events(tmp_path)
    assert event["event"] == "non_finite"
    assert event["values"] == {"a": "nan", "b": "-inf", "c": "inf"}
    assert skipped["grad_norm"] == "inf"


def test_run_json_merges_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    update_run_json(tmp_path, summary={"n_genes": np.int64(7)})
    assert update_run_json(tmp_path, status="FINISHED")["summary"] == {"n_genes": 7}
    assert read_run_json(tmp_path) == {"summary": {"n_genes": 7}, "status": "FINISHED"}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_restarts_are_counted_under_one_run_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = record_start(tmp_path, resumed=False)
    second = record_start(tmp_path, resumed=True)
    assert (first["restarts"], second["restarts"]) == (0, 1)
    assert first["run_id"] == second["run_id"]
    assert first["created"] == second["created"]
    assert second["slurm_job_id"] == "77"
    assert second["environment"]["numpy"] == np.__version__


def test_commit_names_the_checkout_and_says_when_it_is_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *author, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "sclong_ds" / "run_folder" / "identity.py"
    module.parent.mkdir(parents=True)
    module.write_text("1\n")
    monkeypatch.setattr(identity, "__file__", str(module))
    assert git_commit().startswith("version ")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert git_commit() == head
    module.write_text("2\n")
    assert git_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit().startswith("version ")
