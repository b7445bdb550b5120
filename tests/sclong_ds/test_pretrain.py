"""Real training runs: ZeRO-3 ranks on the CPU, stopped, killed, resumed, refused."""

from __future__ import annotations

import dataclasses
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
from safetensors.numpy import load_file

from sclong_ds.config import load_config
from sclong_ds.model.performer import drawn_features
from sclong_ds.run_folder import read_events, read_metrics

pytestmark = pytest.mark.distributed
STEPS = 60


def settings(run_dir, corpus, graph, **overrides):
    base = {
        "run.dir": run_dir, "data.corpus": corpus, "model.gene_graph": graph,
        "model.top_seq_len": 64, "run.max_steps": STEPS, "run.validate_every_n_steps": 30,
        "run.validation_cells": 20, "checkpoint.every_n_steps": 12, "checkpoint.keep_last": 5,
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
    assert [r["step"] for r in scores] == [0, 30, 60]
    assert scores[0]["val/mse"] == pytest.approx(scores[0]["val/baseline_mse"], rel=1e-3)
    assert scores[-1]["val/mse"] < 0.92 * scores[-1]["val/baseline_mse"]
    first = np.mean([found[s] for s in range(1, 16)])
    last = np.mean([found[s] for s in range(STEPS - 14, STEPS + 1)])
    assert last < 0.97 * first
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
        "step_00000012",
        "step_00000024",
        "step_00000036",
        "step_00000048",
        "step_00000060",
    ]  # fmt: skip


@pytest.mark.parametrize("who", ["everyone", "launcher", "outer launcher"])
def test_stopped_and_resumed_equals_straight_through(
    straight, small_corpus, small_graph, tmp_path, who
):
    args = settings(tmp_path / "run", small_corpus, small_graph)
    process = launch(2, args)
    wait_for_step(tmp_path / "run", 10, process)
    if who == "everyone":
        os.killpg(process.pid, signal.SIGINT)
    elif who == "launcher":
        psutil.Process(process.pid).children()[0].terminate()
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


def test_ranks_that_were_asked_to_stop_exit_75(small_corpus, small_graph, tmp_path):
    process = launch(2, settings(tmp_path / "run", small_corpus, small_graph))
    wait_for_step(tmp_path / "run", 5, process)
    inner = psutil.Process(process.pid).children()[0]
    for rank in inner.children():
        rank.send_signal(signal.SIGTERM)
    finish(process, expected=75)


def test_killed_and_resumed_equals_straight_through(straight, small_corpus, small_graph, tmp_path):
    args = settings(tmp_path / "run", small_corpus, small_graph)
    process = launch(2, args)
    wait_for_step(tmp_path / "run", 20, process)
    inner = psutil.Process(process.pid).children()[0]
    inner.children()[-1].kill()
    process.communicate(timeout=300)
    assert process.returncode != 0
    finish(launch(2, args))
    assert losses(tmp_path / "run") == losses(straight)


def test_one_rank_agrees_with_two(straight, small_corpus, small_graph, tmp_path):
    args = settings(tmp_path / "run", small_corpus, small_graph, **{"run.max_steps": 15})
    run_module("sclong_ds.pretrain", *args)
    one, two = losses(tmp_path / "run"), losses(straight)
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    for step in range(2, 16):
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
    assert [e["step"] for e in resumed] == [48]


def test_export_reloads_to_the_trained_model(straight, small_corpus, tmp_path):
    """The exported model scores what validation logged."""
    from sclong_ds import Corpus, load_model
    from sclong_ds.data import CellBatch
    from sclong_ds.masking import VALIDATION_EPOCH
    from sclong_ds.metrics import MaskedMetrics
    from sclong_ds.objective import masked_batch
    from sclong_ds.preparation import prepare

    run_module("sclong_ds", "export", straight / "checkpoints", "--out", tmp_path / "model")
    model, corpus = load_model(tmp_path / "model"), Corpus(small_corpus)
    rows = corpus.split("validation")[:20]
    cells, device = corpus.packed_rows(rows), torch.device("cpu")
    batch = CellBatch(cells, rows, np.full(20, VALIDATION_EPOCH), np.zeros(20, dtype=int))
    prepared = prepare(batch, config=load_config("sclong_tiny"), n_genes=corpus.n_genes)
    masked = masked_batch(
        cells, prepared.targets, n_genes=corpus.n_genes, target_sum=1e4, device=device
    )
    metrics = MaskedMetrics(corpus.gene_stats.mean_expressed, device)
    with torch.no_grad():
        predicted = model(masked.x, masked.hidden).gather(1, masked.positions)
    metrics.add(
        predicted, masked.true, masked.valid, masked.positions, torch.zeros_like(masked.valid)
    )
    logged = [r for r in read_metrics(straight) if "val/mse" in r][-1]
    assert metrics.compute()["val/mse"] == pytest.approx(logged["val/mse"], rel=1e-5)
    assert (tmp_path / "model" / "README.md").read_text().startswith("# scLong")
    again = run_module("sclong_ds", "export", straight, "--out", tmp_path / "model", check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr


@pytest.mark.parametrize("stage", ["zero2", "zero3_offload"])
def test_other_stages_train(straight, small_corpus, small_graph, tmp_path, stage):
    changes = {"run.max_steps": 6, "engine.ds_config": stage}
    run_module(
        "sclong_ds.pretrain", *settings(tmp_path / "run", small_corpus, small_graph, **changes)
    )
    got, expected = losses(tmp_path / "run"), losses(straight)
    assert [got[s] for s in range(1, 7)] == pytest.approx(
        [expected[s] for s in range(1, 7)], rel=1e-3
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"engine.ds_config": "zero1"},
        {"engine.activation_checkpointing": "true", "model.feature_redraw_interval": 3},
    ],
    ids=["zero1", "zero3, recomputed, redrawn"],
)
def test_bf16_stopped_and_resumed_equals_straight_through(
    straight, small_corpus, small_graph, tmp_path, overrides
):
    changes = {"engine.precision": "bf16", **overrides}

    def train(name, steps):
        args = settings(
            tmp_path / name, small_corpus, small_graph, **{"run.max_steps": steps} | changes
        )
        finish(launch(2, args))
        return losses(tmp_path / name)

    whole = train("whole", 8)
    train("parts", 5)
    assert train("parts", 8) == whole
    expected = losses(straight)
    assert [whole[s] for s in range(1, 9)] == pytest.approx(
        [expected[s] for s in range(1, 9)], rel=0.1
    )


