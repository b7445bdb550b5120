"""Stages datasets for the corpus: each on its own, in any order, restartable, in parallel.

    python -m data_prep convert MANIFEST --out CORPUS [--task I --tasks N | --jobs N]

Reads the files of the manifest. Writes `CORPUS/settings.json` and `CORPUS/genes.tsv` (the same for
every dataset), and per dataset `CORPUS/staging/DATASET/` (`cells.zarr`, a cell store of
`sclong_ds.store` with the row table `source_row`, and `obs.parquet`, whose first column is
`barcode`) and `CORPUS/ledger/DATASET.json`. A dataset appears whole or not at all; one that is done
is skipped unless its files or options changed, and one that failed is tried again. What is staged
stays as long as its source cannot be reached, and makes way for other files under the same name
only with `--replace`; `python -m data_prep forget` takes a dataset out.

Datasets run in worker processes, one after the other in each: a damaged file, or a worker killed
for its memory, costs the dataset it was at and no other. Which datasets are to be done is kept in
`CORPUS/manifests/` (see `ledger.py`). Cells that fail the thresholds of `quality.py` are dropped
here and counted by reason; cells that repeat another cell, inside a file or across files, are
dropped by `finalize`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from data_prep.gene_names import GeneResolver
from data_prep.ledger import (
    LedgerEntry,
    dataset_lock,
    empty_entry,
    is_staged,
    known_names,
    previous_entry,
    record_manifest,
    staged_entry,
    write_entry,
)
from data_prep.manifest import Dataset
from data_prep.readers import source_files, source_hash
from data_prep.source import UnusableError
from data_prep.staging import STAGING_VERSION, Settings, clear, stage
from sclong_ds.files import write_atomic
from sclong_ds.genes import GeneVocabulary

_log = logging.getLogger(__name__)

DATASETS_PER_WORKER = 50
"""A worker is replaced after so many: memory that a library has lost comes back."""
_MOST_NAMES = 10
"""Datasets that a message names."""


def convert(
    datasets: Sequence[Dataset],
    *,
    out: str | Path,
    genes: GeneVocabulary,
    settings: Settings,
    task: int = 0,
    tasks: int = 1,
    jobs: int = 1,
    replace: bool = False,
) -> list[LedgerEntry]:
    """Stage the datasets of one task.

    Args:
        datasets: All datasets of the manifest.
        out: The corpus folder; created if needed.
        genes: The vocabulary; its hash must be the one of the settings.
        settings: Must be those the folder was begun with.
        task: Which share to do: every `tasks`-th dataset from this one on.
        tasks: Number of shares.
        jobs: Datasets at a time.
        replace: Let datasets replace staged ones of the same name from other files.

    Returns:
        The ledger entries of this task, in the order given; look at `status`. One that is ok and
        has a `reason` was kept as staged.

    Raises:
        ValueError: Other settings than those of the folder, or names that are taken.
    """
    corpus = Path(out)
    prepare_corpus(corpus, genes=genes, settings=settings)
    ours = datasets[task::tasks]
    if not replace:
        _check_names(corpus, ours)
    record_manifest(corpus, [dataset.dataset_id for dataset in datasets], tasks=tasks)
    _report_others(corpus, datasets)
    waiting = list(reversed(ours))
    workers = [_Worker(corpus, settings, replace) for _ in range(min(jobs, len(ours)))]
    done: dict[str, LedgerEntry] = {}
    bar = tqdm(total=len(ours), unit="dataset", disable=not sys.stderr.isatty())
    try:
        while len(done) < len(ours):
            for worker in workers:
                if worker.dataset is None and waiting:
                    worker.start(waiting.pop())
            busy = [worker for worker in workers if worker.dataset is not None]
            wait([handle for worker in busy for handle in worker.handles()])
            for worker in busy:
                entry = worker.collect()
                if entry is not None:
                    done[entry["dataset_id"]] = entry
                    _report(entry, len(done), len(ours), bar)
    finally:
        bar.close()
        for worker in workers:
            worker.stop()
    return [done[dataset.dataset_id] for dataset in ours]


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
    dataset: Dataset,
    *,
    corpus: Path,
    settings: Settings,
    resolver: GeneResolver,
    replace: bool = False,
) -> LedgerEntry:
    """Stage one dataset and write its ledger entry; a dataset that is done is left alone.

    Waits while another process is at the same dataset.

    Args:
        dataset: The dataset.
        corpus: A folder made by `prepare_corpus`.
        settings: Those of the folder.
        resolver: Of the vocabulary of the folder.
        replace: Replace what is staged under its name from another path.

    Returns:
        The entry; whatever is wrong with the dataset is its status and reason.
    """
    with dataset_lock(corpus, dataset.dataset_id):
        entry = _new_entry(dataset, settings)
        staged = staged_entry(corpus, dataset.dataset_id)
        try:
            entry["source_hash"] = _read_hash(dataset)
        except (ValueError, OSError) as error:
            if isinstance(error, UnusableError):
                entry["status"] = "excluded"
            return _keep_or_fail(corpus, entry, staged, str(error))
        previous = _unchanged(corpus, entry)
        if previous is not None:
            return previous
        if staged is not None and not replace and _is_taken(staged, dataset, entry["source_hash"]):
            return _keep_or_fail(corpus, entry, staged, _taken(staged))
        clear(corpus, dataset.dataset_id)
        _stage_or_explain(dataset, entry, corpus=corpus, settings=settings, resolver=resolver)
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


class _Worker:
    """A process that stages one dataset after another; a new one takes the place of a dead one.

    Its start (libraries, gene names) takes longer than a small dataset.
    """

    def __init__(self, corpus: Path, settings: Settings, replace: bool) -> None:
        self.corpus, self.settings, self.replace = corpus, settings, replace
        self.dataset: Dataset | None = None
        """What it is at; None if it is free."""
        self._process: BaseProcess | None = None
        self._n_begun = 0

    def start(self, dataset: Dataset) -> None:
        """Begin a dataset."""
        alive = self._process is not None and self._process.is_alive()
        if not alive or self._n_begun == DATASETS_PER_WORKER:
            self.stop()
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["data_prep.convert"])
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self.corpus, self.settings))
            self._process.start()
            theirs.close()
            self._n_begun = 0
        self.dataset = dataset
        self._n_begun += 1
        try:
            self._pipe.send((dataset, self.replace))
        except OSError:
            _log.debug("the worker for %s is gone; collect() says so", dataset.dataset_id)

    def handles(self) -> list[Connection | int]:
        """Return what to wait for."""
        assert self._process is not None
        return [self._pipe, self._process.sentinel]

    def collect(self) -> LedgerEntry | None:
        """Return the entry of the dataset if it is done, or if the process died of it."""
        assert self.dataset is not None
        assert self._process is not None
        dataset, entry = self.dataset, None
        try:
            if self._pipe.poll():
                entry = self._pipe.recv()
            elif self._process.is_alive():
                return None
        except (EOFError, OSError):
            _log.debug("the worker for %s died", dataset.dataset_id)
        self.dataset = None
        if entry is not None:
            return entry
        self._process.join()
        return _write_death(dataset, self._process.exitcode, self.corpus, self.settings)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._process.close()
            self._process = None
            self._pipe.close()


def _work(pipe: Connection, corpus: Path, settings: Settings) -> None:
    """Run in a process of its own; takes a dataset, gives its entry, until the pipe is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resolver = GeneResolver(GeneVocabulary.read(corpus / "genes.tsv"))
    while True:
        try:
            dataset, replace = pipe.recv()
        except EOFError:
            return
        entry = convert_dataset(
            dataset, corpus=corpus, settings=settings, resolver=resolver, replace=replace
        )
        pipe.send(entry)


