"""Write a checkpoint's model as a folder that `load_model` reads: `python -m sclong_ds export`.

    python -m sclong_ds export RUN_DIR/checkpoints/step_00000050 --out MODEL_DIR

Reads one checkpoint, checked against its manifest; writes the folder that
`sclong_ds.exported.model_dir` describes. Where the run's corpus is at hand, the folder gets the
digests of the training cells, for which all of them are read, and the recipe of its embeddings,
which is chosen on some validation cells (`sclong_ds.exported.choose_recipe`). The weights of all
ranks are merged in memory (4 bytes a parameter).
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sclong_ds.checkpoint.load import full_weights
from sclong_ds.checkpoint.on_disk import (
    MANIFEST,
    complete_checkpoints,
    damage,
    read_manifest,
)
from sclong_ds.checkpoint.state import read_state
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import DataConfig, ModelConfig
from sclong_ds.corpus.transform import Transform
from sclong_ds.exported.choose_recipe import CELLS, cells_of_run, choose_from_run
from sclong_ds.exported.model_dir import FEATURES, GRAPH, check_absent, write_model_dir
from sclong_ds.exported.training_cells import (
    training_cells_of,
    training_data_of,
    validation_cells_of,
)
from sclong_ds.files.atomic import named_errors
from sclong_ds.model.features_file import read_features
from sclong_ds.model.random_features import drawn_features, favor_stacks, redraw_index
from sclong_ds.run_folder.files import read_run_json, recorded_ids
from sclong_ds.run_folder.identity import environment, git_commit
from sclong_ds.run_folder.metric_names import (
    BASELINES,
    HEADLINE,
    MSE,
    N_CELLS,
    N_HIDDEN,
    SHOWN_MSE,
    VS_STRONGEST_HIGH,
    VS_STRONGEST_LOW,
    of_baseline,
)
from sclong_ds.run_folder.rows import read_metrics, unlisted

log = logging.getLogger(__name__)


def resolve(path: Path) -> Path:
    """Return the checkpoint a path means: itself, or the newest of a `checkpoints` or run folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, unfinished, or a converted copy.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    path = path.resolve()
    if (path / "zero").is_dir():
        raise ValueError(
            f"{path} is a universal checkpoint, which has no manifest, configuration and genes: "
            f"export the checkpoint that it was made from"
        )
    is_checkpoint = path.name.startswith("step_") or (path / MANIFEST).is_file()
    found = complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")
    if not found and not is_checkpoint:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: give RUN_DIR/checkpoints/step_N or a run folder"
        )
    chosen = path if is_checkpoint else found[0]
    problem = damage(chosen)
    if problem is not None:
        raise ValueError(f"{chosen} is damaged or unfinished ({problem}); use another checkpoint")
    return chosen


