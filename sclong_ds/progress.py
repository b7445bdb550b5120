"""Progress of long work: a bar on a terminal, about one log line a minute elsewhere.

The only module that uses tqdm, which is imported when a bar is made.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
Bar: TypeAlias = "tqdm"

_SECONDS_BETWEEN_LINES = 60.0
_log = logging.getLogger(__name__)
_training_log = logging.getLogger("sclong_ds.pretrain")


def progress_bar(
    total: int | None, *, unit: str, stage: str | None = None, done: int = 0, shown: bool = True
) -> Bar:
    """Return a bar, which is silent (`disable`) where there is no terminal to show it on.

    Args:
        total: How many there are; None: unknown.
        unit: What is counted; B, for bytes, is written with k, M, G.
        stage: What is done, before the bar.
        done: How many were finished before.
        shown: False keeps it silent.
    """
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, desc=stage, unit=unit, unit_scale=unit == "B",
        disable=not (shown and sys.stderr.isatty()),
    )  # fmt: skip


@contextmanager
def stage_progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function to call with (stage, done, all); a new stage starts a new bar.

    Args:
        unit: What is counted, such as cells; B for bytes.
    """
    bar: Bar | None = None
    current = ""
    last_line = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal bar, current, last_line
        if not sys.stderr.isatty():
            if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                _log.info("%s: %s", stage, _counted(done, total, unit))
                last_line = time.monotonic()
            return
        if bar is None or stage != current:
            if bar is not None:
                bar.close()
            shown_unit = unit if unit == "B" else f" {unit}"
            bar, current = progress_bar(total, unit=shown_unit, stage=stage), stage
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def _counted(done: int, total: int, unit: str) -> str:
    if unit == "B":
        return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
    return f"{done} of {total} {unit}"


@contextmanager
def count_progress(stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the number that was newly finished.

    Args:
        stage: What is done, such as embed.
        total: How many there are.
        unit: What is counted, such as cells; B for bytes.
    """
    done = 0
    with stage_progress(unit) as report:

        def add(n: int) -> None:
            nonlocal done
            done += n
            report(stage, done, total)

        yield add


def each_with_progress(items: Sequence[T], stage: str, unit: str) -> Iterator[T]:
    """Yield items, each counted when the next one is asked for.

    Args:
        items: The items.
        stage: What is done with them.
        unit: What they are.
    """
    with count_progress(stage, len(items), unit) as add:
        for item in items:
            yield item
            add(1)


class StepProgress:
    """Shows the steps of a training: a bar on a terminal, a line a minute in its log.

    Args:
        done: Steps that are made.
        total: Steps of the run.
        shown: Whether this rank shows anything: rank 0 does.
    """

    def __init__(self, done: int, total: int, *, shown: bool) -> None:
        self._total, self._shown, self._next = total, shown, time.monotonic()
        self._bar = progress_bar(total, unit="step", done=done, shown=shown)

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Show one finished step."""
        self._bar.update()
        self._bar.set_postfix(loss=f"{figures['train/loss']:.4f}", refresh=False)
        if self._shown and self._bar.disable and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
            _training_log.info(
                "step %d of %d: loss %.4f, learning rate %.2e",
                step, self._total, figures["train/loss"], figures["train/lr"],
            )  # fmt: skip

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
