"""Annotations of cells as columns of a finished corpus, in the order of its cells.

    columns = Corpus("CORPUS").columns
    columns["cell_type"].codes(slice(0, 1000))  # (1000,) uint32 positions in .values
    columns["cell_type"].terms                  # the ontology's ids beside the values

`columns/columns.json` lists the columns: name, kind, values, ids of the values in an ontology, bits
of a code. `columns/NUMBER.codes` holds the codes, `bits` each, little-endian, one after the other,
and three bytes of zeros: cell i begins at bit i * bits. It is memory-mapped, so a slice reads no
more than itself, and processes of a machine share it. Value 0 means that nothing is known. Numbers
of more than 2^18 different values have no codes: the file then holds float64, NaN for unknown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sclong_ds.files.atomic import whole_file, write_atomic
from sclong_ds.files.versions import refuse_later

INDEX = "columns/columns.json"
COLUMNS_FORMAT, COLUMNS_VERSION = "sclong_ds-columns", 1
TERMS = "_ontology_term_id"
"""End of the name of the column that holds the ids of a column's values in an ontology."""
MOST_BITS = 18
"""Of a code; a column of more different values is none."""
_BLOCK_CELLS = 2**18
Kind = Literal["text", "number", "truth"]
Rows = ArrayLike | slice | range | None
"""Positions of cells; None: all."""
Reader = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Returns the codes of cells by their positions; of numbers without codes these."""


class Folder(Protocol):
    """A corpus folder: a `sclong_ds.corpus.location.Location`."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name."""

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""

    def local_path(self, name: str) -> Path:
        """Return a path of a file on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnInfo:
    """What columns.json tells of a column."""

    name: str
    kind: Kind
    """text; number; truth: True and False."""
    bits: int
    """Bits of a code; 64 for numbers without codes."""
    values: tuple[str, ...]
    """Text of each value, the first empty; () without codes."""
    terms: tuple[str, ...] | None = None
    """Id of each value in an ontology, empty where no dataset gives one. None: it has none."""
    also: tuple[str, ...] = ()
    """Other names of the column."""


@dataclass(frozen=True, eq=False)
class CellColumn:
    """One column; nothing is read before its cells are asked for."""

    name: str
    kind: Kind
    """What `typed` makes of the values: text, number or truth."""
    values: tuple[str, ...] | None
    """Text of each code, the first empty for unknown; None for numbers without codes."""
    terms: tuple[str, ...] | None
    """Id of each value in an ontology, where a dataset gives one."""
    n_cells: int
    _stored: Reader = field(repr=False)

    def codes(self, rows: Rows = None) -> NDArray[Any]:
        """Return (cells,) uint32 positions in `values`; of numbers without codes their float64.

        Args:
            rows: Positions in the corpus.

        Raises:
            IndexError: A position that the corpus lacks.
        """
        wanted = positions(rows, self.n_cells)
        if isinstance(wanted, range):
            step = _BLOCK_CELLS
            parts = [
                self._stored(np.arange(part.start, part.stop, part.step or 1, dtype=np.int64))
                for part in (wanted[i : i + step] for i in range(0, len(wanted), step))
            ]
            if parts:
                return np.concatenate(parts)
            wanted = np.empty(0, np.int64)
        return self._stored(wanted)

    def typed(self, rows: Rows = None) -> Any:
        """Return chosen cells with their type, for a table of pandas.

        Text is categorical (missing where unknown), numbers are float64 with NaN, and True and
        False are categories as well, which a missing value does not turn into numbers.

        Args:
            rows: Positions in the corpus.
        """
        import pandas as pd

        found = self.codes(rows)
        if self.values is None:
            return found
        if self.kind == "number":
            numbers = np.array([float(v) if v else np.nan for v in self.values])
            return numbers[found]
        names: list[Any] = list(self.values[1:])
        if self.kind == "truth":
            names = [name == "True" for name in names]
        # An ontology may know two values of one name.
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        moved = np.array([-1, *(places[name] for name in names)], np.int32)
        return pd.Categorical.from_codes(moved[found], categories=pd.Index(list(places)))

    def texts(self, rows: Rows = None) -> NDArray[np.object_]:
        """Return (cells,) str of chosen cells, empty where unknown."""
        found = self.codes(rows)
        if self.values is None:
            return np.array(["" if v != v else repr(float(v)) for v in found], object)
        return np.array(self.values, object)[found]


class CellColumns(Mapping[str, CellColumn]):
    """The columns of a corpus by name."""

    def __init__(self, location: Folder, n_cells: int, more: Sequence[CellColumn] = ()) -> None:
        """Read the list of columns; a corpus that has none gives those of `more` alone.

        Args:
            location: The corpus folder.
            n_cells: Its cells.
            more: Columns that other parts of the corpus hold.

        Raises:
            ValueError: A damaged list, or one of a later version.
        """
        self._found = {column.name: column for column in more}
        self.stored: tuple[ColumnInfo, ...] = ()
        """What the list tells of each stored column."""
        self.left_out: frozenset[str] = frozenset()
        """Names that are no columns, because they or earlier parts have too many values of them."""
        if location.exists(INDEX):
            self.stored, self.left_out = _read_index(location, n_cells)
        self.readers: tuple[Reader, ...] = tuple(
            _Stored(location, number, info, n_cells) for number, info in enumerate(self.stored)
        )
        """What returns the codes of cells of each stored column."""
        for info, reader in zip(self.stored, self.readers, strict=True):
            self._add(info, n_cells, reader)

    def _add(self, info: ColumnInfo, n_cells: int, reader: Reader) -> None:
        values = info.values or None
        column = CellColumn(info.name, info.kind, values, info.terms, n_cells, reader)
        for name in (info.name, *info.also):
            self._found[name] = column
        if info.terms is not None:
            name = info.name + TERMS
            self._found[name] = CellColumn(name, "text", info.terms, None, n_cells, reader)

    def __getitem__(self, name: str) -> CellColumn:
        """Return a column.

        Raises:
            KeyError: No such column.
        """
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._found)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._found)


class _Stored:
    """The codes of a column on disk; mapped when they are first asked for."""

    def __init__(self, location: Folder, number: int, info: ColumnInfo, n_cells: int) -> None:
        self._location, self._name, self._bits = (
            location,
            f"columns/{column_name(number)}",
            info.bits,
        )
        self._n_cells = n_cells

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        if self._bits == 64:
            return self._bytes[: 8 * self._n_cells].view("<f8")[rows]
        first = rows * self._bits
        # Four bytes from any byte on: more than a code and the bits before it.
        words = np.ndarray((len(self._bytes) - 3,), "<u4", buffer=self._bytes, strides=(1,))
        shifted = words[first >> 3] >> (first & 7).astype(np.uint32)
        return shifted & np.uint32((1 << self._bits) - 1)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        path = self._location.local_path(self._name)
        size = path.stat().st_size
        expected = stored_bytes(self._n_cells, self._bits)
        if size != expected:
            raise ValueError(
                f"{path}: damaged ({size} bytes, {expected} for {self._n_cells} cells); restore "
                "the file or run finalize again"
            )
        return np.asarray(np.memmap(path, np.uint8, mode="r"))


def positions(rows: Rows, n_cells: int) -> NDArray[np.int64] | range:
    """Return positions of cells, those of a slice as a range.

    Args:
        rows: Positions, or a slice of them.
        n_cells: Cells of the corpus.

    Raises:
        ValueError: Not a list of whole numbers.
        IndexError: A position outside the corpus.
    """
    if rows is None or isinstance(rows, slice):
        return range(n_cells)[rows or slice(None)]
    if isinstance(rows, range):
        wanted: NDArray[np.int64] | range = rows
        ends = [rows[0], rows[-1]] if rows else []
    else:
        try:
            found = np.asarray(rows)
        except ValueError:  # lists of different lengths
            found = np.array(None)
        if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
            raise ValueError(
                f"cells: got {found.dtype} of shape {found.shape}; give a list of whole numbers, "
                "or a slice"
            )
        ends = [int(found.min()), int(found.max())] if found.size else []
        wanted = found.astype(np.int64, copy=False)
    outside = [end for end in ends if not 0 <= end < n_cells]
    if outside:
        from_end = "; a slice counts from the end" if outside[0] < 0 else ""
        raise IndexError(f"cell {outside[0]}: there are cells 0 to {n_cells - 1}{from_end}")
    return wanted


def names_of(columns: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of columns; a text is one name.

    Raises:
        ValueError: A name that comes twice, or that is no text.
    """
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            wrong = "comes twice" if isinstance(name, str) else "is no text"
            raise ValueError(f"columns: {name!r} {wrong}; give each column once, by its name")
    return names


