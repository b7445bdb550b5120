"""Calls the callbacks of a run, on all ranks at the same places of the training loop.

One rank's exception reaches every rank, so that none waits for a rank that has given up. That costs
a sum over the ranks for each call, and nothing in a run without callbacks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch.distributed as dist

from sclong_ds.engine.ranks import Ranks, sum_over_ranks
from sclong_ds.job.failures import in_a_line
from sclong_ds.job.watchdog import PATIENCE, Watchdog
from sclong_ds.training.callbacks.callback import Callback, TrainingRun

log = logging.getLogger("sclong_ds.pretrain")


class CallbackError(RuntimeError):
    """A callback raised on some rank; on that rank, this is raised from its exception."""


class Callbacks:
    """The callbacks of a run; all ranks call the methods at the same places.

    Args:
        callbacks: This rank's.
        ranks: The ranks.
        watchdog: Told that callbacks are waited for.
    """

    def __init__(self, callbacks: Sequence[Callback], ranks: Ranks, watchdog: Watchdog) -> None:
        self._callbacks, self._ranks, self._watchdog = tuple(callbacks), ranks, watchdog
        self._anywhere = sum_over_ranks(ranks, len(self._callbacks))[0] > 0

    def start(self, run: TrainingRun) -> None:
        """Tell them of the run.

        Raises:
            CallbackError: On all ranks, as all methods but `end`.
        """
        self._call(run.step, "on_start", run)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell them of a step."""
        self._call(step, "on_step", step, MappingProxyType(dict(metrics)))

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell them of a validation."""
        self._call(step, "on_validation", step, MappingProxyType(dict(metrics)))

    def checkpoint(self, step: int, path: Path) -> None:
        """Tell them of a checkpoint."""
        self._call(step, "on_checkpoint", step, path)

    def end(self, step: int, outcome: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        """Tell them of the end; ranks need not come here together.

        Raises:
            CallbackError: Of a run that did not fail before.
        """
        error = self._first_error("on_end", step, outcome)
        if error is not None and outcome != "FAILED":
            raise error
        if error is not None:
            log.error("%s", error)

    def _call(self, step: int, method: str, *args: Any) -> None:
        if not self._anywhere:
            return
        self._watchdog.beat(step, f"callbacks: {method}", patience=PATIENCE)
        error = self._first_error(method, *args)
        if not sum_over_ranks(self._ranks, error is not None)[0]:
            return
        everyone: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(everyone, None if error is None else str(error), self._ranks.control)
        if error is not None:
            raise error
        rank, text = next((r, text) for r, text in enumerate(everyone) if text is not None)
        raise CallbackError(f"rank {rank}: {text}")

    def _first_error(self, method: str, *args: Any) -> CallbackError | None:
        """Call a method of all callbacks up to the first that raises."""
        for callback in self._callbacks:
            try:
                getattr(callback, method)(*args)
            except Exception as cause:  # noqa: BLE001 - whatever the caller's code raises
                name, kind = type(callback).__name__, type(cause).__name__
                error = CallbackError(f"{name}.{method}: {kind}: {in_a_line(cause)}")
                error.__cause__ = cause
                return error
        return None
