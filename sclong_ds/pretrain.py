r"""Pretrain scLong: the story from the command to the training step.

    deepspeed --module sclong_ds.pretrain --config sclong_tiny run.dir=runs/a \
        data.corpus=corpus model.gene_graph=graph.npz
    sbatch slurm/pretrain.sh --config sclong_1b run.dir=... data.corpus=... model.gene_graph=...

`main` reads the configuration, `train_as_rank` builds the run and loops, `train_step` is one
optimizer step; `train` is for callers in Python. Starting the same command again on the same
run.dir resumes. Exit status: 0 done, 1 failed, 2 bad usage, 71 a device, network or disk failed, 75
stopped by a signal after saving (start again to continue). Reads the corpus and the gene graph;
writes the run folder (docs/reference/run-folder.md) and MLflow.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from sclong_ds.command_line import add_example, need, parse_arguments
from sclong_ds.config.arguments import EXAMPLE, add_training_arguments
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import EngineConfig, RunConfig
from sclong_ds.input_checks import check_call, check_inputs, check_launch, check_run_dir
from sclong_ds.job import failures
from sclong_ds.job.signals import StopRequest
from sclong_ds.job.starting import Starting
from sclong_ds.page import words
from sclong_ds.run_folder.identity import node_name


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.pretrain",
        description="Pretrain scLong, or resume the run in run.dir.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_training_arguments(parser)
    # The deepspeed launcher passes it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_example(parser, EXAMPLE)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status."""
    args = parse_arguments(parser(), argv)
    run_dir = None
    try:
        check_launch()
        stop = StopRequest()
        rank = int(os.environ.get("RANK", "0"))
        logging.basicConfig(
            level=logging.INFO if rank == 0 else logging.WARNING,
            format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True,
        )  # fmt: skip
        with starting_of(stop) as starting:
            # What is read here may lie on a file system that hangs, and so may the imports.
            starting.waits(f"the configuration {args.config}")
            need("deepspeed", "numba", "pyarrow", extra="train")
            config = load_config(args.config, args.overrides)
            starting.waits(f"the folder of run.dir={config.run.dir}")
            folder = check_run_dir(config.run.dir)
            run_dir = None if args.dry_run else folder
            starting.of_run(run_dir, timeout_s=config.engine.timeout_s)
            starting.waits("the files and folders that the configuration names")
            check_inputs(config)
            starting.phase("imports", f"the imports from {sys.prefix}")
            # This module by its name: run as a program, it ends here before the imports below.
            whole = import_module("sclong_ds.pretrain")
            return int(whole.train_in_group(config, stop, starting, args.dry_run))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # The process group is left as it is: with NCCL, destroying it can wait for the other ranks.
        return failures.report(error, run_dir)


def starting_of(stop: StopRequest) -> Starting:
    """Return the watch over this rank's start."""
    return Starting(stop, rank=int(os.environ.get("RANK", "0")), node=node_name())


if __name__ == "__main__":
    # Before the imports below, which take seconds, and minutes where many nodes read them at once:
    # a wrong command is told at once, and the start can be seen and stopped meanwhile.
    failures.run_to_end(main)

import numpy as np
import torch
import torch.distributed as dist

