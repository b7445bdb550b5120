"""From converted datasets to a corpus: drop duplicates, split, shuffle, write, describe.

    python -m data_prep finalize CORPUS

Reads CORPUS/settings.json, manifests/, ledger/ and staging/ (written by convert; datasets that are
not `ok` are left out and listed; one that was never converted is an error). Writes genes.tsv,
cells.zarr, obs/, gene_stats.npz, checksums.json and, last, corpus.json; `sclong_ds.store` describes
them. Everything is built in `CORPUS/.finalize-KEY` and moved at the end, so a killed run leaves the
corpus that was there, or none. The same staging and options give the same bytes, and the same KEY:
started again, the command goes on after the last finished run, bucket or stage. Memory: about a GB
plus ten bytes a cell.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup import Progress, find_duplicates
from data_prep.gene_statistics import gene_statistics, write_statistics
from data_prep.ledger import (
    LedgerEntry,
    count_statuses,
    ledger_path,
    read_ledger,
    require_current,
)
from data_prep.pending import Pending, read_pending, tasks_to_run
from data_prep.permute import StagedCells, write_permuted
from data_prep.splits import (
    SplitBy,
    SplitCells,
    SplitOptions,
    SplitPlan,
    plan_split,
    read_donors,
)
from sclong_ds.files import file_sha256, sync_folder, sync_tree, write_atomic
from sclong_ds.genes import GeneVocabulary
from sclong_ds.store import (
    SPLITS,
    CellStore,
    CellWriter,
    DatasetInfo,
    write_catalogue,
)

logger = logging.getLogger(__name__)

PRODUCTS = ("cells.zarr", "obs", "genes.tsv", "gene_stats.npz", "checksums.json")
_WORK_PREFIX = ".finalize-"
_WORK_VERSION = 1
"""Raised when an interrupted run of an older program could not be continued."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """One dataset that convert has staged."""

    dataset_id: str
    """Name of the dataset."""
    folder: Path
    """CORPUS/staging/DATASET_ID."""
    ledger: LedgerEntry
    """Its ledger entry."""
    cells: CellStore
    """Its cells."""


def finalize(
    corpus: str | Path,
    *,
    seed: int = 0,
    validation_fraction: float | None = None,
    test_fraction: float = 0.0,
    split_by: SplitBy = "auto",
    validation_datasets: Sequence[str] = (),
    codec: Literal["zstd", "none"] = "zstd",
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the corpus from everything that is staged.

    Args:
        corpus: Folder that convert has filled.
        seed: Seed of the split and of the order of the cells.
        validation_fraction: Share of the cells to hold out for validation, at most (0.05 when
            None); the smallest group when no group fits.
        test_fraction: The same for a test split.
        split_by: donor, dataset or cell; auto takes the first that gives enough groups.
        validation_datasets: Datasets to validate on, instead of a share.
        codec: zstd or none (twice the size, for fast local disks).
        allow_missing: Go on without datasets that were to be converted and never were.
        progress: Called with (stage, cells done, cells in all).

    Returns:
        The content of corpus.json.

    Raises:
        FileNotFoundError: No such folder, or nothing was converted.
        ValueError: Datasets that were never converted, no usable dataset, impossible options,
            damaged staging, or another finalize is at work in the folder.
    """
    corpus = Path(corpus)
    names = tuple(validation_datasets)
    options = SplitOptions(seed, validation_fraction, test_fraction, split_by, names)
    ledger = read_ledger(corpus)
    require_current(corpus, ledger)
    pending = _pending(corpus, ledger, allow_missing=allow_missing)
    genes = _vocabulary(corpus)
    with _alone(corpus):
        staged = _usable(corpus, ledger, genes)
        work = _work_folder(corpus, ledger, pending, staged, options, codec)
        try:
            if not (work / "catalogue.json").exists():
                catalogue = _build(work, staged, genes, options, codec, progress)
                _seal(corpus, work, catalogue, ledger, pending)
            catalogue = json.loads((work / "catalogue.json").read_bytes())
            _publish(corpus, work, catalogue)
        except ValueError:
            # Wrong options or damaged staging: the same command would fail again.
            shutil.rmtree(work)
            raise
        shutil.rmtree(work)
    for warning in catalogue["warnings"]:
        logger.warning("%s", warning)
    return catalogue


def _pending(corpus: Path, ledger: Sequence[LedgerEntry], *, allow_missing: bool) -> list[Pending]:
    """Return the datasets that were never converted; they are an error unless allowed."""
    pending = read_pending(corpus, ledger)
    if pending and not allow_missing:
        names = ", ".join(dataset.dataset_id for dataset in pending[:3])
        raise ValueError(
            f"{corpus}: {len(pending)} of {len(ledger) + len(pending)} datasets were not converted "
            f"yet ({names}{', ...' if len(pending) > 3 else ''}): {tasks_to_run(pending)}, or "
            "finalize with --allow-missing to go on without them"
        )
    return pending


