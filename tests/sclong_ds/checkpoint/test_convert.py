"""A run continues with another number of ranks: the same losses, weights and optimizer state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment
from launching import train as train_ranks

from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_metrics

pytestmark = pytest.mark.distributed
STEPS, SAVED = 8, 4


def train(ranks: int, run_dir: Path, corpus: Path, graph: Path, **changes: object) -> str:
    """Train on some ranks, and return what they said."""
    settings = {
        "run.dir": run_dir, "data.corpus": corpus, "model.gene_graph": graph,
        "model.top_seq_len": 64, "run.max_steps": STEPS, "run.validate_every_n_steps": 0,
        "checkpoint.every_n_steps": 2, "checkpoint.keep_last": 9, "optim.decay_steps": 60,
        "optim.weight_decay": 0.5, "model.feature_redraw_interval": 3, "tracking.enabled": "false",
        "tracking.picture_cells": "null", "data.order": "lanes",
    } | changes  # fmt: skip
    args = ["--config", "sclong_tiny", *(f"{k}={v}" for k, v in settings.items())]
    log = run_dir.with_suffix(f".{len(list(run_dir.parent.glob('*.log')))}.log")
    train_ranks(["-m", "sclong_ds.pretrain", *args], n_ranks=ranks, log=log)
    return log.read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_corpus, small_graph) -> Path:
    """An uninterrupted run on two ranks."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(2, run_dir, small_corpus, small_graph)
    return run_dir


def stopped_at(straight: Path, step: int, run_dir: Path) -> Path:
    """Copy a run as it was after a step."""
    shutil.copytree(straight, run_dir)
    for path in (run_dir / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
    return run_dir


def rows(run_dir: Path, *names: str) -> dict[int, tuple[float, ...]]:
    """Return figures by step."""
    return {
        int(r["step"]): tuple(r[name] for name in names)
        for r in read_metrics(run_dir)
        if "train/loss" in r
    }


def assert_same_training(run_dir: Path, straight: Path, *, weights_atol: float) -> None:
    """The same cells under the same masks would not give another loss; other ones would."""
    exact = ("data/cells_crc32", "train/n_targets", "train/lr")
    assert rows(run_dir, *exact) == rows(straight, *exact)
    near = ("train/loss", "train/grad_norm")
    got, expected = rows(run_dir, *near), rows(straight, *near)
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    for step in got:
        # Measured: 4e-8. The order in which gradients are summed differs.
        assert got[step] == pytest.approx(expected[step], rel=1e-5), step
    from sclong_ds.checkpoint.load import full_weights
    from sclong_ds.checkpoint.on_disk import name_of

    ours, theirs = (full_weights(d / "checkpoints" / name_of(STEPS)) for d in (run_dir, straight))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=weights_atol), name


def optimizer_states(checkpoint: Path) -> list[dict]:
    """Return torch's own state of the optimizer of every rank."""
    files = sorted(checkpoint.glob("*optim_states.pt"))
    whole = [torch.load(f, weights_only=False)["optimizer_state_dict"] for f in files]
    return [part["optimizer_state_dict"] for part in whole]


def test_two_ranks_then_one_then_two(straight, small_corpus, small_graph, tmp_path):
    run_dir = stopped_at(straight, SAVED, tmp_path / "run")
    saved = run_dir / "checkpoints" / f"step_{SAVED:08d}"
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    train(1, run_dir, small_corpus, small_graph, **{"run.max_steps": SAVED + 2})
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    said = train(2, run_dir, small_corpus, small_graph)
    assert f"resuming after step {SAVED + 2}, converted from 1 rank" in said
    assert_same_training(run_dir, straight, weights_atol=1e-5)
    resumed = [e for e in read_events(run_dir) if e["event"] == "resume"]
    assert [(e["saved_by"], e["world_size"]) for e in resumed] == [(2, 1), (1, 2)]
    names = {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert names == {f"step_{s:08d}" for s in (2, 4, 6, 8)} | {"latest"}
    for step, ranks in ((SAVED + 2, 1), (STEPS, 2)):
        states = optimizer_states(run_dir / "checkpoints" / f"step_{step:08d}")
        assert len(states) == ranks
        for state in states:
            # Every group has a counter of its own, and kept its settings.
            assert [float(s["step"]) for s in state["state"].values()] == [step, step]
            groups = [(g["name"], g["weight_decay"]) for g in state["param_groups"]]
            assert groups == [("decay", 0.5), ("no_decay", 0.0)]


def test_two_ranks_then_four_then_two(straight, small_corpus, small_graph, tmp_path):
    run_dir = stopped_at(straight, SAVED, tmp_path / "run")
    # What a process that was killed while it converted or saved leaves behind.
    for left in (f"step_{SAVED:08d}.universal.partial", "step_00000005.partial"):
        (run_dir / "checkpoints" / left / "part").mkdir(parents=True)
    train(4, run_dir, small_corpus, small_graph, **{"run.max_steps": SAVED + 2})
    said = train(2, run_dir, small_corpus, small_graph)
    assert f"resuming after step {SAVED + 2}, converted from 4 ranks" in said
    assert_same_training(run_dir, straight, weights_atol=1e-5)
    assert not list((run_dir / "checkpoints").glob("*.partial"))


def test_a_signal_to_all_processes_waits_for_the_conversion(
    straight, small_corpus, small_graph, tmp_path
):
    run_dir, log = stopped_at(straight, SAVED, tmp_path / "run"), tmp_path / "log"
    settings = {"run.dir": run_dir, "data.corpus": small_corpus, "model.gene_graph": small_graph}
    command = [sys.executable, "-m", "sclong_ds.pretrain", "--config", run_dir / "config.yaml"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *(f"{k}={v}" for k, v in settings.items())], cwd=ROOT, env=environment(),
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    converted = run_dir / "checkpoints" / f"step_{SAVED:08d}.universal.partial"
    while process.poll() is None and not list(converted.glob("*/*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=300) == 75, log.read_text()
    assert f"resuming after step {SAVED}, converted from 2 ranks" in log.read_text()


def test_a_conversion_that_fails_is_said_once_and_harms_nothing(monkeypatch, straight, tmp_path):
    """Here the file of a rank is gone."""
    from sclong_ds.checkpoint import convert as elastic

    saved = stopped_at(straight, SAVED, tmp_path / "run") / "checkpoints" / f"step_{SAVED:08d}"
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    victim = next(saved.glob("*rank_1*optim_states.pt"))
    victim.rename(tmp_path / victim.name)
    monkeypatch.setattr(elastic.dist, "get_world_size", lambda: 1)
    for name, value in environment().items():
        monkeypatch.setitem(os.environ, name, value)
    folder = tmp_path / "converted"
    with pytest.raises(ValueError, match="start with the number of ranks that saved it"):
        elastic.convert(saved, folder, names=["norm.weight"])
    assert not folder.exists()
    (tmp_path / victim.name).rename(victim)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
