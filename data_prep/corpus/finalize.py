"""From converted datasets to a corpus: drop duplicates, split, shuffle, write, describe.

    python -m data_prep finalize CORPUS

Reads CORPUS/settings.json, manifests/, ledger/ and staging/ (written by convert; datasets that are
not `ok` are left out and listed; one that was never converted is an error). All inputs are compared
with their checksums before they are used, and again before the corpus is published; no convert runs
meanwhile. Writes genes.tsv, cells.zarr, obs/, columns/, gene_stats.npz, measured_genes.npy,
CITATIONS.md, checksums.json and, last, corpus.json; `sclong_ds.corpus.corpus` describes them. All
is built in `CORPUS/.finalize-KEY` and moved at the end, so a killed run leaves the corpus that was
there, or none. The same staging and options give the same bytes, and the same KEY: started again,
the command continues after the last finished run, bucket or stage. Memory: about a GB plus ten
bytes a cell.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from data_prep.annotations.columns import Annotations, write_columns
from data_prep.corpus.dedup import Progress
from data_prep.corpus.gene_statistics import gene_statistics, write_statistics
from data_prep.corpus.inputs import Inputs, read_inputs
from data_prep.corpus.near.kept_cells import Kept, kept_cells
from data_prep.corpus.near.near_duplicates import NearRule
from data_prep.corpus.permute import StagedCells, write_permuted
from data_prep.corpus.publish import is_sealed, publish
from data_prep.corpus.split_rule import (
    SplitBy,
    SplitRule,
    in_order_of_arrival,
    read_rule,
    resolve,
)
from data_prep.corpus.splits import SplitCells, SplitPlan, plan_split, read_donors
from data_prep.corpus.work_folder import discard, open_work
from data_prep.ledger.ledger import LedgerEntry, count_statuses, origin_of, read_ledger
from data_prep.ledger.pending import Pending, read_pending, tasks_to_run
from data_prep.source.measured import MEASURED, pack, read_measured
from sclong_ds.corpus.catalogue import (
    CITATIONS,
    SPLITS,
    DatasetInfo,
    checked_files,
    corpus_files,
    write_catalogue,
)
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.datasheet.citations import citations_text
from sclong_ds.files.atomic import (
    file_sha256,
    locked,
    named_errors,
    sync_tree,
    write_atomic,
)
from sclong_ds.files.npz import read_npz

logger = logging.getLogger(__name__)

_MOST_NAMES = 10
"""Datasets that a message names."""
_WORK_VERSION = 6
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
    seed: int | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    split_by: SplitBy | None = None,
    validation_datasets: Sequence[str] = (),
    codec: Literal["zstd", "none"] = "zstd",
    near_duplicates: NearRule = "primary",
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the corpus from everything that is staged.

    What is None or empty is as when the corpus was finalized before: its split stays, whatever was
    added (`data_prep.corpus.split_rule`).

    Args:
        corpus: Folder that convert has filled.
        seed: Seed of the split and of the order of the cells (0).
        validation_fraction: Share of the cells to hold out for validation (0.05); how near whole
            groups come is told.
        test_fraction: The same for a test split (0).
        split_by: donor, dataset or cell; auto takes the first that gives enough groups.
        validation_datasets: Datasets to validate on, instead of a share.
        codec: zstd or none (twice the size, for fast local disks).
        near_duplicates: Which cells to leave out that are the same as one of a dataset with another
            gene list on the genes of both: `primary` those that are not primary data and stand
            beside one that is, `drop` all but one, `keep` none.
        allow_missing: Continue without datasets that were to be converted and never were.
        progress: Called with (stage, cells done, cells in all).

    Returns:
        The content of corpus.json.

    Raises:
        FileNotFoundError: No such folder, or nothing was converted.
        ValueError: Datasets that were never converted, no usable dataset, impossible options,
            inputs that are damaged or change meanwhile, or another finalize or a convert is at work
            in the folder.
    """
    corpus = Path(corpus)
    given = {
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "split_by": split_by,
        "validation_datasets": tuple(validation_datasets),
    }
    if not (corpus / "ledger").is_dir():
        read_ledger(corpus)  # Says what to do; no lock file is made in a folder that is no corpus.
    with _alone(corpus), named_errors(corpus):
        inputs = read_inputs(corpus)
        rule = _rule(corpus, given)
        pending = _pending(corpus, inputs.ledger, allow_missing=allow_missing)
        catalogue = _finish(corpus, inputs, pending, rule, codec, near_duplicates, progress)
    for warning in (*catalogue["warnings"], *_dataset_warnings(corpus, catalogue["datasets"])):
        logger.warning("%s", warning)
    return catalogue


