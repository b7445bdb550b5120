"""Stages datasets for the corpus: each on its own, in any order, restartable, in parallel.

    python -m data_prep convert MANIFEST --out CORPUS [--task I --tasks N | --jobs N]

Reads the files of the manifest. Writes `CORPUS/settings.json` and `CORPUS/genes.tsv` (the same for
every dataset), and per dataset `CORPUS/staging/DATASET/` (`cells.zarr`, a cell store of
`sclong_ds.corpus.corpus` with the row table `source_row`, and `obs.parquet`, whose first column is
`barcode`) and `CORPUS/ledger/DATASET.json`. A dataset appears whole or not at all; one that is done
is skipped unless its files or options changed, and one that failed is tried again. What is staged
stays as long as its source cannot be reached, or what took its place fails, and makes way for other
files under the same name only with `--replace`; `python -m data_prep forget` takes a dataset out.

Datasets run in worker processes, one after the other in each, the largest first; a large file by
row ranges, also of several tasks (`shares.py`, `data_prep.staging.pieces`). A damaged file, or a
worker killed for its memory, costs the dataset it was at and no other. Which datasets are to be
done is kept in `CORPUS/manifests/` (see `ledger.py`). Cells that fail the thresholds of
`quality.py` are dropped here and counted by reason; cells that repeat another cell, inside a file
or across files, are dropped by `finalize`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path

from data_prep.convert.entry import is_taken, read_hash, taken
from data_prep.convert.limits import DEFAULT_MINUTES, Limits, default_memory_gib
from data_prep.convert.remote_sources import RemoteSources
from data_prep.convert.shares import Unit, in_places, shares_of
from data_prep.convert.workers import Worker
from data_prep.ledger.corpus_lock import shared_corpus
from data_prep.ledger.ledger import (
    LedgerEntry,
    dataset_lock,
    is_safe_id,
    ledger_path,
    staged_entry,
)
from data_prep.ledger.pending import known_names, record_manifest
from data_prep.manifest.manifest import Dataset
from data_prep.staging.forget import remove_pieces
from data_prep.staging.settings import STAGING_VERSION, Settings
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import (
    file_sha256,
    locked,
    partial_name,
    read_json,
    remove_partials_of,
    write_atomic,
)
from sclong_ds.page.words import counted
from sclong_ds.progress import Bar, progress_bar

_log = logging.getLogger(__name__)

_MOST_NAMES = 10
"""Datasets that a message names."""
_LOOK_S = 0.5
"""How often the memory and time of the workers are looked at, in seconds."""


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
    verify_sources: bool = False,
    max_memory_gib: float | None = None,
    max_minutes: float = DEFAULT_MINUTES,
    sources: Path | None = None,
    keep_bytes: int | None = None,
) -> list[LedgerEntry]:
    """Stage the datasets of one task.

    Args:
        datasets: All datasets of the manifest.
        out: The corpus folder; created if needed.
        genes: The vocabulary; its hash must be the one of the settings.
        settings: Must be those the folder was begun with.
        task: Which share to do (`data_prep.convert.shares`).
        tasks: Number of shares.
        jobs: Datasets, or row ranges of large ones, at a time.
        replace: Let datasets replace staged ones of the same name from other files.
        verify_sources: Hash files whose size, times and inode are those of before, too.
        max_memory_gib: Memory that a dataset may take; None for `default_memory_gib`.
        max_minutes: Time that a dataset may take, its download not included.
        sources: Where files behind an address lie while they are converted; None: in the corpus.
        keep_bytes: Most bytes of them at a time; None: no limit.

    Returns:
        The ledger entries of this task, in the order given; look at `status`. One that is ok and
        has a `reason` was kept as staged. A dataset of which other tasks have row ranges is the
        one's that has finished the last.

    Raises:
        ValueError: Other settings than those of the folder, names that are taken, or a `finalize`
            that is at work there.
    """
    corpus = Path(out)
    with shared_corpus(corpus):
        prepare_corpus(corpus, genes=genes, settings=settings)
        shares = shares_of(corpus, datasets, tasks=tasks, jobs=jobs)
        mine = shares[task]
        ours = _begin(corpus, datasets, shares, task, replace=replace, verify=verify_sources)
        jobs = min(jobs, len(mine))
        memory = default_memory_gib(max(jobs, 1)) if max_memory_gib is None else max_memory_gib
        limits = Limits(memory_gib=memory, minutes=max_minutes)
        options = {"replace": replace, "verify_sources": verify_sources}
        workers = [Worker(corpus, settings, limits, **options) for _ in range(jobs)]
        fetched = RemoteSources(
            [unit.dataset for unit in mine], corpus=corpus, settings=settings, folder=sources,
            keep_bytes=keep_bytes, jobs=jobs,
        )  # fmt: skip
        with closing(fetched) as remote:
            done = _run_all(workers, shares, task, remote)
        return [done[name] for d in ours if (name := d.dataset_id) in done]


def _begin(
    corpus: Path,
    datasets: Sequence[Dataset],
    shares: Sequence[Sequence[Unit]],
    task: int,
    *,
    replace: bool,
    verify: bool,
) -> list[Dataset]:
    """Record what is to be done, remove what killed runs have left; return a task's datasets."""
    names = {unit.dataset.dataset_id for unit in shares[task]}
    ours = [dataset for dataset in datasets if dataset.dataset_id in names]
    if not replace:
        _check_names(corpus, ours)
    all_names = [dataset.dataset_id for dataset in datasets]
    places = in_places(shares) if len(shares) > 1 else all_names
    record_manifest(corpus, places, tasks=len(shares))
    _remove_leftovers(corpus)
    if verify and len(shares) == 1:
        # Of several tasks another may be at them; then times alone tell of what they were made.
        for name in names:
            remove_pieces(corpus, name)
    _report_others(corpus, datasets)
    return ours


