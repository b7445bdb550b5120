"""The columns of a corpus of parts: those that one corpus of all their datasets has.

Every part has its own codes. A column of the whole has the values of all parts, sorted as those of
one corpus are, and what is read of a part is translated; a part without the column knows nothing of
its cells. A part may know by another name what the whole has under this one: `donor` and `donor_id`
are one column of a part in which no dataset has both, and ids of an ontology are a column of their
own where no dataset of the part has the values that go with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sclong_ds.annotations.columns import (
    MOST_BITS,
    TERMS,
    CellColumn,
    CellColumns,
    ColumnInfo,
    Kind,
    Reader,
    bits_of,
)

ByPart = Callable[[NDArray[np.int64]], Iterator[tuple[int, NDArray[np.intp], NDArray[np.int64]]]]
"""Yields for each part that has some of the cells: which of them, and their rows there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """What a part knows of a column of the whole."""

    part: int
    info: ColumnInfo
    reader: Reader
    pairs: list[tuple[str, str]]
    """Value and term of each code; none where the part has numbers without codes."""


class JoinedColumns(CellColumns):
    """The columns of a corpus of parts by name."""

    def __init__(
        self,
        parts: Sequence[CellColumns],
        by_part: ByPart,
        n_cells: int,
        more: Sequence[CellColumn] = (),
    ) -> None:
        """Join the lists of columns; no cell is read.

        Args:
            parts: The columns of each part.
            by_part: Where cells lie.
            n_cells: Cells of all parts.
            more: Columns that other parts of the corpus hold.
        """
        self._found = {column.name: column for column in more}
        self.left_out = frozenset().union(*(part.left_out for part in parts))
        own = {info.name for part in parts for info in part.stored}
        joined: list[tuple[ColumnInfo, Reader]] = []
        for name in sorted(own):
            if name.endswith(TERMS) and name.removesuffix(TERMS) in own | self.left_out:
                continue
            found = [f for n, part in enumerate(parts) if (f := _of_part(n, part, name))]
            about = _joined_info(name, found, own)
            if about is not None and not {name, name + TERMS, *about.also} & self.left_out:
                joined.append((about, _JoinedReader(about, found, by_part)))
                self._add(about, n_cells, joined[-1][1])
        self.stored = tuple(about for about, _ in joined)
        self.readers = tuple(reader for _, reader in joined)


def _of_part(number: int, part: CellColumns, name: str) -> _Found | None:
    """Return what a part knows of a column: of that name, with it as another, or ids alone."""
    stored = list(zip(part.stored, part.readers, strict=True))
    for info, reader in sorted(stored, key=lambda column: column[0].name != name):
        if name in (info.name, *info.also):
            terms = info.terms or ("",) * len(info.values)
            pairs = list(zip(info.values, terms, strict=True))
        elif name + TERMS == info.name:
            pairs = [("", term) for term in info.values]
        else:
            continue
        return _Found(part=number, info=info, reader=reader, pairs=pairs)
    return None


def _joined_info(name: str, found: Sequence[_Found], own: set[str]) -> ColumnInfo | None:
    """Return what is to know of a column; None where its values are too many."""
    also = {name for f in found for name in f.info.also} - own
    # A part that knows no value has no say in what they are.
    kinds = {f.info.kind for f in found if any(value for value, _ in f.pairs) or f.info.bits == 64}
    kind: Kind = kinds.pop() if len(kinds) == 1 else "text"
    pairs = sorted({("", ""), *(pair for f in found for pair in f.pairs)})
    if len(pairs) > 2**MOST_BITS or any(f.info.bits == 64 for f in found):
        if kind != "number" or any(f.info.bits == 64 and f.info.name != name for f in found):
            return None
        return ColumnInfo(name=name, kind=kind, bits=64, values=())
    has_terms = any(f.info.terms is not None or f.info.name == name + TERMS for f in found)
    return ColumnInfo(
        name=name,
        kind=kind,
        bits=bits_of(len(pairs)),
        values=tuple(value for value, _ in pairs),
        terms=tuple(term for _, term in pairs) if has_terms else None,
        also=tuple(sorted(also)),
    )


class _JoinedReader:
    """Reads a column of all parts."""

    def __init__(self, info: ColumnInfo, found: Sequence[_Found], by_part: ByPart) -> None:
        self._by_part, self._coded = by_part, info.bits != 64
        terms = info.terms or ("",) * len(info.values)
        places = {pair: place for place, pair in enumerate(zip(info.values, terms, strict=True))}
        self._parts = {}
        for f in found:
            values: NDArray[np.uint32] | NDArray[np.float64] | None = None
            if self._coded:
                values = np.array([places[pair] for pair in f.pairs], np.uint32)
            elif f.info.bits != 64:
                numbers = [float(value) if value else np.nan for value, _ in f.pairs]
                values = np.array(numbers, np.float64)
            self._parts[f.part] = values, f.reader

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.uint32] | NDArray[np.float64]:
        found = np.zeros(len(rows), np.uint32) if self._coded else np.full(len(rows), np.nan)
        for part, here, inside in self._by_part(rows):
            if part in self._parts:
                values, reader = self._parts[part]
                codes = reader(inside)
                found[here] = codes if values is None else values[codes]
        return found