def _finish(
    corpus: Path,
    inputs: Inputs,
    pending: Sequence[Pending],
    rule: SplitRule,
    codec: Literal["zstd", "none"],
    near: NearRule,
    progress: Progress | None,
) -> dict[str, Any]:
    """Build and publish the corpus, or what an earlier run has left of that; return the catalogue.

    Raises:
        ValueError: Impossible options or damaged staging; what was built is removed.
    """
    staged = _usable(corpus, inputs, rule)
    inputs.check()
    work = open_work(corpus, _work_content(inputs, pending, rule, [codec, near]))
    try:
        if not is_sealed(corpus, work):
            catalogue = _build(work, staged, inputs.genes, rule, codec, near, progress)
            _seal(work, catalogue, inputs, pending)
        catalogue = publish(corpus, work)
    except ValueError:
        # The same command would fail again.
        discard(work)
        raise
    discard(work)
    return catalogue


def _rule(corpus: Path, given: Mapping[str, Any]) -> SplitRule:
    """Return the rule of the split: that of the corpus, and what is given now."""
    before = read_rule(corpus)
    rule = resolve(given, before)
    if before is not None and rule.datasets != before.datasets:
        logger.warning(
            "%s: the split is drawn again (seed %s, split_by %s; before: %s, %s): validation "
            "figures before and after cannot be compared, and earlier models were trained on cells "
            "that are held out now",
            *(corpus, rule.options.seed, rule.options.split_by),
            *(before.options.seed, before.options.split_by),
        )
    return rule


