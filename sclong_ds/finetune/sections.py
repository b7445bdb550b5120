"""The sections of a run's configuration that a fine-tuning reads, with defaults of its own."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import (
    CheckpointConfig,
    EngineConfig,
    OptimConfig,
    TrackingConfig,
)
from sclong_ds.config.strict_yaml import to_yaml

_SECTIONS = ("optim", "engine", "checkpoint", "tracking")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """What a fine-tuning takes over from the configuration of a training run."""

    optim: OptimConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    text: str
    """The whole as YAML, for the folder."""


_PRETRAINING_ONLY = {
    "linear_products": "precision", "attention_backend": "auto", "compile_layers": False,
}  # fmt: skip
"""Keys of `engine` that have no effect here, and their only values."""


def read_sections(args: argparse.Namespace) -> Sections:
    """Return the sections of a fine-tuning: those of a run, with other defaults.

    Raises:
        ValueError: A setting of another section, or a wrong one.
    """
    for item in args.overrides:
        if item.partition(".")[0] not in _SECTIONS:
            raise ValueError(
                f"{item}: settings are of the sections {', '.join(_SECTIONS)}; see --help for what "
                "else can be chosen"
            )
    cached, world = args.mode in ("frozen", "head"), int(os.environ.get("WORLD_SIZE", "1"))
    defaults = [
        f"optim.lr={ {'frozen': 3e-3, 'head': 3e-3, 'lora': 1e-3, 'all': 1e-4}[args.mode] }",
        "optim.schedule=constant", "optim.warmup_steps=0", "engine.ds_config=zero1",
        "engine.train_batch_size=32",
        f"engine.train_micro_batch_size_per_gpu={max(1, min(32 if cached else 4, 32 // world))}",
        f"checkpoint.every_n_steps={1000 if cached else 50}", "checkpoint.keep_last=1",
        "checkpoint.keep_best=false", "checkpoint.asynchronous=false",
        "tracking.experiment=sclong_ds_finetune", "tracking.picture_cells=null",
        f"run.dir={args.out}", f"run.seed={args.seed}",
    ]  # fmt: skip
    config = load_config("sclong_tiny", [*defaults, *args.overrides])
    if config.engine.ds_config == "zero3" or "zero3" in config.engine.ds_config:
        raise ValueError(
            f"engine.ds_config={config.engine.ds_config}: fine-tuning runs with zero1 or zero2; "
            "with --mode lora a model of a billion parameters needs 4 GB for its weights"
        )
    for key, value in _PRETRAINING_ONLY.items():
        if (got := getattr(config.engine, key)) != value:
            raise ValueError(
                f"engine.{key}={got}: fine-tuning does not use it; leave it at {value}"
            )
    return Sections(
        optim=config.optim, engine=config.engine, checkpoint=config.checkpoint,
        tracking=config.tracking, text=to_yaml(config),
    )  # fmt: skip
