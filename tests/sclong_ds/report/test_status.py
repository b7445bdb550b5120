"""`status`: what a run is doing, by its files alone.

Covers also `sclong_ds/run_folder/heartbeats.py`.
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from sclong_ds.__main__ import main
from sclong_ds.job import failures
from sclong_ds.job.restarts import begin
from sclong_ds.report.status import describe, read_status
from sclong_ds.run_folder.files import RunFolder, update_run_json
from sclong_ds.run_folder.heartbeats import ENDED, HANG_FILE, SLOW_FILE, Heartbeat

NOW = 1_700_000_000.0


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was cut off at step 12, resumed at step 10, and is at step 30 of 90 now."""
    folder, clock = tmp_path / "trial", [NOW - 10_000.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    for first, last, name in ((1, 12, "start"), (11, 30, "resume")):
        with RunFolder(folder) as files:
            files.append_event(name, step=first - 1, world_size=4)
            for step in range(first, last + 1):
                clock[0] += 2.0
                loss = float("nan") if step == 25 else 30.0 / step
                skipped = int(step >= 25)
                row = {"train/loss": loss, "cells_seen": 8 * step, "train/skipped_steps": skipped}
                row["train/spike"] = int(step in (12, 30))
                files.append_metrics(step, row)
                if step % 10 == 0:
                    files.append_metrics(step, {"val/mse": 12.0 / step, "val/pearson": 0.5})
                    files.append_event("checkpoint", step=step, path=f"step_{step:08d}")
        clock[0] = NOW - 45.0
    clock[0] = NOW
    for step in (10, 20):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text("run:\n  max_steps: 90\n")
    update_run_json(folder, run_id="abc", status="RUNNING", restarts=1)
    (folder / "heartbeat").mkdir()
    return folder


def add_rank(run_dir: Path, rank: int, *, age_s: float = 5.0, **changes: object) -> None:
    fields = {
        "rank": rank, "node": f"n{rank // 2}", "pid": 1, "step": 31, "phase": "forward",
        "phase_s": 2.0, "beats": 9, "reading": None, "written": 4, "interval_s": 10.0,
    }  # fmt: skip
    path = run_dir / "heartbeat" / f"rank_{rank:05d}.json"
    path.write_text(json.dumps(asdict(Heartbeat(**(fields | changes)))))
    os.utime(path, (NOW - age_s, NOW - age_s))


def test_figures_are_those_of_the_present_life(run_dir: Path):
    status = read_status(run_dir)
    assert (status.state, status.step, status.max_steps) == ("running", 30, 90)
    assert status.loss == pytest.approx(sum(30 / s for s in range(21, 31) if s != 25) / 9)
    assert status.step_time_s == pytest.approx(2.0)
    assert status.cells_per_s == pytest.approx(4.0)
    assert status.eta_s == pytest.approx(120.0)
    assert (status.restarts, status.skipped_steps, status.spikes) == (1, 1, 2)
    assert "trouble      1 restart, 1 skipped step, 2 loss spikes" in describe(status)
    assert (status.validation_step, status.validation) == (30, {"mse": 0.4, "pearson": 0.5})


def test_a_resumed_run_without_a_step_yet_is_where_it_resumed(run_dir: Path):
    with RunFolder(run_dir) as files:
        files.append_event("resume", step=20, world_size=4)
    status = read_status(run_dir)
    assert (status.step, status.loss, status.cells_per_s, status.eta_s) == (20, None, None, None)
    assert (status.validation_step, status.spikes) == (20, 1)
    assert "step 20 of 90" in describe(status)


def test_the_newest_checkpoint_that_is_still_there_counts(run_dir: Path):
    status = read_status(run_dir)
    assert status.checkpoint == "step_00000020"
    assert "step_00000020, 25 s ago" in describe(status)
    (run_dir / "checkpoints" / "step_00000010").rmdir()
    (run_dir / "checkpoints" / "step_00000020").rmdir()
    assert read_status(run_dir).checkpoint is None
    assert "none yet" in describe(read_status(run_dir))


def test_silent_and_ended_ranks_are_named_on_their_node(run_dir: Path):
    for rank in (0, 1, 3):
        add_rank(run_dir, rank)
    add_rank(run_dir, 2, age_s=300, step=30, phase="data")
    states = [rank.state for rank in read_status(run_dir).ranks]
    assert states == ["alive", "alive", "silent", "alive"]
    text = describe(read_status(run_dir))
    assert "3 of 4 alive, on 2 nodes" in text
    assert "n1: 1 of 2 ranks alive" in text
    assert "silent for 5 min: 2 ('data' of step 30)" in text
    assert text.index("n1:") < text.index("n0:")
    add_rank(run_dir, 2, age_s=300, phase=ENDED)
    assert "ended for 5 min: 2" in describe(read_status(run_dir))


def test_what_the_first_batch_waits_for_is_shown(run_dir: Path):
    for rank in range(4):
        add_rank(run_dir, rank, step=41, phase="data", phase_s=70.0, reading="s3://b/cells/c/7")
    text = describe(read_status(run_dir))
    assert "rank 0 in 'data' of step 41, reading s3://b/cells/c/7, for 7" in text


def test_a_run_whose_ranks_are_all_silent_is_lost(run_dir: Path):
    for rank in range(4):
        add_rank(run_dir, rank, age_s=300)
    status = read_status(run_dir)
    assert (status.state, status.eta_s) == ("lost", None)
    update_run_json(run_dir, status="KILLED")
    assert read_status(run_dir).state == "interrupted"


def test_the_watchdogs_words_are_shown(run_dir: Path):
    (run_dir / "heartbeat" / HANG_FILE).touch()  # a rank is about to report
    (run_dir / "heartbeat" / SLOW_FILE).write_text(json.dumps({"text": "rank 3 is behind"}))
    status = read_status(run_dir)
    assert (status.state, status.warning) == ("running", "rank 3 is behind")
    (run_dir / "heartbeat" / HANG_FILE).write_text(json.dumps({"error": "rank 3 hangs"}))
    assert read_status(run_dir).state == "hung"
    assert "rank 3 hangs" in describe(read_status(run_dir))


def test_many_nodes_are_cut_short(run_dir: Path):
    for rank in range(50):
        add_rank(run_dir, rank)
    text = describe(read_status(run_dir))
    assert text.count("2 of 2 ranks alive") == 16
    assert "and 9 more nodes" in text


def test_a_finished_run(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    update_run_json(run_dir, status="FINISHED")
    for rank in range(4):
        add_rank(run_dir, rank, phase=ENDED, age_s=9000)
    assert main(["status", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "finished, step 30 of 90 (33.3%)" in text
    assert "4 of 4 ended, on 2 nodes" in text
    assert " left" not in text


def test_json_is_one_document_with_the_same_figures(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    add_rank(run_dir, 0)
    assert main(["status", str(run_dir), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(json.dumps(asdict(read_status(run_dir))))
    assert document["ranks"][0]["state"] == "alive"


def test_a_run_that_has_only_begun(tmp_path: Path):
    update_run_json(tmp_path, status="RUNNING")
    status = read_status(tmp_path)
    assert (status.step, status.max_steps, status.ranks) == (0, None, ())
    assert "no heartbeat" in describe(status)


def test_a_folder_that_is_no_run_is_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["status", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: {tmp_path}: no run.json in it, so this is no run; give the folder that training "
        "writes to (run.dir)\n"
    )


def test_time_is_not_needed_to_be_the_same_on_all_nodes(run_dir: Path):
    add_rank(run_dir, 0, age_s=-30)
    assert read_status(run_dir).ranks[0].age_s == 0.0
    assert time.time() == NOW


def test_a_slurm_job_is_shown_with_what_ended_its_last_life(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    assert read_status(run_dir).job is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for start in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        begin(run_dir, job="7", nodes="n[1-2]", max_stalled=3)
    failures.record(run_dir, "rank 1 (n2): no such shard")
    status = read_status(run_dir)
    assert (status.job, status.starts, status.nodes, status.error) == ("7", 2, "n[1-2]", None)
    assert "7, start 2, on n[1-2]" in describe(status)
    update_run_json(run_dir, status="FAILED")
    assert read_status(run_dir).error == "rank 1 (n2): no such shard"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    begin(run_dir, job="7", nodes="n1", max_stalled=3)
    assert read_status(run_dir).error is None


def test_a_training_that_has_not_begun_says_what_preflight_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    begin(tmp_path, job="7", nodes="n[1-2]", max_stalled=3)
    with pytest.raises(FileNotFoundError, match=r"job 7 \(n\[1-2\]\) has not begun: see the log"):
        read_status(tmp_path)
    verdict = {"life": "7.0", "bad_nodes": ["n2"]}
    verdict["problems"] = [{"nodes": ["n2"], "text": "no corpus"}]
    (tmp_path / "preflight.json").write_text(json.dumps(verdict))
    with pytest.raises(FileNotFoundError, match="has not begun: preflight: n2: no corpus"):
        read_status(tmp_path)


def test_a_short_run_names_the_steps_that_its_loss_is_of(tmp_path: Path):
    with RunFolder(tmp_path) as files:
        files.append_metrics(1, {"train/loss": 3.0, "cells_seen": 4})
    update_run_json(tmp_path, run_id="abc", status="RUNNING")
    assert "3.0000, mean of the last 1 step\n" in describe(read_status(tmp_path))
    with RunFolder(tmp_path) as files:
        files.append_metrics(2, {"train/loss": 1.0, "cells_seen": 8})
        files.append_metrics(2, {"val/mse": 0.5, "val/n_cells": 1.0, "val/mae": 0.25})
    status = read_status(tmp_path)
    assert "2.0000, mean of the last 2 steps\n" in describe(status)
    assert "of 1 held-out cell 0.5000; mae 0.25\n" in describe(status)
    assert status.validation == {"mse": 0.5, "n_cells": 1.0, "mae": 0.25}
