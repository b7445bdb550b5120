"""Open a run folder to begin or to continue: claim it, load a checkpoint, write the inputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sclong_ds.checkpoint.load import Loaded, load
from sclong_ds.checkpoint.on_disk import complete_checkpoints, restore_best
from sclong_ds.checkpoint.state import TrainState, read_state
from sclong_ds.config.history import VERSION
from sclong_ds.config.strict_yaml import to_dict, to_yaml
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import earlier_hashes
from sclong_ds.engine.deepspeed_engine import count_parameters
from sclong_ds.engine.ranks import on_first_rank
from sclong_ds.exported.model_dir import FEATURES, GRAPH
from sclong_ds.files.atomic import read_file, remove_partials, write_atomic
from sclong_ds.job.starting import Starting
from sclong_ds.job.watchdog import PATIENCE
from sclong_ds.page.words import counted
from sclong_ds.run_folder.files import RUN_FILE, RunFolder, read_events
from sclong_ds.run_folder.heartbeats import HANG_FILE, read_json
from sclong_ds.run_folder.identity import take_over_ids
from sclong_ds.run_folder.lock import lock_run_folder
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.run_folder.seal import say_changes, seal
from sclong_ds.tracking.description import change_tags
from sclong_ds.tracking.tracker import Tracker
from sclong_ds.training.begin import Run
from sclong_ds.training.guards import history_of
from sclong_ds.training.run import Given, summary
from sclong_ds.training.run_checks import (
    OF_CELLS,
    changed_ds_config,
    changed_measure,
    changed_settings,
    has_grown,
    refuse_changes,
    refuse_other_inputs,
)

log = logging.getLogger(__name__)


def open_run_folder(run: Run, starting: Starting) -> None:
    """Lock the run folder, resume, write what the run consists of, start the tracker."""
    given, opened, counted = run.given, run.opened, run.counted
    run_dir, config = given.run_dir, given.config
    checkpoint_dir = run_dir / "checkpoints"
    starting.phase("checkpoint", f"the newest checkpoint in {run_dir}", patience=PATIENCE)
    on_first_rank(lambda: claim_run_folder(run))
    found = load(
        opened.engine,
        checkpoint_dir,
        accept=partial(refuse_other_run, given, counted.state, opened.cells.corpus),
    )
    grown = None if found is None else take_up(run, found)
    changed = on_first_rank(
        lambda: (
            changed_settings(run_dir / "config.yaml", config)
            | changed_ds_config(run_dir / "ds_config.json", given.ds_config)
            if found
            else {}
        )
    )
    state = counted.state
    # In this order: a start that ends between the two leaves the change to be found again.
    on_first_rank(lambda: record_changes(run_dir, state.step, said(changed)))
    on_first_rank(lambda: write_inputs(given, opened.cells.corpus))
    starting.phase("record", f"rank 0 to record this start in {run_dir} and its trackers")
    opened.tracker.start(
        params={
            **to_dict(config),
            "world_size": given.ranks.world_size,
            "parameters": count_parameters(opened.model),
            "ds_config": given.ds_config,
        },
        tags={
            "corpus_hash": state.corpus_hash,
            "genes_hash": state.genes_hash,
            "graph_hash": str(state.graph_hash),
            **on_first_rank(lambda: change_tags(read_events(run_dir))),
        },
        artifacts=[run_dir / "config.yaml", run_dir / "ds_config.json"],
        resumed=found is not None,
        step=state.step,
        summary=summary(given, opened, state),
        waits=starting.waits,
    )
    # The time-out of the other ranks' first step does not run while rank 0 waits for MLflow.
    dist.barrier()
    record_opening(given, opened.tracker, state, found=found)
    if grown is not None:
        opened.tracker.event("corpus_grown", step=state.step, **grown)
    record_hang(given, opened.tracker, state)


def take_up(run: Run, found: Loaded) -> dict[str, Any] | None:
    """Take over the state of a checkpoint; return what came to its corpus since, if anything."""
    given, counted, now = run.given, run.counted, run.counted.state
    config, corpus = given.config, run.opened.cells.corpus
    checkpoint = given.run_dir / "checkpoints" / found.name
    counted.state, run.saver.last = found.state, found.name
    step, window = found.state.step, config.run.spike_window
    history = on_first_rank(
        lambda: history_of(read_metrics(given.run_dir), step=step, spike_window=window)
    )
    # The rows of the last steps may be lost with a machine; the checkpoint is not.
    counted.guard.restore(replace(history, skipped=found.state.skipped_steps))
    on_first_rank(lambda: take_over_ids(given.run_dir, checkpoint))
    other_measure = on_first_rank(
        lambda: changed_measure(
            checkpoint, config.objective, validation_cells=config.run.validation_cells
        )
    )
    level = logging.WARNING if given.ranks.rank == 0 else logging.DEBUG
    grown = None
    if has_grown(found.state, corpus):
        grown = growth(found.state, corpus)
        of_cells = {name: getattr(now, name) for name in OF_CELLS}
        counted.state = replace(found.state, **of_cells)
        log.log(level, "data.grown: %s", ", ".join(f"{k} {v}" for k, v in grown.items()))
    if other_measure or grown is not None:
        counted.state = replace(counted.state, compared_after=step)
        log.log(
            level,
            "validation measures something else from step %d on: the best checkpoint is chosen "
            "among later ones, and figures before cannot be compared with those after", step
        )  # fmt: skip
    return grown


def growth(found: TrainState, corpus: Corpus) -> dict[str, Any]:
    """Return what came to the corpus of a checkpoint, for the log and the record of the run.

    Args:
        found: State of the checkpoint.
        corpus: The corpus of this start.
    """
    known = earlier_hashes(corpus).index(found.corpus_hash) + 1
    new = corpus.parts[known:]
    return {
        "parts": len(new),
        "datasets": sum(len(part.datasets) for part in new),
        "train_cells": sum(len(part.splits["train"]) for part in new),
        "validation_cells": sum(len(part.splits["validation"]) for part in new),
        "corpus_before": found.corpus_hash[:16],
        "corpus_now": corpus.hash[:16],
    }


def said(changed: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    """Return old and new value of each changed setting, in words."""
    return {key: f"{old!r} -> {new!r}" for key, (old, new) in changed.items()}


def record_changes(run_dir: Path, step: int, changed: Mapping[str, str]) -> None:
    """Log and record the settings that this start changes; on rank 0.

    Args:
        run_dir: Run folder.
        step: Step after which the start resumes.
        changed: Old and new value of each changed setting, in words.
    """
    for key, values in changed.items():
        log.warning("%s: %s, from step %d on", key, values, step + 1)
    if changed:
        with RunFolder(run_dir) as files:
            files.append_event("settings_changed", step=step, **changed)


def record_opening(
    given: Given,
    tracker: Tracker,
    state: TrainState,
    *,
    found: Loaded | None,
) -> None:
    """Log and record whether the run is new, and if not, what it continues from."""
    step, world_size, after = state.step, given.ranks.world_size, state.compared_after
    if found is None:
        tracker.event("start", step=step, world_size=world_size)
        log.info("run folder %s: new run", given.run_dir)
        return
    for problem in found.damaged:
        tracker.event("checkpoint_damaged", step=step, problem=problem)
    tracker.event(
        "resume", step=step, world_size=world_size, saved_by=found.saved_by, path=found.name,
        seconds=round(found.seconds, 3), **({"compared_after": after} if after else {}),
    )  # fmt: skip
    by = counted(found.saved_by, "rank")
    converted = "" if found.saved_by == world_size else f", converted from {by}"
    log.info("run folder %s: resuming after step %d%s", given.run_dir, step, converted)


def record_hang(given: Given, tracker: Tracker, state: TrainState) -> None:
    """Record, once, that the start before hung."""
    path = given.run_dir / "heartbeat" / HANG_FILE

    def record() -> None:
        hang = read_json(path).get("error")
        if hang:
            tracker.event("hung", step=state.step, error=hang)
            # Left there, it would be taken for a hang of this start, and recorded by the next.
            path.unlink(missing_ok=True)

    on_first_rank(record)


def claim_run_folder(run: Run) -> None:
    """Make the run folder, lock it, and log what is not as an earlier start left it."""
    run_dir = run.given.run_dir
    checkpoints = run_dir / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run.dir={run_dir}: {error}") from None
    run.lock = lock_run_folder(run_dir, wait_s=60)
    remove_partials(run_dir)
    say_changes(run_dir)
    restore_best(checkpoints)


def refuse_other_run(
    given: Given, now: TrainState, corpus: Corpus, checkpoint: Path, found: TrainState
) -> None:
    """Refuse to continue from a checkpoint with another configuration or other inputs.

    Raises:
        ValueError: What differs.
    """
    refuse_changes(checkpoint, given.config)
    grown = given.config.data.grown if has_grown(found, corpus) else None
    refuse_other_inputs(given.run_dir, found, now, grown=grown)


def check_run_folder(given: Given, now: TrainState, corpus: Corpus) -> None:
    """Check, without a change, that a run could begin or continue in its folder.

    Args:
        given: What the run is given.
        now: State that it would begin with.
        corpus: Its corpus.

    Raises:
        ValueError: The folder holds another run's checkpoints.
    """
    found = complete_checkpoints(given.run_dir / "checkpoints")
    if found:
        refuse_other_run(given, now, corpus, found[0], read_state(found[0]))


def write_inputs(given: Given, corpus: Corpus) -> None:
    """Write the resolved configuration and what the model consists of into the run folder."""
    config, run_dir = given.config, given.run_dir
    settings = f"version: {VERSION}\n{to_yaml(config)}"
    write_atomic(run_dir / "config.yaml", settings.encode())
    resolved = json.dumps(given.ds_config, indent=2) + "\n"
    write_atomic(run_dir / "ds_config.json", resolved.encode())
    corpus.genes.write(run_dir / "genes.tsv")
    model = config.model
    parts = {GRAPH: model.gene_graph, FEATURES: model.random_features_file}
    for name, path in parts.items():
        if path:
            write_atomic(run_dir / name, read_file(path))
    if (run_dir / RUN_FILE).exists():  # until the start is recorded, `status` compares
        seal(run_dir)