def bits_of(n_values: int) -> int:
    """Return the bits of a code of so many values."""
    return max(1, (n_values - 1).bit_length())


def stored_bytes(n_cells: int, bits: int) -> int:
    """Return the size of the file of a column."""
    return -(-n_cells * bits // 8) + 3


def write_column(folder: Path, number: int, codes: NDArray[Any], bits: int) -> None:
    """Write the codes of a column.

    Args:
        folder: `columns` of a corpus.
        number: Its place in the list.
        codes: (cells,) codes; float64 for 64 bits.
        bits: Of a code.
    """
    with whole_file(folder / column_name(number)) as path, path.open("wb") as file:
        if bits == 64:
            file.write(np.ascontiguousarray(codes, "<f8").data)
        else:
            shifts = np.arange(bits, dtype=np.uint32)
            # Blocks of a multiple of eight cells end at a byte.
            for start in range(0, len(codes), _BLOCK_CELLS):
                block = codes[start : start + _BLOCK_CELLS].astype(np.uint32)
                flags = ((block[:, None] >> shifts) & 1).astype(np.uint8)
                file.write(np.packbits(flags, bitorder="little").data)
        file.write(bytes(3))


def write_index(
    folder: Path, infos: Sequence[ColumnInfo], n_cells: int, left_out: Collection[str] = ()
) -> None:
    """Write the list of columns, after all of them.

    Args:
        folder: `columns` of a corpus.
        infos: The columns in the order of their files.
        n_cells: Cells of the corpus.
        left_out: Names that are no columns, for too many values here or in earlier parts.
    """
    columns = [
        {
            "name": info.name,
            "kind": info.kind,
            "bits": info.bits,
            "values": info.values,
            "terms": info.terms,
            "also": info.also,
        }
        for info in infos
    ]
    document = {"format": COLUMNS_FORMAT, "version": COLUMNS_VERSION, "n_cells": n_cells}
    document |= {"left_out": sorted(left_out)} if left_out else {}
    text = json.dumps(document | {"columns": columns}, indent=0, ensure_ascii=False)
    write_atomic(folder / Path(INDEX).name, (text + "\n").encode())


def column_name(number: int) -> str:
    """Return the name of the file with the codes of a column, inside the folder of columns."""
    return f"{number:04d}.codes"


def _read_index(location: Folder, n_cells: int) -> tuple[tuple[ColumnInfo, ...], frozenset[str]]:
    """Return the columns on the list, and the names that it says are none."""
    where = f"{location}/{INDEX}"
    try:
        document = json.loads(location.read_bytes(INDEX))
        refuse_later(document["version"], newest=COLUMNS_VERSION, what=COLUMNS_FORMAT, where=where)
        if document["n_cells"] != n_cells:
            raise ValueError(f"of {document['n_cells']} cells, the corpus has {n_cells}")
        infos = []
        for about in document["columns"]:
            terms = about["terms"]
            infos.append(
                ColumnInfo(
                    name=str(about["name"]),
                    kind=about["kind"],
                    bits=int(about["bits"]),
                    values=tuple(about["values"]),
                    terms=None if terms is None else tuple(terms),
                    also=tuple(about["also"]),
                )
            )
        return tuple(infos), frozenset(map(str, document.get("left_out", ())))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{where}: damaged ({type(error).__name__}: {error}); restore the file or run finalize "
            "again"
        ) from None
