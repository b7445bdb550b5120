"""Tests of state.json, and of those of earlier and later versions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sclong_ds.checkpoint.state import TrainState, read_state

STATE = TrainState(
    step=3, cells_seen=24, world_size=2, seed=5, precision="fp32", zero_stage=2, corpus_hash="c",
    genes_hash="g", graph_hash=None, features_hash=None, weights_hash="w", skipped_steps=1,
)  # fmt: skip


def write(folder: Path, state: object) -> Path:
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(write(tmp_path, asdict(STATE))) == STATE


def test_what_an_earlier_version_did_not_write_means_what_was_so_then(tmp_path: Path) -> None:
    old = asdict(STATE)
    del old["weights_hash"], old["skipped_steps"]
    state = read_state(write(tmp_path, old))
    assert (state.weights_hash, state.skipped_steps, state.step) == (None, 0, 3)


def test_a_state_of_a_later_version_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, asdict(STATE) | {"teacher_step": 1, "shards": 2})
    with pytest.raises(ValueError, match=r"later version .*shards, teacher_step\): update") as got:
        read_state(path)
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("lost", ["step", "cells_seen", "corpus_hash"])
def test_a_state_that_lost_what_every_version_wrote_is_damaged(tmp_path: Path, lost: str) -> None:
    state = asdict(STATE)
    del state[lost]
    with pytest.raises(ValueError, match=rf"state.json: damaged \(lacks {lost}\)"):
        read_state(write(tmp_path, state))


def test_a_state_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state.json: holds a list"):
        read_state(write(tmp_path, [1]))
