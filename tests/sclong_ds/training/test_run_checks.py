"""A run continues with the inputs that it was saved with, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.training.run_checks import (
    changed_measure,
    changed_settings,
    refuse_changes,
    refuse_other_inputs,
)

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


@pytest.mark.parametrize(
    ("saved", "now", "goes_on"),
    [
        ("a", "a", True), ("a", "b", False), ("a", "column a", False),
        ("column a", "column a", True), ("column a", "column b", False), ("column a", "a", False),
        # Of a version that wrote none: it weighed by datasets.
        (None, "a", True), (None, "column a", False), (None, None, True),
    ],
)  # fmt: skip
def test_cells_that_would_be_weighed_otherwise_are_refused(
    tmp_path: Path, saved: str | None, now: str | None, goes_on: bool
) -> None:
    found, begins = (dataclasses.replace(SAVED, balance_hash=hash_) for hash_ in (saved, now))
    if goes_on:
        refuse_other_inputs(tmp_path, found, begins)
        return
    with pytest.raises(ValueError, match=r"data\.balance_by weighs the cells otherwise"):
        refuse_other_inputs(tmp_path, found, begins)


def changed(checkpoint: Path, config: RunConfig) -> list[str]:
    """Return what a configuration measures otherwise than a checkpoint's."""
    cells = config.run.validation_cells
    return changed_measure(checkpoint, config.objective, validation_cells=cells)


def changes(tmp_path: Path, before: list[str], now: list[str]) -> dict[str, tuple[object, object]]:
    """Return what a resume of sclong_tiny with some settings calls changed."""
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(load_config("sclong_tiny", before)))
    return changed_settings(saved, load_config("sclong_tiny", now))


def test_a_schedule_counts_as_changed_if_its_steps_are_others(tmp_path: Path) -> None:
    in_steps = ["optim.warmup_steps=20", "optim.decay_steps=320"]
    assert changes(tmp_path, in_steps, []) == {}
    assert changes(tmp_path, [], ["run.max_steps=640"]) == {
        "run.max_steps": (320, 640), "optim.warmup_steps": (20, 40),
        "optim.decay_steps": (320, 640),
    }  # fmt: skip
    assert changes(tmp_path, in_steps, [*in_steps, "run.max_steps=640"]) == {
        "run.max_steps": (320, 640)
    }


OTHER = {
    "optim.name": "adam", "optim.lr": "0.5", "optim.betas": "[0.5, 0.6]", "optim.eps": "0.5",
    "optim.weight_decay": "0.0", "optim.schedule": "constant", "optim.warmup_steps": "3",
    "optim.decay_steps": "99", "optim.min_lr_ratio": "0.3", "optim.cycle_mult": "2.0",
    "optim.cycle_gamma": "0.5",
    "objective.mask_prob": "0.3", "objective.mask_prob_range": "[0.1, 0.2]",
    "objective.zero_mask_prob": "0.1", "objective.replace_prob": "0.8",
    "objective.target_rounding": "float32", "objective.loss": "likelihood",
    "engine.ds_config": "zero3_offload", "engine.train_batch_size": "16",
    "engine.train_micro_batch_size_per_gpu": "2", "engine.gradient_clipping": "0.5",
    "engine.precision": "bf16", "engine.activation_checkpointing": "true",
    "engine.attention_backend": "torch", "engine.compile_layers": "true", "engine.timeout_s": "9",
}  # fmt: skip
"""Another value of every key of three sections than sclong_tiny has."""
NEEDED = {
    "optim.name": ["optim.weight_decay=0.0"],
    "optim.cycle_mult": ["optim.schedule=warm_restarts"],
    "optim.cycle_gamma": ["optim.schedule=warm_restarts"],
}
"""What such a value demands of other keys."""


MODEL_OF = {"objective.loss": ["model.cell_offset=poisson"]}
"""What such a value demands of the model, which a run keeps from its start."""


def saved_run(tmp_path: Path, overrides: Sequence[str] = ()) -> Path:
    """Return the checkpoint of a run of sclong_tiny, as far as its configuration.

    Args:
        tmp_path: Where to write it.
        overrides: Its `key=value` settings.
    """
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(to_yaml(load_config("sclong_tiny", overrides)))
    return checkpoint


def test_every_key_of_three_sections_has_another_value() -> None:
    config = load_config("sclong_tiny")
    assert {
        f"{section}.{field.name}"
        for section in ("optim", "objective", "engine")
        for field in dataclasses.fields(getattr(config, section))
    } == OTHER.keys()


@pytest.mark.parametrize("key", OTHER)
def test_a_changed_key_is_said_or_refused(tmp_path: Path, key: str) -> None:
    """The objective needs consent; precision is refused with the state, see above."""
    of_model = MODEL_OF.get(key, [])
    checkpoint = saved_run(tmp_path, of_model)
    overrides = [f"{key}={OTHER[key]}", *NEEDED.get(key, []), *of_model]
    config = load_config("sclong_tiny", overrides)
    assert key in changed_settings(checkpoint / "config.yaml", config)
    if not key.startswith("objective."):
        refuse_changes(checkpoint, config)
        assert changed(checkpoint, config) == []
        return
    with pytest.raises(ValueError, match=rf"{key}: .* -> .*run\.accept_changes=true") as error:
        refuse_changes(checkpoint, config)
    accepted = load_config("sclong_tiny", [*overrides, "run.accept_changes=true"])
    refuse_changes(checkpoint, accepted)
    (line,) = changed(checkpoint, accepted)
    assert line in str(error.value)
    assert "run.accept_changes" not in changed_settings(checkpoint / "config.yaml", accepted)


def test_consent_does_not_cover_another_model_or_corpus(tmp_path: Path) -> None:
    for change in ("model.head=linear", "data.target_sum=5.0e3"):
        config = load_config("sclong_tiny", [change, "run.accept_changes=true"])
        with pytest.raises(ValueError, match=change.partition("=")[0]):
            refuse_changes(saved_run(tmp_path / change), config)


def test_validation_on_other_cells_measures_something_else(tmp_path: Path) -> None:
    config = load_config("sclong_tiny", ["run.validation_cells=9", "run.max_steps=9"])
    assert changed(saved_run(tmp_path), config) == ["run.validation_cells: 64 -> 9"]
