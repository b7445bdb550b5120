"""A sweep as a job array: a run for each task; one that is preempted leaves the others alone."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from sclong_ds.report.compare import as_json
from sclong_ds.report.report import write_report
from sclong_ds.run_folder.files import read_events, read_run_json
from sclong_ds.run_folder.rows import read_every_row, read_metrics
from sclong_ds.tracking.client import find_runs

pytestmark = pytest.mark.slurm

STEPS, TASKS = 12, (1, 2, 3, 4)
SMALL = (
    "model.top_seq_len=64", "model.large_encoder.depth=1", "engine.train_batch_size=2",
    "run.validation_cells=4", f"run.max_steps={STEPS}", "run.validate_every_n_steps=0",
    "tracking.picture_cells=null",
)  # fmt: skip


def test_a_sweep_with_a_preempted_task(
    slurm: Any, small_corpus: Path, small_graph: Path, tmp_path: Path
) -> None:
    file, folder = tmp_path / "rates.txt", tmp_path / "rates"
    # The second task is the slow one: it loses its node when it has made some steps.
    file.write_text(
        "# rates\nrun.seed=1\n\nrun.seed=2 engine.train_batch_size=16\nrun.seed=3\nrun.seed=4\n"
    )
    inputs = (f"run.dir={folder}", f"data.corpus={small_corpus}", f"model.gene_graph={small_graph}")
    array = slurm.sbatch(
        "pretrain.sh", "--sweep", file, "--config", "sclong_tiny", *inputs, *SMALL,
        options=("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--array=1-4"),
        env={"SCLONG_PREFLIGHT": "0", "SCLONG_RANKS_PER_NODE": "1"},
    )  # fmt: skip
    runs = [folder / f"task_00{task}" for task in TASKS]
    second, metrics = f"{array}_2", runs[1] / "metrics.jsonl"
    slurm.wait_until(
        second, lambda: metrics.exists() and len(read_every_row(runs[1])) > 1, timeout_s=600
    )
    slurm.preempt(slurm.fields(second)["NodeList"])
    jobs = [slurm.wait(f"{array}_{task}", timeout_s=900) for task in TASKS]
    found = [(job.state, job.exit_code, job.restarts) for job in jobs]
    assert found == [("COMPLETED", 0, int(task == 2)) for task in TASKS], jobs[1].log
    for run in runs:
        steps = [int(row["step"]) for row in read_metrics(run) if "train/loss" in row]
        assert steps == list(range(1, STEPS + 1))
    opened = [
        [e["event"] for e in read_events(run) if e["event"] in ("start", "resume")] for run in runs
    ]
    assert opened == [["start"], ["start", "resume"], ["start"], ["start"]]
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        names = dict(store.execute("SELECT run_uuid, name FROM runs WHERE status = 'FINISHED'"))
        query = "SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'"
        children = dict(store.execute(query))
    assert len(names) == 5
    assert set(children) == {read_run_json(run)["mlflow_run_id"] for run in runs}
    (parent,) = set(children.values())
    assert names[parent] == "rates"
    records = find_runs([str(folder)])
    compared = as_json(records)
    assert [run["figures"]["restarts"] for run in compared["runs"]] == [0, 1, 0, 0]
    assert [run["figures"]["step"] for run in compared["runs"]] == [STEPS] * 4
    seeds = {"task_001": "1", "task_002": "2", "task_003": "3", "task_004": "4"}
    assert compared["differences"]["run.seed"] == seeds
    write_report(records, tmp_path / "rates.html")
    page = (tmp_path / "rates.html").read_text()
    assert "4 runs compared" in page
    assert all(f"<th>{name}</th>" in page for name in seeds)


def test_a_wrong_line_or_a_short_file_starts_no_task(slurm: Any, tmp_path: Path) -> None:
    file, folder = tmp_path / "rates.txt", tmp_path / "rates"
    file.write_text("run.seed=1\nrun.sed=2\n")
    arguments = ("--sweep", file, "--config", "sclong_tiny", f"run.dir={folder}")
    array = slurm.sbatch("pretrain.sh", *arguments, options=("--array=1-3",))
    jobs = [slurm.wait(f"{array}_{task}") for task in (1, 2, 3)]
    assert [(job.state, job.exit_code, job.restarts) for job in jobs] == [("FAILED", 2, 0)] * 3
    for job in jobs:
        assert f"error: {file}, line 2: override 'run.sed=2'" in job.log
        assert "2 lines of settings, but the array goes to 3" in job.log
    assert not folder.exists()
    job = slurm.wait(slurm.sbatch("pretrain.sh", *arguments))
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert "--sweep FILE needs a job array" in job.log
