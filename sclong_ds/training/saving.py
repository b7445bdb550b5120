"""When a run saves: checkpoints begin here, are written while training continues, and are finished.

Every rank calls the methods of its `Saver` at the same places of the training loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sclong_ds.checkpoint import save as checkpoint
from sclong_ds.checkpoint.on_disk import name_of, record_best
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.config.sections import CheckpointConfig
from sclong_ds.engine.deepspeed_engine import Engine
from sclong_ds.engine.ranks import Ranks, sum_over_ranks
from sclong_ds.exported.model_dir import FEATURES, GRAPH
from sclong_ds.job.watchdog import PATIENCE, Watchdog
from sclong_ds.run_folder.files import RUN_FILE
from sclong_ds.run_folder.rows import Judged
from sclong_ds.tracking.tracker import Tracker
from sclong_ds.training.callbacks.calling import CallbackError, Callbacks

# The messages are part of the training log.
log = logging.getLogger("sclong_ds.pretrain")

COPIED = ("config.yaml", "genes.tsv", GRAPH, FEATURES, RUN_FILE)
"""Files of the run folder that make a checkpoint self-contained, and say which run it is of."""


class Saver:
    """Saves a run; all ranks together.

    Args:
        run_dir: Run folder.
        settings: Section checkpoint.
        engine: What is saved.
        ranks: The ranks.
        tracker: Told about every checkpoint.
        watchdog: Told that one begins, which takes longer than other phases.
        callbacks: Told about every checkpoint too, by `tell_callbacks`.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        *,
        engine: Engine,
        ranks: Ranks,
        tracker: Tracker,
        watchdog: Watchdog,
        callbacks: Callbacks,
    ) -> None:
        self._run_dir, self._settings, self._engine = run_dir, settings, engine
        self._ranks, self._tracker, self._watchdog = ranks, tracker, watchdog
        self._callbacks = callbacks
        self.last: str | None = None
        """Name of the newest good checkpoint."""
        self._pending: checkpoint.Saving | None = None
        self._validated: tuple[int, Judged] | None = None
        self._failed_in_a_row = 0
        self._stalled_s = 0.0
        self._untold: list[tuple[int, Path]] = []

    def save(self, state: TrainState, *, must: bool) -> None:
        """Begin to write a checkpoint; finish it where training has to wait.

        A failure, for instance a full disk, is logged and the run continues from memory, unless the
        checkpoint must be there or checkpoint.max_failed_saves failed in a row.

        Args:
            state: The state after the last finished step.
            must: The run ends here: wait for the checkpoint, without a copy of it in memory;
                nothing to do if it is there. One before it that could not be written is only
                logged.

        Raises:
            SaveError: The run cannot continue without the checkpoint.
        """
        step = state.step
        try:
            self.settle(step)
        except checkpoint.SaveError as error:
            if not must:
                raise
            log.error("%s", error)
        if must and self.last == name_of(step):
            return
        background = self._settings.asynchronous and not must
        with self._stall(step):
            try:
                self._pending = checkpoint.begin_save(
                    self._engine,
                    self._run_dir / "checkpoints",
                    state,
                    files=[self._run_dir / n for n in COPIED if (self._run_dir / n).is_file()],
                    settings=self._settings,
                    by=self._validated[1]
                    if self._validated and self._validated[0] == step
                    else None,
                    background=background,
                )
            except checkpoint.SaveError as error:
                self._failed(error, step=step, must=must)
        if not background:
            self.settle(step, must=must)

    def save_before_failing(self, state: TrainState) -> None:
        """Save the last finished step of a run that cannot continue, and tell the callbacks.

        What fails here is logged: it must not hide why the run cannot continue.
        """
        if state.step:
            try:
                self.save(state, must=True)
            except checkpoint.SaveError as error:
                log.error("%s", error)
        self.tell_callbacks(failing=True)

    def tell_callbacks(self, *, failing: bool = False) -> None:
        """Tell the callbacks of the checkpoints that were finished since the last call.

        Not while a checkpoint or a step is being made: what they raise must cost neither.

        Args:
            failing: The run fails already: log what they raise.

        Raises:
            CallbackError: On all ranks.
        """
        while self._untold:
            step, folder = self._untold.pop(0)
            try:
                self._callbacks.checkpoint(step, folder)
            except CallbackError as error:
                if not failing:
                    raise
                log.error("%s", error)

    def settle_if_written(self, step: int) -> None:
        """Finish the checkpoint that is being written, if all ranks have written their part.

        Args:
            step: The last finished step.
        """
        if self._pending is None:
            return
        written = sum_over_ranks(self._ranks, self._pending.writer.is_done())[0]
        if written == self._ranks.world_size:
            self.settle(step)

    def settle(self, step: int, *, must: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one, and finish it.

        Args:
            step: The last finished step.
            must: The run cannot continue without it.

        Raises:
            SaveError: It could not be written, and must be there or was not the first.
        """
        if self._pending is None:
            return
        saving, self._pending = self._pending, None
        with self._stall(step):
            try:
                saved = checkpoint.finish_save(saving)
            except checkpoint.SaveError as error:
                self._failed(error, step=saving.state.step, must=must)
                return
        self._failed_in_a_row, self.last = 0, saved.name
        self._tracker.event(
            "checkpoint", step=saving.state.step, path=saved.name, bytes=saved.n_bytes,
            seconds=round(saved.seconds, 3),
        )  # fmt: skip
        log.info("saved %s, %.1f MB in %.1f s", saved.name, saved.n_bytes / 1e6, saved.seconds)
        self._untold.append((saving.state.step, self._run_dir / "checkpoints" / saved.name))

    def judge(self, state: TrainState, by: Judged) -> None:
        """Take the figures of a validation, by which the checkpoint of its step is judged.

        Args:
            state: The state that was validated.
            by: Its figures.
        """
        self._validated = (state.step, by)
        if self._ranks.rank == 0 and self.last == name_of(state.step):
            # A run that was stopped before it validated at this step, and continues from there.
            try:
                record_best(
                    self._run_dir / "checkpoints", name_of(state.step), by,
                    compared_after=state.compared_after,
                )  # fmt: skip
            except OSError as error:  # on this rank alone
                log.warning("the best checkpoint is not recorded: %s", error)

    def take_stalled_s(self) -> float:
        """Return how long training stood still for checkpoints since the last call, in seconds."""
        stalled, self._stalled_s = self._stalled_s, 0.0
        return stalled

    def _failed(self, error: checkpoint.SaveError, *, step: int, must: bool) -> None:
        """Record a checkpoint that could not be written; raise if the run must have it."""
        self._failed_in_a_row += 1
        self._tracker.event("checkpoint_failed", step=step, error=str(error))
        if must or self._failed_in_a_row >= self._settings.max_failed_saves:
            self.tell_callbacks(failing=True)
            raise error
        log.error("%s", error)

    @contextmanager
    def _stall(self, step: int) -> Iterator[None]:
        """Add the time of a block to what training stood still."""
        self._watchdog.beat(step, "checkpoint", patience=PATIENCE)
        started = time.perf_counter()
        yield
        self._stalled_s += time.perf_counter() - started
