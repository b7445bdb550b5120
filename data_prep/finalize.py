"""From converted datasets to a corpus: drop duplicates, split, shuffle, write, describe.

    python -m data_prep finalize CORPUS

Reads CORPUS/settings.json, ledger/ and staging/ (written by convert; datasets that are not `ok` are
left out and listed). Writes genes.tsv, cells.zarr, obs/, gene_stats.npz, checksums.json and, last,
corpus.json; `sclong_ds.store` describes them. Everything is built in a temporary folder inside
CORPUS and moved at the end, so a killed run leaves the corpus that was there, or none. The same
staging and options give the same bytes. Memory: a few hundred MB plus about six bytes a cell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup import Progress, find_duplicates
from data_prep.gene_statistics import gene_statistics, write_statistics
from data_prep.ledger import LedgerEntry, count_statuses, read_ledger
from data_prep.permute import StagedCells, write_permuted
from data_prep.splits import (
    SplitBy,
    SplitCells,
    SplitOptions,
    SplitPlan,
    plan_split,
    read_donors,
)
from sclong_ds.files import file_sha256, sync_tree, write_atomic
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
        progress: Called with (stage, cells done, cells in all).

    Returns:
        The content of corpus.json.

    Raises:
        FileNotFoundError: No such folder, or nothing was converted.
        ValueError: No usable dataset, impossible options, or damaged staging.
    """
    corpus = Path(corpus)
    names = tuple(validation_datasets)
    options = SplitOptions(seed, validation_fraction, test_fraction, split_by, names)
    ledger = read_ledger(corpus)
    genes = _vocabulary(corpus)
    staged = [_open_staged(corpus, entry, genes) for entry in ledger if entry["status"] == "ok"]
    if not staged:
        found = ", ".join(f"{n} {status}" for status, n in count_statuses(ledger).items())
        raise ValueError(
            f"{corpus}: no usable dataset ({found}); see: python -m data_prep status {corpus}"
        )
    for stale in corpus.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=corpus))
    try:
        catalogue = _build(work, staged, genes, options, codec, progress)
        catalogue["unused"] = [
            {"dataset_id": e["dataset_id"], "status": e["status"], "reason": e["reason"]}
            for e in ledger
            if e["status"] != "ok"
        ]
        catalogue |= _write_checksums(corpus, work, catalogue, [s.dataset_id for s in staged])
        _publish(corpus, work, catalogue)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for warning in catalogue["warnings"]:
        logger.warning("%s", warning)
    return catalogue


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
    """Write all products except the checksums to `work`; return the catalogue."""
    repeated = find_duplicates([s.cells for s in staged], work / "digests", progress=progress)
    groups = []
    for s, dropped in zip(staged, repeated, strict=True):
        donors, donor = read_donors(s.folder / "obs.tsv.gz", len(s.cells))
        groups.append(
            SplitCells(dataset_id=s.dataset_id, donors=donors, donor=donor, kept=~dropped)
        )
    plan = plan_split(groups, options)
    with CellWriter(work / "cells.zarr", n_genes=len(genes), codec=codec) as writer:
        ends = write_permuted(
            [
                StagedCells(dataset_id=s.dataset_id, cells=s.cells, kept=~dropped, split=split)
                for s, dropped, split in zip(staged, repeated, plan.codes, strict=True)
            ],
            writer,
            seed=options.seed,
            scratch=work / "scattered",
            progress=progress,
        )
    cells = CellStore(work / "cells.zarr")
    stats = gene_statistics(cells, range(*ends["train"]), progress=progress)
    write_statistics(work / "gene_stats.npz", stats)
    genes.write(work / "genes.tsv")
    (work / "obs").mkdir()
    for s in staged:
        shutil.copyfile(s.folder / "obs.tsv.gz", work / "obs" / f"{s.dataset_id}.tsv.gz")
    datasets = [
        _dataset_info(s, ~dropped, split)
        for s, dropped, split in zip(staged, repeated, plan.codes, strict=True)
    ]
    return _catalogue(cells, genes, options, plan, ends, datasets)


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
    ends: Mapping[str, tuple[int, int]],
    datasets: Sequence[DatasetInfo],
) -> dict[str, Any]:
    return {
        "n_cells": len(cells),
        "n_genes": len(genes),
        "n_values": cells.n_values,
        "genes_hash": genes.hash,
        "splits": {name: list(border) for name, border in ends.items()},
        "split_unit": plan.unit,
        "held_out": plan.held_out,
        "options": asdict(options),
        "datasets": [asdict(dataset) for dataset in datasets],
        "duplicates_dropped": sum(dataset.duplicates_dropped for dataset in datasets),
        "warnings": list(plan.warnings),
    }


def _write_checksums(
    corpus: Path, work: Path, catalogue: Mapping[str, Any], used: Sequence[str]
) -> dict[str, str]:
    """Write checksums.json; return the corpus hash and the hash of checksums.json itself."""
    files = {
        path.relative_to(work).as_posix(): file_sha256(path)
        for product in PRODUCTS[:-1]
        for path in files_below(work / product)
    }
    inputs = [corpus / "settings.json", *files_below(corpus / "ledger")]
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
    """Move the products to their names.

    corpus.json goes first and comes last: a run killed in between leaves no corpus, never a mix.
    """
    sync_tree(work)
    (corpus / "corpus.json").unlink(missing_ok=True)
    for name in PRODUCTS:
        if (corpus / name).is_dir():
            os.rename(corpus / name, work / f"old-{name}")
        os.replace(work / name, corpus / name)
    write_catalogue(corpus, catalogue)
    handle = os.open(corpus, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
