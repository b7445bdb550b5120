"""The staged datasets that a corpus is made of, opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpus.inputs import Inputs
from data_prep.corpus.split.rule import SplitRule, in_order_of_arrival
from data_prep.ledger.ledger import LedgerEntry, count_statuses
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import files_below


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


def open_used(corpus: Path, inputs: Inputs, rule: SplitRule) -> list[Staged]:
    """Return the staged datasets, at least one, in the order in which they came.

    Args:
        corpus: The corpus folder.
        inputs: What lies there.
        rule: With the order in which the datasets came.

    Raises:
        ValueError: No usable dataset, or one whose staging is not that of its ledger.
    """
    used = {entry["dataset_id"]: entry for entry in inputs.used}
    names = in_order_of_arrival([*used], rule)
    staged: Sequence[Staged] = [_opened(corpus, used[name], inputs.genes) for name in names]
    if not staged:
        found = ", ".join(f"{n} {status}" for status, n in count_statuses(inputs.ledger).items())
        raise ValueError(
            f"{corpus}: no usable dataset ({found}); see: python -m data_prep status {corpus}"
        )
    return list(staged)


def _opened(corpus: Path, entry: LedgerEntry, genes: GeneVocabulary) -> Staged:
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


def file_states(staged: Staged) -> dict[str, list[int]]:
    """Return what tells staged files that were written to from those that were not.

    Args:
        staged: A dataset.
    """
    states = {}
    for path in files_below(staged.folder):
        if path.is_file():
            # Opening asks a network file system for the state of now.
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
            times = about.st_mtime_ns, about.st_ctime_ns
            name = path.relative_to(staged.folder).as_posix()
            states[name] = [about.st_ino, about.st_size, *times]
    return states
