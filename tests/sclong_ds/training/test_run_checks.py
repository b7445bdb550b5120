"""A run goes on with the inputs that it was saved with, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.load import load_config
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.training.run_checks import changed_settings, refuse_other_inputs

SAVED = TrainState(
    step=4, cells_seen=16, world_size=2, seed=0, precision="fp32", zero_stage=3,
    corpus_hash="a", genes_hash="b", graph_hash="c", features_hash=None,
)  # fmt: skip


def test_the_same_inputs_go_on_at_another_step_and_number_of_ranks(tmp_path: Path) -> None:
    now = dataclasses.replace(SAVED, step=0, cells_seen=0, world_size=5)
    refuse_other_inputs(tmp_path, SAVED, now)


@pytest.mark.parametrize(
    "name",
    ["corpus_hash", "genes_hash", "graph_hash", "features_hash", "weights_hash", "seed",
     "zero_stage", "precision"],
)  # fmt: skip
def test_another_corpus_or_any_other_input_is_refused_by_name(tmp_path: Path, name: str) -> None:
    other = {"seed": 1, "zero_stage": 2, "precision": "bf16"}.get(name, "another")
    now = dataclasses.replace(SAVED, **{name: other})
    said = {"zero_stage": "ZeRO stage 3", "precision": "fp32"}.get(name, name)
    with pytest.raises(ValueError, match=said):
        refuse_other_inputs(tmp_path, SAVED, now)


def changes(tmp_path: Path, before: list[str], now: list[str]) -> dict[str, tuple[object, object]]:
    """Return what a resume of sclong_tiny with some settings calls changed."""
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(load_config("sclong_tiny", before)))
    return changed_settings(saved, load_config("sclong_tiny", now))


def test_a_schedule_counts_as_changed_if_its_steps_are_others(tmp_path: Path) -> None:
    in_steps = ["optim.warmup_steps=10", "optim.decay_steps=160"]
    assert changes(tmp_path, in_steps, []) == {}
    assert changes(tmp_path, [], ["run.max_steps=320"]) == {
        "run.max_steps": (160, 320), "optim.warmup_steps": (10, 20),
        "optim.decay_steps": (160, 320),
    }  # fmt: skip
    assert changes(tmp_path, in_steps, [*in_steps, "run.max_steps=320"]) == {
        "run.max_steps": (160, 320)
    }
