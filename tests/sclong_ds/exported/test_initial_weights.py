"""A run that starts from a model folder: the same weights, to the bit, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from exported import write_model
from launching import run_module, train
from safetensors.torch import load_file

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.exported.initial_weights import InitialWeights, check_initial_model
from sclong_ds.exported.manifest import write_manifest
from sclong_ds.model.features_file import write_features


@pytest.fixture
def model_dir(small_corpus, tmp_path):
    return write_model(tmp_path, GeneVocabulary.read(small_corpus / "genes.tsv"), seed=5)


def overrides(model_dir, **changes):
    """Return the overrides that make the tiny preset the model of a folder."""

    def flat(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}.{key}")
            else:
                yield f"{prefix}.{key}", value

    model = yaml.safe_load((model_dir / "config.yaml").read_text())["model"]
    settings = dict(flat(model, "model")) | {"run.init_from": model_dir} | changes
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def seal_again(model_dir):
    """Make an edited model folder a whole one."""
    (model_dir / "manifest.json").unlink()
    write_manifest(model_dir)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_run_starts_from_the_weights_it_is_given(model_dir, small_corpus, tmp_path, stage):
    """In bf16, where DeepSpeed would round the fp32 weights."""
    before = load_file(model_dir / "model.safetensors")
    drawn = {
        f"{stack}.0": torch.randn(8, 4) for stack in ("large_encoder", "mini_encoder", "decoder")
    }
    features = model_dir / "random_features.safetensors"
    write_features(features, drawn)
    described = yaml.safe_load((model_dir / "config.yaml").read_text())
    described["model"]["random_features_file"] = "random_features.safetensors"
    (model_dir / "config.yaml").write_text(yaml.safe_dump(described))
    seal_again(model_dir)
    run_dir = tmp_path / "run"
    settings = {
        "run.dir": run_dir, "data.corpus": small_corpus, "run.max_steps": 1,
        "engine.ds_config": stage,
        "run.validate_every_n_steps": 0, "engine.precision": "bf16", "optim.lr": "1.0e-20",
        "optim.weight_decay": 0.0, "tracking.enabled": "false",
        "tracking.picture_cells": "null",
        "model.random_features_file": features,
    }  # fmt: skip
    command = ["--config", "sclong_tiny", *overrides(model_dir, **settings)]
    train(["-m", "sclong_ds.pretrain", *command], n_ranks=2, log=tmp_path / "log")
    run_module("sclong_ds", "export", run_dir, "--out", tmp_path / "after")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert set(after) == set(before)
    for name, weight in before.items():
        # One step of 1e-20: what differs more was rounded.
        torch.testing.assert_close(after[name], weight, atol=1e-19, rtol=0)
    kept = load_file(tmp_path / "after" / "random_features.safetensors")
    assert all(torch.equal(kept[name], drawn[name]) for name in drawn)


def check(config: RunConfig, genes: GeneVocabulary) -> None:
    """Check the model of `run.init_from` against a configuration."""
    folder, target_sum = Path(str(config.run.init_from)), config.data.target_sum
    check_initial_model(folder, config.model, genes, target_sum=target_sum)


def test_other_model_is_named(model_dir, small_corpus, tmp_path):
    genes = GeneVocabulary.read(small_corpus / "genes.tsv")
    settings = overrides(model_dir)
    check(load_config("sclong_tiny", settings), genes)
    free = overrides(model_dir, **{"model.feature_redraw_interval": 9})
    check(load_config("sclong_tiny", free), genes)
    other = {
        "model.base_dim": 16, "model.decoder.nb_features": "null", "model.projection_seed": 4,
        "data.target_sum": 1e6, "model.random_features_file": tmp_path / "f",
    }  # fmt: skip
    with pytest.raises(ValueError, match="its model is another one; set ") as error:
        check(load_config("sclong_tiny", overrides(model_dir, **other)), genes)
    needed = str(error.value).partition("set ")[2].split()
    assert sorted(needed) == [
        "data.target_sum=10000.0", "model.base_dim=8", "model.decoder.nb_features=8",
        "model.projection_seed=0", "model.random_features_file=null",
    ]  # fmt: skip
    repaired = [*overrides(model_dir, **other), *needed]
    check(load_config("sclong_tiny", repaired), genes)
    fewer = GeneVocabulary(genes.ids[1:], genes.symbols[1:], genes.classes[1:])
    with pytest.raises(ValueError, match=r"its genes are not those of data\.corpus"):
        check(load_config("sclong_tiny", settings), fewer)


def test_other_features_are_refused(model_dir, small_corpus, tmp_path):
    genes = GeneVocabulary.read(small_corpus / "genes.tsv")
    described = yaml.safe_load((model_dir / "config.yaml").read_text())
    described["model"]["random_features_file"] = "random_features.safetensors"
    (model_dir / "config.yaml").write_text(yaml.safe_dump(described))
    for folder, value in ((model_dir, 0.0), (tmp_path, 1.0)):
        features = {"decoder.0": torch.full((8, 4), value)}
        write_features(folder / "random_features.safetensors", features)
    seal_again(model_dir)
    own = {"model.random_features_file": model_dir / "random_features.safetensors"}
    check(load_config("sclong_tiny", overrides(model_dir, **own)), genes)
    other = {"model.random_features_file": tmp_path / "random_features.safetensors"}
    with pytest.raises(ValueError, match=f"set model.random_features_file={model_dir}"):
        check(load_config("sclong_tiny", overrides(model_dir, **other)), genes)


def test_damaged_or_absent_weights_are_named(model_dir, tmp_path):
    genes = GeneVocabulary.read(model_dir / "genes.tsv")
    config = load_config("sclong_tiny", [f"run.init_from={tmp_path}"])
    with pytest.raises(FileNotFoundError, match="is no exported model"):
        check(config, genes)
    path = model_dir / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="damaged"):
        InitialWeights(model_dir)
    for name in ("model.safetensors", "provenance.json"):
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            check(load_config("sclong_tiny", overrides(model_dir)), genes)
        path.unlink()
        path.write_bytes(whole)
        (model_dir / "provenance.json").write_text("{}")


@pytest.mark.distributed
def test_a_run_warns_of_validation_cells_that_its_model_was_trained_on(small_corpus, tmp_path):
    """The same staged datasets, finalized again with the split turned round."""
    turned = tmp_path / "turned"
    turned.mkdir()
    for name in ("settings.json", "genes.tsv", "ledger", "staging", "manifests"):
        copy = shutil.copytree if (small_corpus / name).is_dir() else shutil.copy
        copy(small_corpus / name, turned / name)
    run_module("data_prep", "finalize", turned, "--validation-datasets", "immune_a")
    logs = []
    model = features = "null"
    for name, corpus in (("first", small_corpus), ("same", small_corpus), ("turned", turned)):
        settings = {
            "run.dir": tmp_path / name, "data.corpus": corpus, "run.init_from": model,
            "run.max_steps": 1, "run.validation_cells": 20, "model.gene_graph": "null",
            "model.gene_encoder": "embedding", "model.top_seq_len": 64,
            "engine.train_batch_size": 2, "tracking.enabled": "false",
            "tracking.picture_cells": "null", "model.random_features_file": features,
        }  # fmt: skip
        args = [f"{key}={value}" for key, value in settings.items()]
        logs.append(tmp_path / f"{name}.log")
        train(["-m", "sclong_ds.pretrain", "--config", "sclong_tiny", *args],
              n_ranks=2 if name == "turned" else 1, log=logs[-1])  # fmt: skip
        if name == "first":
            model = tmp_path / "model"
            features = model / "random_features.safetensors"
            run_module("sclong_ds", "export", tmp_path / name, "--out", model)
    provenance = json.loads((model / "provenance.json").read_text())
    assert provenance["validation_cells"]["n_cells"] == 20
    first, same, other = (log.read_text() for log in logs)
    for warning in ("were in the training", "the validation set is not"):
        assert warning not in first + same
    assert other.count("validation: 20 of the 20 validation cells were in the training") == 1
    assert other.count("validation: the validation set is not that of the model's training") == 1
