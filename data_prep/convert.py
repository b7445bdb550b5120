"""Stages datasets for the corpus: each on its own, in any order, restartable, in parallel.

    python -m data_prep convert MANIFEST --out CORPUS [--task I --tasks N | --jobs N]

Reads the files of the manifest. Writes `CORPUS/settings.json` and `CORPUS/genes.tsv` (the same for
every dataset), and per dataset `CORPUS/staging/DATASET/` (`cells.zarr`, a cell store of
`sclong_ds.store` with the row table `source_row`, and `obs.tsv.gz`, whose first column is
`barcode`) and `CORPUS/ledger/DATASET.json`. A dataset appears whole or not at all; one that is done
is skipped unless its files or options changed, and one that failed is tried again.

Every dataset runs in its own process: a damaged file, or a worker killed for its memory, costs that
dataset only. Cells with fewer genes than `min_genes` are dropped here and counted by reason; cells
that repeat another cell, inside a file or across files, are dropped by `finalize`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from data_prep.harmonize import GeneResolver
from data_prep.ledger import LedgerEntry, empty_entry, ledger_path, read_entry, write_entry
from data_prep.manifest import Dataset
from data_prep.readers import source_hash
from data_prep.source import UnusableError
from data_prep.staging import STAGING_VERSION, Settings, stage
from sclong_ds.files import write_atomic
from sclong_ds.genes import GeneVocabulary

_log = logging.getLogger(__name__)


def convert(
    datasets: Sequence[Dataset],
    *,
    out: str | Path,
    genes: GeneVocabulary,
    settings: Settings,
    jobs: int = 1,
) -> list[LedgerEntry]:
    """Stage datasets, each in a process of its own.

    Args:
        datasets: The datasets of this task.
        out: The corpus folder; created if needed.
        genes: The vocabulary; its hash must be the one of the settings.
        settings: Must be those the folder was begun with.
        jobs: Datasets at a time.

    Returns:
        The ledger entries, in the order given; look at `status`.

    Raises:
        ValueError: Other settings than those of the folder.
    """
    corpus = Path(out)
    prepare_corpus(corpus, genes=genes, settings=settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.convert"])
    waiting = list(reversed(datasets))
    running: dict[BaseProcess, Dataset] = {}
    done: dict[str, LedgerEntry] = {}
    bar = tqdm(total=len(datasets), unit="dataset", disable=not sys.stderr.isatty())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                dataset = waiting.pop()
                process: BaseProcess = context.Process(
                    target=_work, args=(dataset, corpus, settings)
                )
                process.start()
                running[process] = dataset
            wait([process.sentinel for process in running])
            for ended in [process for process in running if process.exitcode is not None]:
                entry = _collect(running.pop(ended), ended.exitcode, corpus, settings)
                done[entry["dataset_id"]] = entry
                _report(entry, len(done), len(datasets), bar)
    finally:
        bar.close()
        for process in running:
            process.terminate()
            process.join()
    return [done[dataset.dataset_id] for dataset in datasets]


def prepare_corpus(corpus: Path, *, genes: GeneVocabulary, settings: Settings) -> None:
    """Create a corpus folder, or check that it was begun with the same settings.

    Args:
        corpus: The folder.
        genes: The vocabulary, written to genes.tsv.
        settings: Written to settings.json.

    Raises:
        ValueError: The folder has other settings; the message names them.
    """
    for folder in (corpus, corpus / "ledger", corpus / "staging"):
        folder.mkdir(parents=True, exist_ok=True)
    path = corpus / "settings.json"
    wanted = {"staging_version": STAGING_VERSION, **dataclasses.asdict(settings)}
    if not path.exists():
        _write_if_missing(path, (json.dumps(wanted, indent=1) + "\n").encode())
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path}: not JSON; use another --out folder") from None
    different = [
        f"{name} {found.get(name)} there, {wanted.get(name)} here"
        for name in sorted(set(wanted) | set(found))
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"{corpus} was begun with other settings ({'; '.join(different)}); "
            "use the same ones or another --out folder"
        )
    if not (corpus / "genes.tsv").exists():
        genes.write(corpus / "genes.tsv")


def convert_dataset(
    dataset: Dataset, *, corpus: Path, settings: Settings, resolver: GeneResolver
) -> LedgerEntry:
    """Stage one dataset and write its ledger entry; a dataset that is done is left alone.

    Args:
        dataset: The dataset.
        corpus: A folder made by `prepare_corpus`.
        settings: Those of the folder.
        resolver: Of the vocabulary of the folder.

    Returns:
        The entry; whatever is wrong with the dataset is its status and reason.
    """
    entry = _new_entry(dataset, settings)
    try:
        entry["source_hash"] = source_hash(dataset.path)
        previous = _unchanged(corpus, entry)
        if previous is not None:
            return previous
        _clear(corpus, dataset.dataset_id)
        folder = corpus / "staging" / dataset.dataset_id
        stage(dataset, entry, folder=folder, settings=settings, resolver=resolver)
        entry["status"] = "ok"
    except UnusableError as error:
        entry["status"], entry["reason"] = "excluded", str(error)
    except (ValueError, OSError) as error:
        entry["status"], entry["reason"] = "failed", str(error)
    except MemoryError as error:
        entry["status"], entry["reason"] = "failed", f"not enough memory ({error})"
    if entry["status"] != "ok":
        _clear(corpus, dataset.dataset_id)
    write_entry(corpus, entry)
    return entry


def settings_hash(dataset: Dataset, settings: Settings) -> str:
    """Return the SHA-256 (hex) of everything but the files that decides what is staged.

    Args:
        dataset: Its options count, its path does not.
        settings: Those of the folder.
    """
    content = {
        "staging_version": STAGING_VERSION,
        "settings": dataclasses.asdict(settings),
        "options": dataset.options(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _work(dataset: Dataset, corpus: Path, settings: Settings) -> None:
    """Run in a process of its own; the result is the ledger entry on disk."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resolver = GeneResolver(GeneVocabulary.read(corpus / "genes.tsv"))
    convert_dataset(dataset, corpus=corpus, settings=settings, resolver=resolver)


