"""Judges every optimizer step: applied and ordinary, a loss spike, or skipped as not finite.

`sclong_ds.pretrain` asks `StepGuard.judge` once a step, on every rank and with the same global
figures, so that all ranks come to the same verdict and stop together. DeepSpeed does not apply a
step whose gradient norm is not finite, and says nothing: the guard counts such steps and stops the
run when too many come in a row. A resumed run judges as an uninterrupted one: what the guard
remembers is a function of the rows of metrics.jsonl (`history_of`). Reads and writes nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sclong_ds.run_folder.metric_names import SKIPPED_METRIC

MIN_LOSSES = 20
"""Losses that must have been seen before one can be called a spike."""

SHIFT_STEPS = 5
"""Spikes in a row that are reported; then the loss has a new level, which is no spike any more."""

# Losses that hardly differ have no spread: below 0.1% of their median no rise is worth a report.
_LEAST_SPREAD = 1e-3
# The median absolute deviation of a normal distribution is 1 / 1.4826 of its standard deviation.
_MAD_TO_STD = 1.4826
_NAMED_CELLS = 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of one step."""

    kind: Literal["ok", "spike", "skipped"]
    """skipped: the weights have not changed."""
    text: str
    """One line for the log; empty when there is nothing to say."""


@dataclass(frozen=True, slots=True)
class History:
    """What a guard remembers of the steps so far."""

    losses: tuple[float, ...] = ()
    """Losses of the last applied steps, oldest first."""
    skipped: int = 0
    """Skipped steps since the run began."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last applied one."""


def history_of(rows: Iterable[Mapping[str, float]], *, step: int, spike_window: int) -> History:
    """Return what a guard knew after a step, from what the run has logged.

    Args:
        rows: Rows of `run_folder.read_metrics`, by step; other rows than those of steps are passed
            over.
        step: The step that the run continues from; later rows are of a start that was cut off.
        spike_window: As the guard's.
    """
    losses: deque[float] = deque(maxlen=_memory(spike_window))
    skipped = in_a_row = 0
    for row in rows:
        if "train/loss" not in row or row["step"] > step:
            continue
        total = int(row.get(SKIPPED_METRIC, skipped))
        if total > skipped:
            skipped, in_a_row = total, in_a_row + 1
        else:
            in_a_row = 0
            losses.append(row["train/loss"])
    return History(tuple(losses), skipped, in_a_row)


