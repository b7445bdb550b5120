"""Short training runs of real ranks, and what they leave."""

from __future__ import annotations

import subprocess
import time

import pytest
from launching import (
    ROOT,
    deepspeed_command,
    environment,
    run_module,
    train,
)
from safetensors.numpy import load_file
from small_runs import last_step

from sclong_ds.run_folder.rows import read_metrics

STEPS = 60


def settings(run_dir, corpus, graph, **overrides):
    base = {
        "run.dir": run_dir, "data.corpus": corpus, "model.gene_graph": graph,
        "model.top_seq_len": 64, "run.max_steps": STEPS, "run.validate_every_n_steps": 30,
        "run.validation_cells": 21, "checkpoint.every_n_steps": 12, "checkpoint.keep_last": 5,
        "optim.decay_steps": STEPS, "tracking.enabled": "false",
        "tracking.picture_cells": "null", "engine.train_batch_size": 4,
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


def run_ranks(ranks, args, run_dir, *, program=("-m", "sclong_ds.pretrain")):
    """Train on some ranks, without the time that a launcher takes."""
    train([*program, *args], n_ranks=ranks, log=run_dir.with_suffix(".log"))


def log_of(run_dir):
    return run_dir.with_suffix(".log").read_text()


def losses(run_dir):
    return {int(r["step"]): r["train/loss"] for r in read_metrics(run_dir) if "train/loss" in r}


def cells(run_dir):
    rows = read_metrics(run_dir)
    return [r["data/cells_crc32"] for r in rows if "data/cells_crc32" in r]


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-6000:]
        if last_step(run_dir) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


def weights(run_dir, tmp_path):
    out = tmp_path / f"model_{run_dir.name}"
    done = run_module("sclong_ds", "export", run_dir, "--out", out)
    assert "it/s" not in done.stderr, "bars of a library"
    return load_file(out / "model.safetensors")


def refused(*args):
    """Run and expect one clear line and exit status 1."""
    done = run_module("sclong_ds.pretrain", *args, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]