def _dataset_warnings(corpus: Path, datasets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line that counts and names the datasets whose ledger has warnings, if any."""
    numbers = {info["dataset_id"]: len(info.get("warnings") or ()) for info in datasets}
    found = [f"{name} ({number})" for name, number in numbers.items() if number]
    if not found:
        return []
    more = f", and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return [
        f"{sum(numbers.values())} warnings about {len(found)} of the {len(datasets)} datasets "
        f"used: {', '.join(found[:_MOST_NAMES])}{more}; see: python -m data_prep status {corpus}"
    ]


def _work_content(
    inputs: Inputs, pending: Sequence[Pending], rule: SplitRule, options: Sequence[str]
) -> list[Any]:
    """Return what decides the corpus; the ledger holds the checksums of what is staged."""
    missing = [dataset.dataset_id for dataset in pending]
    ledger = [dict(entry) for entry in inputs.ledger]
    return [_WORK_VERSION, rule.as_json(), *options, ledger, inputs.documents, missing]


def _pending(corpus: Path, ledger: Sequence[LedgerEntry], *, allow_missing: bool) -> list[Pending]:
    """Return the datasets that were never converted; they are an error unless allowed."""
    pending = read_pending(corpus, ledger)
    if pending and not allow_missing:
        names = ", ".join(dataset.dataset_id for dataset in pending[:3])
        raise ValueError(
            f"{corpus}: {len(pending)} of {len(ledger) + len(pending)} datasets were not converted "
            f"yet ({names}{', ...' if len(pending) > 3 else ''}): {tasks_to_run(pending)}, or "
            "finalize with --allow-missing to continue without them"
        )
    return pending


def _usable(corpus: Path, inputs: Inputs, rule: SplitRule) -> list[Staged]:
    """Return the staged datasets, at least one, in the order in which they came."""
    used = {entry["dataset_id"]: entry for entry in inputs.used}
    staged = [
        _open_staged(corpus, used[name], inputs.genes)
        for name in in_order_of_arrival([*used], rule)
    ]
    if not staged:
        found = ", ".join(f"{n} {status}" for status, n in count_statuses(inputs.ledger).items())
        raise ValueError(
            f"{corpus}: no usable dataset ({found}); see: python -m data_prep status {corpus}"
        )
    return staged


@contextmanager
def _alone(corpus: Path) -> Iterator[None]:
    """Keep converts and other runs of finalize out of a corpus; the lock ends with the process."""
    with locked(corpus / ".locks" / "~corpus", wait=False) as held:
        if not held:
            raise ValueError(
                f"{corpus}: another finalize is at work here, or a convert or forget; wait for it"
            )
        yield


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, or the file itself, sorted."""
    return [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())


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
        raise ValueError(
            f"{folder}/cells.zarr: cells of {cells.n_genes} genes, the corpus has {len(genes)}; "
            "convert it again"
        )
    if len(cells) != entry["n_cells"]:
        raise ValueError(
            f"{folder}/cells.zarr: {len(cells)} cells, its ledger entry has {entry['n_cells']}; "
            "convert it again"
        )
    if "source_row" not in cells.tables:
        raise ValueError(f"{folder}: no table source_row; convert the dataset again")
    return Staged(dataset_id=name, folder=folder, ledger=entry, cells=cells)


def _build(
    work: Path,
    staged: Sequence[Staged],
    genes: GeneVocabulary,
    rule: SplitRule,
    codec: Literal["zstd", "none"],
    near: NearRule,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write all products except the checksums to `work`, where missing; return the catalogue."""
    measured = np.stack([read_measured(s.folder, len(genes)) for s in staged])
    kept = kept_cells(work, {s.folder: s.cells for s in staged}, measured, near, progress=progress)
    groups = []
    for s, here in zip(staged, kept.cells, strict=True):
        donors, donor = read_donors(s.folder / "obs.parquet", len(s.cells))
        rows = s.cells.table("source_row")
        groups.append(
            SplitCells(dataset_id=s.dataset_id, donors=donors, donor=donor, kept=here, rows=rows)
        )
    plan = plan_split(groups, rule)
    if not (work / "cells.zarr").exists():
        datasets = [
            StagedCells(dataset_id=s.dataset_id, cells=s.cells, kept=here, split=split)
            for s, here, split in zip(staged, kept.cells, plan.codes, strict=True)
        ]
        path = work / "cells.zarr"
        with CellWriter(path, n_genes=len(genes), codec=codec, resumable=True) as writer:
            scratch = work / "scattered"
            seed = rule.options.seed
            write_permuted(datasets, writer, seed=seed, scratch=scratch, progress=progress)
    cells = CellStore(work / "cells.zarr")
    infos = [
        _dataset_info(s, kept, n, plan.codes[n], groups[n].donors) for n, s in enumerate(staged)
    ]
    ends = np.cumsum([0, *(sum(info.split_cells[name] for info in infos) for name in SPLITS)])
    splits = {name: ends[code : code + 2].tolist() for code, name in enumerate(SPLITS)}
    _write_measured_genes(work / MEASURED, measured)
    train = range(*splits["train"])
    _write_gene_statistics(work / "gene_stats.npz", cells, train, measured, progress)
    genes.write(work / "genes.tsv")
    _write_annotations(work, staged)
    annotations = [
        Annotations(
            obs=work / "obs" / f"{s.dataset_id}.parquet",
            n_cells=len(s.cells),
            tissue=s.ledger["tissue"],
        )
        for s in staged
    ]
    no_columns = write_columns(work / "columns", annotations, cells, progress=progress)
    write_atomic(work / CITATIONS, citations_text(infos).encode())
    catalogue = _catalogue(cells, genes, plan, splits, infos) | {"near_duplicates": near}
    catalogue["warnings"] += kept.warnings()
    if no_columns:
        catalogue["warnings"].append(
            f"cell annotations of too many different values are no columns of the corpus: "
            f"{', '.join(no_columns)}; Corpus.obs reads them all the same, more slowly"
        )
    return catalogue


def _write_gene_statistics(
    path: Path,
    cells: CellStore,
    train: range,
    measured: NDArray[np.bool_],
    progress: Progress | None,
) -> None:
    """Write the statistics of the training cells, if an earlier run has not."""
    try:
        read_npz(path, cure="it is made again")
    except (OSError, ValueError):
        write_statistics(path, gene_statistics(cells, train, measured, progress=progress))


def _write_annotations(work: Path, staged: Sequence[Staged]) -> None:
    """Copy the annotations of the staged cells, nothing else being in their folder."""
    shutil.rmtree(work / "obs", ignore_errors=True)
    (work / "obs").mkdir()
    for s in staged:
        copy = work / "obs" / f"{s.dataset_id}.parquet"
        shutil.copyfile(s.folder / "obs.parquet", copy)
        if file_sha256(copy) != s.ledger["files"]["obs.parquet"][1]:
            raise ValueError(f"{s.folder / 'obs.parquet'}: changed while finalize was at work")


def _write_measured_genes(path: Path, measured: NDArray[np.bool_]) -> None:
    """Write (datasets, genes / 8) uint8, the bits of all datasets."""
    content = io.BytesIO()
    np.save(content, pack(measured))
    write_atomic(path, content.getvalue())


def _dataset_info(
    s: Staged,
    cells: Kept,
    number: int,
    split: NDArray[np.uint8],
    donors: tuple[str, ...] | None,
) -> DatasetInfo:
    kept = cells.cells[number]
    per_split = np.bincount(split[kept], minlength=len(SPLITS))
    entry, known = s.ledger, cast("Mapping[str, Any]", s.ledger)
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
        n_cells_input=entry["n_cells_input"],
        version=entry["version"],
        matrix=entry["matrix"],
        restored=entry["restored"],
        warnings=tuple(known.get("warnings", ())),
        origin=origin_of(entry),
        median_genes=entry["median_genes"],
        n_donors=len({*(donors or ())} - {""}),
        near_dropped=cells.near_dropped[number],
        near_kept=cells.near_kept[number],
    )


def _catalogue(
    cells: CellStore,
    genes: GeneVocabulary,
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
        "options": asdict(plan.rule.options),
        "split_rule": plan.rule.as_json(),
        "split_shares": {name: asdict(share) for name, share in plan.shares.items()},
        "datasets": [asdict(dataset) for dataset in datasets],
        "duplicates_dropped": sum(dataset.duplicates_dropped for dataset in datasets),
        "warnings": list(plan.warnings),
    }


def _seal(
    work: Path, catalogue: dict[str, Any], inputs: Inputs, pending: Sequence[Pending]
) -> None:
    """Write checksums.json and, when all is on disk and the inputs are unchanged, corpus.json."""
    ledger = inputs.ledger
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
    catalogue |= _write_checksums(work, catalogue, inputs)
    catalogue["files"] = checked_files(work, corpus_files(work))
    inputs.check()
    sync_tree(work)
    write_catalogue(work, catalogue)


def _write_checksums(work: Path, catalogue: Mapping[str, Any], inputs: Inputs) -> dict[str, str]:
    """Write checksums.json; return the corpus hash and the hash of checksums.json itself."""
    names = [name for name in corpus_files(work) if name != "checksums.json"]
    files = {name: file_sha256(work / name) for name in names}
    document = {"algorithm": "sha256", "files": files, "inputs": inputs.checksums()}
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
