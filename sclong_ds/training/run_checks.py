"""What a training run checks before it resumes, and its messages when it cannot."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.history import read_saved
from sclong_ds.config.sections import DataConfig, ObjectiveConfig, OptimConfig, RunConfig
from sclong_ds.config.strict_yaml import flat, override, to_dict
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import earlier_hashes
from sclong_ds.engine.ds_config import changed_keys
from sclong_ds.files.sealed_json import read_sound
from sclong_ds.loader.weights import BY_COLUMN

log = logging.getLogger(__name__)
OF_CELLS = ("corpus_hash", "weights_hash", "balance_hash")
"""Of `TrainState`, what follows the cells of a corpus that grows."""

GROWN = (
    "; to train on with more data, export the run and start from it (run.init_from), which tells "
    "whether the validation cells are still held-out ones"
)


def with_order_of_run(run_dir: Path, data: DataConfig) -> DataConfig:
    """Return the data section with the order of cells that a run by groups began with.

    A run of an earlier version ends under its order, also where a preset has another one now.

    Args:
        run_dir: Run folder, which need not exist.
        data: The section of this start.
    """
    saved = run_dir / "config.yaml"
    try:
        before = read_saved(saved).get("data") if saved.is_file() else None
    except ValueError:
        # Named when the checkpoint is opened, whose own copy counts.
        return data
    if not isinstance(before, dict) or (before.get("order"), data.order) != (
        "groups", "lanes"
    ):  # fmt: skip
        return data
    log.info("data.order: this run began with the order by groups and keeps it")
    chunks = before["shuffle_group_chunks"]
    return replace(data, order="groups", shuffle_group_chunks=chunks)


def refuse_changes(checkpoint: Path, config: RunConfig) -> None:
    """Refuse to continue from a checkpoint under another model, data or objective section.

    So is `run.init_from`: a run begins once, and what it began from tells which cells it has seen.
    Another path of the same folder is the same. Paths of the other sections may change, their
    content may not; so may what has no influence on the weights. Another objective is taken with
    run.accept_changes. The checkpoint's own config.yaml counts, which its manifest covers.

    Args:
        checkpoint: The checkpoint to continue from, in the run folder.
        config: The configuration to continue with.

    Raises:
        ValueError: What differs.
    """
    saved, run_dir = checkpoint / "config.yaml", checkpoint.parent.parent
    before, now = read_saved(saved), to_dict(config)
    names = ("model", "data", "objective", "run")
    lost = [name for name in names if not isinstance(before.get(name), dict)]
    if lost:
        raise ValueError(f"{saved}: damaged (has no section {lost[0]}); use another checkpoint")
    free = {f"model.{key}" for key in ("gene_graph", "gene_vectors", "random_features_file")}
    free |= {
        f"data.{key}"
        for key in (
            "corpus",
            "dataset_weights",
            "cache_dir",
            "cells_cache",
            "prefetch_batches",
            "on_damage",
            "grown",
            "loader_memory",
        )
    }
    lines = [
        line
        for section in ("model", "data")
        for line in _differences(before, now, section)
        if line.partition(":")[0] not in free
    ]
    began, begins = before["run"].get("init_from"), now["run"]["init_from"]
    if (began and Path(str(began)).resolve()) != (begins and Path(begins).resolve()):
        lines.append(f"run.init_from: {began!r} -> {begins!r}")
    if lines:
        raise ValueError(
            f"run.dir={run_dir}: cannot resume with a changed configuration "
            f"({'; '.join(lines)}); to continue it set {_as_before(before, now, free)}, or use a "
            f"new run.dir"
        )
    changed = _differences(before, now, "objective")
    if changed and not config.run.accept_changes:
        raise ValueError(
            f"run.dir={run_dir}: another objective than the run's ({'; '.join(changed)}), under "
            f"which losses mean something else: undo the change, use a new run.dir, or add "
            f"run.accept_changes=true to continue with losses that cannot be compared"
        )


def _as_before(before: Mapping[str, Any], now: Mapping[str, Any], free: AbstractSet[str]) -> str:
    """Return the settings with which a run continues as it began, as a command line has them.

    Those of the optimizer are among them: a preset may have changed more than is refused.
    """
    found = []
    for section in ("model", "data", "optim", "run"):
        current = flat(now[section], section)
        keys = current if section != "run" else ("run.init_from",)
        saved = flat(before.get(section, {}), section)
        found += [
            override(key, saved[key])
            for key in keys
            if key in saved and key not in free and saved[key] != current[key]
        ]
    return " ".join(found)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], section: str) -> list[str]:
    """Return the keys of a section whose values differ, with both values."""
    return [
        f"{section}.{key}: {before[section].get(key)!r} -> {value!r}"
        for key, value in now[section].items()
        if before[section].get(key) != value
    ]


def changed_measure(
    checkpoint: Path, objective: ObjectiveConfig, *, validation_cells: int
) -> list[str]:
    """Return the settings of what validation measures that are not those of a checkpoint.

    Args:
        checkpoint: The checkpoint that the run continues from.
        objective: The section to continue with.
        validation_cells: Number of cells to continue with.
    """
    before = read_saved(checkpoint / "config.yaml")
    now = {"objective": to_dict(objective), "run": {"validation_cells": validation_cells}}
    return [line for section in now for line in _differences(before, now, section)]


def changed_ds_config(saved: Path, ds_config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what DeepSpeed's configuration has other values of than at the run's last start.

    A file of the same name may hold something else by now.

    Args:
        saved: The ds_config.json of the run folder.
        ds_config: That of this start, resolved.

    Returns:
        Old and new value by `ds_config.KEY`; nothing for a folder without one.
    """
    before = read_sound(saved)
    found = changed_keys(before, ds_config) if before else {}
    return {f"ds_config.{key}": values for key, values in found.items()}


