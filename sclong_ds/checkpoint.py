"""Checkpoints: save as a whole, find the newest good one, resume, prune; export to a model folder.

A checkpoint is a folder `checkpoints/step_00000050` with DeepSpeed's files of every rank, the files
that make it self-contained (config.yaml, genes.tsv, gene_graph.npz,
random_features.safetensors), state.json (position of the run) and manifest.json (size and CRC-32 of
every file). It is written under a temporary name, synced and renamed, so it is whole or absent. A
damaged one is found on load, reported, and the one before it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from sclong_ds.config import RunConfig, load_config
from sclong_ds.engine import on_first_rank
from sclong_ds.features_file import read_features
from sclong_ds.files import sync_folder, sync_tree, write_atomic
from sclong_ds.model.performer import drawn_features
from sclong_ds.model.sclong import Transform
from sclong_ds.model_dir import FEATURES, GRAPH, write_model_dir
from sclong_ds.run_folder import environment, git_commit, read_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Where a run is, and on what; everything but weights and optimizer moments."""

    step: int
    """Optimizer steps applied."""
    cells_seen: int
    """Position in the stream of cells."""
    world_size: int
    """Ranks that wrote the checkpoint."""
    seed: int
    """`run.seed`."""
    precision: str
    """`engine.precision`."""
    zero_stage: int
    """ZeRO stage; the stages write different files."""
    corpus_hash: str
    """Content hash of the corpus."""
    genes_hash: str
    """Hash of the gene vocabulary."""
    graph_hash: str | None
    """SHA-256 of the gene graph file."""
    features_hash: str | None
    """SHA-256 of the file of random features."""