def export(
    checkpoint_dir: Path,
    out: Path,
    *,
    training_cells: bool = True,
    recipe_cells: int = CELLS,
    n_directions: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the exported model of a checkpoint.

    Args:
        checkpoint_dir: A checkpoint, a `checkpoints` folder or a run folder (its newest
            checkpoint).
        out: Folder to make.
        training_cells: Whether to add the digests of the training cells.
        recipe_cells: Training and validation cells each to choose the embedding's recipe on; 0:
            the mean over the expressed genes.
        n_directions: Principal directions to embed along; 0: the best of all candidates.
            Needs `recipe_cells`.
        device: Where they are embedded.

    Returns:
        The provenance that was written.

    Raises:
        ValueError: `n_directions` without cells that choose how they are scaled, or that the run's
            corpus does not give.
    """
    if n_directions and not recipe_cells:
        raise ValueError(
            f"--principal-directions {n_directions} with --recipe-cells 0, which embeds by the "
            "mean over expressed genes: leave one of them out"
        )
    check_absent(out)
    with named_errors(checkpoint_dir):
        checkpoint = resolve(checkpoint_dir)
        return _export(
            checkpoint,
            out,
            with_cells=training_cells,
            n_cells=recipe_cells,
            n_directions=n_directions,
            device=device,
        )


def _export(
    checkpoint: Path, out: Path, *, with_cells: bool, n_cells: int, n_directions: int, device: str
) -> dict[str, Any]:
    config = load_config(checkpoint / "config.yaml")
    state = read_state(checkpoint)
    if n_directions:
        # Refused before all cells are read.
        cells_of_run(
            config.data, corpus_hash=state.corpus_hash, n_cells=n_cells, n_directions=n_directions
        )
    graph, trained = checkpoint / GRAPH, read_run_json(checkpoint)
    provenance = asdict(state) | {
        "checkpoint": checkpoint.name,
        "checkpoint_digest": read_manifest(checkpoint).digest,
        "commit": trained.get("commit"),
        "run": recorded_ids(checkpoint),
        "validation": last_validation(checkpoint, state.step),
        "environment": trained.get("environment"),
        "exported_by": {"commit": git_commit(), "environment": environment()},
    }
    training_cells = (
        training_cells_of(
            config.data, init_from=config.run.init_from, corpus_hash=state.corpus_hash
        )
        if with_cells
        else None
    )
    if training_cells is not None:
        provenance["training_cells"] = training_cells.facts()
    provenance["validation_cells"] = validation_cells_of(
        config.data, n_cells=config.run.validation_cells, corpus_hash=state.corpus_hash
    )
    provenance["training_data"] = training_data_of(
        config.data, init_from=config.run.init_from, corpus_hash=state.corpus_hash
    )
    weights = full_weights(checkpoint)
    with named_errors(out):
        write_model_dir(
            out,
            weights=weights,
            model=config.model,
            transform=transform_of(config.data),
            genes=checkpoint / "genes.tsv",
            graph=graph if graph.is_file() else None,
            features=features_of(checkpoint, config.model, state.step),
            provenance=provenance,
            training_cells=training_cells,
            choose=lambda model: choose_from_run(
                model.to(device),
                config.data,
                corpus_hash=state.corpus_hash,
                n_cells=n_cells,
                n_directions=n_directions,
            ),
        )
    return provenance


def features_of(checkpoint: Path, model: ModelConfig, step: int) -> dict[str, Tensor] | None:
    """Return the random features (M, K) by `stack.layer` that belong to a checkpoint's weights.

    They are drawn here and not where the model is used: another processor may round differently.
    """
    if not favor_stacks(model):
        return None
    redraws = redraw_index(model, step)
    if redraws == 0 and (checkpoint / FEATURES).is_file():
        return read_features(checkpoint / FEATURES)
    return drawn_features(model, redraws)


def transform_of(data: DataConfig) -> Transform:
    """Return the value transform of a run."""
    return Transform(name="log1p_total", target_sum=data.target_sum, unmeasured=data.unmeasured)


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds export`."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    provenance = export(
        args.checkpoint,
        args.out,
        training_cells=not args.no_training_cells,
        recipe_cells=args.recipe_cells,
        n_directions=args.principal_directions,
        device=args.device,
    )
    log.info("wrote %s from step %d of %s", args.out, provenance["step"], args.checkpoint)
    return 0


def last_validation(checkpoint: Path, step: int) -> dict[str, float]:
    """Return the last validation figures up to a step, and `step`, where they were made.

    Args:
        checkpoint: Its folder; empty unless it still lies in its run folder.
        step: Its step.
    """
    run_dir = checkpoint.parent.parent
    if not (run_dir / "metrics.jsonl").is_file():
        return {}
    rows = [r for r in read_metrics(run_dir) if MSE in r and r["step"] <= step]
    errors = (of_baseline(name, MSE) for name in BASELINES)
    names = (*HEADLINE, VS_STRONGEST_LOW, VS_STRONGEST_HIGH, SHOWN_MSE, N_HIDDEN, N_CELLS, *errors)
    if not rows:
        return {}
    found = ("step", *names)
    return {n: rows[-1][n] for n in found if n in rows[-1]} | unlisted(rows[-1])
