"""A run goes on with the inputs that it was saved with, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.training.run_checks import refuse_other_inputs

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
