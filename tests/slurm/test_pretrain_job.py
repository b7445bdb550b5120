"""pretrain.sh checks two nodes, trains on them and continues after signals; embed.sh embeds."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import pytest

from sclong_ds.job.restarts import newest_step, read_starts
from sclong_ds.report.status import RunStatus, read_status
from sclong_ds.run_folder.files import read_events, read_run_json
from sclong_ds.run_folder.rows import read_every_row, read_metrics

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT_CELLS = ROOT / "data_prep" / "resources" / "demo" / "immune_c.csv.gz"
STEPS = 30
# sclong_tiny with short encoders: what is tested is the job, and a step is to take a second.
SMALL = (
    "model.top_seq_len=256",
    "model.large_encoder.depth=1",
    "engine.train_batch_size=2",
    "checkpoint.every_n_steps=3",
    "run.validate_every_n_steps=30",
    "run.validation_cells=4",
    f"run.max_steps={STEPS}",
    "tracking.enabled=false",
    "tracking.picture_cells=null",
)


def _submit(slurm: Any, run_dir: Path, corpus: Path, graph: Path, *settings: str) -> str:
    inputs = (f"data.corpus={corpus}", f"model.gene_graph={graph}", f"run.dir={run_dir}")
    arguments = ("--config", "sclong_tiny", *inputs, *SMALL, *settings)
    return slurm.sbatch("pretrain.sh", *arguments, options=("--nodes=2",))


def _figures(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm by step."""
    rows = read_metrics(run_dir)
    return {
        int(row["step"]): (row["train/loss"], row["train/grad_norm"])
        for row in rows
        if "train/loss" in row
    }


