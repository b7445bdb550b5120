"""DeepSpeed configurations resolve completely or are refused; schedule and parameter groups.

Covers also `sclong_ds/engine/ds_config.py`, `sclong_ds/engine/ranks.py`.
"""

import dataclasses
import json

import pytest
import torch

from sclong_ds.config.load import load_config
from sclong_ds.engine.deepspeed_engine import parameter_groups, torch_optimizer
from sclong_ds.engine.ds_config import (
    DS_CONFIGS_DIR,
    SHIPPED_ZERO_KEYS,
    resolve_ds_config,
    zero_keys,
)
from sclong_ds.engine.schedule import learning_rate

CONFIG = load_config("sclong_tiny")


def resolve(**changes):
    return resolve_ds_config(dataclasses.replace(CONFIG.engine, **changes), world_size=2)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS_DIR.glob("*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_shipped_json_resolves(path, precision):
    resolved = resolve(ds_config=path.stem, precision=precision, train_batch_size=12)
    assert "auto" not in json.dumps(resolved)
    assert resolved["gradient_accumulation_steps"] == 6
    assert resolved["bf16"]["enabled"] == (precision == "bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "is set in the run's YAML"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "has no source here"),
        ({}, "allowed: 1, 2, 3"),
        ({"bf16": True, "zero_optimization": {"stage": 1}}, "bf16: expected a mapping"),
        ([], "expected a mapping, got list"),
    ],
)
def test_wrong_json_is_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    base = {"zero_optimization": {"stage": 3}} if content and isinstance(content, dict) else content
    path.write_text(json.dumps(base | content if isinstance(content, dict) else content))
    with pytest.raises(ValueError, match=message):
        resolve(ds_config=str(path))


def test_text_that_is_no_json_and_a_missing_file_are_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve(ds_config=str(path))
    with pytest.raises(FileNotFoundError, match="zero3_offload"):
        resolve(ds_config="zero7")


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="x 2 ranks"):
        resolve(train_batch_size=3)


def test_learning_rate_warms_up_and_falls():
    optim = dataclasses.replace(
        CONFIG.optim, lr=1.0, warmup_steps=4, decay_steps=12, min_lr_ratio=0.1, schedule="cosine"
    )
    rates = [learning_rate(optim, step) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.55)
    assert rates[12:] == pytest.approx([0.1, 0.1, 0.1])
    constant = dataclasses.replace(optim, schedule="constant")
    assert [learning_rate(constant, step) for step in (0, 4, 99)] == [0.25, 1.0, 1.0]


def test_keys_of_shipped_files_are_deepspeeds():
    assert zero_keys() >= SHIPPED_ZERO_KEYS
    used = {
        key
        for path in DS_CONFIGS_DIR.glob("*.json")
        for key in json.loads(path.read_text())["zero_optimization"]
    }
    assert used <= SHIPPED_ZERO_KEYS


def test_only_matrices_are_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decay, no_decay = parameter_groups(model, CONFIG.optim)
    assert [p.shape for p in decay["params"]] == [(4, 3)]
    assert decay["weight_decay"] == CONFIG.optim.weight_decay
    assert no_decay["weight_decay"] == 0.0
    assert len(no_decay["params"]) == 3


def test_the_fused_optimizer_is_the_same_to_rounding():
    """As `initialize` takes it, on a CPU too; of two lengths, of which one is no vector's."""
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, generator=generator).requires_grad_() for n in (64, 37)]
        settings = {"lr": 1e-2, "weight_decay": 0.1}
        if fused:
            optimizer = torch_optimizer([{"params": weights}], "adamw", **settings)
        else:
            optimizer = torch.optim.AdamW(weights, fused=False, **settings)
        assert all(group["fused"] is fused for group in optimizer.param_groups)
        for _ in range(20):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        found.append(torch.cat(weights).detach())
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
