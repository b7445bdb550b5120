"""What a caller of `sclong_ds.train` may have called while a run trains.

Trackers hear of a run from its files, later and on a thread of their own
(`sclong_ds.recorders.recorder`); a callback is called in the loop, which waits for it, and may stop
the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sclong_ds.config.sections import RunConfig

if TYPE_CHECKING:
    from sclong_ds.model.sclong import ScLong


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """The run that a callback is told of when it starts."""

    run_dir: Path
    config: RunConfig
    model: ScLong
    """As it is trained: call it under `torch.no_grad()` and leave it in the mode it is in. With
    ZeRO stage 3 each rank holds a part of its weights."""
    rank: int
    world_size: int
    step: int
    """Optimizer steps that earlier starts have made."""
    stop: Callable[[str], None]
    """Call it with a reason, on any rank: all ranks stop after the step, save, and `train` raises
    InterruptedError with the reason. Training again resumes. In `on_step` of the last step it stops
    only a validation that is due, which training again makes; later, or with none due, the run is
    finished and `train` returns."""


class Callback:
    """Base class of callbacks for `sclong_ds.train`: override what is wanted of it.

    All methods are called on every rank, in the order of the list, while the run waits: give every
    rank the same ones. What one raises ends the run on all ranks after its last finished step is
    saved; `train` raises it where it was raised, and RuntimeError on the other ranks. The run is
    recorded as failed with that error; training again resumes. A method, `on_end` excepted, that
    takes longer than four times `engine.timeout_s` ends the process, as a hang.
    """

    def on_start(self, run: TrainingRun) -> None:
        """Take the run, opened and resumed, before its first step.

        Args:
            run: What is trained, and how to stop it.
        """

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take an optimizer step.

        Args:
            step: Its number, from 1.
            metrics: The row of metrics.jsonl, such as `train/loss`: see docs/reference/metrics.md.
                Times are this rank's.
        """

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take a validation; one at the step that a start resumes from is made again.

        Args:
            step: The last finished step.
            metrics: Such as `val/mse`.
        """

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Take a checkpoint that is whole on disk; steps may have been made since it began.

        What this raises of a run that is failing already is logged.

        Args:
            step: Its step.
            path: Its folder, which may be deleted when newer ones are written.
        """

    def on_end(self, step: int, outcome: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        """Take the end, after all is recorded; what this raises is logged where the run failed.

        Args:
            step: The last finished step.
            outcome: KILLED: asked to stop, and saved.
        """
