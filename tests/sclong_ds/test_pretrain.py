"""Real training runs: ZeRO-3 ranks on the CPU, stopped, killed, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launching import ROOT, deepspeed_command, environment, run_module

from sclong_ds.run_folder import read_events, read_metrics

pytestmark = pytest.mark.distributed
STEPS = 120


def settings(run_dir, corpus, graph, **overrides):
    base = {
        "run.dir": run_dir, "data.corpus": corpus, "model.gene_graph": graph,
        "model.top_seq_len": 64, "run.max_steps": STEPS, "run.validate_every_n_steps": 60,
        "run.validation_cells": 20, "checkpoint.every_n_steps": 25, "checkpoint.keep_last": 5,
        "optim.decay_steps": STEPS, "tracking.enabled": "false",
    }  # fmt: skip
    return ["--config", "sclong_tiny", *(f"{k}={v}" for k, v in (base | overrides).items())]


def launch(ranks, args, **kwargs):
    return subprocess.Popen(
        deepspeed_command(ranks, *args), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **kwargs,
    )  # fmt: skip


def finish(process, expected=0):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == expected, output[-6000:]
    return output


def losses(run_dir):
    return {int(r["step"]): r["train/loss"] for r in read_metrics(run_dir) if "train/loss" in r}


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 300
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-6000:]
        if path.exists() and len(path.read_bytes().splitlines()) > step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


def weights(run_dir, tmp_path):
    from safetensors.numpy import load_file

    out = tmp_path / f"model_{run_dir.name}"
    run_module("sclong_ds", "export", run_dir, "--out", out)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_corpus, small_graph) -> Path:
    """An uninterrupted run on two ranks."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finish(launch(2, settings(run_dir, small_corpus, small_graph)))
    return run_dir


def test_run_learns_and_leaves_a_complete_folder(straight):
    found = losses(straight)
    assert sorted(found) == list(range(1, STEPS + 1))
    rows = read_metrics(straight)
    scores = [r for r in rows if "val/mse" in r]
    assert [r["step"] for r in scores] == [0, 60, 120]
    assert scores[0]["val/mse"] == pytest.approx(scores[0]["val/baseline_mse"], rel=1e-3)
    assert scores[-1]["val/mse"] < 0.9 * scores[-1]["val/baseline_mse"]
    first = np.mean([found[s] for s in range(1, 21)])
    last = np.mean([found[s] for s in range(STEPS - 19, STEPS + 1)])
    assert last < 0.9 * first
    assert rows[-1]["cells_seen"] == 4 * STEPS
    for name in (
        "config.yaml",
        "ds_config.json",
        "metrics.jsonl",
        "events.jsonl",
        "run.json",
        "plots/predicted_vs_true.png",
    ):
        assert (straight / name).is_file(), name
    resolved = json.loads((straight / "ds_config.json").read_text())
    assert "auto" not in json.dumps(resolved)
    assert sorted(p.name for p in (straight / "checkpoints").glob("step_*")) == [
        "step_00000025", "step_00000050", "step_00000075", "step_00000100", "step_00000120",
    ]  # fmt: skip


@pytest.mark.parametrize("who", ["everyone", "outer launcher"])
def test_stopped_and_resumed_equals_straight_through(
    straight, small_corpus, small_graph, tmp_path, who
):
    args = settings(tmp_path / "run", small_corpus, small_graph)
    process = launch(2, args)
    wait_for_step(tmp_path / "run", 10, process)
    if who == "everyone":
        os.killpg(process.pid, signal.SIGINT)
    else:
        # Kills only the outer `deepspeed` process; the ranks notice that it is gone.
        process.terminate()
    process.communicate(timeout=300)
    deadline = time.monotonic() + 60
    while (
        not (tmp_path / "run" / "checkpoints" / "latest").exists() and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    stopped = max(losses(tmp_path / "run"))
    assert 10 <= stopped < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:08d}").is_dir()
    finish(launch(2, args))
    events = [e["event"] for e in read_events(tmp_path / "run")]
    assert events.count("start") == 1
    assert events.count("resume") == 1
    assert losses(tmp_path / "run") == losses(straight)
    if who == "everyone":
        ours, theirs = weights(tmp_path / "run", tmp_path), weights(straight, tmp_path / "other")
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_signal_to_the_launcher_exits_75(small_corpus, small_graph, tmp_path):
    process = launch(2, settings(tmp_path / "run", small_corpus, small_graph))
    wait_for_step(tmp_path / "run", 5, process)
    inner = psutil.Process(process.pid).children()[0]
    for rank in inner.children():
        rank.send_signal(signal.SIGTERM)
    finish(process, expected=75)


def test_killed_and_resumed_equals_straight_through(straight, small_corpus, small_graph, tmp_path):
    args = settings(tmp_path / "run", small_corpus, small_graph)
    process = launch(2, args)
    wait_for_step(tmp_path / "run", 40, process)
    inner = psutil.Process(process.pid).children()[0]
    inner.children()[-1].kill()
    process.communicate(timeout=300)
    assert process.returncode != 0
    finish(launch(2, args))
    assert losses(tmp_path / "run") == losses(straight)