@pytest.fixture(scope="module")
def straight_run(
    slurm: Any, demo_corpus: Path, demo_graph: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Train on two nodes without interruption; returns the run folder and the job."""
    run_dir = tmp_path_factory.mktemp("pretrain_job") / "straight"
    return run_dir, slurm.wait(_submit(slurm, run_dir, demo_corpus, demo_graph), timeout_s=400)


def test_two_nodes_train_the_tiny_preset(straight_run: tuple[Path, Any]) -> None:
    run_dir, job = straight_run
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.log
    assert "n[1-2], 2 x 1 ranks" in job.log
    assert list(_figures(run_dir)) == list(range(1, STEPS + 1))
    assert [e["world_size"] for e in read_events(run_dir) if e["event"] == "start"] == [2]
    assert (run_dir / "checkpoints" / "latest").is_file()


def test_the_nodes_are_checked_before_the_training(straight_run: tuple[Path, Any]) -> None:
    run_dir, job = straight_run
    verdict = json.loads((run_dir / "preflight.json").read_text())
    assert (verdict["ok"], verdict["life"], verdict["problems"]) == (True, f"{job.id}.0", [])
    assert [rank["node"] for rank in verdict["ranks"]] == ["n1", "n2"]
    assert all(rank["write_bytes_per_s"] > 0 for rank in verdict["ranks"])
    assert {"data.corpus", "model.gene_graph"} <= set(verdict["ranks"][1]["compared"])
    assert verdict["all_reduce"]["bytes_per_s"] > 0
    assert job.log.index("preflight: 2 ranks are fit") < job.log.index("new run")
    assert not list(run_dir.glob(".preflight*"))


def _wait_for_steps(slurm: Any, job_id: str, run_dir: Path, count: int) -> None:
    """Wait until this start of a job has made some steps."""
    metrics = run_dir / "metrics.jsonl"
    before = len(read_every_row(run_dir)) if metrics.exists() else 0
    slurm.wait_until(
        job_id, lambda: metrics.exists() and len(read_every_row(run_dir)) >= before + count
    )


@pytest.fixture(scope="module")
def troubled_run(
    slurm: Any, demo_corpus: Path, demo_graph: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, RunStatus]:
    """Train on two nodes through all that a job may meet; returns run folder, job and a status.

    Starts: two nodes until the ranks of one are killed, two until a job that goes first takes the
    nodes, two until one has a power failure, one until a signal, two to the end.
    """
    run_dir = tmp_path_factory.mktemp("pretrain_job") / "troubled"
    job_id = _submit(slurm, run_dir, demo_corpus, demo_graph, "tracking.enabled=true")
    slurm.wait_until(job_id, lambda: newest_step(run_dir) > 0)
    _wait_for_steps(slurm, job_id, run_dir, 1)
    status = read_status(run_dir)
    slurm.kill_ranks("n2")
    slurm.wait_until_requeued(job_id)
    slurm.release(job_id)
    _wait_for_steps(slurm, job_id, run_dir, 2)
    slurm.preempt()
    slurm.wait_until_requeued(job_id)
    slurm.release(job_id)
    _wait_for_steps(slurm, job_id, run_dir, 2)
    slurm.lose_node("n2")
    slurm.command("scontrol", "update", f"JobId={job_id}", "NumNodes=1")
    slurm.wait_until_requeued(job_id)
    slurm.release(job_id)
    _wait_for_steps(slurm, job_id, run_dir, 2)
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    slurm.wait_until_requeued(job_id)
    slurm.return_node("n2")
    slurm.command("scontrol", "update", f"JobId={job_id}", "NumNodes=2")
    return run_dir, slurm.wait(job_id, timeout_s=400), status


def test_a_job_comes_back_after_every_trouble_on_fewer_and_more_nodes(
    straight_run: tuple[Path, Any], troubled_run: tuple[Path, Any, RunStatus]
) -> None:
    run_dir, job, _ = troubled_run
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 4), job.log
    assert all(f"start {start}:" in job.log for start in range(1, 6)), "one log for all starts"
    assert "a rank died (status 137)" in job.log
    assert job.log.count("saved after a signal") == 2
    assert [start.nodes for start in read_starts(run_dir)] == ["n[1-2]"] * 3 + ["n1", "n[1-2]"]
    resumes = [e for e in read_events(run_dir) if e["event"] == "resume"]
    assert [(e["saved_by"], e["world_size"]) for e in resumes] == [(2, 2)] * 2 + [(2, 1), (1, 2)]


def test_the_losses_over_all_lives_are_those_of_the_uninterrupted_run(
    straight_run: tuple[Path, Any], troubled_run: tuple[Path, Any, RunStatus]
) -> None:
    straight, run_dir = _figures(straight_run[0]), troubled_run[0]
    resumes = [e["step"] for e in read_events(run_dir) if e["event"] == "resume"]
    figures = _figures(run_dir)
    assert list(figures) == list(straight)
    # On as many ranks bit for bit, repeated steps too; on one rank sums have another order.
    alone = next(e["time"] for e in read_events(run_dir) if e.get("world_size") == 1)
    rows = [r for r in read_every_row(run_dir) if "train/loss" in r and r["time"] < alone]
    assert all((r["train/loss"], r["train/grad_norm"]) == straight[int(r["step"])] for r in rows)
    assert resumes[2] in {int(row["step"]) for row in rows}
    losses = [figures[step][0] for step in straight]
    assert losses == pytest.approx([loss for loss, _ in straight.values()], rel=1e-3)


def test_all_lives_are_one_mlflow_run(troubled_run: tuple[Path, Any, RunStatus]) -> None:
    run_dir = troubled_run[0]
    with contextlib.closing(sqlite3.connect(run_dir.parent / "mlflow.db")) as store:
        runs = store.execute("SELECT run_uuid, status FROM runs").fetchall()
        rows = store.execute("SELECT DISTINCT step FROM metrics WHERE key = 'train/loss'")
        steps = {step for (step,) in rows}
    assert runs == [(read_run_json(run_dir)["mlflow_run_id"], "FINISHED")]
    assert steps == set(range(1, STEPS + 1))


def test_status_shows_job_nodes_and_ranks_from_outside(
    troubled_run: tuple[Path, Any, RunStatus],
) -> None:
    run_dir, job, early = troubled_run
    assert (early.state, early.job, early.starts, early.nodes) == ("running", job.id, 1, "n[1-2]")
    assert [(rank.node, rank.state) for rank in early.ranks] == [("n1", "alive"), ("n2", "alive")]
    late = read_status(run_dir)
    assert (late.state, late.step, late.starts, late.restarts) == ("finished", STEPS, 5, 4)
    assert late.checkpoint is not None


def test_embed_job_writes_one_vector_per_cell(
    slurm: Any, straight_run: tuple[Path, Any], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "embedded.h5ad"
    subprocess.run(
        [sys.executable, "-m", "sclong_ds", "export", straight_run[0], "--out", model],
        check=True, cwd=ROOT,
    )  # fmt: skip
    job = slurm.wait(slurm.sbatch("embed.sh", model, HELD_OUT_CELLS, "--out", out))
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    embedded = anndata.read_h5ad(out)
    assert embedded.n_obs == 64
    assert any(len(vectors) == embedded.n_obs for vectors in embedded.obsm.values())
