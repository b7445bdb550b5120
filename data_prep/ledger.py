"""The ledger of a corpus folder: one small JSON file per dataset that says what became of it.

`CORPUS/ledger/DATASET.json` is written when a dataset is done, so array tasks never write to the
same file; `python -m data_prep status` lists them. `finalize` takes the datasets that are `ok`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from sclong_ds.files import write_atomic

Status = Literal["ok", "excluded", "failed"]
STATUSES: tuple[Status, ...] = ("ok", "excluded", "failed")


class LedgerEntry(TypedDict):
    """What is known of one dataset; sizes are 0 or null where it could not be read."""

    dataset_id: str
    path: str
    status: Status
    """ok: staged; excluded: readable but not usable; failed: damaged, missing, or the work died."""
    reason: str
    """Why it is not ok; empty otherwise."""
    format: str | None
    organism: str
    tissue: str
    matrix: str | None
    """Which matrix held the counts: X, raw.X or layers/NAME."""
    gene_column: str | None
    """Which column named the genes."""
    n_cells: int
    """Cells staged."""
    n_cells_input: int
    dropped_cells: dict[str, int]
    """Cells left out, by reason."""
    n_genes_input: int
    n_genes_known: int
    """Genes of the dataset that are in the vocabulary."""
    n_genes_mapped: int
    """Genes of the vocabulary that are reached (fewer where several genes were summed)."""
    counts_input: int
    """Sum of all counts of the dataset."""
    counts_kept: float | None
    """Share of them that fell on mapped genes."""
    largest_losses: dict[str, int]
    """Unmapped genes with most counts."""
    obs_columns: list[str]
    """Cell annotations kept."""
    source_hash: str | None
    settings_hash: str


def empty_entry(
    dataset_id: str, path: Path, *, organism: str, tissue: str, settings_hash: str
) -> LedgerEntry:
    """Return the entry of a dataset of which nothing is known yet.

    Args:
        dataset_id: Name of the dataset.
        path: Its file or folder.
        organism: As in the manifest.
        tissue: As in the manifest.
        settings_hash: See `convert.settings_hash`.
    """
    return LedgerEntry(
        dataset_id=dataset_id,
        path=str(path),
        status="failed",
        reason="",
        format=None,
        organism=organism,
        tissue=tissue,
        matrix=None,
        gene_column=None,
        n_cells=0,
        n_cells_input=0,
        dropped_cells={},
        n_genes_input=0,
        n_genes_known=0,
        n_genes_mapped=0,
        counts_input=0,
        counts_kept=None,
        largest_losses={},
        obs_columns=[],
        source_hash=None,
        settings_hash=settings_hash,
    )


def ledger_path(corpus: Path, dataset_id: str) -> Path:
    """Return where the entry of a dataset lies.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    return corpus / "ledger" / f"{dataset_id}.json"


def write_entry(corpus: Path, entry: LedgerEntry) -> None:
    """Write the entry of a dataset, replacing an older one.

    Args:
        corpus: The corpus folder.
        entry: The entry.
    """
    path = ledger_path(corpus, entry["dataset_id"])
    write_atomic(path, (json.dumps(entry, indent=1) + "\n").encode())


def read_entry(path: Path) -> LedgerEntry:
    """Read one entry.

    Args:
        path: A file of the ledger.

    Raises:
        ValueError: Not an entry.
    """
    try:
        entry = json.loads(path.read_bytes())
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or entry.get("status") not in STATUSES:
        raise ValueError(f"{path}: not a ledger entry; delete it and convert the dataset again")
    return entry  # type: ignore[return-value]


def read_ledger(corpus: str | Path) -> list[LedgerEntry]:
    """Read all entries of a corpus folder, sorted by dataset.

    Args:
        corpus: The corpus folder.

    Raises:
        FileNotFoundError: No corpus folder, or nothing was converted into it.
        ValueError: A damaged entry.
    """
    folder = Path(corpus) / "ledger"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{corpus}: no corpus here; run: python -m data_prep convert MANIFEST --out {corpus}"
        )
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    return [read_entry(path) for path in paths]


def count_statuses(entries: Iterable[LedgerEntry]) -> dict[str, int]:
    """Return how many datasets have each status.

    Args:
        entries: Entries of the ledger.
    """
    statuses = [entry["status"] for entry in entries]
    return {status: statuses.count(status) for status in STATUSES}


def format_table(entries: Sequence[LedgerEntry]) -> str:
    """Return a text table (dataset, status, cells, genes mapped, reason) and a line of totals.

    Args:
        entries: Entries of the ledger.
    """
    rows = [("dataset", "status", "cells", "genes mapped", "reason")]
    rows += [
        (
            entry["dataset_id"],
            entry["status"],
            str(entry["n_cells"]),
            str(entry["n_genes_mapped"]),
            entry["reason"],
        )
        for entry in entries
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, status, cells, mapped, reason in rows:
        line = f"{name:<{widths[0]}}  {status:<{widths[1]}}  {cells:>{widths[2]}}"
        lines.append(f"{line}  {mapped:>{widths[3]}}  {reason}".rstrip())
    counts = ", ".join(f"{number} {status}" for status, number in count_statuses(entries).items())
    n_cells = sum(entry["n_cells"] for entry in entries)
    return "\n".join([*lines, f"{len(entries)} datasets: {counts}; {n_cells} cells"])
