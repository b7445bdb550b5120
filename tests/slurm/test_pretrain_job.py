"""pretrain.sh trains on two nodes and continues exactly after a signal; embed.sh uses the model."""

from __future__ import annotations

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


def test_a_signal_saves_requeues_and_continues_exactly(
    slurm: Any, straight_run: tuple[Path, Any], demo_corpus: Path, demo_graph: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "preempted"
    job_id = _submit(slurm, run_dir, demo_corpus, demo_graph)
    metrics = run_dir / "metrics.jsonl"
    slurm.wait_until(job_id, lambda: metrics.exists() and 2 in _figures(run_dir), timeout_s=300)
    slurm.command("scancel", "--batch", "--signal=USR1", job_id)
    job = slurm.wait(job_id, timeout_s=400)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    assert f"job {job_id} is queued again" in job.log
    events = read_events(run_dir)
    stopped = next(e["step"] for e in events if e["event"] == "finish" and e["step"] < STEPS)
    assert 2 <= stopped
    assert [e["step"] for e in events if e["event"] == "resume"] == [stopped]
    assert _figures(run_dir) == _figures(straight_run[0])


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