def test_one_rank_agrees_with_two(straight, small_corpus, small_graph, tmp_path):
    args = settings(tmp_path / "run", small_corpus, small_graph, **{"run.max_steps": 30})
    run_module("sclong_ds.pretrain", *args)
    one, two = losses(tmp_path / "run"), losses(straight)
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    for step in range(2, 31):
        assert one[step] == pytest.approx(two[step], rel=1e-3), step


def test_damaged_checkpoint_is_found_and_the_one_before_is_used(
    straight, small_corpus, small_graph, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    newest = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    victim = next(newest.glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    output = finish(launch(2, settings(run_dir, small_corpus, small_graph)))
    assert "is damaged" in output
    assert losses(run_dir) == losses(straight)
    resumed = [e for e in read_events(run_dir) if e["event"] == "resume"]
    assert [e["step"] for e in resumed] == [100]


def test_export_reloads_to_the_trained_model(straight, small_corpus, tmp_path):
    """The exported model scores what validation logged."""
    from sclong_ds import Corpus, load_model
    from sclong_ds.data import CellBatch
    from sclong_ds.objective import VALIDATION_EPOCH, MaskedMetrics, mask_batch

    run_module("sclong_ds", "export", straight / "checkpoints", "--out", tmp_path / "model")
    model, corpus = load_model(tmp_path / "model"), Corpus(small_corpus)
    rows = corpus.split("validation")[:20]
    batch = CellBatch(corpus.rows(rows), rows, np.full(20, VALIDATION_EPOCH))
    masked = mask_batch(batch, target_sum=1e4, mask_prob=0.15, replace_prob=0.9, seed=0)
    metrics = MaskedMetrics(corpus.gene_stats.mean_expressed, torch.device("cpu"))
    with torch.no_grad():
        metrics.add(model(masked.x, masked.hidden), masked.x, masked.targets)
    logged = [r for r in read_metrics(straight) if "val/mse" in r][-1]
    assert metrics.compute()["val/mse"] == pytest.approx(logged["val/mse"], rel=1e-5)
    assert (tmp_path / "model" / "README.md").read_text().startswith("# scLong")
    again = run_module("sclong_ds", "export", straight, "--out", tmp_path / "model", check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    "overrides",
    [
        {"engine.ds_config": "zero1"},
        {"engine.ds_config": "zero2", "engine.precision": "bf16"},
        {"engine.ds_config": "zero3_offload"},
        {
            "engine.precision": "bf16",
            "engine.activation_checkpointing": "true",
            "model.feature_redraw_interval": 3,
        },
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_other_stages_and_precisions_train(
    straight, small_corpus, small_graph, tmp_path, overrides
):
    args = settings(tmp_path / "run", small_corpus, small_graph, **{"run.max_steps": 6} | overrides)
    run_module("sclong_ds.pretrain", *args)
    got, expected = losses(tmp_path / "run"), losses(straight)
    tolerance = 0.05 if "engine.precision" in overrides else 1e-3
    assert got[1] == pytest.approx(expected[1], rel=tolerance)
    assert all(np.isfinite(v) for v in got.values())


def refused(*args):
    """Run and expect one clear line and exit status 1."""
    done = run_module("sclong_ds.pretrain", *args, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_resume_refuses_what_would_not_be_the_same_run(
    straight, small_corpus, small_graph, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    before = (run_dir / "config.yaml").read_bytes()
    changed = refused(*settings(run_dir, small_corpus, small_graph, **{"model.top_seq_len": 32}))
    assert "model.top_seq_len: 64 -> 32" in changed
    assert "saved by 2 ranks, this run has 1" in refused(
        *settings(run_dir, small_corpus, small_graph)
    )
    assert (run_dir / "config.yaml").read_bytes() == before


def test_wrong_inputs_are_named_and_nothing_is_left(
    small_corpus, small_graph, demo_graph, tmp_path
):
    run_dir = tmp_path / "run"
    cases = {
        "model.gene_graph is not set": settings(run_dir, small_corpus, "null"),
        "model.gene_graph=/none.npz: no such file": settings(run_dir, small_corpus, "/none.npz"),
        "no such folder": settings(run_dir, tmp_path / "none", small_graph),
        "made for another gene vocabulary": settings(run_dir, small_corpus, demo_graph),
        "must be a multiple": settings(
            run_dir, small_corpus, small_graph, **{"engine.train_micro_batch_size_per_gpu": 3}
        ),
        "shipped ones are": settings(
            run_dir, small_corpus, small_graph, **{"engine.ds_config": "zero9"}
        ),
        "did you mean 'max_steps'": settings(
            run_dir, small_corpus, small_graph, **{"run.max_step": 3}
        ),
    }
    for message, args in cases.items():
        assert message in refused(*args), message
    assert not run_dir.exists()


def test_two_runs_cannot_share_a_folder(tmp_path):
    from sclong_ds.signals import lock_run_folder

    held = lock_run_folder(tmp_path, wait_s=0)
    code = (
        "from pathlib import Path; from sclong_ds.signals import lock_run_folder; "
        f"lock_run_folder(Path({str(tmp_path)!r}), wait_s=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "another process is training there" in done.stderr
    held.close()