def _end_with_parent() -> None:
    """Stop this worker when `convert` is gone, so that it cannot get in the way of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _write_death(
    dataset: Dataset, exit_code: int | None, corpus: Path, settings: Settings
) -> LedgerEntry:
    """Return the entry of a dataset whose worker died, and write it unless the old one holds."""
    entry = _new_entry(dataset, settings)
    if exit_code is not None and exit_code < 0:
        entry["reason"] = (
            f"the worker was killed by signal {-exit_code} (9 is often a lack of memory); "
            "run convert again to retry"
        )
    else:
        entry["reason"] = f"the worker stopped with exit code {exit_code}; its error is in the log"
    with dataset_lock(corpus, dataset.dataset_id, wait=False) as held:
        # Another convert that holds it will write its entry; staging that the dead worker had
        # not yet removed is still whole.
        if held and staged_entry(corpus, dataset.dataset_id) is None:
            clear(corpus, dataset.dataset_id)
            write_entry(corpus, entry)
    return entry


def _report(entry: LedgerEntry, n_done: int, n_all: int, bar: tqdm) -> None:
    bar.update()
    if entry["status"] == "ok" and entry["reason"]:
        _log.warning("%s: %s", entry["dataset_id"], entry["reason"])
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


def _read_hash(dataset: Dataset) -> str:
    """Return the hash of the files of a dataset; an empty folder may be a disk that is away."""
    if dataset.path.is_dir() and not source_files(dataset.path):
        raise FileNotFoundError(f"{dataset.path}: no file in this folder")
    return source_hash(dataset.path, gene_list=dataset.gene_list)


def _stage_or_explain(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    corpus: Path,
    settings: Settings,
    resolver: GeneResolver,
) -> None:
    """Stage a dataset, or say in its entry why it cannot be and leave nothing of it."""
    folder = corpus / "staging" / dataset.dataset_id
    try:
        stage(dataset, entry, folder=folder, settings=settings, resolver=resolver)
        entry["status"] = "ok"
        return
    except UnusableError as error:
        entry["status"], entry["reason"] = "excluded", str(error)
    except (ValueError, OSError) as error:
        entry["status"], entry["reason"] = "failed", str(error)
    except MemoryError as error:
        entry["status"], entry["reason"] = "failed", f"not enough memory ({error})"
    # Of a dataset that is not used nothing is staged, and what was dropped on the way is no loss.
    entry["n_cells"], entry["dropped_cells"], entry["obs_columns"] = 0, {}, []
    clear(corpus, dataset.dataset_id)


def _keep_or_fail(
    corpus: Path, entry: LedgerEntry, staged: LedgerEntry | None, reason: str
) -> LedgerEntry:
    """Return what this run says of a dataset whose files could not be taken.

    What is staged stays, with its entry on disk; only without it the failure is written.
    """
    if staged is not None and entry["source_hash"] is None:
        entry["status"] = "failed"
        if staged["settings_hash"] == entry["settings_hash"]:
            kept = staged.copy()
            kept["reason"] = f"source not reachable, kept as staged ({reason})"
            return kept
        reason += "; what is staged was made with other options"
    entry["reason"] = reason
    if staged is None:
        clear(corpus, entry["dataset_id"])
        write_entry(corpus, entry)
    return entry


def _unchanged(corpus: Path, entry: LedgerEntry) -> LedgerEntry | None:
    """Return the entry of an earlier run if it still holds."""
    previous = previous_entry(corpus, entry["dataset_id"])
    if previous is None or previous["status"] == "failed":
        return None
    same = all(previous.get(key) == entry.get(key) for key in ("source_hash", "settings_hash"))
    if not same or (previous["status"] == "ok" and not is_staged(corpus, entry["dataset_id"])):
        return None
    return previous


def _is_taken(staged: LedgerEntry, dataset: Dataset, found_hash: str | None) -> bool:
    """Whether a dataset is another one than what is staged under its name.

    A file that moved has the old hash, one that changed has the old path.
    """
    moved = os.path.realpath(staged["path"]) != os.path.realpath(dataset.path)
    return moved and staged["source_hash"] != found_hash


def _taken(staged: LedgerEntry) -> str:
    return (
        f"dataset_id '{staged['dataset_id']}' is already {staged['path']} in this corpus; "
        "rename it in the manifest, or add --replace"
    )


def _check_names(corpus: Path, datasets: Sequence[Dataset]) -> None:
    """Refuse datasets whose name is that of other files; only paths that differ are read."""
    problems = []
    for dataset in datasets:
        staged = staged_entry(corpus, dataset.dataset_id)
        if staged is None or not _is_taken(staged, dataset, None):
            continue
        try:
            found_hash = _read_hash(dataset)
        except (ValueError, OSError) as error:
            _log.debug("%s: %s; what is staged is kept", dataset.dataset_id, error)
            continue
        if _is_taken(staged, dataset, found_hash):
            problems.append(_taken(staged))
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")


def _report_others(corpus: Path, datasets: Sequence[Dataset]) -> None:
    others = sorted(known_names(corpus) - {dataset.dataset_id for dataset in datasets})
    if others:
        named = ", ".join(others[:_MOST_NAMES]) + (", ..." if len(others) > _MOST_NAMES else "")
        _log.info(
            "%d datasets of this corpus are not in this manifest: %s (python -m data_prep forget "
            "takes datasets out)",
            len(others),
            named,
        )


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
