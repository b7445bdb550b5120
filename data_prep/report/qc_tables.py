"""Tables of the quality report as the template reads them: columns, cells and what sorts them.

    sheet(COLUMNS, summary.datasets, id="datasets")

Imported by `data_prep.report.qc_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data_prep.ledger.ledger import origin_of
from data_prep.report.qc_summary import Dataset

BADGES = {"ok": "good", "excluded": "warn", "failed": "bad"}
"""Outcome of a dataset to the kind of its badge."""
_LONG = ("reason", "restored", "title", "citation")
"""Columns of sentences."""

Column = tuple[str, bool, Callable[[Dataset], Any]]
"""Heading, whether it is a number, and the value of a dataset."""


def _split(dataset: Dataset) -> str:
    names = [name for name, n in dataset.info.split_cells.items() if n] if dataset.info else []
    return ", ".join(names)


COLUMNS: tuple[Column, ...] = (
    ("dataset", False, lambda d: d.entry["dataset_id"]),
    ("outcome", False, lambda d: d.entry["status"]),
    ("tissue", False, lambda d: d.entry["tissue"]),
    ("cells", True, lambda d: d.n_cells or None),
    ("dropped", True, lambda d: f"{d.lost:.1%}" if d.lost == d.lost else None),
    ("repeats", True, lambda d: d.info.duplicates_dropped if d.info else None),
    ("genes mapped", True, lambda d: d.entry["n_genes_mapped"] or None),
    ("counts kept", True, lambda d: _percent(d.entry["counts_kept"])),
    ("ambiguous names", True, lambda d: d.entry["gene_names"].get("ambiguous")),
    ("genes a cell", True, lambda d: number(d.median_genes)),
    ("counts a cell", True, lambda d: number(d.median_counts)),
    ("warnings", True, lambda d: len(d.entry["warnings"]) or None),
    ("split", False, _split),
    ("format", False, lambda d: d.entry["format"] or ""),
    ("matrix", False, lambda d: d.entry["matrix"] or ""),
    ("restored", False, lambda d: d.entry["restored"]),
    ("reason", False, lambda d: d.entry["reason"]),
)


def _fact(name: str) -> Column:
    return name, False, lambda d: origin_of(d.entry).get(name, "")


SOURCE_COLUMNS: tuple[Column, ...] = (
    *(column for column in COLUMNS if column[0] in ("dataset", "cells")),
    *map(_fact, ("title", "licence", "version", "doi", "citation")),
)


def sheet(
    columns: Sequence[Column],
    datasets: Sequence[Dataset],
    *,
    title: str = "",
    id: str = "",
    tall: bool = False,
) -> dict[str, Any]:
    """Return a table for the template; one with an id is sorted by the page's script."""
    rows = []
    for dataset in datasets:
        cells = []
        for name, numeric, value_of in columns:
            value = value_of(dataset)
            if numeric:
                cells.append(_numeric_cell(value))
            elif name == "outcome":
                cells.append(cell(value, badge=BADGES[value]))
            else:
                cells.append(cell(value, "long" if name in _LONG and value else ""))
        rows.append((dataset.entry["status"], cells))
    head = [(name, numeric) for name, numeric, _ in columns]
    return {"title": title, "text": "", "head": head, "rows": rows, "id": id, "tall": tall}


def cell(
    text: str, kind: str = "", *, number: str | None = None, badge: str | None = None
) -> dict[str, str | None]:
    """Return a cell for the template.

    Args:
        text: What it shows.
        kind: Its class.
        number: What the page's script sorts by; None: the text.
        badge: Kind of badge around the text; None: none.
    """
    return {"text": text, "kind": kind, "number": number, "badge": badge}


def _numeric_cell(value: float | str | None) -> dict[str, str | None]:
    if value is None:
        return cell("", "n", number="")
    if isinstance(value, str):
        return cell(value, "n", number=value.rstrip("%"))
    return cell(f"{value:,.0f}", "n", number=f"{value:g}")


def number(value: float) -> float | None:
    """Return a figure; None for NaN."""
    return None if value != value else value


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"