def _usable(corpus: Path, ledger: Sequence[LedgerEntry], genes: GeneVocabulary) -> list[Staged]:
    """Return the staged datasets, at least one."""
    staged = [_open_staged(corpus, entry, genes) for entry in ledger if entry["status"] == "ok"]
    if not staged:
        found = ", ".join(f"{n} {status}" for status, n in count_statuses(ledger).items())
        raise ValueError(
            f"{corpus}: no usable dataset ({found}); see: python -m data_prep status {corpus}"
        )
    return staged


@contextmanager
def _alone(corpus: Path) -> Iterator[None]:
    """Keep other runs of finalize out of a corpus; the lock ends with the process."""
    with (corpus / "settings.json").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{corpus}: another finalize is at work here; wait for it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            logger.warning("%s: this file system has no locks; start one finalize only", corpus)
        yield


def _work_folder(
    corpus: Path,
    ledger: Sequence[LedgerEntry],
    pending: Sequence[Pending],
    staged: Sequence[Staged],
    options: SplitOptions,
    codec: str,
) -> Path:
    """Return the folder in which this very work goes on, if it was begun; other work is removed.

    Staged files are told apart by size and time of change: reading them all takes too long.
    """
    files = [
        (path.relative_to(corpus).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for s in staged
        for path in files_below(s.folder)
    ]
    missing = [dataset.dataset_id for dataset in pending]
    content = [_WORK_VERSION, asdict(options), codec, list(ledger), missing, files]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    work = corpus / f"{_WORK_PREFIX}{key}"
    for other in corpus.glob(f"{_WORK_PREFIX}*"):
        if other != work:
            shutil.rmtree(other)
    if work.exists():
        logger.info("%s: continuing what an earlier run has begun", corpus)
    work.mkdir(exist_ok=True)
    return work


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, or the file itself, sorted."""
    return [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())


def _vocabulary(corpus: Path) -> GeneVocabulary:
    """Return the vocabulary that convert used, checked against its hash in settings.json."""
    genes = GeneVocabulary.read(corpus / "genes.tsv")
    path = corpus / "settings.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; run: python -m data_prep convert MANIFEST --out {corpus}"
        )
    try:
        expected = json.loads(path.read_bytes())["genes_hash"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged; convert into a new folder") from None
    if expected != genes.hash:
        raise ValueError(
            f"{corpus / 'genes.tsv'}: gene hash {genes.hash}, the cells were converted with "
            f"{expected}; restore genes.tsv or convert into a new folder"
        )
    return genes


def _open_staged(corpus: Path, entry: LedgerEntry, genes: GeneVocabulary) -> Staged:
    name = entry["dataset_id"]
    folder = corpus / "staging" / name
    try:
        cells = CellStore(folder / "cells.zarr")
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: the ledger calls {name} ok but its cells are missing; convert it again"
        ) from None
    if cells.n_genes != len(genes):
        raise ValueError(f"{folder}: cells of {cells.n_genes} genes, the corpus has {len(genes)}")
    if "source_row" not in cells.tables:
        raise ValueError(f"{folder}: no table source_row; convert the dataset again")
    return Staged(dataset_id=name, folder=folder, ledger=entry, cells=cells)


def _build(
    work: Path,
    staged: Sequence[Staged],
    genes: GeneVocabulary,
    options: SplitOptions,
    codec: Literal["zstd", "none"],
    progress: Progress | None,
) -> dict[str, Any]:
    """Write all products except the checksums to `work`, where missing; return the catalogue."""
    kept = _kept_cells(work, staged, progress)
    groups = []
    for s, here in zip(staged, kept, strict=True):
        donors, donor = read_donors(s.folder / "obs.parquet", len(s.cells))
        groups.append(SplitCells(dataset_id=s.dataset_id, donors=donors, donor=donor, kept=here))
    plan = plan_split(groups, options)
    if not (work / "cells.zarr").exists():
        datasets = [
            StagedCells(dataset_id=s.dataset_id, cells=s.cells, kept=here, split=split)
            for s, here, split in zip(staged, kept, plan.codes, strict=True)
        ]
        path = work / "cells.zarr"
        with CellWriter(path, n_genes=len(genes), codec=codec, resumable=True) as writer:
            scratch = work / "scattered"
            write_permuted(datasets, writer, seed=options.seed, scratch=scratch, progress=progress)
    cells = CellStore(work / "cells.zarr")
    infos = [
        _dataset_info(s, here, split)
        for s, here, split in zip(staged, kept, plan.codes, strict=True)
    ]
    ends = np.cumsum([0, *(sum(info.split_cells[name] for info in infos) for name in SPLITS)])
    splits = {name: ends[code : code + 2].tolist() for code, name in enumerate(SPLITS)}
    stats = gene_statistics(cells, range(*splits["train"]), progress=progress)
    write_statistics(work / "gene_stats.npz", stats)
    genes.write(work / "genes.tsv")
    (work / "obs").mkdir(exist_ok=True)
    for s in staged:
        shutil.copyfile(s.folder / "obs.parquet", work / "obs" / f"{s.dataset_id}.parquet")
    return _catalogue(cells, genes, options, plan, splits, infos)


def _kept_cells(
    work: Path, staged: Sequence[Staged], progress: Progress | None
) -> list[NDArray[np.bool_]]:
    """Return which cells of each dataset repeat no earlier one."""
    path = work / "repeated.npy"
    stores = [s.cells for s in staged]
    if path.exists():
        # A run killed while it removed its scratch files.
        shutil.rmtree(work / "digests", ignore_errors=True)
        repeated = np.split(np.load(path), np.cumsum([len(store) for store in stores])[:-1])
    else:
        repeated = find_duplicates(stores, work / "digests", progress=progress)
        content = io.BytesIO()
        np.save(content, np.concatenate(repeated))
        write_atomic(path, content.getvalue())
    return [~here for here in repeated]


def _dataset_info(s: Staged, kept: NDArray[np.bool_], split: NDArray[np.uint8]) -> DatasetInfo:
    per_split = np.bincount(split[kept], minlength=len(SPLITS))
    entry = s.ledger
    return DatasetInfo(
        dataset_id=s.dataset_id,
        n_cells=int(kept.sum()),
        duplicates_dropped=int((~kept).sum()),
        split_cells=dict(zip(SPLITS, per_split.tolist(), strict=True)),
        n_genes_mapped=entry["n_genes_mapped"],
        counts_kept=entry["counts_kept"],
        organism=entry["organism"],
        tissue=entry["tissue"],
        format=entry["format"],
        source=entry["path"],
        source_hash=entry["source_hash"],
    )


def _catalogue(
    cells: CellStore,
    genes: GeneVocabulary,
    options: SplitOptions,
    plan: SplitPlan,
    splits: Mapping[str, list[int]],
    datasets: Sequence[DatasetInfo],
) -> dict[str, Any]:
    return {
        "n_cells": len(cells),
        "n_genes": len(genes),
        "n_values": cells.n_values,
        "genes_hash": genes.hash,
        "splits": dict(splits),
        "split_unit": plan.unit,
        "held_out": plan.held_out,
        "options": asdict(options),
        "datasets": [asdict(dataset) for dataset in datasets],
        "duplicates_dropped": sum(dataset.duplicates_dropped for dataset in datasets),
        "warnings": list(plan.warnings),
    }


def _seal(
    corpus: Path,
    work: Path,
    catalogue: dict[str, Any],
    ledger: Sequence[LedgerEntry],
    pending: Sequence[Pending],
) -> None:
    """Write checksums.json and, when all is on disk, the whole catalogue to `work`."""
    catalogue["unused"] = [
        {"dataset_id": e["dataset_id"], "status": e["status"], "reason": e["reason"]}
        for e in ledger
        if e["status"] != "ok"
    ]
    catalogue["unused"] += [
        {"dataset_id": p.dataset_id, "status": "pending", "reason": "not converted"}
        for p in pending
    ]
    left_out = Counter(dataset["status"] for dataset in catalogue["unused"])
    if left_out:
        catalogue["warnings"].append(
            f"{left_out.total()} of {len(ledger) + len(pending)} datasets are left out "
            f"({', '.join(f'{n} {status}' for status, n in sorted(left_out.items()))}); see: "
            "python -m data_prep status"
        )
    used = [entry["dataset_id"] for entry in ledger if entry["status"] == "ok"]
    entries = [ledger_path(corpus, entry["dataset_id"]) for entry in ledger]
    catalogue |= _write_checksums(corpus, work, catalogue, used, entries)
    sync_tree(work)
    write_atomic(work / "catalogue.json", json.dumps(catalogue).encode())


def _write_checksums(
    corpus: Path,
    work: Path,
    catalogue: Mapping[str, Any],
    used: Sequence[str],
    entries: Sequence[Path],
) -> dict[str, str]:
    """Write checksums.json; return the corpus hash and the hash of checksums.json itself."""
    files = {
        path.relative_to(work).as_posix(): file_sha256(path)
        for product in PRODUCTS[:-1]
        for path in files_below(work / product)
    }
    inputs = [corpus / "settings.json", *entries]
    inputs += [path for name in used for path in files_below(corpus / "staging" / name)]
    document = {
        "algorithm": "sha256",
        "files": files,
        "inputs": {p.relative_to(corpus).as_posix(): file_sha256(p) for p in inputs},
    }
    text = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    write_atomic(work / "checksums.json", text)
    content = {
        "genes": catalogue["genes_hash"],
        "splits": catalogue["splits"],
        "cells": {name: h for name, h in files.items() if name.startswith("cells.zarr/")},
    }
    return {
        "hash": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        "checksums_sha256": hashlib.sha256(text).hexdigest(),
    }


def _publish(corpus: Path, work: Path, catalogue: Mapping[str, Any]) -> None:
    """Move the products to their names; what a killed run has moved stays.

    corpus.json goes first and comes last: a run killed in between leaves no corpus, never a mix.
    """
    (corpus / "corpus.json").unlink(missing_ok=True)
    for name in PRODUCTS:
        if not (work / name).exists():
            continue
        if (corpus / name).is_dir():
            os.rename(corpus / name, work / f"old-{name}")
        os.replace(work / name, corpus / name)
    write_catalogue(corpus, catalogue)
    sync_folder(corpus)
