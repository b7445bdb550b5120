"""Many files at a time, each tried until it is there or hopeless; none stops the others.

A process that is killed anywhere leaves parts that the next one continues.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.fetch.budgets import Stopped
from data_prep.fetch.download import Place, Record, Rules, fetch_file
from data_prep.fetch.item import Item
from data_prep.fetch.remote import FetchError
from data_prep.manifest.address import without_secrets
from sclong_ds.progress import Bar, progress_bar

_log = logging.getLogger(__name__)

_LINE_S = 60.0
"""Between two lines about all files where no terminal shows a bar, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one file."""

    item: Item
    record: Record | None
    """None where it is not there."""
    reason: str = ""
    """Why it is not there."""


class Downloads:
    """Threads that fetch files as they are handed over."""

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        *,
        parallel: int,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the threads.

        Args:
            folder: Where the files come to lie.
            rules: How to download.
            parallel: Files at a time.
            arrived: Called in a thread for each outcome.
        """
        self._folder, self._rules, self._arrived = folder, rules, arrived
        rules.stop.clear()
        self._wanted: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        # A daemon: a thread that waits for a silent server must not keep the program alive.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(parallel)]
        for thread in self._threads:
            thread.start()

    def add(self, item: Item) -> None:
        """Hand over a file.

        Args:
            item: The file.
        """
        self._wanted.put(item)

    def outcome(self, wait_s: float) -> Outcome | None:
        """Return what became of the next file that is done, None if none is.

        Args:
            wait_s: How long to wait for one, in seconds.
        """
        try:
            return self._outcomes.get(timeout=wait_s) if wait_s else self._outcomes.get_nowait()
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Let every thread end at its next byte; what came stays."""
        self._rules.stop.set()
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _work(self) -> None:
        while (item := self._wanted.get()) is not None:
            try:
                record = fetch_file(item, self._folder, self._rules)
                self._outcomes.put(Outcome(item=item, record=record))
            except (FetchError, OSError) as error:
                self._outcomes.put(
                    Outcome(item=item, record=None, reason=without_secrets(str(error)))
                )
            except Stopped:
                return
            except BaseException as error:  # noqa: BLE001
                # What no library is known to raise: a thread that ends without an outcome would let
                # the caller wait for ever.
                reason = without_secrets(f"{type(error).__name__}: {error}")
                _log.exception("%s: %s", item.url, reason)
                self._outcomes.put(Outcome(item=item, record=None, reason=reason))
            self._arrived()


def fetch(
    items: Sequence[Item],
    folder: Path,
    rules: Rules,
    *,
    parallel: int = 4,
    each: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Fetch files.

    Args:
        items: The files.
        folder: Where they come to lie; made if missing.
        rules: How to download; its `retried` and `progress` are replaced.
        parallel: Files at a time.
        each: Called with each outcome as it comes.

    Returns:
        The outcomes in the order of the files.

    Raises:
        OSError: The folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _count_what_is_there(items, folder, rules)
    outcomes: dict[str, Outcome] = {}
    with _progress(items, rules) as show:
        downloads = Downloads(folder, rules, parallel=min(parallel, len(items)))
        try:
            for item in items:
                downloads.add(item)
            while len(outcomes) < len(items):
                outcome = downloads.outcome(_LINE_S)
                if outcome is not None:
                    outcomes[outcome.item.dataset_id] = outcome
                    _settle_budget(outcome, folder, rules)
                    each(outcome)
                show(outcome)
        finally:
            downloads.stop()
    return [outcomes[item.dataset_id] for item in items]


def _count_what_is_there(items: Sequence[Item], folder: Path, rules: Rules) -> None:
    """Count files and parts of earlier runs against the disk budget.

    Raises:
        ValueError: They are more than it allows.
    """
    for item in items:
        here = Place(folder, item).bytes_here()
        if here and not rules.disk.hold(item.file_name, here):
            raise ValueError(
                f"{folder} holds more than the disk budget of {rules.disk.most} bytes already; "
                "raise it, or convert and delete what is there"
            )


def _settle_budget(outcome: Outcome, folder: Path, rules: Rules) -> None:
    """Give back the room that a file does not take after all."""
    if outcome.record is None:
        here = Place(folder, outcome.item).bytes_here()
        rules.disk.release(outcome.item.file_name)
        if here:
            rules.disk.hold(outcome.item.file_name, here)


@contextmanager
def _progress(items: Sequence[Item], rules: Rules) -> Iterator[Callable[[Outcome | None], None]]:
    """Give a function to call with each outcome, and None now and then: a bar, or lines."""
    state = _Progress(items)
    rules.progress, rules.retried = state.bytes_came, state.was_retried
    if not sys.stderr.isatty():
        yield state.line
        return
    known = [item.size for item in items]
    total = sum(size or 0 for size in known) if all(known) else None
    with progress_bar(total, unit="B") as bar:
        state.bar = bar
        yield state.line
        state.bar = None


class _Progress:
    """Bytes of each file and of all, from many threads."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.bar: Bar | None = None
        self._n_items, self._n_done = len(items), 0
        self._came: dict[str, tuple[int, int | None]] = {}
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def bytes_came(self, item: Item, done: int, total: int | None) -> None:
        with self._lock:
            before = self._came.get(item.dataset_id, (0, None))[0]
            self._came[item.dataset_id] = done, total
            if self.bar is not None:
                self.bar.update(done - before)

    def was_retried(self, item: Item, reason: str) -> None:
        _log.info("%s: %s; trying again", item.dataset_id, reason)

    def line(self, outcome: Outcome | None) -> None:
        """Log an outcome, and about once a minute how far all are."""
        if outcome is not None:
            self._n_done += 1
            with self._lock:
                self._came.pop(outcome.item.dataset_id, None)
            what = f"{outcome.record['size']} bytes" if outcome.record else outcome.reason
            head = "%d/%d %s: %s" if outcome.record else "%d/%d %s: NOT fetched: %s"
            if self.bar is None or not outcome.record:
                _log.info(head, self._n_done, self._n_items, outcome.item.dataset_id, what)
        now = time.monotonic()
        if now - self._last >= _LINE_S and self.bar is None:
            self._last = now
            with self._lock:
                running = [
                    f"{name} {size_text(done)}" + (f" ({done / total:.0%})" if total else "")
                    for name, (done, total) in self._came.items()
                ]
            _log.info("%d of %d files; now: %s", self._n_done, self._n_items, ", ".join(running))


def size_text(n_bytes: float) -> str:
    """Return a number of bytes as humans read it, such as 1.5 GB.

    Args:
        n_bytes: The number.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"