def _run_all(
    workers: Sequence[Worker], shares: Sequence[Sequence[Unit]], task: int, remote: RemoteSources
) -> dict[str, LedgerEntry]:
    """Do the units of a task, then row ranges of its datasets that other tasks have not done."""
    try:
        done = _run(workers, shares[task], remote)
        left = {unit.dataset.dataset_id for unit in shares[task]} - done.keys()
        others = [unit for share in shares if share is not shares[task] for unit in share]
        rest = [u.taken_over() for u in others if u.piece and u.dataset.dataset_id in left]
        return done | _run(workers, rest, remote)
    finally:
        for worker in workers:
            worker.stop()


def _run(
    workers: Sequence[Worker], units: Sequence[Unit], remote: RemoteSources
) -> dict[str, LedgerEntry]:
    """Give every unit to a worker, the largest first; return the entries that they gave."""
    waiting = [unit for unit in reversed(units) if not unit.dataset.remote]
    entries: dict[str, LedgerEntry] = {}
    n_done, n_all = 0, len(units)
    bar = progress_bar(n_all, unit="dataset") if n_all and sys.stderr.isatty() else None
    try:
        while n_done < n_all:
            arrived, lost = remote.advance()
            waiting += [Unit(dataset, 0) for dataset in arrived]
            for dataset, reason in lost:
                n_done += 1
                entry = workers[0].fail(dataset, reason)
                entries[dataset.dataset_id] = entry
                _report(entry, n_done, n_all, bar)
            for worker in workers:
                if worker.unit is None and waiting:
                    worker.start(waiting.pop())
            busy = [worker for worker in workers if worker.unit is not None]
            handles = [handle for worker in busy for handle in worker.handles()]
            if n_done < n_all:
                wait([*handles, *remote.handles()], _LOOK_S)
            for worker in busy:
                found = worker.collect()
                if found is None:
                    continue
                unit, of_unit = found
                if of_unit is not None and not remote.finish(of_unit):
                    continue
                n_done += 1
                if of_unit is not None:
                    entries[of_unit["dataset_id"]] = of_unit
                    _report(of_unit, n_done, n_all, bar)
                elif bar is not None:
                    bar.update()
                else:
                    _log.debug("%d/%d %s: a piece", n_done, n_all, unit.dataset.dataset_id)
    finally:
        if bar is not None:
            bar.close()
    return entries


def prepare_corpus(corpus: Path, *, genes: GeneVocabulary, settings: Settings) -> None:
    """Create a corpus folder, or check that it was begun with the same settings.

    Args:
        corpus: The folder.
        genes: The vocabulary, written to genes.tsv.
        settings: Written to settings.json; the same settings of an older version are replaced.

    Raises:
        ValueError: The folder has other settings, which the message names, another genes.tsv, or a
            `finalize` is at work there.
    """
    with shared_corpus(corpus), locked(corpus / ".locks" / "~settings"):
        for folder in (corpus / "ledger", corpus / "staging"):
            folder.mkdir(exist_ok=True)
        for name in ("settings.json", "genes.tsv"):
            remove_partials_of(corpus / name)
        _settle_settings(corpus, settings, genes)
        path = corpus / "genes.tsv"
        if not path.exists():
            genes.write(path)
        # Reading the table takes longer than hashing it; a copy with other line ends is the same.
        if file_sha256(path) != genes.table_sha256 and GeneVocabulary.read(path) != genes:
            raise ValueError(
                f"{path}: other genes, symbols or classes than this folder was begun with; "
                "restore the file or use another --out folder"
            )


