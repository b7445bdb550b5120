"""When a run saves: checkpoints begin here, are written while training continues, and are finished.

Every rank calls these functions at the same places of the training loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sclong_ds.checkpoint import save as checkpoint
from sclong_ds.checkpoint.on_disk import name_of
from sclong_ds.engine.ranks import sum_over_ranks
from sclong_ds.exported.model_dir import FEATURES, GRAPH
from sclong_ds.run_folder.files import RUN_FILE
from sclong_ds.training.run import Run

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")

PATIENCE = 4
"""Saving may take this many times engine.timeout_s. Collectives wait twice as long: the watchdog,
which names the slow rank, must come first."""
COPIED = ("config.yaml", "genes.tsv", GRAPH, FEATURES, RUN_FILE)
"""Files of the run folder that make a checkpoint self-contained, and say which run it is of."""


def save(run: Run, *, must: bool) -> None:
    """Begin to write a checkpoint of the current state; finish it where training has to wait.

    A failure, for instance a full disk, is logged and the run continues from memory, unless the
    checkpoint must be there or checkpoint.max_failed_saves failed in a row.

    Args:
        run: The run.
        must: The run ends here: wait for the checkpoint, without a copy of it in memory; nothing
            to do if it is there. One before it that could not be written is only logged.

    Raises:
        SaveError: The run cannot continue without the checkpoint.
    """
    try:
        settle(run)
    except checkpoint.SaveError as error:
        if not must:
            raise
        log.error("%s", error)
    settings, step = run.config.checkpoint, run.state.step
    if must and run.last_checkpoint == name_of(step):
        return
    background = settings.asynchronous and not must
    with _stall(run):
        try:
            run.saving = checkpoint.begin_save(
                run.engine,
                run.run_dir / "checkpoints",
                run.state,
                files=[run.run_dir / n for n in COPIED if (run.run_dir / n).is_file()],
                settings=settings,
                by=run.validated[1] if run.validated and run.validated[0] == step else None,
                background=background,
            )
        except checkpoint.SaveError as error:
            _failed(run, error, step=step, must=must)
    if not background:
        settle(run, must=must)


def save_before_failing(run: Run) -> None:
    """Save the last finished step of a run that cannot continue, unless that fails too."""
    if run.state.step:
        try:
            save(run, must=True)
        except checkpoint.SaveError as error:
            log.error("%s", error)


def settle_if_written(run: Run) -> None:
    """Finish the checkpoint that is being written, if all ranks have written their part."""
    if run.saving is None:
        return
    if sum_over_ranks(run.ranks, run.saving.writer.is_done())[0] == run.ranks.world_size:
        settle(run)


def settle(run: Run, *, must: bool = False) -> None:
    """Wait for the checkpoint that is being written, if there is one, and finish it.

    Args:
        run: The run.
        must: The run cannot continue without it.

    Raises:
        SaveError: It could not be written, and must be there or was not the first.
    """
    if run.saving is None:
        return
    saving, run.saving = run.saving, None
    step = saving.state.step
    with _stall(run):
        try:
            saved = checkpoint.finish_save(saving)
        except checkpoint.SaveError as error:
            _failed(run, error, step=step, must=must)
            return
    run.failed_saves, run.last_checkpoint = 0, saved.name
    run.tracker.event(
        "checkpoint", step=step, path=saved.name, bytes=saved.n_bytes,
        seconds=round(saved.seconds, 3),
    )  # fmt: skip
    log.info("saved %s, %.1f MB in %.1f s", saved.name, saved.n_bytes / 1e6, saved.seconds)


def _failed(run: Run, error: checkpoint.SaveError, *, step: int, must: bool) -> None:
    """Record a checkpoint that could not be written; raise if the run cannot continue without."""
    run.failed_saves += 1
    run.tracker.event("checkpoint_failed", step=step, error=str(error))
    if must or run.failed_saves >= run.config.checkpoint.max_failed_saves:
        raise error
    log.error("%s", error)


@contextmanager
def _stall(run: Run) -> Iterator[None]:
    """Add the time of a block to what the next row of metrics gives as `perf/checkpoint_s`."""
    run.watchdog.beat(run.state.step, "checkpoint", patience=PATIENCE)
    started = time.perf_counter()
    yield
    run.stalled_s += time.perf_counter() - started
