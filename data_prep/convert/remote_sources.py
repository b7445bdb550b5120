"""Sources of `convert` that lie behind an address: fetched ahead, converted, removed.

At most `keep_bytes` of them are on the disk at a time, in this task; threads of the parent fetch
while the workers convert. What an earlier run that was killed has left is used first. A file of the
user in the folder of the sources is used where it is what the manifest says, and stays.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from data_prep.convert.entry import settings_hash
from data_prep.fetch.budgets import DiskBudget
from data_prep.fetch.download import NO_ROOM, Place, Rules, remove_fetched
from data_prep.fetch.fetch import Downloads
from data_prep.fetch.item import Item, path_in
from data_prep.fetch.lock_file import LOCK_NAME
from data_prep.ledger.ledger import LedgerEntry, is_older, previous_entry
from data_prep.manifest.manifest import Dataset
from data_prep.staging.settings import Settings

PARALLEL = 4
"""Files fetched at a time."""
AHEAD = 4
"""Files that may wait for a worker, besides one for each."""


class RemoteSources:
    """Files on their way to the workers."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        corpus: Path,
        settings: Settings,
        folder: Path | None = None,
        keep_bytes: int | None,
        jobs: int,
        rules: Rules | None = None,
    ) -> None:
        """Begin to fetch what is not staged yet.

        Args:
            datasets: Of this task; those on this machine are left to the caller.
            corpus: The corpus folder.
            settings: Those of the folder.
            folder: Where files lie while they are converted; None: in the corpus folder.
            keep_bytes: Most bytes of them at a time; None: no limit.
            jobs: Number of workers.
            rules: Of the downloads; None: the usual.

        Raises:
            ValueError: The folder is one that `fetch` keeps.
        """
        folder = folder or corpus / ".sources"
        remote = [dataset for dataset in datasets if dataset.remote]
        if remote and (folder / LOCK_NAME).exists():
            raise ValueError(
                f"{folder}: a folder of fetch ({LOCK_NAME} is there), whose files convert would "
                "remove; give --sources another folder, or convert the manifest that fetch writes "
                "without --list"
            )
        self.rules = rules or Rules()
        self.rules.disk = DiskBudget(keep_bytes)
        self._folder, self._most_ahead = folder, jobs + AHEAD
        self._datasets = {dataset.dataset_id: dataset for dataset in remote}
        self._items = {dataset.dataset_id: item_of(dataset) for dataset in remote}
        # Datasets that seem to be done: a worker compares what is staged.
        self._rechecked = {
            dataset.dataset_id for dataset in remote if _seems_done(corpus, dataset, settings)
        }
        self._ready = [self._datasets[name] for name in sorted(self._rechecked)]
        left = {name: Place(folder, item).bytes_here() for name, item in self._items.items()}
        wanted = [name for name in self._items if name not in self._rechecked]
        self._wanted = sorted(wanted, key=lambda name: not left[name])
        for name in self._wanted:
            if left[name]:
                self.rules.disk.hold(self._items[name].file_name, left[name])
        self._here: set[str] = set()
        """On their way, waiting for a worker, or being converted."""
        self._is_full = False
        """The disk had no room for another; it has when one is removed."""
        self._failed: list[tuple[Dataset, str]] = []
        self._wake, self._bell = os.pipe()
        self._closed, self._bell_lock = False, threading.Lock()
        os.set_blocking(self._wake, False)
        self._downloads = (
            Downloads(folder, self.rules, parallel=PARALLEL, arrived=self._ring) if remote else None
        )

    def handles(self) -> list[int]:
        """Return what to wait for besides the workers."""
        return [self._wake]

    def advance(self) -> tuple[list[Dataset], list[tuple[Dataset, str]]]:
        """Begin what there is room for.

        Returns:
            Datasets whose file is here now, and those that cannot be had, with the reason.
        """
        if self._downloads is None:
            return [], []
        try:
            os.read(self._wake, 4096)
        except BlockingIOError:
            pass
        while (outcome := self._downloads.outcome(0.0)) is not None:
            name = outcome.item.dataset_id
            if outcome.record is None and NO_ROOM in outcome.reason and len(self._here) > 1:
                self._here.discard(name)
                self.rules.disk.release(outcome.item.file_name)
                self._wanted.append(name)
                self._is_full = True
                continue
            if outcome.record is None:
                self._give_up(name, outcome.reason)
                continue
            # What was set aside for a file of unknown length is more than it takes.
            self.rules.disk.hold(outcome.item.file_name, outcome.record["size"])
            self._ready.append(
                dataclasses.replace(
                    self._datasets[name],
                    path=path_in(self._folder, outcome.item),
                    sha256=outcome.record["sha256"],
                    fetched=True,
                )
            )
        if not self._here:
            self._is_full = False
        most = 0 if self._is_full else self._most_ahead
        while self._wanted and len(self._here) < most and self._begin(self._wanted[0]):
            self._wanted.pop(0)
        ready, failed = self._ready, self._failed
        self._ready, self._failed = [], []
        return ready, failed

    def finish(self, entry: LedgerEntry) -> bool:
        """Remove the file of a dataset that a worker is done with.

        Args:
            entry: What the worker returned.

        Returns:
            Whether the entry is final; False for a dataset that is to be fetched after all.
        """
        name = entry["dataset_id"]
        if name in self._rechecked:
            self._rechecked.discard(name)
            if entry["status"] == "failed":
                self._wanted.append(name)
                return False
            # A run that was killed between the last step and this one has left it.
            self._remove(name)
        elif name in self._here:
            self._here.discard(name)
            self._remove(name)
        return True

    def close(self) -> None:
        """Stop the downloads; parts stay for the next run."""
        if self._downloads is not None:
            self._downloads.stop()
        # A thread that waits for a silent server outlives this, and the number of the pipe may then
        # be that of another file.
        with self._bell_lock:
            self._closed = True
            os.close(self._wake)
            os.close(self._bell)

    def _begin(self, name: str) -> bool:
        """Fetch a file if there is room for it; return whether it is settled."""
        item, most = self._items[name], self.rules.disk.most
        # A file of unknown length has the disk for itself until the server tells it.
        size = item.size if item.size is not None else most or 0
        if most is not None and size > most:
            self._give_up(name, f"{item.url}: {size} bytes, --keep-bytes allows {most}")
            return True
        if not self.rules.disk.hold(item.file_name, size):
            if self._here:
                return False
            self._drop_leftovers(name)
            self.rules.disk.hold(item.file_name, size)
        self._here.add(name)
        assert self._downloads is not None
        self._downloads.add(item)
        return True

    def _drop_leftovers(self, name: str) -> None:
        """Remove what earlier runs have left of files that are not next."""
        for other in self._wanted:
            if other != name:
                self._remove(other)

    def _remove(self, name: str) -> None:
        """Remove what was fetched of a dataset, and give back its room."""
        item, self._is_full = self._items[name], False
        remove_fetched(item, self._folder)
        Place(self._folder, item).drop_part()
        self.rules.disk.release(item.file_name)

    def _give_up(self, name: str, reason: str) -> None:
        self._here.discard(name)
        item = self._items[name]
        if self.rules.disk.most is not None:
            # Its room is needed; elsewhere the next run continues the part.
            Place(self._folder, item).drop_part()
        self.rules.disk.release(item.file_name)
        self._failed.append((self._datasets[name], f"{item.url}: {reason}"))

    def _ring(self) -> None:
        with self._bell_lock:
            if not self._closed:
                os.write(self._bell, b"x")


def item_of(dataset: Dataset) -> Item:
    """Return what to fetch for a dataset.

    Args:
        dataset: With an address.
    """
    return Item(
        dataset_id=dataset.dataset_id,
        url=dataset.url,
        address=dataset.address,
        size=dataset.bytes,
        sha256=dataset.sha256,
        version=dataset.version,
    )


def _seems_done(corpus: Path, dataset: Dataset, settings: Settings) -> bool:
    """Tell whether the ledger has the same address, version and options; no staging is read."""
    previous = previous_entry(corpus, dataset.dataset_id)
    if previous is None or previous["status"] == "failed" or is_older(previous):
        return False
    origin = previous["origin"]
    return (
        previous["settings_hash"] == settings_hash(dataset, settings)
        and previous["source_hash"] is not None
        and dataset.version in ("", origin.get("version", ""))
        and (
            dataset.sha256 == origin.get("sha256")
            if dataset.sha256
            else previous["path"] == dataset.url
        )
    )