def _end_with_parent() -> None:
    """Stop this worker when `convert` is gone, so that it cannot get in the way of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _collect(
    dataset: Dataset, exit_code: int | None, corpus: Path, settings: Settings
) -> LedgerEntry:
    """Return what a finished process left; write the entry for it if it died."""
    if exit_code == 0:
        return read_entry(ledger_path(corpus, dataset.dataset_id))
    _clear(corpus, dataset.dataset_id)
    entry = _new_entry(dataset, settings)
    if exit_code is not None and exit_code < 0:
        entry["reason"] = (
            f"the worker was killed by signal {-exit_code} (9 is often a lack of memory); "
            "run convert again to retry"
        )
    else:
        entry["reason"] = f"the worker stopped with exit code {exit_code}; its error is in the log"
    write_entry(corpus, entry)
    return entry


def _report(entry: LedgerEntry, n_done: int, n_all: int, bar: tqdm) -> None:
    bar.update()
    if bar.disable:
        detail = f"{entry['n_cells']} cells" if entry["status"] == "ok" else entry["reason"]
        _log.info("%d/%d %s: %s, %s", n_done, n_all, entry["dataset_id"], entry["status"], detail)


def _new_entry(dataset: Dataset, settings: Settings) -> LedgerEntry:
    return empty_entry(
        dataset.dataset_id,
        dataset.path,
        organism=dataset.organism,
        tissue=dataset.tissue,
        settings_hash=settings_hash(dataset, settings),
    )


def _unchanged(corpus: Path, entry: LedgerEntry) -> LedgerEntry | None:
    """Return the entry of an earlier run if it still holds."""
    path = ledger_path(corpus, entry["dataset_id"])
    if not path.is_file():
        return None
    try:
        previous = read_entry(path)
    except ValueError as error:
        _log.warning("%s", error)
        return None
    same = all(previous.get(key) == entry.get(key) for key in ("source_hash", "settings_hash"))
    staged = (corpus / "staging" / entry["dataset_id"] / "obs.tsv.gz").is_file()
    if not same or previous["status"] == "failed" or (previous["status"] == "ok" and not staged):
        return None
    return previous


def _clear(corpus: Path, dataset_id: str) -> None:
    """Remove what earlier runs left of a dataset; the entry first, so that none is without data."""
    ledger_path(corpus, dataset_id).unlink(missing_ok=True)
    staging = corpus / "staging"
    shutil.rmtree(staging / dataset_id, ignore_errors=True)
    # "~" cannot be part of a dataset id, so these are ours.
    for stale in staging.glob(f".{dataset_id}~*"):
        shutil.rmtree(stale)


def _write_if_missing(path: Path, data: bytes) -> None:
    """Create a file whole; where another task was faster, its file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_atomic(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        _log.debug("%s was written by another task", path)
    finally:
        temporary.unlink()