from sclong_ds.checkpoint.state import TrainState
from sclong_ds.engine.deepspeed_engine import (
    limit_norm,
    peak_memory_gib,
    quiet_deepspeed,
    set_hyper_parameters,
)
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.profiling import check_profile, profiled, unseen_profile
from sclong_ds.engine.ranks import (
    Ranks,
    UnreadableCellsError,
    join_process_group,
    on_first_rank,
    sum_or_raise,
    sum_over_ranks,
)
from sclong_ds.job.exit_status import STOP_STATUS
from sclong_ds.job.watchdog import PATIENCE
from sclong_ds.loader.batches import StepBatch
from sclong_ds.loader.loader import CellLoader, open_stream
from sclong_ds.model.random_features import redraw_index
from sclong_ds.objective.losses import loss_of, n_scored, outputs_of
from sclong_ds.objective.masked_cells import MaskedCells
from sclong_ds.progress import StepProgress
from sclong_ds.run_folder.metric_names import SKIPPED_METRIC, SPIKE_METRIC
from sclong_ds.tracking.check import check_tracking
from sclong_ds.tracking.client import Status
from sclong_ds.training.begin import Run, begin
from sclong_ds.training.callbacks.callback import Callback
from sclong_ds.training.callbacks.calling import CallbackError
from sclong_ds.training.resume import check_run_folder, open_run_folder
from sclong_ds.training.run import Counted, Given, Opened, training_run
from sclong_ds.training.run_checks import with_order_of_run
from sclong_ds.training.timing import StepTimer

log = logging.getLogger("sclong_ds.pretrain")


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> Path:
    """Train in this process: `sclong_ds.train`, for notebooks and scripts.

    Alone, or as one of the ranks of the launcher that started the script. Calling it again with the
    same `run.dir` resumes. A main thread is needed: signals ask for a stop, as for the command.

    Args:
        config: From `load_config`; `run.dir` and `data.corpus` must be set.
        callbacks: Called while it trains, on every rank: see `Callback`. Give all ranks the same.

    Returns:
        The run folder, when all of `run.max_steps` are made.

    Raises:
        InterruptedError: A signal (Ctrl-C) or a callback asked for a stop: a checkpoint is saved.
        TypeError: No configuration, or no list of callbacks.
        ValueError: A wrong setting, a damaged file, or another configuration than the run's.
        FileNotFoundError: A file that the configuration names is absent.
        RuntimeError: A device or another rank failed.
        Exception: What a callback raised, after a checkpoint was saved.
    """
    check_call(config, callbacks)
    check_run_dir(config.run.dir)
    check_inputs(config)
    stop = StopRequest()
    try:
        # The group stays: DeepSpeed cannot join a second one in the same process.
        # Not entered: a hang or Ctrl-C of a start must not end the caller's process.
        starting = starting_of(stop)
        ranks = join(starting, timeout_s=config.engine.timeout_s)
        status = train_as_rank(config, ranks, stop, starting, callbacks=callbacks)
    except CallbackError as error:
        raise error.__cause__ or error from None
    finally:
        stop.release()
    run_dir = Path(str(config.run.dir))
    if status == STOP_STATUS:
        raise InterruptedError(
            f"{run_dir}: stopped by {stop.reason() or 'another rank'} after saving; train again "
            f"with the same configuration to resume"
        )
    return run_dir


def join(starting: Starting, *, timeout_s: int) -> Ranks:
    """Join the ranks of the run."""
    quiet_deepspeed()
    return join_process_group(timeout_s=2 * PATIENCE * timeout_s, watch=starting)


def train_in_group(config: RunConfig, stop: StopRequest, starting: Starting, dry_run: bool) -> int:
    """Join the ranks, train, leave them, and return the exit status."""
    ranks = join(starting, timeout_s=config.engine.timeout_s)
    status = train_as_rank(config, ranks, stop, starting, dry_run=dry_run)
    dist.destroy_process_group()
    return status


