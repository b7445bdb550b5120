"""Opens a run folder to begin or to continue: claim, inputs, first state."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sclong_ds.checkpoint.load import Loaded, load
from sclong_ds.checkpoint.on_disk import restore_best
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.history import VERSION
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import to_dict, to_yaml
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.engine.deepspeed_engine import count_parameters
from sclong_ds.engine.ranks import Ranks, on_first_rank
from sclong_ds.exported.model_dir import FEATURES, GRAPH
from sclong_ds.files.atomic import file_sha256, remove_partials, write_atomic
from sclong_ds.job.starting import Starting
from sclong_ds.run_folder.files import RUN_FILE
from sclong_ds.run_folder.identity import take_over_ids
from sclong_ds.run_folder.lock import lock_run_folder
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.run_folder.seal import say_changes, seal
from sclong_ds.training.guards import history_of
from sclong_ds.training.run import Run, summary
from sclong_ds.training.run_checks import (
    changed_measure,
    changed_settings,
    refuse_changes,
    refuse_other_inputs,
)

log = logging.getLogger(__name__)


def first_state(
    config: RunConfig, ranks: Ranks, corpus: Corpus, ds_config: dict[str, Any]
) -> TrainState:
    """Return the state of a run that has not made a step."""
    return TrainState(
        step=0,
        cells_seen=0,
        world_size=ranks.world_size,
        seed=config.run.seed,
        precision=config.engine.precision,
        zero_stage=ds_config["zero_optimization"]["stage"],
        corpus_hash=corpus.hash,
        genes_hash=corpus.genes.hash,
        graph_hash=hash_of(config.model.gene_graph),
        features_hash=hash_of(config.model.random_features_file),
        weights_hash=hash_of(config.data.dataset_weights),
    )


def hash_of(path: str | None) -> str | None:
    """Return the SHA-256 of an optional file."""
    return file_sha256(path) if path else None


def open_run_folder(run: Run, ds_config: dict[str, Any], starting: Starting) -> None:
    """Lock the run folder, resume, write what the run consists of, start the tracker."""
    run_dir, checkpoint_dir = run.run_dir, run.run_dir / "checkpoints"
    on_first_rank(lambda: claim_run_folder(run))
    found = load(
        run.engine,
        checkpoint_dir,
        accept=partial(refuse_other_run, run),
    )
    if found is not None:
        run.state, run.last_checkpoint = found.state, found.name
        step, window = run.state.step, run.config.run.spike_window
        history = on_first_rank(
            lambda: history_of(read_metrics(run_dir), step=step, spike_window=window)
        )
        # The rows of the last steps may be lost with a machine; the checkpoint is not.
        run.guard.restore(replace(history, skipped=run.state.skipped_steps))
        on_first_rank(lambda: take_over_ids(run_dir, checkpoint_dir / found.name))
        if on_first_rank(
            lambda: changed_measure(
                checkpoint_dir / found.name, run.config.objective,
                validation_cells=run.config.run.validation_cells,
            )
        ):  # fmt: skip
            run.state = replace(run.state, compared_after=step)
            log.log(
                logging.WARNING if run.ranks.rank == 0 else logging.DEBUG,
                "validation measures something else from step %d on: the best checkpoint is chosen "
                "among later ones, and figures before cannot be compared with those after", step
            )  # fmt: skip
    config_file = run_dir / "config.yaml"
    changed = on_first_rank(lambda: changed_settings(config_file, run.config) if found else {})
    on_first_rank(lambda: write_inputs(run, ds_config))
    starting.done()
    run.tracker.start(
        params={
            **to_dict(run.config),
            "world_size": run.ranks.world_size,
            "parameters": count_parameters(run.model),
            "ds_config": ds_config,
        },
        tags={
            "corpus_hash": run.state.corpus_hash,
            "genes_hash": run.state.genes_hash,
            "graph_hash": str(run.state.graph_hash),
        },
        artifacts=[run_dir / "config.yaml", run_dir / "ds_config.json"],
        resumed=found is not None,
        step=run.state.step,
        summary=summary(run),
    )
    record_opening(run, found, changed)


def record_opening(run: Run, found: Loaded | None, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Log and record whether the run is new, and if not, what it continues from and under what."""
    step, world_size = run.state.step, run.ranks.world_size
    if found is None:
        run.tracker.event("start", step=step, world_size=world_size)
        log.info("run folder %s: new run", run.run_dir)
        return
    for problem in found.damaged:
        run.tracker.event("checkpoint_damaged", step=step, problem=problem)
    after = run.state.compared_after
    run.tracker.event(
        "resume", step=step, world_size=world_size, saved_by=found.saved_by, path=found.name,
        seconds=round(found.seconds, 3), **({"compared_after": after} if after else {}),
    )  # fmt: skip
    converted = "" if found.saved_by == world_size else f", converted from {found.saved_by} ranks"
    log.info("run folder %s: resuming after step %d%s", run.run_dir, step, converted)
    for key, (old, new) in changed.items():
        log.warning("%s: %r -> %r, from step %d on", key, old, new, step + 1)
    if changed:
        values = {key: f"{old!r} -> {new!r}" for key, (old, new) in changed.items()}
        run.tracker.event("settings_changed", step=step, **values)


def claim_run_folder(run: Run) -> None:
    """Make the run folder, lock it, and log what is not as an earlier start left it."""
    checkpoints = run.run_dir / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir={run.run_dir}: {error}") from None
    run.lock = lock_run_folder(run.run_dir, wait_s=60)
    remove_partials(run.run_dir)
    say_changes(run.run_dir)
    restore_best(checkpoints)


def refuse_other_run(run: Run, checkpoint: Path, found: TrainState) -> None:
    """Refuse to continue from a checkpoint with another configuration or other inputs.

    Raises:
        ValueError: What differs.
    """
    refuse_changes(checkpoint, run.config)
    refuse_other_inputs(run.run_dir, found, run.state)


def write_inputs(run: Run, ds_config: dict[str, Any]) -> None:
    """Write the resolved configuration and what the model consists of into the run folder."""
    settings = f"version: {VERSION}\n{to_yaml(run.config)}"
    write_atomic(run.run_dir / "config.yaml", settings.encode())
    resolved = json.dumps(ds_config, indent=2) + "\n"
    write_atomic(run.run_dir / "ds_config.json", resolved.encode())
    run.corpus.genes.write(run.run_dir / "genes.tsv")
    model = run.config.model
    parts = {GRAPH: model.gene_graph, FEATURES: model.random_features_file}
    for name, path in parts.items():
        if path:
            write_atomic(run.run_dir / name, Path(path).read_bytes())
    if (run.run_dir / RUN_FILE).exists():  # until the start is recorded, `status` compares
        seal(run.run_dir)