def _settle_settings(corpus: Path, settings: Settings, genes: GeneVocabulary) -> None:
    """Write settings.json, or compare it."""
    path = corpus / "settings.json"
    wanted = {"staging_version": STAGING_VERSION, **dataclasses.asdict(settings)}
    # The other hash of genes is that of the ids alone; names of genes decide what is staged, too.
    wanted["genes_sha256"] = genes.table_sha256
    content = (json.dumps(wanted, indent=1) + "\n").encode()
    if not path.exists():
        _write_if_missing(path, content)
    found = read_json(path, cure="use another --out folder")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (no settings); use another --out folder")
    before = found.get("staging_version")
    older = type(before) is int and 0 < before < STAGING_VERSION
    if older:
        # Settings that came later had their defaults.
        default = dataclasses.asdict(Settings(genes_hash=settings.genes_hash))
        default["genes_sha256"] = genes.table_sha256
        found = default | found | {"staging_version": STAGING_VERSION}
        if before == 1 and found["min_genes"] == 1:
            # The default of that version, which kept every cell with counts.
            found["min_genes"] = settings.min_genes
    different = [
        f"{name} {_shown(found.get(name))} there, {_shown(wanted.get(name))} here"
        for name in sorted(set(wanted) | set(found))
        if name not in found or name not in wanted or found[name] != wanted[name]
    ]
    if different:
        raise ValueError(
            f"{corpus} was begun with other settings ({'; '.join(different)}); "
            "use the same ones or another --out folder"
        )
    if older:
        write_atomic(path, content)
        _log.info("%s: begun with an older version; its datasets are staged again", corpus)


def _shown(setting: object) -> object:
    return "the default" if setting is None else setting


def _remove_leftovers(corpus: Path) -> None:
    """Remove the staging that killed runs have left without a ledger entry."""
    for path in (corpus / "staging").iterdir():
        part = path.name.startswith(".") and path.name.endswith("~")
        name = path.name[1:-1] if part else path.name
        if not is_safe_id(name) or not (part or not ledger_path(corpus, name).exists()):
            continue
        with dataset_lock(corpus, name, wait=False) as held:
            # Whoever holds it may be about to write the entry, or has just done so.
            if held and (part or not ledger_path(corpus, name).exists()):
                shutil.rmtree(path, ignore_errors=True)


def _report(entry: LedgerEntry, n_done: int, n_all: int, bar: Bar | None) -> None:
    if entry["status"] == "ok" and entry["reason"]:
        _log.warning("%s: %s", entry["dataset_id"], entry["reason"])
    for warning in entry["warnings"]:
        _log.warning("%s: %s", entry["dataset_id"], warning)
    if bar is not None:
        bar.update()
    else:
        detail = (
            f"{counted(entry['n_cells'], 'cell')}{_dropped(entry)}"
            if entry["status"] == "ok"
            else entry["reason"]
        )
        _log.info("%d/%d %s: %s, %s", n_done, n_all, entry["dataset_id"], entry["status"], detail)


def _dropped(entry: LedgerEntry) -> str:
    """Return how many cells were dropped and why, '' if none."""
    dropped = entry["dropped_cells"]
    if not dropped:
        return ""
    reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
    limit = f"below min_genes {entry['min_genes']}"
    return f" (dropped: {reasons.replace('below min_genes', limit)})"


def _check_names(corpus: Path, datasets: Sequence[Dataset]) -> None:
    """Refuse datasets whose name is that of other files; only paths that differ are read."""
    problems = []
    for dataset in datasets:
        staged = staged_entry(corpus, dataset.dataset_id)
        if staged is None or not is_taken(staged, dataset, None):
            continue
        if dataset.remote:
            problems.append(taken(staged))
            continue
        try:
            found_hash = read_hash(dataset)
        except (ValueError, OSError) as error:
            _log.debug("%s: %s; what is staged is kept", dataset.dataset_id, error)
            continue
        if is_taken(staged, dataset, found_hash):
            problems.append(taken(staged))
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")


def _report_others(corpus: Path, datasets: Sequence[Dataset]) -> None:
    others = sorted(known_names(corpus) - {dataset.dataset_id for dataset in datasets})
    if others:
        named = ", ".join(others[:_MOST_NAMES]) + (", ..." if len(others) > _MOST_NAMES else "")
        _log.info(
            "%s of this corpus not in this manifest: %s (python -m data_prep forget takes datasets "
            "out)",
            counted(len(others), "dataset"),
            named,
        )


def _write_if_missing(path: Path, data: bytes) -> None:
    """Create a file atomically; where another task was faster, its file stays."""
    # The lock is held already, but not every file system has locks.
    temporary = partial_name(path)
    write_atomic(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        _log.debug("%s was written by another task", path)
    finally:
        temporary.unlink()
