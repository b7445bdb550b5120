"""What asks for another start of a job, and when it is refused.

Covers also `sclong_ds/restarts.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sclong_ds.files.sealed_json import write_sealed
from sclong_ds.job import failures
from sclong_ds.job.restarts import (
    PREFLIGHT_FILE,
    RESTARTS_FILE,
    bad_nodes,
    begin,
    end,
    main,
    newest_step,
    read_starts,
    read_verdict,
    seconds_to_save,
)
from sclong_ds.run_folder.files import RunFolder, update_run_json
from sclong_ds.run_folder.seal import seal


def _begin(run_dir: Path, *, job: str = "7", max_stalled: int = 3) -> None:
    begin(run_dir, job=job, nodes="n[1-2]", max_stalled=max_stalled)


def _end(run_dir: Path, status: int, *, max_stalled: int = 3) -> str:
    return end(run_dir, status, job="7", max_stalled=max_stalled)


def _checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def _metrics(run_dir: Path, step: int) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": step, "time": 0.0}) + "\n")


def test_starts_without_a_new_checkpoint_end_the_job(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 40)
    for _ in range(3):
        _begin(tmp_path)
    with pytest.raises(ValueError, match=r"no new checkpoint in 3 starts .* at step 40"):
        _begin(tmp_path)
    assert [start.step for start in read_starts(tmp_path)] == [40, 40, 40]


def test_a_new_checkpoint_or_a_new_job_begins_the_count_again(tmp_path: Path) -> None:
    for _ in range(3):
        _begin(tmp_path)
    _checkpoint(tmp_path, 10)
    _begin(tmp_path)
    _begin(tmp_path)
    assert [start.step for start in read_starts(tmp_path)] == [0, 0, 0, 10, 10]
    _begin(tmp_path, job="8", max_stalled=1)
    with pytest.raises(ValueError, match="job 8"):
        _begin(tmp_path, job="8", max_stalled=1)


def test_only_whole_checkpoints_are_progress(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    _checkpoint(tmp_path, 20)
    (tmp_path / "checkpoints" / "step_00000030.partial").mkdir()
    assert newest_step(tmp_path) == 20


@pytest.mark.parametrize("status", [1, 2])
def test_what_the_training_itself_reports_is_not_repeated(tmp_path: Path, status: int) -> None:
    _checkpoint(tmp_path, 5)
    _begin(tmp_path)
    with pytest.raises(ValueError, match=f"ended by itself with status {status}"):
        _end(tmp_path, status)


@pytest.mark.parametrize("status", [71, 137, 139, 134])
def test_a_dead_rank_asks_for_another_life_once_the_run_has_made_a_step(
    tmp_path: Path, status: int
) -> None:
    _begin(tmp_path)
    with pytest.raises(ValueError, match=f"status {status}.* before the run's first step"):
        _end(tmp_path, status)
    _metrics(tmp_path, 0)  # a validation before the first step
    with pytest.raises(ValueError, match="first step"):
        _end(tmp_path, status)
    _metrics(tmp_path, 1)
    assert f"(status {status}" in _end(tmp_path, status)
    with pytest.raises(ValueError, match="in 1 starts in a row"):
        _end(tmp_path, status, max_stalled=1)


def test_an_error_of_srun_itself_asks_for_another_life_even_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _begin(tmp_path)
    assert _end(tmp_path, 69) == "srun failed (status 69, see above)"
    with pytest.raises(ValueError, match="in 1 starts in a row"):
        _end(tmp_path, 69, max_stalled=1)
    failures.record(tmp_path, "rank 1 (n2): no such shard")
    with pytest.raises(ValueError, match="no such shard"):
        _end(tmp_path, 69)


def test_a_step_that_slurm_refuses_is_not_asked_for_again_and_is_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _checkpoint(tmp_path, 5)
    _begin(tmp_path)
    run = ("--config", "sclong_tiny", f"run.dir={tmp_path}")
    assert main(["end", "--status", "69", "--refused", "", *run]) == 0
    why = "srun: error: Invalid --distribution specification"
    assert main(["end", "--status", "69", "--refused", why, *run]) == 1
    (line,) = [said for said in capsys.readouterr().err.splitlines() if "refuses" in said]
    assert line.startswith(f"error: Slurm refuses the job's step ({why})")
    assert why in str(failures.read_failure(tmp_path, start="7.0"))


@pytest.mark.parametrize(
    ("most", "ranks_per_node", "nodes"), [(8, 8, 8), (7, 8, 4), (3, 8, 2), (1, 8, 1), (6, 3, None)]
)
def test_the_batch_says_how_many_nodes_can_share_it(
    most: int, ranks_per_node: int, nodes: int | None, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    # sclong_1b: 1024 cells in micro-batches of 4.
    arguments = ("--most", str(most), "--ranks-per-node", str(ranks_per_node))
    run = ("--config", "sclong_1b", f"run.dir={tmp_path}")
    assert main(["nodes", *arguments, *run]) == (0 if nodes else 1)
    said = capsys.readouterr()
    assert said.out == (f"{nodes}\n" if nodes else "")
    assert nodes or "engine.train_batch_size: got 1024, must be a multiple of" in said.err


def test_what_one_rank_says_outweighs_how_the_others_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _checkpoint(tmp_path, 5)
    _begin(tmp_path)
    failures.record(tmp_path, "rank 1 (n2): no such shard")
    for status in (1, 71, 137):
        with pytest.raises(ValueError, match=r"by itself .*: rank 1 \(n2\): no such shard"):
            _end(tmp_path, status)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the record is of an earlier start
    assert _end(tmp_path, 71).startswith("a device, network or disk failed a rank")
    assert _end(tmp_path, 137) == "a rank died (status 137)"


def test_a_start_says_that_the_record_is_not_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run_dir = tmp_path / "run"
    with RunFolder(run_dir) as folder:
        update_run_json(run_dir, run_id="a")
        folder.append_event("start", step=0)
        seal(run_dir)
    arguments = ["begin", "--config", "sclong_tiny", f"run.dir={run_dir}"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    (run_dir / RESTARTS_FILE).unlink()
    assert main(arguments) == 0
    assert f"{run_dir / RESTARTS_FILE}: missing" in capsys.readouterr().err
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [failures.FAILURE_FILE, PREFLIGHT_FILE])
def test_another_file_of_the_run_in_its_place_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write_sealed(tmp_path / name, {"run_id": "a", "status": "FINISHED"})
    assert failures.read_failure(tmp_path, start="7.0") is None
    assert read_verdict(tmp_path, start="7.0") is None
    assert str(tmp_path / name) in caplog.text


def test_a_hang_of_this_life_asks_for_another(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    hang = tmp_path / "heartbeat" / "hang.json"
    hang.parent.mkdir()
    hang.write_text("{}")
    os.utime(hang, (1000, 1000))
    _begin(tmp_path)
    with pytest.raises(ValueError, match="by itself"):
        _end(tmp_path, 1)
    hang.write_text("{}")
    os.utime(tmp_path / RESTARTS_FILE, (1000, 1000))
    assert _end(tmp_path, 1) == "a rank hung"


def test_a_saved_run_comes_back_even_before_its_first_step(tmp_path: Path) -> None:
    _begin(tmp_path)
    assert _end(tmp_path, 75) == "saved after a signal"
    with pytest.raises(ValueError, match="no new checkpoint"):
        _end(tmp_path, 75, max_stalled=1)


def test_time_to_save_follows_the_slowest_recent_checkpoint(tmp_path: Path) -> None:
    assert seconds_to_save(tmp_path) == 30
    seconds = [900.0] + [10.0] * 18 + [45.2, 12.0]
    rows = [
        {"time": 0.0, "event": "checkpoint", "step": i, "seconds": s} for i, s in enumerate(seconds)
    ]
    lines = [json.dumps(row) for row in [*rows, {"time": 0.0, "event": "finish", "step": 9}]]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    assert seconds_to_save(tmp_path) == 121


@pytest.mark.parametrize("text", ['[{"job": "7"}]', "{", "[" * 100_000, "5"])
def test_a_damaged_record_counts_starts_from_0(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / RESTARTS_FILE).write_text(text)
    _begin(tmp_path)
    assert "restarts.json: not a record of starts" in caplog.text
    assert len(read_starts(tmp_path)) == 1


def test_a_changed_start_is_not_one_and_those_of_earlier_versions_count(tmp_path: Path) -> None:
    _begin(tmp_path)
    path = tmp_path / RESTARTS_FILE
    whole = path.read_text()
    path.write_text(whole.replace('"step": 0', '"step": 8'))
    assert read_starts(tmp_path) == []
    rows = [{k: v for k, v in row.items() if k != "checksum"} for row in json.loads(whole)]
    path.write_text(json.dumps(rows))
    assert len(read_starts(tmp_path)) == 1


def test_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = ("--max-stalled", "1", "--config", "sclong_tiny", f"run.dir={tmp_path / 'run'}")
    assert main(["begin", *run]) == 0
    assert main(["seconds-to-save", *run]) == 0
    assert capsys.readouterr().out == "30\n"
    assert main(["begin", *run]) == 1
    assert main(["end", "--status", "2", *run]) == 1
    assert main(["end", "--status", "75", *run[:1], "2", *run[2:]]) == 0
    assert main(["bad-nodes", *run]) == 0
    assert capsys.readouterr().out == "\n"
    # The jobs of slurm/resubmit.sh are one training.
    monkeypatch.setenv("SCLONG_CHAIN", "chain")
    assert main(["begin", *run]) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert main(["begin", *run]) == 1
    assert main(["begin", "--config", "sclong_tiny"]) == 1
    assert main(["begin", "--config", "no_such_preset"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "run.dir is not set" in errors[-2]
    assert "no such preset or file" in errors[-1]


def test_bad_nodes_are_those_of_this_lifes_preflight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert bad_nodes(tmp_path) == []
    verdict = {"bad_nodes": ["n2", "n5"], "life": "7.0"}
    (tmp_path / "preflight.json").write_text(json.dumps(verdict))
    assert bad_nodes(tmp_path) == ["n2", "n5"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert bad_nodes(tmp_path) == []
