"""A start that ends while it resumes leaves nothing unsaid, and nothing to be said twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_forked, run_module

from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.heartbeats import HANG_FILE
from sclong_ds.tracking.description import change_tags

pytestmark = pytest.mark.distributed
ENDS_AFTER = (
    "import os, sys; from sclong_ds import pretrain; from sclong_ds.training import resume; "
    "name = sys.argv.pop(1); real = getattr(resume, name); "
    "setattr(resume, name, lambda *a: (real(*a), os._exit(75))); pretrain.main()"
)
"""Trains until a function of `resume` has returned."""


def settings(run_dir: Path, corpus: Path, graph: Path) -> list[str]:
    keys = {
        "run.dir": run_dir, "data.corpus": corpus, "model.gene_graph": graph,
        "model.top_seq_len": 64, "run.max_steps": 2, "run.validate_every_n_steps": 0,
        "run.validation_cells": 8, "checkpoint.every_n_steps": 2, "tracking.enabled": "false",
        "tracking.picture_cells": "null", "engine.train_batch_size": 4,
    }  # fmt: skip
    return ["--config", "sclong_tiny", *(f"{key}={value}" for key, value in keys.items())]


def test_starts_that_end_while_they_resume_leave_their_changes_and_one_hang(
    small_corpus: Path, small_graph: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    args = settings(run_dir, small_corpus, small_graph)
    run_module("sclong_ds.pretrain", *args)
    hang = run_dir / "heartbeat" / HANG_FILE
    hang.write_text(json.dumps({"error": "rank 0 hangs", "time": 1.0}))

    def end_after(function: str, *changes: str) -> None:
        done = run_forked(["-c", ENDS_AFTER, function, *args, *changes], timeout=300)
        assert done.returncode == 75, done.stderr

    lr, eps = "optim.lr=0.5", "optim.eps=0.25"
    end_after("record_changes", lr)
    end_after("write_inputs", lr)
    assert hang.exists(), "not recorded yet"
    end_after("record_hang", lr, eps)
    assert not hang.exists()
    end_after("record_hang", lr, eps)
    events = read_events(run_dir)
    (hung,) = [e for e in events if e["event"] == "hung"]
    assert hung["error"] == "rank 0 hangs"
    (tag,) = change_tags(events).items()
    name, lines = tag[0], tag[1].splitlines()
    assert name == "changed_after_step_2"
    assert [line.partition(":")[0] for line in lines] == ["optim.lr", "optim.eps"]
    assert lines[0].endswith(" -> 0.5, from step 3 on")
