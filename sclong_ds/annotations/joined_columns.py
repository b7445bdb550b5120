"""The columns of a corpus of parts: those of its parts, with one vocabulary each.

Every part has its own codes. A column of the whole has the values of all parts, sorted as those of
one corpus are, and what is read of a part is translated; a part without the column knows nothing of
its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sclong_ds.annotations.columns import (
    MOST_BITS,
    CellColumn,
    CellColumns,
    ColumnInfo,
    Kind,
    Reader,
    bits_of,
)

ByPart = Callable[[NDArray[np.int64]], Iterator[tuple[int, NDArray[np.intp], NDArray[np.int64]]]]
"""Yields for each part that has some of the cells: which of them, and their rows there."""
_Found = tuple[int, ColumnInfo, Reader]
"""A column of a part, and which part that is."""


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
        columns: dict[str, list[_Found]] = {}
        for number, part in enumerate(parts):
            for info, reader in zip(part.stored, part.readers, strict=True):
                columns.setdefault(info.name, []).append((number, info, reader))
        joined: list[tuple[ColumnInfo, Reader]] = []
        for name in sorted(columns):
            about = _joined_info(columns[name])
            if about is not None:
                joined.append((about, _JoinedReader(about, columns[name], by_part)))
                self._add(about, n_cells, joined[-1][1])
        self.stored = tuple(about for about, _ in joined)
        self.readers = tuple(reader for _, reader in joined)


def _joined_info(found: Sequence[_Found]) -> ColumnInfo | None:
    """Return what is to know of a column; None where its values are too many."""
    infos = [info for _, info, _ in found]
    also = tuple(sorted({name for info in infos for name in info.also}))
    # A part that knows no value has no say in what they are.
    kinds = {info.kind for info in infos if len(info.values) != 1}
    kind: Kind = kinds.pop() if len(kinds) == 1 else "text"
    pairs = sorted({("", ""), *(pair for info in infos for pair in _pairs_of(info))})
    if len(pairs) > 2**MOST_BITS or any(info.bits == 64 for info in infos):
        if kind != "number":
            return None
        return ColumnInfo(name=infos[0].name, kind=kind, bits=64, values=(), also=also)
    terms = tuple(term for _, term in pairs)
    return ColumnInfo(
        name=infos[0].name,
        kind=kind,
        bits=bits_of(len(pairs)),
        values=tuple(value for value, _ in pairs),
        terms=terms if any(info.terms is not None for info in infos) else None,
        also=also,
    )


def _pairs_of(info: ColumnInfo) -> list[tuple[str, str]]:
    """Return value and term of each code."""
    terms = info.terms or ("",) * len(info.values)
    return list(zip(info.values, terms, strict=True))


class _JoinedReader:
    """Reads a column of all parts."""

    def __init__(self, info: ColumnInfo, found: Sequence[_Found], by_part: ByPart) -> None:
        self._by_part, self._coded = by_part, info.bits != 64
        places = {pair: place for place, pair in enumerate(_pairs_of(info))}
        self._parts = {}
        for part, own, reader in found:
            values: NDArray[np.uint32] | NDArray[np.float64] | None = None
            if self._coded:
                values = np.array([places[pair] for pair in _pairs_of(own)], np.uint32)
            elif own.bits != 64:
                numbers = [float(value) if value else np.nan for value in own.values]
                values = np.array(numbers, np.float64)
            self._parts[part] = values, reader

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.uint32] | NDArray[np.float64]:
        found = np.zeros(len(rows), np.uint32) if self._coded else np.full(len(rows), np.nan)
        for part, here, inside in self._by_part(rows):
            if part in self._parts:
                values, reader = self._parts[part]
                codes = reader(inside)
                found[here] = codes if values is None else values[codes]
        return found