def changed_settings(saved: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that are not those of the run's last start.

    Args:
        saved: The config.yaml of the run folder.
        config: The configuration of this start.

    Returns:
        Old and new value by `section.key`; nothing for a folder without a configuration. The
        schedule is compared in steps, so that it counts as changed where another length of the
        run changes it, and 0.02 of 50,000 steps are 1,000 steps.
    """
    if not saved.is_file():
        return {}
    before = _in_steps(read_saved(saved), config.optim)
    now = _in_steps(to_dict(config), config.optim)
    return {
        f"{section}.{key}": (before.get(section, {}).get(key), value)
        for section, keys in now.items()
        for key, value in keys.items()
        if before.get(section, {}).get(key) != value and key != "accept_changes"
    }


def _in_steps(tree: dict[str, Any], optim: OptimConfig) -> dict[str, Any]:
    """Return a configuration's sections with the schedule in steps."""
    found, steps = tree.get("optim", {}), tree.get("run", {}).get("max_steps")
    keys = ("warmup_steps", "decay_steps")
    if not isinstance(steps, int) or not found.keys() >= set(keys):
        return tree
    resolved = replace(optim, **{key: found[key] for key in keys}).in_steps(steps)
    return tree | {"optim": found | {key: getattr(resolved, key) for key in keys}}


def has_grown(found: TrainState, corpus: Corpus) -> bool:
    """Tell whether parts came to the corpus of a checkpoint.

    Args:
        found: State of the checkpoint.
        corpus: The corpus of this start.
    """
    return found.corpus_hash in earlier_hashes(corpus)


def refuse_other_inputs(
    run_dir: Path, found: TrainState, now: TrainState, *, grown: bool | None = None
) -> None:
    """Refuse to resume on other cells, genes, graph or seed, or with other files of the optimizer.

    Args:
        run_dir: Run folder.
        found: State of the checkpoint.
        now: State that the run would begin with.
        grown: `data.grown` where parts came to the corpus, None where it is another one.

    Raises:
        ValueError: What differs.
    """
    if (found.precision, found.zero_stage) != (now.precision, now.zero_stage):
        raise ValueError(
            f"run.dir={run_dir}: was saved with ZeRO stage {found.zero_stage} in "
            f"{found.precision}, this run has stage {now.zero_stage} in {now.precision}: "
            f"set engine.ds_config and engine.precision back, or use a new run.dir"
        )
    names = (
        "seed", "corpus_hash", "genes_hash", "graph_hash", "features_hash", "weights_hash"
    )  # fmt: skip
    changed = [n for n in names if getattr(found, n) != getattr(now, n)]
    if grown is False and "corpus_hash" in changed:
        raise ValueError(
            f"run.dir={run_dir}: cannot resume, parts came to the corpus since the checkpoint: add "
            f"data.grown=true to continue with their cells, too, or use a new run.dir"
        )
    if grown:
        # The weights are of all datasets, new ones among them.
        changed = [name for name in changed if name not in OF_CELLS]
    if changed:
        raise ValueError(
            f"run.dir={run_dir}: cannot resume, {', '.join(changed)} differ from the "
            f"checkpoint's; use the same corpus, gene graph, random features, dataset weights and "
            f"run.seed, or a new run.dir{GROWN * ('corpus_hash' in changed)}"
        )
    # Earlier versions wrote no hash of weights, and weighed by datasets alone.
    by_column = (now.balance_hash or "").startswith(BY_COLUMN)
    if found.balance_hash != now.balance_hash and (found.balance_hash or by_column) and not grown:
        raise ValueError(
            f"run.dir={run_dir}: cannot resume, data.balance_by weighs the cells otherwise than "
            f"before, since the annotations of the corpus are others (finalize writes them); take "
            f"the corpus as it was, or a new run.dir"
        )
