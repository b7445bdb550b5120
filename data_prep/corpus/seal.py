"""The last products of a corpus: statistics, list of columns, checksums and catalogue."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from data_prep.annotations.columns import names_left_out
from data_prep.corpus.build import LEFT_OUT, Build
from data_prep.corpus.gene_statistics import (
    GeneSums,
    of_measuring_cells,
    read_sums,
    write_statistics,
)
from data_prep.corpus.growth.part_list import earlier_datasets, growth_warnings, write_list
from data_prep.corpus.inputs import Inputs
from data_prep.corpus.near.kept_cells import NearCounts, near_counts
from data_prep.corpus.split.plan import SplitPlan
from data_prep.ledger.ledger import origin_of
from data_prep.ledger.pending import Pending
from data_prep.source.measured import MEASURED, pack
from sclong_ds.annotations.columns import ColumnInfo, column_name, write_index
from sclong_ds.corpus.catalogue import (
    CITATIONS,
    SPLITS,
    DatasetInfo,
    checked_files,
    corpus_files,
    write_catalogue,
)
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.datasheet.citations import citations_text
from sclong_ds.files.atomic import file_sha256, link_or_copy, sync_tree, write_atomic

_DAMAGED = "damaged since it was made; run finalize again"


def seal(build: Build, pending: Sequence[Pending]) -> None:
    """Write what is left, and when all is on disk and the inputs are unchanged, corpus.json.

    Args:
        build: All stages of which are done.
        pending: Datasets that were never converted.

    Raises:
        ValueError: An input has changed, or what other stages have made.
    """
    work, inputs, near = build.work, build.inputs, near_counts(build.crew)
    n_donors = build.planned("n_donors")
    numbers = range(build.n_earlier, len(build.staged))
    infos = [_dataset_info(build, near, n_donors[n], number=n) for n in numbers]
    splits = splits_of(infos)
    measured = build.measured[build.n_earlier :]
    _write_measured_genes(work / MEASURED, measured)
    sums = GeneSums.none(len(inputs.genes))
    for unit in range(len(build.layout)):
        sums.join(read_sums(build.unit_path(unit, ".sums.npz")))
    of = of_measuring_cells(build.cells, range(*splits["train"]), measured)
    write_statistics(work / "gene_stats.npz", sums.statistics(of))
    inputs.genes.write(work / "genes.tsv")
    write_atomic(work / CITATIONS, citations_text(infos).encode())
    catalogue = described(build.plan("new"), infos)
    catalogue |= _numbers(build)
    catalogue["near_duplicates"] = build.near
    warnings = near.warnings()
    no_columns = _write_columns(build)
    if no_columns:
        warnings.append(
            f"cell annotations of too many different values are no columns of the corpus: "
            f"{', '.join(no_columns)}; Corpus.obs reads them all the same, more slowly"
        )
    catalogue["warnings"] += warnings
    if build.earlier is None:
        _add_unused(catalogue, inputs, pending)
    catalogue |= _write_checksums(build, catalogue)
    catalogue["files"] = checked_files(work, corpus_files(work))
    if build.earlier is not None:
        listed = described(build.plan("all"), [*earlier_datasets(build.earlier, near), *infos])
        listed["warnings"] += [*warnings, *growth_warnings(build.earlier, build.planned("overdue"))]
        _add_unused(listed, inputs, pending)
        listed["near_duplicates"] = build.near
        firsts = build.firsts.tolist()
        write_list(work, build.earlier, listed, catalogue, inputs.documents, firsts)
    inputs.check_documents()
    sync_tree(work)
    write_catalogue(work, catalogue)


def described(plan: SplitPlan, datasets: Sequence[DatasetInfo]) -> dict[str, Any]:
    """Return what a catalogue says of datasets and their split.

    Args:
        plan: Of the split.
        datasets: All of its datasets.
    """
    return {
        "splits": splits_of(datasets),
        "split_unit": plan.unit,
        "held_out": plan.held_out,
        "options": asdict(plan.rule.options),
        "split_rule": plan.rule.as_json(),
        "split_shares": {name: asdict(share) for name, share in plan.shares.items()},
        "datasets": [asdict(dataset) for dataset in datasets],
        "duplicates_dropped": sum(dataset.duplicates_dropped for dataset in datasets),
        "warnings": list(plan.warnings),
    }


def splits_of(datasets: Sequence[DatasetInfo]) -> dict[str, list[int]]:
    """Return where the cells of each split begin and end.

    Args:
        datasets: All datasets.
    """
    sizes = (sum(info.split_cells[name] for info in datasets) for name in SPLITS)
    ends = np.cumsum([0, *sizes])
    return {name: ends[code : code + 2].tolist() for code, name in enumerate(SPLITS)}


def unused(inputs: Inputs, pending: Sequence[Pending]) -> list[dict[str, Any]]:
    """Return the datasets that are not in the corpus, for its catalogue.

    Args:
        inputs: With the ledger.
        pending: Datasets that were never converted.
    """
    found = [
        {"dataset_id": e["dataset_id"], "status": str(e["status"]), "reason": e["reason"]}
        for e in inputs.ledger
        if e["status"] != "ok"
    ]
    return found + [
        {"dataset_id": p.dataset_id, "status": "pending", "reason": "not converted"}
        for p in pending
    ]


def restated(
    catalogue: Mapping[str, Any], inputs: Inputs, pending: Sequence[Pending]
) -> dict[str, Any]:
    """Return a catalogue of parts with the unused datasets and the ledger of now.

    Args:
        catalogue: Of the corpus; the datasets that it uses are as they were.
        inputs: With the ledger.
        pending: Datasets that were never converted.
    """
    before = _unused_warnings(catalogue)
    warnings = [text for text in catalogue["warnings"] if text not in before]
    found = {**catalogue, "warnings": warnings, "documents": dict(inputs.documents)}
    _add_unused(found, inputs, pending)
    return found


def _add_unused(catalogue: dict[str, Any], inputs: Inputs, pending: Sequence[Pending]) -> None:
    catalogue["unused"] = unused(inputs, pending)
    catalogue["warnings"] += _unused_warnings(catalogue)


def _unused_warnings(catalogue: Mapping[str, Any]) -> list[str]:
    left_out = Counter(dataset["status"] for dataset in catalogue["unused"])
    if not left_out:
        return []
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(left_out.items()))
    n_datasets = len(catalogue["datasets"]) + left_out.total()
    return [
        f"{left_out.total()} of {n_datasets} datasets are left out ({statuses}); see: "
        "python -m data_prep status"
    ]


def _write_columns(build: Build) -> list[str]:
    """Number the columns that were made, and list them; return those that are none."""
    folder = build.work / "columns"
    infos: list[ColumnInfo] = []
    without: list[str] = []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, made in enumerate(build.crew.made("columns")):
        found = made.result
        if found is None:
            without.append(build.columns[number].name)
            continue
        name, target = f"columns-made/{column_name(number)}", folder / column_name(len(infos))
        link_or_copy(build.work / name, target)
        if file_sha256(target) != made.files[name]:
            raise ValueError(f"{build.work / name}: {_DAMAGED}")
        for name in ("values", "also", "terms"):
            found[name] = None if found[name] is None else tuple(found[name])
        infos.append(ColumnInfo(**found))
    names = names_left_out(build.annotations(build.new), [info.name for info in infos])
    write_index(folder, infos, len(build.cells), names | _left_out_before(build))
    return without


def _left_out_before(build: Build) -> set[str]:
    """Return the names that are no columns of earlier parts; old ones do not list them."""
    if build.earlier is None:
        return set()
    corpus = Corpus(build.earlier.corpus)
    names: set[str] = set()
    for part, found in zip(build.earlier.parts, corpus.parts or [corpus], strict=True):
        tables = build.annotations(build.staged[part.first : part.stop])
        names |= names_left_out(tables, [info.name for info in found.columns.stored])
    return names


def _write_measured_genes(path: Path, measured: NDArray[np.bool_]) -> None:
    """Write (datasets, genes / 8) uint8, the bits of all datasets."""
    content = io.BytesIO()
    np.save(content, pack(measured))
    write_atomic(path, content.getvalue())


def _dataset_info(build: Build, near: NearCounts, n_donors: int, *, number: int) -> DatasetInfo:
    s, codes = build.staged[number], build.codes[number]
    cells = np.bincount(codes, minlength=LEFT_OUT + 1)
    entry, known = s.ledger, cast("Mapping[str, Any]", s.ledger)
    return DatasetInfo(
        dataset_id=s.dataset_id,
        n_cells=int(len(codes) - cells[LEFT_OUT]),
        duplicates_dropped=int(cells[LEFT_OUT]),
        split_cells=dict(zip(SPLITS, cells[: len(SPLITS)].tolist(), strict=True)),
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
        n_donors=n_donors,
        near_dropped=near.near_dropped[number],
        near_kept=near.near_kept[number],
    )


def _numbers(build: Build) -> dict[str, Any]:
    cells, genes = build.cells, build.inputs.genes
    return {
        "n_cells": len(cells),
        "n_genes": len(genes),
        "n_values": cells.n_values,
        "genes_hash": genes.hash,
    }


def _write_checksums(build: Build, catalogue: Mapping[str, Any]) -> dict[str, str]:
    """Write checksums.json; return the corpus hash and the hash of checksums.json itself.

    Args:
        build: With all other products. The SHA-256 of shards is that of when they were written.
        catalogue: As far as it is known.

    Raises:
        ValueError: A product is not what another stage has made.
    """
    work, inputs = build.work, build.inputs
    (joined,) = build.crew.made("join")
    names = [name for name in corpus_files(work) if name != "checksums.json"]
    files = {name: joined.result.get(name) or file_sha256(work / name) for name in names}
    made = dict(joined.files)
    for unit in build.crew.made("annotations"):
        made |= unit.files
    for name, digest in files.items():
        if made.get(name, digest) != digest:
            raise ValueError(f"{work / name}: {_DAMAGED}")
    of = None if build.earlier is None else [s.dataset_id for s in build.new]
    document = {"algorithm": "sha256", "files": files, "inputs": inputs.checksums(of)}
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
