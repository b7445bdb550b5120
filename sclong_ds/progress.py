"""Progress of long work: a bar on a terminal, about one log line a minute elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60.0
_log = logging.getLogger(__name__)


def progress_bar(
    total: int | None,
    *,
    unit: str,
    stage: str | None = None,
    done: int = 0,
    shown: bool = True,
    scaled: bool = False,
) -> tqdm:
    """Return a bar, which is silent where there is no terminal to show it on.

    Args:
        total: How many there are; None: unknown.
        unit: What is counted.
        stage: What is done, before the bar.
        done: How many were finished before.
        shown: False keeps it silent.
        scaled: Whether counts are written with k, M, G, as of bytes.
    """
    return tqdm(
        total=total, initial=done, desc=stage, unit=unit, unit_scale=scaled,
        disable=not (shown and sys.stderr.isatty()),
    )  # fmt: skip


@contextmanager
def stage_progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function to call with (stage, done, all); a new stage starts a new bar.

    Args:
        unit: What is counted, such as cells.
    """
    bar: tqdm | None = None
    current = ""
    last_line = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal bar, current, last_line
        if not sys.stderr.isatty():
            if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                _log.info("%s: %d of %d %s", stage, done, total, unit)
                last_line = time.monotonic()
            return
        if bar is None or stage != current:
            if bar is not None:
                bar.close()
            bar, current = progress_bar(total, unit=f" {unit}", stage=stage), stage
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def count_progress(stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the number that was newly finished.

    Args:
        stage: What is done, such as embed.
        total: How many there are.
        unit: What is counted, such as cells.
    """
    done = 0
    with stage_progress(unit) as report:

        def add(n: int) -> None:
            nonlocal done
            done += n
            report(stage, done, total)

        yield add
