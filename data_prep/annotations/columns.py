"""Annotations of all datasets as columns in the order of the corpus, of its own format.

Every annotation that a dataset keeps becomes a column; a dataset that lacks it has no value there.
Three are put together: `donor` and `donor_id`, by which the split goes, are one column of both
names, or two where a dataset has both, and then either name stands for the other where a dataset
has that one alone; a column and its `_ontology_term_id` are coded as pairs; the tissue
of the manifest stands for the cells of a dataset that names none itself. Text that is different in
(nearly) every cell, as barcodes are, is no column. One column is in memory at a time: 8 bytes a
cell.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.source.source import USUAL_OBS_COLUMNS
from sclong_ds.annotations.columns import (
    MOST_BITS,
    TERMS,
    ColumnInfo,
    Kind,
    bits_of,
)
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.files.obs_table import obs_names, read_coded

_DONOR, _DONOR_ID = "donor", "donor_id"
_NO_COLUMNS = ("barcode", "dataset_id")
_WORDS = {*USUAL_OBS_COLUMNS} - {"is_primary_data"}
"""Columns of names, whatever these look like: a donor 7 is no number."""
_BLOCK_CELLS = 2**22
Pair = tuple[str, str]
"""A value, and its id in an ontology."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The annotations of one dataset."""

    obs: Path
    """Those of its staged cells, a file of `sclong_ds.files.obs_table`."""
    n_cells: int
    """Staged cells."""
    tissue: str
    """As in the manifest, empty if not given."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The columns of the table."""
        return tuple(obs_names(self.obs))


@dataclass(frozen=True, kw_only=True)
class ColumnPlan:
    """Where a column comes from."""

    name: str
    """Of the column."""
    sources: tuple[str, ...]
    """Names in the tables; a table gives the first that it has."""
    terms: str | None
    """Name of the ids of its values in an ontology."""
    also: tuple[str, ...]
    """Other names of the column."""


def plan_columns(tables: Sequence[Annotations]) -> list[ColumnPlan]:
    """Return the columns to make, by name.

    Args:
        tables: By their number in the table `dataset`.
    """
    names = {name for table in tables for name in table.names} - {*_NO_COLUMNS}
    if any(table.tissue.strip() for table in tables):
        names.add("tissue")
    both = any({_DONOR, _DONOR_ID} <= {*table.names} for table in tables)
    one_donor = bool({_DONOR, _DONOR_ID} & names) and not both
    plans = []
    for name in sorted(names):
        if name.endswith(TERMS) and name.removesuffix(TERMS) in names:
            continue
        terms = name + TERMS if name + TERMS in names else None
        sources: tuple[str, ...] = (name,)
        also: tuple[str, ...] = ()
        if one_donor and name in (_DONOR, _DONOR_ID):
            if name == _DONOR_ID and _DONOR in names:
                continue
            name, sources, also = _DONOR, (_DONOR, _DONOR_ID), (_DONOR_ID,)
        elif name in (_DONOR, _DONOR_ID):
            sources = (name, _DONOR_ID if name == _DONOR else _DONOR)
        plans.append(ColumnPlan(name=name, sources=sources, terms=terms, also=also))
    return sorted(plans, key=lambda plan: plan.name)


def names_left_out(tables: Sequence[Annotations], names: Collection[str]) -> set[str]:
    """Return the names of annotations that are no columns, for too many values.

    Args:
        tables: By their number in the table `dataset`.
        names: Of the columns that were made of them.
    """
    plans = [plan for plan in plan_columns(tables) if plan.name not in names]
    return {name for plan in plans for name in (plan.name, *plan.also)}


