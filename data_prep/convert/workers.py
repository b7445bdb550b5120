"""Worker processes of `convert`: one dataset after another in each, within limits.

A damaged file, or a worker that is killed, costs the dataset it was at and no other. A worker whose
dataset takes more memory or time than allowed is ended by its parent.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from data_prep.convert.entry import new_entry
from data_prep.convert.limits import Limits, limit_memory, reason_of, used_gib
from data_prep.convert.shares import Unit
from data_prep.ledger.ledger import LedgerEntry, dataset_lock, staged_entry, write_entry
from data_prep.manifest.manifest import Dataset
from data_prep.staging.forget import clear, part_folder
from data_prep.staging.settings import Settings
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import named_errors

_log = logging.getLogger(__name__)

DATASETS_PER_WORKER = 50
"""A worker is replaced after so many: memory that a library has lost comes back."""


class Worker:
    """A process that stages one dataset after another; a new one takes the place of a dead one.

    Its start (libraries, gene names) takes longer than a small dataset.
    """

    def __init__(self, corpus: Path, settings: Settings, limits: Limits, **options: bool) -> None:
        """Describe a worker; its process starts with its first dataset.

        Args:
            corpus: The corpus folder.
            settings: Those of the folder.
            limits: What a dataset may take.
            options: `replace` and `verify_sources` of `convert_dataset`.
        """
        self.corpus, self.settings, self.options = corpus, settings, options
        self.limits = limits
        self.unit: Unit | None = None
        """What it is at; None if it is free."""
        self._process: BaseProcess | None = None
        self._n_begun = 0
        self._begun_at = 0.0

    def start(self, unit: Unit) -> None:
        """Begin a dataset, or a piece of one.

        Args:
            unit: What to do.
        """
        alive = self._process is not None and self._process.is_alive()
        if not alive or self._n_begun == DATASETS_PER_WORKER:
            self.stop()
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, *self._preloaded()])
            # A start that is broken off leaves a process that complains of its missing parent.
            with _held_back(signal.SIGTERM, signal.SIGINT):
                self._pipe, theirs = context.Pipe()
                arguments = theirs, self.corpus, self.settings, self.limits
                process = context.Process(target=_work, args=arguments)
                process.start()
                self._process = process
                theirs.close()
            self._n_begun = 0
        self.unit = unit
        self._n_begun += 1
        self._begun_at = time.monotonic()
        try:
            self._pipe.send((unit.dataset, unit.piece, self.options))
        except OSError:
            name = unit.dataset.dataset_id
            _log.debug("the worker for %s is gone; collect() reports it", name)

    def _preloaded(self) -> list[str]:
        """Return modules that the process imports from which the workers are forked."""
        found = ["data_prep.convert.one_dataset", "pyarrow.parquet"]
        if self.settings.genes_hash == GeneVocabulary.bundled().hash:
            found.append("data_prep.convert.bundled_resolver")
        return found

    def handles(self) -> list[Connection | int]:
        """Return what to wait for."""
        assert self._process is not None
        return [self._pipe, self._process.sentinel]

    def collect(self) -> tuple[Unit, LedgerEntry | None] | None:
        """Return the unit if it is done or failed, or None.

        Returns:
            The unit, and the entry of its dataset; None where pieces of that are missing.

        Raises:
            OSError: The entry of a failure cannot be written.
        """
        assert self.unit is not None
        assert self._process is not None
        unit, reason = self.unit, ""
        try:
            if self._pipe.poll():
                found = self._pipe.recv()
                if not isinstance(found, str):
                    self.unit = None
                    return unit, found
                reason = found
            elif self._process.is_alive():
                reason = self._beyond_limits()
                if not reason:
                    return None
                self._process.kill()
        except (EOFError, OSError):
            _log.debug("the worker for %s died", unit.dataset.dataset_id)
        if not reason:
            self._process.join()
            reason = _death(self._process.exitcode)
        self.stop()
        self.unit = None
        return unit, write_failure(unit.dataset, reason, self.corpus, self.settings)

    def fail(self, dataset: Dataset, reason: str) -> LedgerEntry:
        """Return the entry of a dataset that never came here, and write it.

        Args:
            dataset: The dataset.
            reason: Why.
        """
        return write_failure(dataset, reason, self.corpus, self.settings)

    def _beyond_limits(self) -> str:
        """Return why the worker has to be ended; empty if it has not."""
        assert self._process is not None
        assert self._process.pid is not None
        limits, minutes = self.limits, (time.monotonic() - self._begun_at) / 60
        used = used_gib(self._process.pid)
        if used is not None and used > limits.memory_gib:
            return (
                f"took {used:.1f} GiB of memory, {limits.memory_gib:.1f} GiB are allowed; if the "
                "file is sound, raise --max-memory or lower --jobs"
            )
        if minutes > limits.minutes:
            return (
                f"took more than {limits.minutes:g} minutes; if the file is sound, raise "
                "--max-minutes"
            )
        return ""

    def stop(self) -> None:
        """End the process; what it was at leaves nothing."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.join()
        self._process.close()
        self._process = None
        self._pipe.close()
        if self.unit is not None:
            remove_part(self.corpus, self.unit.dataset.dataset_id)


