"""Trackers beside MLflow get every value once, through failures, and as their libraries read it.

Covers `sclong_ds/recorders/recorder.py`, `sclong_ds/recorders/csv_file.py`,
`sclong_ds/recorders/tensorboard.py`, `sclong_ds/recorders/wandb.py` and
`sclong_ds/recorders/opening.py` too.
"""

from __future__ import annotations

import csv
import logging
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sclong_ds.config.load import load_config
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.recorders.csv_file import CsvFile
from sclong_ds.recorders.follower import Follower
from sclong_ds.recorders.opening import RECORDERS, check_libraries
from sclong_ds.recorders.recorder import About, Ending, Recorder, Row
from sclong_ds.run_folder.files import RunFolder
from sclong_ds.tracking.sync import sync
from sclong_ds.tracking.tracker import Tracker

WAIT_S = 60.0


class Kept:
    """A tracker in memory that fails when it is told to."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.pictures: list[tuple[int, str]] = []
        self.files: list[str] = []
        self.endings: list[Ending] = []
        self.fails = 0

    def open(self, about: About) -> Recorder:
        self._answer()
        return self

    def _answer(self) -> None:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no answer")

    def log(self, rows: Sequence[Row]) -> None:
        self._answer()
        self.rows += rows

    def picture(self, step: int, path: Path) -> None:
        self._answer()
        self.pictures.append((step, path.name))

    def artifact(self, path: Path) -> None:
        self._answer()
        self.files.append(path.name)

    def finish(self, ending: Ending) -> None:
        self.endings.append(ending)


def about(run_dir: Path) -> About:
    return About(run_dir=run_dir, run_id="abc", name="a", group="all", params={"x": "1"}, tags={})


def picture(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + b"\1\2\3" * 2))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))


@pytest.mark.parametrize("fails", [0, 1, 2, 3, 4])
def test_every_row_picture_and_file_arrives_once_through_failures(
    tmp_path: Path, fails: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sclong_ds.recorders.follower._RETRY_AFTER_S", 0.0)
    monkeypatch.setattr("sclong_ds.recorders.follower._ROWS", 2)
    kept = Kept()
    kept.fails = fails
    picture(tmp_path / "plots" / "step_3" / "b.png")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with RunFolder(tmp_path) as folder, caplog.at_level(logging.WARNING):
        follower = Follower("kept", about(tmp_path), kept.open)
        follower.queue([tmp_path / "config.yaml"] * 2)
        for step in range(1, 6):
            folder.append_metrics(step, {"train/loss": 1.0 / step, "train/z": float("nan")})
            follower.flush()
            follower._collect(wait_s=WAIT_S)
        assert follower.finish("FINISHED", wait_s=WAIT_S)
    assert [row["step"] for row in kept.rows] == [1, 2, 3, 4, 5]
    assert kept.rows[1]["train/loss"] == 0.5
    assert kept.rows[1]["train/z"] is None
    assert (kept.pictures, kept.files) == ([(3, "b.png")], ["config.yaml"])
    assert kept.endings == ["FINISHED"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (2 if fails else 0)  # once that it fails, once that it records again


def test_another_start_continues_where_the_last_one_was_killed(tmp_path: Path) -> None:
    first, second = Kept(), Kept()
    with RunFolder(tmp_path) as folder:
        for kept, steps in ((first, (1, 2)), (second, (3,))):
            for step in steps:
                folder.append_metrics(step, {"loss": 0.5})
            follower = Follower("kept", about(tmp_path), kept.open)
            follower.flush()
            assert follower._collect(wait_s=WAIT_S)
    assert [[row["step"] for row in kept.rows] for kept in (first, second)] == [[1, 2], [3]]


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    def hang(about: About) -> Recorder:
        threading.Event().wait()
        raise AssertionError

    follower = Follower("hanging", about(tmp_path), hang)
    follower.flush()
    assert not follower.finish("KILLED", wait_s=0.01)


def test_the_table_holds_each_value_once_after_a_kill_between_row_and_record(
    tmp_path: Path,
) -> None:
    rows: list[Row] = [
        {"step": 1, "time": 5.0, "a": 0.1, "b": None},
        {"step": 2, "time": 6.0, "a": 2.0},
    ]
    killed = CsvFile(about(tmp_path))
    killed.log(rows)
    killed._file.close()
    again = CsvFile(replace(about(tmp_path), recorded=2))  # the second row is not on record
    again.log(rows[1:])
    again.finish("FINISHED")
    table = list(csv.reader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert table == [["step", "time", "name", "value"], ["1", "5.000", "a", "0.1"],
                     ["1", "5.000", "b", "nan"], ["2", "6.000", "a", "2.0"]]  # fmt: skip


def test_a_table_that_finds_no_room_ends_with_a_whole_line(tmp_path: Path) -> None:
    table = CsvFile(about(tmp_path))

    class Full:
        def __init__(self, file: object) -> None:
            self.file, self.room = file, 7

        def __getattr__(self, name: str) -> Callable[..., object]:
            return getattr(self.file, name)  # type: ignore[no-any-return]

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            done, self.room = self.file.write(data[: self.room]), 0  # type: ignore[attr-defined]
            return int(done)

    file, table._file = table._file, Full(table._file)  # type: ignore[assignment]
    row: Row = {"step": 1, "time": 5.0, "a": 0.1}
    with pytest.raises(OSError, match="No space"):
        table.log([row])
    table._file = file
    table.log([row])
    table.finish("FINISHED")
    assert (tmp_path / "metrics.csv").read_text() == "step,time,name,value\n1,5.000,a,0.1\n"


def test_a_run_feeds_several_trackers_without_mlflow_and_sync_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Kept()
    monkeypatch.setitem(RECORDERS, "tensorboard", kept.open)
    monkeypatch.setattr("sclong_ds.recorders.opening._LIBRARIES", {})
    config = load_config("sclong_tiny", [
        "tracking.enabled=false", "tracking.also=[csv, tensorboard]", "tracking.picture_cells=null",
        "tracking.system_metrics_every_s=0", "tracking.flush_every_n_steps=1",
    ])  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    tracker = Tracker(config.tracking, tmp_path, enabled=True)
    kept.fails = 1000
    assert tracker.start(params={"a": 1}, tags={}, artifacts=[tmp_path / "config.yaml"],
                         resumed=False) is None  # fmt: skip
    for step in range(1, 4):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish("FINISHED")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    assert not kept.rows
    kept.fails = 0
    assert sync(tmp_path) is None
    assert [row["step"] for row in kept.rows] == [1, 2, 3]
    assert kept.endings == ["FINISHED"]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4
    assert f"tensorboard has all of {tmp_path}" in capsys.readouterr().out


def test_a_missing_library_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_libraries(["csv"])
    with pytest.raises(ValueError, match=r"names wandb.*pip install wandb"):
        check_libraries(["csv", "wandb"])
    with pytest.raises(ValueError, match="name each tracker once"):
        load_config("sclong_tiny", ["tracking.also=[csv, csv]"])
    with pytest.raises(
        ValueError, match=r"also\[0\]: got 'aim' .str., allowed: csv, tensorboard, wandb"
    ):
        load_config("sclong_tiny", ["tracking.also=[aim]"])


ROWS: list[Row] = [
    {"step": 1, "time": 1e9, "train/loss": 0.5},
    {"step": 2, "time": 2e9, "train/loss": None},
]


def fill(make: Callable[[About], Recorder], run_dir: Path) -> None:
    recorder = make(about(run_dir))
    recorder.log(ROWS)
    picture(run_dir / "plots" / "step_2" / "embedding.png")
    recorder.picture(2, run_dir / "plots" / "step_2" / "embedding.png")
    (run_dir / "config.yaml").write_text("a: 1\n")
    recorder.artifact(run_dir / "config.yaml")
    recorder.finish("FINISHED")


def test_tensorboard_reads_values_pictures_and_texts(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fill(RECORDERS["tensorboard"], tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    first, second = found.Scalars("train/loss")
    assert (first.step, first.value, second.step, second.value) == (1, 0.5, 2, pytest.approx(
        float("nan"), nan_ok=True))  # fmt: skip
    (image,) = found.Images("embedding")
    assert (image.step, image.width, image.height) == (2, 2, 1)
    (text,) = found.Tensors("config.yaml")
    assert b"a: 1" in text.tensor_proto.string_val[0]


def test_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fill(RECORDERS["wandb"], tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = run.glob("run-abc.wandb")
    deadline = time.monotonic() + 30
    while b"train/loss" not in file.read_bytes():  # W&B's own process writes it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(run.rglob("embedding_*.png"))
    assert (run / "files" / tmp_path.name / "config.yaml").read_text() == "a: 1\n"
