import logging
import shutil
from pathlib import Path

import pytest

from sclong_ds.run_folder.files import (
    RunFolder,
    read_run_json,
    recorded_ids,
    update_run_json,
)
from sclong_ds.run_folder.seal import changes, say_change, seal, seal_again


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has ended, with two rows, two events and a node, sealed twice."""
    return make(tmp_path / "run", run_id="a", loss=1.0)


def make(run_dir: Path, *, run_id: str, loss: float) -> Path:
    with RunFolder(run_dir) as folder:
        update_run_json(run_dir, run_id=run_id, status="RUNNING")
        (run_dir / "config.yaml").write_text(f"run: {{dir: {run_id}}}\n")
        (run_dir / "system").mkdir()
        for step, event in ((1, "start"), (2, "finish")):
            folder.append_metrics(step, {"train/loss": loss * step})
            with (run_dir / "system" / "n1.jsonl").open("ab") as file:
                file.write(f'{{"step": {step}, "time": {loss}}}\n'.encode())
            folder.append_event(event, step=step)
            seal(run_dir)
            if event == "start":
                shutil.copy(run_dir / "run.json", run_dir / "early.json")
    update_run_json(run_dir, status="FINISHED")
    return run_dir


def test_an_untouched_run_has_no_changes_and_may_grow(run_dir: Path) -> None:
    assert changes(run_dir) == []
    with RunFolder(run_dir) as folder:
        folder.append_metrics(3, {"train/loss": 3.0})
        folder.append_event("validation", step=3)
    assert changes(run_dir) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "system/n1.jsonl"])
def test_lost_lines_of_a_growing_file_are_said_for_ever(run_dir: Path, name: str) -> None:
    path = run_dir / name
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    for left in (b"", first, second, second + first, whole[:-1], whole.replace(b"1", b"7", 1)):
        path.write_bytes(left)
        assert [line.split(":")[0] for line in changes(run_dir)] == [str(path)]
    path.write_bytes(first)
    with RunFolder(run_dir) as folder:
        for step in range(2, 9):
            folder.append_metrics(step, {"train/loss": 3.0})
            folder.append_event("validation", step=step)
    seal(run_dir)
    assert any(line.startswith(f"{path}:") for line in changes(run_dir))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl", "run.json"])
def test_files_that_are_missing_or_of_another_run_are_said(run_dir: Path, name: str) -> None:
    other = make(run_dir.parent / "other", run_id="b", loss=5.0)
    (run_dir / name).unlink()
    assert any(line.startswith(f"{run_dir / name}: missing") for line in changes(run_dir))
    shutil.copy(other / name, run_dir / name)
    assert changes(run_dir)
    if name != "run.json":
        assert changes(run_dir)[0].startswith(f"{run_dir / name}: ")


@pytest.mark.parametrize("name", ["restarts.json", "preflight.json", "failure.json"])
def test_what_the_job_writes_again_is_sealed_by_its_writer(
    run_dir: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = run_dir / name
    for text in ("[1]", "[1, 2]"):
        path.write_text(text)
        seal_again(run_dir, name)
        assert changes(run_dir) == []
    seal(run_dir)
    for spoil in (path.unlink, lambda: path.write_text("[1]"), lambda: path.write_text("[1, 3]")):
        spoil()
        assert [line.split(":")[0] for line in changes(run_dir)] == [str(path)]
        caplog.clear()
        say_change(run_dir, name)
        assert str(path) in caplog.text
    seal_again(run_dir, "config.yaml", forget=[name])
    assert changes(run_dir) == []


def test_a_start_before_the_first_training_is_sealed_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "restarts.json").write_text("[1]")
    seal_again(tmp_path, "restarts.json")
    assert not (tmp_path / "run.json").exists()
    run_dir = make(tmp_path, run_id="a", loss=1.0)
    assert changes(run_dir) == []
    (tmp_path / "restarts.json").write_text("[2]")
    assert [line.split(":")[0] for line in changes(run_dir)] == [str(tmp_path / "restarts.json")]


def test_an_earlier_copy_of_run_json_is_said(run_dir: Path) -> None:
    shutil.copy(run_dir / "early.json", run_dir / "run.json")
    (line,) = changes(run_dir)
    assert line.startswith(f"{run_dir / 'run.json'}: older than events.jsonl")


def test_a_run_without_a_seal_has_no_changes(run_dir: Path) -> None:
    run = {k: v for k, v in read_run_json(run_dir).items() if k != "seal"}
    (run_dir / "run.json").unlink()
    update_run_json(run_dir, **run)
    (run_dir / "metrics.jsonl").write_text("")
    assert changes(run_dir) == []


def test_a_run_json_of_another_run_gives_no_ids(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    shutil.copy(run_dir / "run.json", checkpoint)
    other = make(run_dir.parent / "other", run_id="b", loss=5.0)
    shutil.copy(other / "run.json", run_dir / "run.json")
    assert recorded_ids(run_dir)["run_id"] == "a"
    assert f"{run_dir / 'run.json'}: of another run (b; the checkpoints are of a)" in caplog.text


def test_a_run_that_cannot_be_sealed_goes_on(
    run_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "run.json")

    monkeypatch.setattr("sclong_ds.run_folder.seal.update_run_json", fail)
    with caplog.at_level(logging.WARNING):
        seal(run_dir)
    assert "not sealed: [Errno 28] No space left on device: 'run.json'" in caplog.text


@pytest.mark.parametrize("content", ['{"zero_optimization": 1}', None])
def test_another_json_file_is_no_run_json_of_an_earlier_version(
    run_dir: Path, content: str | None
) -> None:
    path = run_dir / "run.json"
    path.write_text(content or path.read_text().replace('"checksum"', '"chebksum"'))
    assert read_run_json(run_dir) == {}
    assert changes(run_dir) == [f"{path}: missing or damaged; nothing can be compared with it"]