def save(
    engine: Any, folder: Path, state: TrainState, *, files: Iterable[Path], keep_last: int
) -> Path:
    """Save a checkpoint; every rank must call it.

    Args:
        engine: The DeepSpeed engine.
        folder: The run's `checkpoints` folder, shared by all ranks.
        state: Position of the run.
        files: Files to keep with the weights.
        keep_last: Newest checkpoints that stay.

    Returns:
        The checkpoint's folder.
    """
    name = name_of(state.step)
    partial, final = folder / f"{name}.partial", folder / name
    first = dist.get_rank() == 0
    if first:
        # Also those of other steps, left by a process that was killed while it saved.
        for unfinished in folder.glob("step_*.partial"):
            shutil.rmtree(unfinished)
    dist.barrier()
    with _quiet():
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    dist.barrier()
    if first:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        manifest = {
            str(p.relative_to(partial)): _fingerprint(p)
            for p in sorted(partial.rglob("*"))
            if p.is_file()
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        sync_tree(partial)
        if final.exists():
            # A damaged checkpoint of this step was skipped on load and the step was reached again.
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(folder)
        write_atomic(folder / "latest", f"{name}\n".encode())
        _prune(folder, keep_last)
    dist.barrier()
    return final


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def load(engine: Any, folder: Path, *, expected: TrainState) -> TrainState | None:
    """Load the newest good checkpoint of a run; every rank must call it.

    Args:
        engine: The DeepSpeed engine, freshly initialised.
        folder: The run's `checkpoints` folder.
        expected: What this run would start from; number of ranks, stage and precision must agree.

    Returns:
        The position to go on from, or None when there is no checkpoint.

    Raises:
        ValueError: Checkpoints exist but none is good, or it was saved by another number of ranks,
            in another precision or ZeRO stage.
    """
    name = on_first_rank(lambda: _choose(folder))
    if name is None:
        return None
    state = read_state(folder / name)
    if (state.precision, state.zero_stage) != (expected.precision, expected.zero_stage):
        raise ValueError(
            f"{folder / name} was saved with ZeRO stage {state.zero_stage} in {state.precision}, "
            f"this run has stage {expected.zero_stage} in {expected.precision}: "
            f"set engine.ds_config and engine.precision back, or use a new run.dir"
        )
    if state.world_size != dist.get_world_size():
        raise ValueError(
            f"{folder / name} was saved by {state.world_size} ranks, "
            f"this run has {dist.get_world_size()}: start it with {state.world_size}"
        )
    with _quiet():
        path, _ = engine.load_checkpoint(str(folder), tag=name)
    if path is None:
        raise ValueError(f"{folder / name}: DeepSpeed could not load it; see the messages above")
    return state


def _choose(folder: Path) -> str | None:
    """Return the newest good checkpoint's name, or None when there is none at all."""
    found = complete_checkpoints(folder)
    for path in found:
        problem = damage(path)
        if problem is None:
            return path.name
        log.error("%s is damaged (%s): going back to the checkpoint before it", path, problem)
    if found:
        raise ValueError(
            f"no checkpoint in {folder} is usable: {len(found)} are damaged (see above); "
            f"restore one or use a new run.dir"
        )
    return None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first; unfinished ones are left out.

    Args:
        folder: The run's `checkpoints` folder.
    """
    return sorted(
        (p for p in folder.glob("step_*") if p.is_dir() and p.suffix != ".partial"), reverse=True
    )


def damage(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest; returns what is wrong, or None.

    Args:
        checkpoint: A `step_*` folder.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    for name, fingerprint in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != fingerprint:
            return f"{name} does not have the size and CRC-32 it was saved with"
    return None


def read_state(checkpoint: Path) -> TrainState:
    """Read a checkpoint's state.json.

    Raises:
        ValueError: It was written by another version.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    names = {field.name for field in fields(TrainState)}
    if set(state) != names:
        raise ValueError(
            f"{checkpoint}/state.json was written by another version ({sorted(set(state) ^ names)} "
            f"differ): go on with that version, or export there and set run.init_from"
        )
    return TrainState(**state)


def resolve(path: Path) -> Path:
    """Return the checkpoint a path means: itself, or the newest of a `checkpoints` or run folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or unfinished.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    candidates = [path] if path.name.startswith("step_") else []
    candidates = (
        candidates or complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")
    )
    if not candidates:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: give RUN_DIR/checkpoints/step_N or a run folder"
        )
    problem = damage(candidates[0])
    if problem is not None:
        raise ValueError(
            f"{candidates[0]} is damaged or unfinished ({problem}); use another checkpoint"
        )
    return candidates[0]


def export(checkpoint_dir: Path, out: Path) -> dict[str, Any]:
    """Write the exported model of a checkpoint.

    Args:
        checkpoint_dir: A checkpoint, a `checkpoints` folder or a run folder (its newest
            checkpoint).
        out: Folder to make.

    Returns:
        The provenance that was written.
    """
    checkpoint = resolve(checkpoint_dir)
    config = load_config(checkpoint / "config.yaml")
    state = read_state(checkpoint)
    with _quiet():
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name
        )
    graph = checkpoint / GRAPH
    provenance = asdict(state) | {
        "checkpoint": checkpoint.name,
        "commit": git_commit(),
        "validation": _validation(checkpoint, state.step),
        "environment": environment(),
    }
    write_model_dir(
        out,
        weights=weights,
        model=config.model,
        transform=transform_of(config),
        genes=checkpoint / "genes.tsv",
        graph=graph if graph.is_file() else None,
        features=features_of(checkpoint, config, state.step),
        provenance=provenance,
    )
    return provenance


def features_of(checkpoint: Path, config: RunConfig, step: int) -> dict[str, Tensor] | None:
    """Return the random features (M, K) by `stack.layer` that belong to a checkpoint's weights.

    They are drawn here and not where the model is used: another processor may round differently.
    """
    if config.model.attention != "favor":
        return None
    redraws = redraw_index(config, step)
    if redraws == 0 and (checkpoint / FEATURES).is_file():
        return read_features(checkpoint / FEATURES)
    return drawn_features(config.model, redraws)


def transform_of(config: RunConfig) -> Transform:
    """Return the value transform of a run."""
    return Transform(name="log1p_total", target_sum=config.data.target_sum)


def redraw_index(config: RunConfig, step: int) -> int:
    """Return which draw of the random features belongs to the state after a number of steps."""
    interval = config.model.feature_redraw_interval
    return step // interval if interval else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds export`."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="a checkpoint or a run folder"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="MODEL_DIR", help="folder to make"
    )


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds export`."""
    provenance = export(args.checkpoint, args.out)
    log.info("wrote %s from step %d of %s", args.out, provenance["step"], args.checkpoint)
    return 0


def _validation(checkpoint: Path, step: int) -> dict[str, float]:
    """Return the last validation figures up to a step.

    Empty unless the checkpoint still lies in its run folder.
    """
    run_dir = checkpoint.parent.parent
    if not (run_dir / "metrics.jsonl").is_file():
        return {}
    rows = [r for r in read_metrics(run_dir) if "val/mse" in r and r["step"] <= step]
    names = ("val/mse", "val/baseline_mse", "val/pearson", "val/baseline_pearson")
    return {n: rows[-1][n] for n in names if n in rows[-1]} if rows else {}


def _prune(folder: Path, keep_last: int) -> None:
    for old in complete_checkpoints(folder)[keep_last:]:
        shutil.rmtree(old)


def _fingerprint(path: Path) -> list[int]:
    crc, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return [size, crc]


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Swallow what DeepSpeed prints on stdout while it saves, loads or merges."""
    return contextlib.redirect_stdout(io.StringIO())