def train_as_rank(
    config: RunConfig, ranks: Ranks, stop: StopRequest, starting: Starting,
    *, dry_run: bool = False, callbacks: Sequence[Callback] = (),
) -> int:  # fmt: skip
    """Build the run, go through the optimizer steps, return the exit status."""
    run_dir = Path(str(config.run.dir))
    config = replace(config, data=with_order_of_run(run_dir, config.data))
    check_profile(config.run.profile, config.run.profile_step, ranks.device)
    starting.phase("tracking", "MLflow")
    on_first_rank(lambda: check_tracking(config.tracking, run_dir))
    ds_config = resolve_ds_config(config.engine, world_size=ranks.world_size)
    given = Given(
        config=config, run_dir=run_dir, ds_config=ds_config, ranks=ranks, stop=stop,
        callbacks=tuple(callbacks),
    )  # fmt: skip
    run = begin(given, starting)
    opened, counted = run.opened, run.counted
    unseen = unseen_profile(
        config.run.profile_step, first=counted.state.step + 1, last=config.run.max_steps
    )
    if unseen:
        log.warning("%s", unseen)
    if dry_run:
        on_first_rank(lambda: check_run_folder(given, counted.state, opened.cells.corpus))
        log.info("dry run: everything fits together, nothing was trained")
        return 0
    open_run_folder(run, starting)
    outcome: Status = "FAILED"
    why: dict[str, str] = {}
    progress = StepProgress(counted.state.step, config.run.max_steps, shown=ranks.rank == 0)
    try:
        starting.done()
        with (
            opened.watchdog,
            open_loader(opened.cells, config.engine, ranks, state=counted.state) as loader,
        ):
            if not go_to_the_end(run, loader, progress):
                status = stop_early(run)
                outcome = "KILLED"
                return status
        outcome = "FINISHED"
        log.info(
            "done: %s, %s; run folder %s",
            words.counted(counted.state.step, "step"),
            words.counted(counted.state.cells_seen, "cell"), run_dir,
        )  # fmt: skip
        return 0
    except Exception as error:
        why["error"] = failures.in_a_line(error)
        raise
    finally:
        progress.close()
        opened.tracker.event("finish", step=counted.state.step, outcome=outcome, **why)
        opened.tracker.finish(outcome)
        if run.lock is not None:
            run.lock.release()
        opened.callbacks.end(counted.state.step, outcome)


def go_to_the_end(run: Run, loader: CellLoader, progress: StepProgress) -> bool:
    """Do the steps that are left, with validations and checkpoints; False: asked to stop.

    Raises:
        UnreadableCellsError: After saving the last finished step.
        CallbackError: Likewise.
    """
    settings, counted, validation = run.given.config.run, run.counted, run.validation
    every = run.given.config.checkpoint.every_n_steps

    def validated() -> bool:
        return not validation.is_due(counted.state.step) or validation.validate(counted.state)

    try:
        run.opened.callbacks.start(training_run(run.given, run.opened, counted.state))
        if not validated():
            return False
        while counted.state.step < settings.max_steps:
            step = counted.state.step + 1
            run.opened.watchdog.beat(step, "data", reading=lambda: loader.reading)
            started, waited = time.perf_counter(), loader.waited_s
            batch, n_targets = next_batch(run.opened, counted, loader)
            with looked_into(run, step):
                figures = train_step(run, batch, n_targets)
            if figures is None:
                return False
            figures["perf/data_wait_s"] = loader.waited_s - waited
            record_step(run, figures, step_s=time.perf_counter() - started)
            progress.show(step, figures)
            run.saver.settle_if_written(step)
            run.saver.tell_callbacks()
            done = step == settings.max_steps
            if not validated():
                return False
            if step % every == 0 or done:
                run.saver.save(counted.state, must=done)
                run.saver.tell_callbacks()
    except (UnreadableCellsError, CallbackError):
        run.saver.save_before_failing(counted.state)
        raise
    return True


def next_batch(opened: Opened, counted: Counted, loader: CellLoader) -> tuple[StepBatch, int]:
    """Return this rank's part of the next step, and the targets of the whole.

    Raises:
        UnreadableCellsError: What a rank could not read, on all ranks: others would wait for it.
    """
    batch, problem, mine, skipped = None, None, 0, 0
    step = counted.state.step + 1
    try:
        batch = next(loader)
    except (ValueError, OSError) as error:
        problem = str(error)
    else:
        mine = sum(n_scored(b.extra.targets, opened.cells.model) for b in batch.micro_batches)
        skipped = batch.skipped
    # From here on a rank waits for the others; one that still reads is in an earlier phase.
    opened.watchdog.beat(step, "targets")
    n_targets, n_skipped = sum_or_raise(opened.ranks, mine, skipped, problem=problem)
    assert batch is not None
    counted.skipped_cells += n_skipped
    if n_skipped == batch.n_cells:
        raise UnreadableCellsError(
            f"none of the {n_skipped} cells of step {step} could be read: is "
            f"{opened.cells.corpus.location} still there? Start the same command again when it is"
        )
    return batch, n_targets


