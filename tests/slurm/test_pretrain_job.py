"""pretrain.sh checks two nodes, trains on them and continues after signals; embed.sh embeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import pytest

from sclong_ds.run_folder import read_events, read_metrics

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT_CELLS = ROOT / "data_prep" / "resources" / "demo" / "immune_c.csv.gz"
STEPS = 12
# sclong_tiny with short encoders: what is tested is the job, and a step is to take a second.
SMALL = (
    "model.top_seq_len=256",
    "model.large_encoder.depth=1",
    "engine.train_batch_size=2",
    "checkpoint.every_n_steps=8",
    "run.validate_every_n_steps=12",
    "run.validation_cells=4",
    f"run.max_steps={STEPS}",
    "tracking.enabled=false",
)


def _submit(slurm: Any, run_dir: Path, corpus: Path, graph: Path) -> str:
    settings = (f"data.corpus={corpus}", f"model.gene_graph={graph}", f"run.dir={run_dir}", *SMALL)
    return slurm.sbatch("pretrain.sh", "--config", "sclong_tiny", *settings, options=("--nodes=2",))


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


def _signal_at(slurm: Any, job_id: str, run_dir: Path, step: int) -> None:
    """Ask a job to stop once a step is done, and wait until it is queued again."""
    metrics = run_dir / "metrics.jsonl"
    slurm.wait_until(job_id, lambda: metrics.exists() and step in _figures(run_dir))
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    slurm.wait_until_requeued(job_id)


def test_signals_requeue_the_job_which_continues_exactly_and_then_on_one_node(
    slurm: Any, straight_run: tuple[Path, Any], demo_corpus: Path, demo_graph: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "preempted"
    job_id = _submit(slurm, run_dir, demo_corpus, demo_graph)
    _signal_at(slurm, job_id, run_dir, 2)
    slurm.release(job_id)
    _signal_at(slurm, job_id, run_dir, 6)
    slurm.command("scontrol", "update", f"JobId={job_id}", "NumNodes=1")
    job = slurm.wait(job_id, timeout_s=400)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 2), job.log
    assert job.log.count(f"job {job_id} is queued again") == 2
    events = read_events(run_dir)
    stops = [e["step"] for e in events if e["event"] == "finish" and e["step"] < STEPS]
    resumes = [e for e in events if e["event"] == "resume"]
    assert [e["step"] for e in resumes] == stops
    assert [(e["saved_by"], e["world_size"]) for e in resumes] == [(2, 2), (2, 1)]
    straight, figures = _figures(straight_run[0]), _figures(run_dir)
    on_two = [step for step in straight if step <= stops[1]]
    assert [figures[step] for step in on_two] == [straight[step] for step in on_two]
    assert list(figures) == list(straight)
    losses = [figures[step][0] for step in straight]
    assert losses == pytest.approx([loss for loss, _ in straight.values()], rel=1e-3)


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
