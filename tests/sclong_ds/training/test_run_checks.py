"""A run continues with the inputs that it was saved with, or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_yaml
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.training.run_checks import (
    changed_ds_config,
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
    "engine.linear_products": "fp8",
}  # fmt: skip
"""Another value of every key of three sections than sclong_tiny has."""
NEEDED = {
    "optim.name": ["optim.weight_decay=0.0"],
    "optim.cycle_mult": ["optim.schedule=warm_restarts"],
    "optim.cycle_gamma": ["optim.schedule=warm_restarts"],
}
"""What such a value demands of other keys."""


MODEL_OF = {"objective.loss": ["model.cell_vector=svd"]}
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


NO_ZEROS = ["model.zero_genes=null"]
VECTOR = "model.cell_vector=svd"
NO_OFFSET = ["model.gene_bias=false", "model.cell_offset=none", VECTOR]
BALANCED = ["data.balance_by=dataset"]
STACK = {
    "depth": "9", "heads": "9", "dim_head": "9", "nb_features": "9", "ff_mult": "9",
    "attention": "softmax",
}  # fmt: skip
REFUSED: dict[str, tuple[str, Sequence[str]]] = {
    "model.base_dim": ("16", []), "model.large_dim": ("32", []), "model.top_seq_len": ("9", []),
    "model.routing": ("top", NO_ZEROS), "model.zero_genes": ("9", []),
    "model.expression_hidden": ("9", []), "model.mask_vector_max_norm": ("0.5", []),
    "model.pad_token": ("true", NO_ZEROS), "model.gene_encoder": ("embedding", []),
    "model.gene_encoder_layers": ("2", []), "model.use_gene_vectors": ("false", []),
    "model.contextual_encoder": ("mini", []), "model.qkv_bias": ("true", []),
    "model.head": ("linear", []), "model.head_init": ("random", NO_OFFSET),
    "model.gene_bias": ("false", ["model.cell_offset=none", VECTOR]),
    "model.cell_offset": ("none", [VECTOR]),
    "model.cell_vector": ("none", []),
    "model.zero_head": ("true", ["objective.zero_mask_prob=0.1"]),
    "model.attention": ("softmax", []), "model.favor_eps": ("1e-3", []),
    "model.random_features": ("gaussian", []), "model.stabiliser_scope": ("head", []),
    "model.feature_redraw_interval": ("9", []), "model.projection_seed": ("9", []),
    **{
        f"model.{stack}.{key}": (value, [])
        for stack in ("large_encoder", "mini_encoder", "decoder")
        for key, value in STACK.items()
    },
    "data.target_sum": ("5e3", []), "data.order": ("groups", []),
    "data.shuffle_group_chunks": ("9", []), "data.balance_by": ("dataset", []),
    "data.balance_exponent": ("0.5", BALANCED), "data.max_repeats": ("9", BALANCED),
    "data.unmeasured": ("mask", []),
    "engine.precision": ("bf16", []), "run.seed": ("9", []), "run.init_from": ("model", []),
}  # fmt: skip
"""Keys that a run keeps from its start: another value, and what both starts need for it."""
CONSENT = {key for key in OTHER if key.startswith("objective.")}
"""Keys that a run takes with run.accept_changes, since losses then mean something else."""
MOVED = {
    "model.gene_graph": "x", "model.gene_vectors": "x", "model.random_features_file": "x",
    "data.corpus": "x", "data.dataset_weights": "x", "run.dir": "x",
}  # fmt: skip
"""Paths, whose content is compared where it decides anything (`refuse_other_inputs`)."""
APPLIED = {key: value for key, value in OTHER.items() if key not in CONSENT | REFUSED.keys()} | {
    "data.cache_dir": "x", "data.cells_cache": "9", "data.loader_memory": "9",
    "data.prefetch_batches": "9", "data.on_damage": "skip", "data.grown": "true",
    "checkpoint.every_n_steps": "25", "checkpoint.keep_last": "9",
    "checkpoint.keep_every_n_steps": "100", "checkpoint.keep_best": "false",
    "checkpoint.max_failed_saves": "9", "checkpoint.asynchronous": "false",
    "tracking.enabled": "false", "tracking.uri": "http://h", "tracking.experiment": "x",
    "tracking.run_name": "x", "tracking.parent_run": "x", "tracking.tags": "{a: b}",
    "tracking.also": "[csv]", "tracking.flush_every_n_steps": "9",
    "tracking.system_metrics_every_s": "9.0", "tracking.picture_cells": "9",
    "run.max_steps": "9", "run.validate_every_n_steps": "9", "run.validation_cells": "9",
    "run.spike_zscore": "9.0", "run.spike_window": "9", "run.max_skipped_steps": "9",
    "run.profile_step": "9", "run.profile": "memory",
}  # fmt: skip
"""Keys that are in force from the resume on."""
OF_ONE_START = {"run.accept_changes"}
"""A consent, which no later start inherits."""


def keys_of(section: object, prefix: str) -> Iterator[str]:
    """Yield the dotted name of every key of a section, those of its stacks included."""
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{name}.")
        else:
            yield name


def test_it_is_stated_of_every_key_what_a_resume_does_with_another_value() -> None:
    stated = [*REFUSED, *CONSENT, *MOVED, *APPLIED, *OF_ONE_START]
    assert len(stated) == len(set(stated))
    assert set(stated) == set(keys_of(load_config("sclong_tiny"), ""))


def resume(tmp_path: Path, before: Sequence[str], now: Sequence[str]) -> dict[str, object]:
    """Resume as a run does, as far as its settings; returns what is said to have changed."""
    checkpoint = saved_run(tmp_path, before)
    configs = [load_config("sclong_tiny", overrides) for overrides in (before, now)]
    found, state = (
        dataclasses.replace(SAVED, seed=c.run.seed, precision=c.engine.precision) for c in configs
    )
    refuse_changes(checkpoint, configs[1])
    refuse_other_inputs(tmp_path, found, state)
    assert changed(checkpoint, configs[1]) == [] or any("validation_cells" in o for o in now)
    return dict(changed_settings(checkpoint / "config.yaml", configs[1]))


def test_another_path_of_the_model_that_a_run_began_from_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("model")
    began = ["run.init_from=model"]
    for n, path in enumerate((tmp_path / "model", "./model/", "link")):
        resume(tmp_path / str(n), began, [f"run.init_from={path}"])
    for n, path in enumerate(("other", "null"), start=3):
        with pytest.raises(ValueError, match=r"run\.init_from: 'model' -> "):
            resume(tmp_path / str(n), began, [f"run.init_from={path}"])


@pytest.mark.thorough
@pytest.mark.parametrize("key", REFUSED)
def test_what_a_run_keeps_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value, both = REFUSED[key]
    named = ".".join(key.split(".")[:2])
    said = {"run.seed": "seed differ", "engine.precision": r"this run has .* in bf16"}
    with pytest.raises(ValueError, match=said.get(named, rf"{named}: .* -> ")):
        # Consent to another objective is none to this.
        resume(tmp_path, both, [*both, f"{key}={value}", "run.accept_changes=true"])


def test_what_a_run_is_continued_with_is_said_as_a_command_line_has_it(tmp_path: Path) -> None:
    """Also of a preset that changed meanwhile, with what of it would have been accepted."""
    before = ["model.cell_vector=svd", "model.decoder.depth=2", "optim.lr=1e-3"]
    with pytest.raises(ValueError, match=r"svd' -> 'residuals'") as error:
        resume(tmp_path, before, [])
    said = str(error.value).partition("to continue it set ")[2].partition(", or use a new")[0]
    assert sorted(said.split()) == sorted([*before[:2], "optim.lr=0.001"])
    assert resume(tmp_path / "again", before, said.split()) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("key", [*APPLIED, *MOVED])
def test_what_changes_is_said(tmp_path: Path, key: str) -> None:
    value = (APPLIED | MOVED)[key]
    assert key in resume(tmp_path, [], [f"{key}={value}", *NEEDED.get(key, [])])


@pytest.mark.parametrize("key", sorted(CONSENT))
def test_another_objective_needs_consent(tmp_path: Path, key: str) -> None:
    of_model = MODEL_OF.get(key, [])
    checkpoint = saved_run(tmp_path, of_model)
    overrides = [f"{key}={OTHER[key]}", *NEEDED.get(key, []), *of_model]
    config = load_config("sclong_tiny", overrides)
    assert key in changed_settings(checkpoint / "config.yaml", config)
    with pytest.raises(ValueError, match=rf"{key}: .* -> .*run\.accept_changes=true") as error:
        refuse_changes(checkpoint, config)
    accepted = load_config("sclong_tiny", [*overrides, "run.accept_changes=true"])
    refuse_changes(checkpoint, accepted)
    (line,) = changed(checkpoint, accepted)
    assert line in str(error.value)
    assert "run.accept_changes" not in changed_settings(checkpoint / "config.yaml", accepted)


def test_another_content_of_deepspeeds_file_is_said(tmp_path: Path) -> None:
    """Beside the numbers that the YAML gives, on whatever number of ranks."""
    saved, engine = tmp_path / "ds_config.json", load_config("sclong_tiny").engine
    before, now = (resolve_ds_config(engine, world_size=n) for n in (1, 2))
    assert changed_ds_config(saved, now) == {}
    saved.write_text(json.dumps(before))
    assert changed_ds_config(saved, now) == {}
    now["zero_optimization"] |= {"reduce_bucket_size": 1, "offload_optimizer": {"device": "cpu"}}
    del now["zero_optimization"]["overlap_comm"]
    assert changed_ds_config(saved, now) == {
        "ds_config.zero_optimization.overlap_comm": (True, None),
        "ds_config.zero_optimization.reduce_bucket_size": (500_000_000, 1),
        "ds_config.zero_optimization.offload_optimizer.device": (None, "cpu"),
    }


def test_consent_does_not_cover_another_model_or_corpus(tmp_path: Path) -> None:
    for change in ("model.head=linear", "data.target_sum=5.0e3"):
        config = load_config("sclong_tiny", [change, "run.accept_changes=true"])
        with pytest.raises(ValueError, match=change.partition("=")[0]):
            refuse_changes(saved_run(tmp_path / change), config)


def test_validation_on_other_cells_measures_something_else(tmp_path: Path) -> None:
    config = load_config("sclong_tiny", ["run.validation_cells=9", "run.max_steps=9"])
    assert changed(saved_run(tmp_path), config) == ["run.validation_cells: 64 -> 9"]