def train_step(run: Run, batch: StepBatch, n_targets: int) -> dict[str, float] | None:
    """Do one optimizer step; returns its figures, or None when asked to stop before its end."""
    config, opened, counted = run.given.config, run.opened, run.counted
    ranks, engine, model, watchdog = opened.ranks, opened.engine, opened.model, opened.watchdog
    done, skipped = counted.state.step, counted.guard.skipped
    step, timer = done + 1, StepTimer(ranks.device)
    lr = set_hyper_parameters(engine, config.optim, done - skipped, max_steps=config.run.max_steps)
    model.redraw_features(redraw_index(config.model, done))
    # The loss is the mean over the targets of the global batch, however they are divided. DeepSpeed
    # averages over ranks and micro-batches; the weight undoes that.
    weight = ranks.world_size * len(batch.micro_batches) / max(n_targets, 1)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for micro_batch in batch.micro_batches:
        # A step of many micro-batches takes longer than a launcher waits for its ranks to end.
        if any_rank_must_stop(ranks, opened.stop):
            return None
        watchdog.beat(step, "forward")
        with timer.part("forward"):
            masked = opened.cells.to_device(micro_batch, micro_batch.extra)
            predicted = engine(
                masked.x,
                masked.hidden,
                positions=masked.positions,
                lengths=micro_batch.extra.lengths,
                unmeasured=masked.unmeasured,
                outputs=outputs_of(config.model, config.objective),
            )
            loss = loss_of(predicted, masked, config.model, config.objective)
        watchdog.beat(step, "backward")
        with timer.part("backward"):
            engine.backward(loss * weight)
        with timer.part("optimizer"):
            opened.gradient_norms.measure()
            engine.step()
        total += loss.detach()
    if config.model.mask_vector_max_norm is not None and engine.was_step_applied():
        limit_norm(model.expression_encoder.mask_vector, config.model.mask_vector_max_norm)
    watchdog.beat(step, "loss")
    dist.all_reduce(total)
    figures = {
        "train/loss": total.item() / max(n_targets, 1),
        "train/grad_norm": float(engine.get_global_grad_norm()),
        "train/lr": lr,
        **opened.gradient_norms.figures(),
    }
    judge(run, batch, figures)
    counted.state = replace(
        counted.state,
        step=step,
        cells_seen=counted.state.cells_seen + batch.n_cells,
        skipped_steps=counted.guard.skipped,
    )
    figures |= {"train/n_targets": n_targets, SKIPPED_METRIC: counted.guard.skipped}
    if opened.ranks.rank == 0:
        # Equal in two runs whose step had the same cells in the same order.
        figures["data/cells_crc32"] = zlib.crc32(batch.cell_ids.astype("<i8").tobytes())
    return figures | {f"perf/{name}_s": seconds for name, seconds in timer.seconds().items()}


