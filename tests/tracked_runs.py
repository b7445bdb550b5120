"""Runs as a training starts them, tracked in a store of a test."""

from pathlib import Path
from typing import Any

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_dict
from sclong_ds.tracking import client as client_module
from sclong_ds.tracking.tracker import Tracker


def make_config(*, uri: str | None, enabled: bool = True, lr: str = "0.001") -> RunConfig:
    values = {
        "tracking.uri": uri or "null",
        "tracking.enabled": str(enabled).lower(),
        "tracking.experiment": "tests",
        "tracking.flush_every_n_steps": "3",
        "tracking.picture_cells": "0",
        "model.large_encoder.dim_head": "8",
        "optim.lr": lr,
    }
    return load_config("sclong_tiny", [f"{key}={value}" for key, value in values.items()])


def client_of(uri: str) -> Any:
    return client_module.new_client(uri)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    points = client_of(uri).get_metric_history(run_id, name)
    return sorted((point.step, point.value) for point in points)


def start(
    config: RunConfig, run_dir: Path, *, resumed: bool = False, step: int = 0
) -> tuple[Tracker, str | None]:
    tracker = Tracker(config.tracking, run_dir, enabled=True)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("a: 1\n")
    run_id = tracker.start(
        params={**to_dict(config), "n_parameters": 12, "long": "x" * 7000},
        tags={"corpus_hash": "abc"},
        artifacts=[run_dir / "config.yaml"],
        resumed=resumed,
        step=step,
    )
    return tracker, run_id
