"""Real training runs: ZeRO-3 ranks on the CPU, stopped, resumed, refused.

What a run survives beyond that is in `test_survival.py`.

Covers also `sclong_ds/engine/gradient_norms.py`, `sclong_ds/training/build.py`,
`sclong_ds/training/resume.py`, `sclong_ds/training/run.py`, `sclong_ds/training/timing.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launching import (
    run_module,
)
from pretraining import (
    STEPS,
    cells,
    launch,
    log_of,
    losses,
    refused,
    run_ranks,
    settings,
    wait_for_step,
    weights,
)
from safetensors.numpy import load_file
from small_runs import last_step, openings
from trained_outputs import OUTPUTS, assert_export_is_the_trained_model

from sclong_ds.config.load import load_config
from sclong_ds.model.random_features import drawn_features
from sclong_ds.planning.devices import multiplies_bf16
from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.metric_names import BASELINES as NAMES
from sclong_ds.run_folder.rows import read_metrics

pytestmark = pytest.mark.distributed


def check_gradient_norms(run_dir):
    """The norms of the parts add up to DeepSpeed's own norm of the whole gradient."""
    steps = [r for r in read_metrics(run_dir) if "train/grad_norm" in r]
    parts = {"gene_encoder", "expression_encoder", "large", "mini", "decoder", "head"}
    if load_config(run_dir / "config.yaml").model.cell_vector != "none":
        parts |= {"cell_vector"}
    for row in steps:
        of_part = {k.split("/")[-1]: v for k, v in row.items() if k.startswith("train/grad_norm/")}
        assert of_part.keys() == parts
        whole = math.sqrt(sum(v**2 for v in of_part.values()))
        assert whole == pytest.approx(row["train/grad_norm"], rel=1e-4)
    # The head's last layer starts at zero: at first nothing else gets a gradient.
    assert steps[0]["train/grad_norm/large"] < steps[0]["train/grad_norm/head"]
    assert all(v > 0 for k, v in steps[-1].items() if k.startswith("train/grad_norm/"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, small_corpus, small_graph) -> Path:
    """An uninterrupted run on two ranks."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    changes = {"tracking.picture_cells": 21, "tracking.system_metrics_every_s": 1.0}
    run_ranks(2, settings(run_dir, small_corpus, small_graph, **changes), run_dir)
    return run_dir


def test_run_learns(straight):
    found = losses(straight)
    assert sorted(found) == list(range(1, STEPS + 1))
    rows = read_metrics(straight)
    scores = [r for r in rows if "val/mse" in r]
    assert [r["step"] for r in scores] == [0, 30, 60]
    # It begins at principal directions of the training cells.
    assert scores[0]["val/mse"] < 0.7 * scores[0]["val/baseline_mse"]
    assert scores[-1]["val/mse"] < scores[0]["val/mse"]
    assert scores[-1]["val/mse"] < 0.92 * scores[-1]["val/baseline_mse"]
    for row in scores:
        baselines = [row[f"val/{name}/mse"] for name in NAMES]
        assert row["val/strongest_mse"] == min(baselines)
        assert row["val/relative_mse"] == row["val/mse"] / min(baselines)
        # Two ways to the same sums: histograms over ranks, and the table on rank 0.
        assert row["val/gene_mean/mse"] == pytest.approx(row["val/baseline_mse"], rel=1e-5)
        assert row["val/n_hidden"] == row["val/n_values"]
    # The baselines see no weights: they are what they were.
    assert [r["val/linear/mse"] for r in scores] == [scores[0]["val/linear/mse"]] * 3
    assert scores[-1]["val/shown_mse"] != scores[-1]["val/mse"]
    assert "the strongest baseline (" in log_of(straight)
    first = np.mean([found[s] for s in range(1, 16)])
    last = np.mean([found[s] for s in range(STEPS - 14, STEPS + 1)])
    assert last < 0.97 * first
    assert rows[-1]["cells_seen"] == 4 * STEPS
    steps = [r for r in rows if "train/loss" in r]
    parts = ("data_wait", "forward", "backward", "optimizer", "checkpoint")
    assert all(r[f"perf/{part}_s"] >= 0 for r in steps for part in parts)
    assert all(sum(r[f"perf/{part}_s"] for part in parts[:4]) <= r["perf/step_time_s"]
               for r in steps)  # fmt: skip
    # In the row after the step that was saved.
    stalled = {int(r["step"]) for r in steps if r["perf/checkpoint_s"] > 0}
    assert {13, 25, 37, 49} <= stalled
    assert scores[-1]["perf/rank_skew"] >= 1


def test_run_leaves_a_complete_folder(straight):
    for name in (
        "config.yaml",
        "ds_config.json",
        "metrics.jsonl",
        "events.jsonl",
        "run.json",
        "environment.txt",
        "report.html",
        "plots/predicted_vs_true.png",
        "checkpoints/step_00000060/run.json",
    ):
        assert (straight / name).is_file(), name
    check_gradient_norms(straight)
    shown = {"predicted_vs_true", "expression_bins", "cells", "genes"}
    for step, more in ((0, set()), (30, {"gradient_norms", "ranks"}),
                       (60, {"gradient_norms", "ranks"})):  # fmt: skip
        pictures = (straight / "plots" / f"step_{step:08d}").glob("*.png")
        assert {p.stem for p in pictures} == shown | more
    (node,) = (straight / "system").glob("*.jsonl")
    assert len(node.read_text().splitlines()) >= 2
    resolved = json.loads((straight / "ds_config.json").read_text())
    assert "auto" not in json.dumps(resolved)
    assert sorted(p.name for p in (straight / "checkpoints").glob("step_*")) == [
        "step_00000012",
        "step_00000024",
        "step_00000036",
        "step_00000048",
        "step_00000060",
    ]  # fmt: skip


def stop(how, process):
    """Interrupt a run that the launcher has started; returns its exit status."""
    launcher = psutil.Process(process.pid)
    ranks = launcher.children()[0].children()
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "ranks":
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
    elif how == "launcher":
        launcher.children()[0].terminate()
    elif how == "outer launcher":
        # Kills only the outer `deepspeed` process; the ranks notice that it is gone.
        launcher.terminate()
    else:
        ranks[-1].kill()
    process.communicate(timeout=300)
    psutil.wait_procs(ranks, timeout=60)
    return process.returncode


def test_stopped_in_every_way_and_resumed_equals_straight_through(
    straight, small_corpus, small_graph, tmp_path
):
    """One run that is interrupted again and again."""
    run_dir, end = tmp_path / "run", 24
    args = settings(run_dir, small_corpus, small_graph, **{"run.max_steps": end})
    stops = []
    for how in ("Ctrl-C", "ranks", "launcher", "outer launcher", "kill"):
        process = launch(2, args)
        wait_for_step(run_dir, (stops[-1] if stops else 0) + 2, process)
        status = stop(how, process)
        stopped = last_step(run_dir)
        assert stopped < end, how
        if how == "kill":
            assert status not in (0, 75)
            break
        assert (run_dir / "checkpoints" / f"step_{stopped:08d}").is_dir(), how
        if how == "ranks":
            assert status == 75
        stops.append(stopped)
    run_ranks(2, args, run_dir)
    # After the kill it continues from the last checkpoint, which that of step 12 may be.
    *before, last = openings(run_dir)
    assert before == [0, *stops]
    assert last in (stops[-1], 12)
    expected = losses(straight)
    assert losses(run_dir) == {step: expected[step] for step in range(1, end + 1)}
    assert cells(run_dir) == cells(straight)[:end]
    newest = f"checkpoints/step_{end:08d}/manifest.json"
    ours, theirs = (json.loads((run / newest).read_text()) for run in (run_dir, straight))
    assert {n: v for n, v in ours.items() if n.endswith(".pt")} == {
        n: v for n, v in theirs.items() if n.endswith(".pt")
    }


def test_one_rank_agrees_with_two_and_exports_what_it_trained(
    straight, small_corpus, small_graph, tmp_path
):
    args = settings(tmp_path / "run", small_corpus, small_graph, **{"run.max_steps": 12})
    outputs = tmp_path / "outputs.pt"
    run_ranks(1, args, tmp_path / "run", program=("-c", OUTPUTS, outputs))
    assert_export_is_the_trained_model(tmp_path / "run", outputs)
    assert cells(tmp_path / "run") == cells(straight)[:12]
    one, two = losses(tmp_path / "run"), losses(straight)
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    for step in range(2, 13):
        assert one[step] == pytest.approx(two[step], rel=1e-3), step
    first = [
        next(row for row in read_metrics(run_dir) if "val/mse" in row)
        for run_dir in (tmp_path / "run", straight)
    ]
    for name in first[0].keys() & first[1].keys():
        if name.startswith("val/"):
            assert first[0][name] == pytest.approx(first[1][name], rel=1e-4, abs=1e-6), name


def test_export_reloads_to_the_trained_model(straight, small_corpus, tmp_path, monkeypatch):
    """The exported model scores what validation logged, and names what trained it."""
    from sclong_ds import Corpus, load_model
    from sclong_ds.exported import export
    from sclong_ds.exported.training_cells import read_training_cells
    from sclong_ds.loader.batches import CellBatch
    from sclong_ds.objective.batch import masked_batch
    from sclong_ds.objective.metrics import MaskedMetrics
    from sclong_ds.objective.targets import VALIDATION_EPOCH, prepare

    monkeypatch.setattr(export, "git_commit", lambda: "a later one")
    provenance = export.export(straight / "checkpoints", tmp_path / "model")
    run = json.loads((straight / "run.json").read_text())
    assert (provenance["commit"], provenance["environment"]) == (run["commit"], run["environment"])
    assert provenance["exported_by"]["commit"] == "a later one"
    assert run["commit"] in (tmp_path / "model" / "README.md").read_text()
    model, corpus = load_model(tmp_path / "model"), Corpus(small_corpus)
    rows = corpus.split("validation")[:21]
    cells, device = corpus.packed_rows(rows), torch.device("cpu")
    batch = CellBatch(cells, rows, np.full(21, VALIDATION_EPOCH), np.zeros(21, dtype=int))
    config = load_config("sclong_tiny")
    prepared = prepare(
        batch,
        objective=config.objective,
        model=config.model,
        seed=config.run.seed,
        n_genes=corpus.n_genes,
    )
    masked = masked_batch(
        cells, prepared.targets, n_genes=corpus.n_genes, target_sum=1e4, device=device
    )
    metrics = MaskedMetrics(corpus.gene_stats.mean_expressed, device)
    with torch.no_grad():
        predicted = model(masked.x, masked.hidden).gather(1, masked.positions)
    unseen = masked.valid & masked.hidden.gather(1, masked.positions)
    metrics.add(predicted, masked.true, unseen, masked.positions, torch.zeros_like(unseen))
    logged = [r for r in read_metrics(straight) if "val/mse" in r][-1]
    assert metrics.compute()["val/mse"] == pytest.approx(logged["val/mse"], rel=1e-5)
    assert "\n# scLong" in (tmp_path / "model" / "README.md").read_text()
    assert provenance["training_cells"]["datasets"] == ["immune_a"]
    assert read_training_cells(tmp_path / "model").hold(corpus.rows(corpus.split("train"))).all()
    export.export(straight / "checkpoints", tmp_path / "without", training_cells=False)
    assert read_training_cells(tmp_path / "without") is None
    again = run_module("sclong_ds", "export", straight, "--out", tmp_path / "model", check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, {
            "engine.ds_config": "zero3", "engine.compile_layers": "true",
            "engine.activation_checkpointing": "true",
        }),
        (1, {"engine.ds_config": "zero3_offload", "run.profile_step": 2, "run.profile": "flops"}),
    ],
    ids=["zero3, compiled, recomputed", "zero3_offload"],
)  # fmt: skip
def test_other_stages_train(straight, small_corpus, small_graph, tmp_path, ranks, overrides):
    changes = {"run.max_steps": 4, "run.validate_every_n_steps": 0, **overrides}
    args = settings(tmp_path / "run", small_corpus, small_graph, **changes)
    if ranks == 1:
        run_module("sclong_ds.pretrain", *args)
    else:
        run_ranks(ranks, args, tmp_path / "run")
    got, expected = losses(tmp_path / "run"), losses(straight)
    assert [got[s] for s in range(1, 5)] == pytest.approx(
        [expected[s] for s in range(1, 5)], rel=1e-3
    )
    check_gradient_norms(tmp_path / "run")
    if "run.profile" in overrides:
        counted = (tmp_path / "run" / "profile" / "step_00000002_flops.txt").read_text()
        assert "PerformerLayer" in counted
        assert re.search(r"fwd flops per GPU:\s+[1-9]", counted)


@pytest.mark.parametrize(
    "overrides",
    [
        {"engine.ds_config": "zero1"},
        {
            "engine.activation_checkpointing": "true", "model.feature_redraw_interval": 3,
            "model.large_encoder.attention": "softmax", "model.cell_vector": "none",
            "model.cell_offset": "visible",
        },
        pytest.param(
            {"engine.precision": "fp32", "engine.linear_products": "bf16"},
            marks=pytest.mark.skipif(not multiplies_bf16(), reason="a CPU that multiplies bf16"),
        ),
        {
            "engine.precision": "fp32", "engine.linear_products": "fp8",
            "engine.activation_checkpointing": "true",
        },
    ],
    ids=[
        "zero1", "zero3, recomputed, redrawn, exact large encoder, no cell vector",
        "products alone", "products in 8 bits",
    ],
)  # fmt: skip
def test_bf16_resumed_equals_straight_through_and_exports_what_it_trained(
    straight, small_corpus, small_graph, tmp_path, overrides
):
    changes = {
        "engine.precision": "bf16", "run.max_steps": 7, "checkpoint.every_n_steps": 4,
        "run.validate_every_n_steps": 0, **overrides,
    }  # fmt: skip
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    run_ranks(2, settings(whole, small_corpus, small_graph, **changes), whole)
    # Another run folder, with what was there after step 4 alone.
    shutil.copytree(whole / "checkpoints" / "step_00000004", rest / "checkpoints" / "step_00000004")
    rows = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (rest / "metrics.jsonl").write_text("".join(rows[:4]))
    outputs = tmp_path / "outputs.pt"
    args = settings(rest, small_corpus, small_graph, **changes)
    run_ranks(2, args, rest, program=("-c", OUTPUTS, outputs))
    if "engine.linear_products" not in overrides:  # a loaded model multiplies in fp32
        assert_export_is_the_trained_model(rest, outputs)
    warned = "stage 1 adds the gradients of 2 micro-steps up in bf16" in log_of(rest)
    assert warned == (overrides.get("engine.ds_config") == "zero1")
    assert openings(rest) == [4]
    got, expected = losses(whole), losses(straight)
    assert losses(rest) == got
    if "model.cell_vector" not in overrides:  # without it the model starts elsewhere
        assert [got[s] for s in range(1, 8)] == pytest.approx(
            [expected[s] for s in range(1, 8)], rel=0.1
        )
    started = "principal directions of" in log_of(whole)
    assert started == ("model.cell_vector" not in overrides)
    assert "principal directions of" not in log_of(rest)
    check_gradient_norms(whole)


def test_first_loss_is_the_variance_of_the_targets(small_corpus, small_graph, tmp_path):
    """Without a bias per gene the model starts at the overall mean."""
    changes = {
        "model.gene_bias": "false", "model.cell_vector": "none", "model.cell_offset": "none",
        "run.max_steps": 1, "run.validation_cells": 126,
    }  # fmt: skip
    run_module(
        "sclong_ds.pretrain", *settings(tmp_path / "run", small_corpus, small_graph, **changes)
    )
    first = next(r for r in read_metrics(tmp_path / "run") if "val/mse" in r)
    assert first["val/mse"] == pytest.approx(first["val/target_variance"], rel=0.1)


def test_resume_refuses_another_run_and_passes_over_a_damaged_checkpoint(
    straight, small_corpus, small_graph, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    before = (run_dir / "config.yaml").read_bytes()
    changed = settings(run_dir, small_corpus, small_graph, **{"model.top_seq_len": 32})
    assert "model.top_seq_len: 64 -> 32" in refused(*changed)
    assert "model.top_seq_len: 64 -> 32" in refused("--dry-run", *changed)
    other = settings(run_dir, small_corpus, small_graph, **{"engine.ds_config": "zero2"})
    assert "was saved with ZeRO stage 3 in fp32" in refused(*other)
    assert (run_dir / "config.yaml").read_bytes() == before

    newest = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    victim = next(newest.glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    run_ranks(2, settings(run_dir, small_corpus, small_graph), run_dir)
    assert "is damaged" in log_of(run_dir)
    assert losses(run_dir) == losses(straight)
    assert openings(run_dir) == [0, 48]


def test_settings_changed_at_a_resume_are_in_force_and_said(
    straight, small_corpus, small_graph, tmp_path
):
    """With an eps that no gradient can move, and no decay, the weights stay what they were."""
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    for later in run_dir.glob("checkpoints/step_*"):
        if later.name > "step_00000012":
            shutil.rmtree(later)
    before = weights(run_dir, tmp_path)
    (tmp_path / "model_run").rename(tmp_path / "before")
    changes = {"optim.eps": 1e9, "optim.betas": "[0.5, 0.6]", "optim.weight_decay": 0.0,
               "run.max_steps": 14}  # fmt: skip
    run_ranks(2, settings(run_dir, small_corpus, small_graph, **changes), run_dir)
    after = weights(run_dir, tmp_path)
    assert max(np.abs(after[name] - before[name]).max() for name in before) < 1e-7
    (event,) = [e for e in read_events(run_dir) if e["event"] == "settings_changed"]
    assert event["step"] == 12
    assert event["optim.eps"] == "1e-08 -> 1000000000.0"
    assert event["optim.betas"] == "[0.9, 0.999] -> [0.5, 0.6]"
    assert {"optim.weight_decay", "run.max_steps"} <= event.keys()
    # Once, not by every rank.
    assert log_of(run_dir).count("optim.eps: 1e-08 -> 1000000000.0, from step 13 on") == 1


def test_released_choices_train(small_corpus, small_graph, tmp_path):
    """The choices of sclong_reference at a small size: features are redrawn, the mask is cut."""
    tiny, released = (load_config(name).model for name in ("sclong_tiny", "sclong_reference"))
    sizes = {"base_dim", "large_dim", "top_seq_len", "expression_hidden", "gene_graph"}
    values = {field.name: getattr(released, field.name) for field in dataclasses.fields(tiny)}
    choices = {
        f"model.{field.name}": "null" if values[field.name] is None else values[field.name]
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
    run_ranks(2, args, run_dir)
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