def judge(run: Run, batch: StepBatch, figures: dict[str, float]) -> None:
    """Say what was wrong with a step: not finite and therefore not applied, or a loss spike.

    Raises:
        ValueError: Too many steps in a row were not finite.
    """
    done, applied = run.counted.state.step, run.opened.engine.was_step_applied()
    loss, grad_norm = figures["train/loss"], figures["train/grad_norm"]
    # What rank 0 says is recorded; the others spare themselves finding the cells of all ranks.
    own = np.concatenate([micro.cell_ids for micro in batch.micro_batches])
    step, cells = done + 1, (batch.cell_ids if run.opened.ranks.rank == 0 else own).tolist()

    def record(event: str) -> None:
        run.opened.tracker.event(event, step=step, loss=loss, grad_norm=grad_norm, cell_ids=cells)

    if not (applied and math.isfinite(loss) and math.isfinite(grad_norm)):
        # The run may end here, and then names its last checkpoint.
        run.saver.settle(done)
    try:
        verdict = run.counted.guard.judge(
            loss, grad_norm=grad_norm, applied=applied, step=step, cells=cells,
            last_checkpoint=run.saver.last,
        )  # fmt: skip
    except ValueError:
        record("spoilt_step" if applied else "skipped_step")
        run.saver.tell_callbacks(failing=True)
        raise
    figures[SPIKE_METRIC] = int(verdict.kind == "spike")
    if verdict.kind != "ok":
        log.warning("%s", verdict.text)
        record("spike" if verdict.kind == "spike" else "skipped_step")


def any_rank_must_stop(ranks: Ranks, stop: StopRequest) -> bool:
    """Tell every rank whether one of them was asked to stop, so that all stop at the same place."""
    return bool(sum_over_ranks(ranks, int(stop.reason() is not None))[0])


def stop_early(run: Run) -> int:
    """Save the last finished step and return the status that asks for a restart.

    Raises:
        CallbackError: After all that.
    """
    state, stop = run.counted.state, run.given.stop
    if state.step:
        run.saver.save(state, must=True)
    run.opened.tracker.event("signal", step=state.step, reason=stop.reason() or "another rank")
    log.info("stopped after step %d; start the same command again to continue", state.step)
    run.saver.tell_callbacks()
    return STOP_STATUS


def looked_into(run: Run, step: int) -> AbstractContextManager[None]:
    """Return what looks into a step as `run.profile` says, or nothing."""
    settings, opened = run.given.config.run, run.opened
    if step != settings.profile_step:
        return nullcontext()
    folder = run.given.run_dir / "profile"
    return profiled(settings.profile, folder, step, engine=opened.engine, ranks=opened.ranks)


def record_step(run: Run, figures: dict[str, float], *, step_s: float) -> None:
    """Log one step's figures; its time includes the wait for data, but no checkpoint.

    `perf/checkpoint_s` is how long training stood still for checkpoints since the row before.
    """
    counted = run.counted
    speed = {
        "cells_seen": counted.state.cells_seen,
        **run.rates.figures(step_s),
        "perf/checkpoint_s": run.saver.take_stalled_s(),
        "mem/peak_gib": peak_memory_gib(run.opened.ranks.device),
    }
    if run.given.config.data.on_damage == "skip":
        speed["data/skipped_cells"] = counted.skipped_cells
    counted.rank_times.add(figures | speed)
    run.opened.tracker.log(counted.state.step, figures | speed)
    run.opened.callbacks.step(counted.state.step, figures | speed)


def open_loader(
    cells: MaskedCells, engine: EngineConfig, ranks: Ranks, *, state: TrainState
) -> CellLoader:
    """Open the loader.

    Args:
        cells: What it reads and prepares.
        engine: Section engine: the sizes of batches.
        ranks: The ranks.
        state: Cells that the run has consumed, and its order of cells.
    """
    data, corpus = cells.data, cells.corpus
    stream = open_stream(
        corpus,
        seed=cells.seed,
        weights=cells.weights,
        group_chunks=None if state.lanes else data.shuffle_group_chunks,
        lanes=state.lanes or None,
        batch=state.lanes_batch or None,
    )
    return CellLoader(
        corpus,
        stream=stream,
        cells_seen=state.cells_seen,
        rank=ranks.rank,
        world_size=ranks.world_size,
        train_batch_size=engine.train_batch_size,
        micro_batch_size=engine.train_micro_batch_size_per_gpu,
        prefetch_batches=data.prefetch_batches,
        on_damage=data.on_damage,
        memory_bytes=data.loader_memory * 10**6,
        finish=cells.prepare,
    )