class StepGuard:
    """Judges the steps of one run, in their order.

    Args:
        spike_zscore: A loss this many robust standard deviations above the median of the last ones
            is a spike; 0: none is.
        spike_window: Number of those losses, at least `MIN_LOSSES` unless spike_zscore is 0.
        max_skipped_in_a_row: Skipped steps in a row that stop the run.

    Raises:
        ValueError: The window is too short to measure a spread.
    """

    def __init__(
        self, *, spike_zscore: float, spike_window: int, max_skipped_in_a_row: int
    ) -> None:
        if spike_zscore and spike_window < MIN_LOSSES:
            raise ValueError(
                f"run.spike_window: got {spike_window}, allowed: at least {MIN_LOSSES}, or "
                f"run.spike_zscore=0 to look for no spikes"
            )
        self._zscore, self._window = spike_zscore, spike_window
        self._max_skipped = max_skipped_in_a_row
        self.restore(History())

    @property
    def skipped(self) -> int:
        """Skipped steps since the run began, over all restarts."""
        return self._skipped

    @property
    def history(self) -> History:
        """What the guard remembers."""
        return History(tuple(self._losses), self._skipped, self._skipped_in_a_row)

    def restore(self, history: History) -> None:
        """Continue from what the guard of an earlier start remembered."""
        self._losses = deque(history.losses, maxlen=_memory(self._window))
        self._skipped = history.skipped
        self._skipped_in_a_row = history.skipped_in_a_row
        losses = list(self._losses)
        self._spikes_in_a_row = 0
        while losses and self._spikes_in_a_row < SHIFT_STEPS:
            last = losses.pop()
            if self._sigmas(last, losses) is None:
                break
            self._spikes_in_a_row += 1

    def judge(
        self,
        loss: float,
        *,
        grad_norm: float,
        applied: bool,
        step: int,
        cells: Sequence[int],
        last_checkpoint: str | None,
    ) -> Verdict:
        """Judge one step; every rank calls it with the same figures.

        Args:
            loss: The step's loss over all ranks.
            grad_norm: The step's global gradient norm.
            applied: Whether the optimizer changed the weights.
            step: The step's number, from 1.
            cells: Corpus rows of the step's cells.
            last_checkpoint: Name of the newest checkpoint; None: there is none.

        Raises:
            ValueError: Too many skipped steps in a row, or a step that is not finite was applied.
        """
        what = f"the loss is {loss:.6g}, the gradient norm {grad_norm:.6g}{_named(cells)}"
        back = "none yet" if last_checkpoint is None else f"{last_checkpoint} of the run folder"
        if not applied:
            return self._skip(f"step {step}", what, back)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise ValueError(
                f"step {step}: {what}, yet the optimizer has changed the weights; lower optim.lr "
                f"or look at these cells, then start again (last good checkpoint: {back})"
            )
        self._skipped_in_a_row = 0
        sigmas = self._sigmas(loss, list(self._losses))
        self._losses.append(loss)
        # Spikes enter the window too: a median does not move for a few of them, and the window
        # stays what metrics.jsonl says it is.
        if sigmas is None:
            self._spikes_in_a_row = 0
            return Verdict("ok", "")
        self._spikes_in_a_row = min(self._spikes_in_a_row + 1, SHIFT_STEPS + 1)
        if self._spikes_in_a_row > SHIFT_STEPS:
            return Verdict("ok", "")
        text = f"step {step}: loss spike, {sigmas:.1f} standard deviations above the last: {what}"
        if self._spikes_in_a_row == SHIFT_STEPS:
            text += f"; spike {SHIFT_STEPS} in a row, not reported again until the loss is back"
        return Verdict("spike", text)

    def _skip(self, step: str, what: str, back: str) -> Verdict:
        self._skipped += 1
        self._skipped_in_a_row += 1
        in_a_row, most = self._skipped_in_a_row, self._max_skipped
        if in_a_row < most:
            text = f"{step} is skipped, the weights stay as they are: {what}"
            return Verdict("skipped", f"{text}; {in_a_row} in a row, {most} stop the run")
        raise ValueError(
            f"{step}: {what}; this is skipped step {in_a_row} in a row, run.max_skipped_steps="
            f"{most} stops the run. Lower optim.lr or look at these cells, then start again (last "
            f"good checkpoint: {back})"
        )

    def _sigmas(self, loss: float, before: list[float]) -> float | None:
        """Return by how many standard deviations a loss is above those before; None: no spike."""
        window = before[-self._window :]
        if not self._zscore or len(window) < MIN_LOSSES:
            return None
        # Median and MAD, not mean and deviation: one spike among the last losses would raise those
        # so far that the next one passed for ordinary.
        median = statistics.median(window)
        spread = _MAD_TO_STD * statistics.median(abs(value - median) for value in window)
        spread = max(spread, _LEAST_SPREAD * abs(median))
        rise = loss - median
        return rise / spread if spread and rise > self._zscore * spread else None


def _memory(spike_window: int) -> int:
    """Return the losses to keep: enough to judge the last SHIFT_STEPS of them again."""
    return spike_window + SHIFT_STEPS


def _named(cells: Sequence[int]) -> str:
    more = ", ..." if len(cells) > _NAMED_CELLS else ""
    return f" (corpus rows {', '.join(str(int(cell)) for cell in cells[:_NAMED_CELLS])}{more})"