def test_first_loss_is_the_variance_of_the_targets(small_corpus, small_graph, tmp_path):
    """Without a bias per gene the model starts at the overall mean."""
    changes = {"model.gene_bias": "false", "run.max_steps": 1, "run.validation_cells": 126}
    run_module(
        "sclong_ds.pretrain", *settings(tmp_path / "run", small_corpus, small_graph, **changes)
    )
    first = next(r for r in read_metrics(tmp_path / "run") if "val/mse" in r)
    assert first["val/mse"] == pytest.approx(first["val/target_variance"], rel=0.1)


def test_dry_run_checks_and_leaves_nothing(small_corpus, small_graph, tmp_path):
    args = settings(tmp_path / "run", small_corpus, small_graph)
    done = run_module("sclong_ds.pretrain", "--dry-run", *args)
    assert "everything fits together" in done.stderr
    assert not (tmp_path / "run").exists()


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
    other = settings(run_dir, small_corpus, small_graph, **{"engine.ds_config": "zero2"})
    assert "was saved with ZeRO stage 3 in fp32" in refused(*other)
    assert (run_dir / "config.yaml").read_bytes() == before


def test_many_ranks_say_an_error_once(small_corpus, tmp_path):
    args = settings(tmp_path / "run", small_corpus, "/none.npz")
    output = finish(launch(2, args), expected=1)
    assert output.count("error: ") == 1
    assert "model.gene_graph=/none.npz: no such file" in output


def test_released_choices_train(small_corpus, small_graph, tmp_path):
    """The choices of sclong_reference at a small size: features are redrawn, the mask is cut."""
    tiny, released = (load_config(name).model for name in ("sclong_tiny", "sclong_reference"))
    sizes = {"base_dim", "large_dim", "top_seq_len", "expression_hidden", "gene_graph"}
    choices = {
        f"model.{field.name}": getattr(released, field.name)
        for field in dataclasses.fields(tiny)
        if getattr(released, field.name) != getattr(tiny, field.name)
        and field.name not in sizes | {"large_encoder", "mini_encoder", "decoder"}
    }
    assert {"model.mask_vector_max_norm", "model.pad_token", "model.head_init"} <= set(choices)
    schedule = {
        "optim.name": "adam", "optim.weight_decay": 0.0, "optim.schedule": "warm_restarts",
        "optim.warmup_steps": 2, "optim.decay_steps": 4, "objective.target_rounding": "float32",
    }  # fmt: skip
    run_dir = tmp_path / "run"
    steps = {"run.max_steps": 6, "run.validate_every_n_steps": 0, "optim.lr": "1.0e-1"}
    args = settings(run_dir, small_corpus, small_graph, **(choices | schedule | steps))
    finish(launch(2, args))
    assert sorted(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    rates = [r["train/lr"] for r in read_metrics(run_dir) if "train/lr" in r]
    assert rates == pytest.approx([0.01, 0.055, 0.1, 0.055, 0.01, 0.055])
    exported = weights(run_dir, tmp_path)
    norm = np.linalg.norm(exported["expression_encoder.mask_vector"])
    # Steps of 0.1 move a vector of 32 by up to 0.57.
    assert 0.9 < norm <= 1 + 1e-6
    assert exported["gene_encoder.table"].shape[0] == 301
    assert released.feature_redraw_interval == 5
    features = load_file(tmp_path / "model_run" / "random_features.safetensors")
    model = load_config(run_dir / "config.yaml").model
    assert torch.equal(
        torch.from_numpy(features["decoder.0"]), drawn_features(model, 1)["decoder.0"]
    )


def test_missing_inputs_are_named(small_corpus, small_graph, tmp_path, capsys):
    """Found before any process group is joined."""
    from sclong_ds.pretrain import main

    run_dir = tmp_path / "run"
    cases = {
        "model.gene_graph is not set": settings(run_dir, small_corpus, "null"),
        "model.gene_graph=/none.npz: no such file": settings(run_dir, small_corpus, "/none.npz"),
        "no such folder": settings(run_dir, tmp_path / "none", small_graph),
        "did you mean 'max_steps'": settings(
            run_dir, small_corpus, small_graph, **{"run.max_step": 3}
        ),
    }
    for message, args in cases.items():
        assert main(args) == 1
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert message in said
    assert not run_dir.exists()


def test_inputs_that_do_not_fit_are_named(small_corpus, small_graph, demo_graph, tmp_path):
    run_dir = tmp_path / "run"
    micro = {"engine.train_micro_batch_size_per_gpu": 3}
    cases = {
        "made for another gene vocabulary": settings(run_dir, small_corpus, demo_graph),
        "must be a multiple": settings(run_dir, small_corpus, small_graph, **micro),
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