def column_of(
    plan: ColumnPlan, tables: Sequence[Annotations], cells: CellStore
) -> tuple[ColumnInfo, NDArray[Any]] | None:
    """Return a column in the order of the corpus; None if its values are too many.

    Args:
        plan: Of `plan_columns`.
        tables: By their number in the table `dataset`.
        cells: Of the corpus.

    Raises:
        ValueError: A damaged table of annotations.
    """
    staged = np.empty(sum(table.n_cells for table in tables), np.uint32)
    known: dict[Pair, int] = {("", ""): 0}
    first = 0
    for table in tables:
        codes, pairs = _pairs(plan, table)
        places = np.array([known.setdefault(pair, len(known)) for pair in pairs], np.uint32)
        if len(known) > 2**MOST_BITS:
            return _numbers(plan, tables, cells) if _kind(plan.name, pairs) == "number" else None
        staged[first : first + table.n_cells] = places[codes]
        first += table.n_cells
    pairs = sorted(known)
    order = np.empty(len(pairs), np.uint32)
    order[[known[pair] for pair in pairs]] = np.arange(len(pairs), dtype=np.uint32)
    info = ColumnInfo(
        name=plan.name,
        kind=_kind(plan.name, pairs),
        bits=bits_of(len(pairs)),
        values=tuple(value for value, _ in pairs),
        terms=tuple(term for _, term in pairs) if plan.terms else None,
        also=plan.also,
    )
    return info, _in_corpus_order(order[staged], tables, cells)


def _numbers(
    plan: ColumnPlan, tables: Sequence[Annotations], cells: CellStore
) -> tuple[ColumnInfo, NDArray[Any]] | None:
    """Return a column of numbers without codes; None if some value is no number."""
    staged = np.empty(sum(table.n_cells for table in tables), np.float64)
    first = 0
    for table in tables:
        codes, pairs = _pairs(plan, table)
        if _kind(plan.name, pairs) != "number" and any(value for value, _ in pairs):
            return None
        numbers = np.array([float(value) if value else np.nan for value, _ in pairs])
        staged[first : first + table.n_cells] = numbers[codes]
        first += table.n_cells
    info = ColumnInfo(name=plan.name, kind="number", bits=64, values=())
    return info, _in_corpus_order(staged, tables, cells)


def _pairs(plan: ColumnPlan, table: Annotations) -> tuple[NDArray[np.int64], list[Pair]]:
    """Return the column of a dataset: (cells,) positions among pairs, and these."""
    source = next((name for name in plan.sources if name in table.names), None)
    codes, values = np.zeros(table.n_cells, np.int64), [""]
    if source is not None:
        codes, values = read_coded(table.obs, source)
    elif plan.name == "tissue":
        values = [table.tissue.strip()]
    if plan.terms is None or plan.terms not in table.names:
        return codes, [(value, "") for value in values]
    term_codes, terms = read_coded(table.obs, plan.terms)
    together = codes * len(terms) + term_codes
    found, here = np.unique(together, return_inverse=True)
    pairs = [(values[pair // len(terms)], terms[pair % len(terms)]) for pair in found.tolist()]
    return here.astype(np.int64), pairs


def _in_corpus_order(
    staged: NDArray[Any], tables: Sequence[Annotations], cells: CellStore
) -> NDArray[Any]:
    """Return what belongs to the staged cells of all datasets for the cells of the corpus."""
    firsts = np.cumsum([0, *(table.n_cells for table in tables)])
    dataset, obs_row = cells.table("dataset"), cells.table("obs_row")
    found = np.empty(len(cells), staged.dtype)
    for start in range(0, len(cells), _BLOCK_CELLS):
        here = slice(start, start + _BLOCK_CELLS)
        found[here] = staged[firsts[dataset[here]] + obs_row[here]]
    return found


def _kind(name: str, pairs: Sequence[Pair]) -> Kind:
    """Return what all values of a column are, those of known names text."""
    values = {value for value, _ in pairs} - {""}
    if not values or name in _WORDS:
        return "text"
    if values <= {"True", "False"}:
        return "truth"
    return "number" if all(map(_is_number, values)) else "text"


def _is_number(text: str) -> bool:
    """Tell whether a text is a number that is written in its one usual way: 7, not 007."""
    try:
        number = float(text)
        return np.isfinite(number) and text in (repr(number), str(int(number)))
    except ValueError:
        return False