@contextlib.contextmanager
def _held_back(*numbers: signal.Signals) -> Iterator[None]:
    """Let signals of this process wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _work(pipe: Connection, corpus: Path, settings: Settings, limits: Limits) -> None:
    """Run in a process of its own; takes a dataset, gives its entry, until the pipe is closed."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limit_memory(limits.memory_gib)
    # The parent, which imports this module too, needs no reader; here they are preloaded.
    from data_prep.convert.one_dataset import convert_dataset, convert_piece
    from data_prep.genes.gene_names import resolver_of

    resolver = None
    while True:
        try:
            dataset, piece, options = pipe.recv()
        except EOFError:
            return
        try:
            with named_errors(corpus):
                if resolver is None:
                    resolver = resolver_of(GeneVocabulary.read(corpus / "genes.tsv"))
                options |= {"corpus": corpus, "settings": settings, "resolver": resolver}
                entry: LedgerEntry | str | None
                if piece is None:
                    entry = convert_dataset(dataset, **options)
                else:
                    entry = convert_piece(dataset, piece, **options)
        except (ValueError, OSError, MemoryError) as error:
            entry = reason_of(error)
        pipe.send(entry)


def _end_with_parent() -> None:
    """Stop this worker when `convert` is gone, so that it cannot get in the way of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return (
            f"the worker was killed by signal {-exit_code} (9 is often a lack of memory); "
            "run convert again to retry"
        )
    return f"the worker stopped with exit code {exit_code}; its error is in the log"


def write_failure(dataset: Dataset, reason: str, corpus: Path, settings: Settings) -> LedgerEntry:
    """Return the entry of a dataset that its worker could not end, and write it.

    An older entry that still holds is not replaced.

    Args:
        dataset: The dataset.
        reason: What happened.
        corpus: The corpus folder.
        settings: Those of the folder.
    """
    entry = new_entry(dataset, settings)
    entry["reason"] = reason
    with dataset_lock(corpus, dataset.dataset_id, wait=False) as held:
        # Another convert that holds it will write its entry; staging that the worker had not yet
        # removed is still whole.
        if held and staged_entry(corpus, dataset.dataset_id) is None:
            clear(corpus, dataset.dataset_id)
            write_entry(corpus, entry)
    return entry


def remove_part(corpus: Path, dataset_id: str) -> None:
    """Remove the unfinished staging of a process that was ended, unless another is at it.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    with dataset_lock(corpus, dataset_id, wait=False) as held:
        if held:
            shutil.rmtree(part_folder(corpus / "staging" / dataset_id), ignore_errors=True)
