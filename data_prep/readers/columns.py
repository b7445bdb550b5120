"""Columns of tables in HDF5 and zarr: texts, numbers, categories; obs and var of any AnnData.

Each column is read by itself, so that one that cannot be read costs nothing but itself. Bytes that
are not UTF-8 become surrogates (PEP 383): whoever keeps a text repairs and counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from data_prep.readers.arrays import Open, part_inside, require_inside, require_whole
from data_prep.readers.containers import failed_call
from data_prep.source.features import is_kind_column, require_names_only
from data_prep.source.source import Annotations, StringArray, check_size

_CATEGORIES = "__categories"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """obs or var of an AnnData file, or the attributes of one axis of a loom file."""

    index: StringArray
    """Names of the rows."""
    columns: Mapping[str, Callable[[Any], pd.Series]]
    """What reads each column, given the root group."""
    text_columns: tuple[str, ...]
    """Those that may hold texts, by their types, or hold kinds of features by their names."""

    def annotations(self, opened: Open) -> Annotations:
        """Return the columns as annotations of cells.

        Args:
            opened: Opens the root group.
        """

        def reader(read: Callable[[Any], pd.Series]) -> Callable[[], pd.Series]:
            def column() -> pd.Series:
                with opened() as root:
                    return read(root)

            return column

        columns = {name: reader(read) for name, read in self.columns.items()}
        return Annotations(len(self.index), columns)

    def names(self, root: Any) -> tuple[dict[str, StringArray], dict[str, str]]:
        """Return the index and all text columns, and why others cannot be read.

        Args:
            root: The root group.
        """
        found, notes = {"index": self.index}, {}
        for name in self.text_columns:
            try:
                values = self.columns[name](root)
            except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
                if failed_call(error):
                    raise
                reason = " ".join(str(error).split())
                require_names_only(name, reason)
                notes[f"var/{name}"] = reason
                continue
            # The kinds of features may be written as numbers.
            if isinstance(values.dtype, pd.CategoricalDtype) or is_kind_column(name):
                values = values.astype(object)
            if values.dtype == object:
                found[name] = objects(values.where(values.notna(), ""))
        return found, notes


def table_of(root: Any, where: str) -> Table:
    """Return obs or var, in the layouts of all AnnData versions.

    Args:
        root: The root group of AnnData.
        where: Name of the table.

    Raises:
        ValueError: No names of the rows.
    """
    element = root[where]
    if getattr(element, "dtype", None) is not None:
        return _compound_table(root, where)
    index_name = text_of(element.attrs.get("_index", "_index"))
    require_inside(element, index_name)
    if index_name not in element:
        raise ValueError(f"{where} has no index column '{index_name}'")
    if hasattr(element[index_name], "shape"):
        _check_length(element[index_name], f"{where}/{index_name}", names=True)
    values = column_values(element, index_name)
    if isinstance(values, pd.Categorical):
        values = np.asarray(values, dtype=object)
    index = objects(values)
    order = element.attrs.get("column-order")
    listed: Iterable[object] = () if isinstance(order, h5py.Empty) else np.ravel(order)
    names = list(element) if order is None else [text_of(name) for name in listed]
    names = [name for name in dict.fromkeys(names) if name not in (index_name, _CATEGORIES)]

    def reader(name: str) -> Callable[[Any], pd.Series]:
        return lambda again: _series(again[where], name, len(index))

    text_columns = [
        name
        for name in names
        if is_kind_column(name) or name not in element or _may_be_text(element[name])
    ]
    return Table(
        index=index,
        columns={name: reader(name) for name in names},
        text_columns=tuple(text_columns),
    )


def column_values(parent: Any, name: str) -> Any:
    """Read one column: texts as an object array, numbers, categories or nullable values.

    Args:
        parent: The table, a group.
        name: Of the column.

    Raises:
        ValueError: It is not there, or of an encoding that is not read.
    """
    require_inside(parent, name)
    if name not in parent:
        raise ValueError("it is listed, but not there")
    element = parent[name]
    kind = text_of(element.attrs.get("encoding-type", ""))
    if hasattr(element, "shape"):
        categories = element.attrs.get("categories")
        if categories is not None:
            # AnnData before 0.8: a reference in HDF5, a name in zarr.
            return _categorical(_whole(element), decoded(_whole(parent[categories])))
        return decoded(_whole(element))
    inside = set(element)
    if {"codes", "categories"} <= inside:
        codes = _whole(part_inside(element, "codes"))
        return _categorical(codes, column_values(element, "categories"))
    if {"values", "mask"} <= inside:
        return _nullable(column_values(element, "values"), _whole(part_inside(element, "mask")))
    raise ValueError(f"it is stored as '{kind or 'a group'}', which is not read")


def decoded(values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return texts of any storage as an object array of str; numbers as they are.

    Args:
        values: Bytes (UTF-8), texts or numbers.
    """
    found = np.asarray(values)
    if found.dtype.kind not in "SUOT":
        return found
    return objects(
        value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        for value in found
    )


def objects(values: Iterable[object]) -> StringArray:
    """Return values as an object array of str.

    Args:
        values: Of any type.
    """
    return np.array([str(value) for value in values], dtype=object)


def _compound_table(root: Any, where: str) -> Table:
    """Return a table of AnnData before 0.7: one array of records, categories beside it."""
    element = root[where]
    fields = element.dtype.names
    if not fields:
        raise ValueError(f"{where} is an array of {element.dtype}, expected a table")
    _check_length(element, where, names=True)
    index_name = "index" if "index" in fields else fields[0]

    def reader(name: str) -> Callable[[Any], pd.Series]:
        return lambda again: _compound_series(again, where, name)

    columns = [name for name in fields if name != index_name]
    return Table(
        index=objects(decoded(element[index_name])),
        columns={name: reader(name) for name in columns},
        text_columns=tuple(
            name
            for name in columns
            if element.dtype[name].kind in "SUO"
            or is_kind_column(name)
            or _old_categories(root, where, name) is not None
        ),
    )


def _compound_series(root: Any, where: str, name: str) -> pd.Series:
    values = decoded(root[where][name])
    categories = _old_categories(root, where, name)
    if categories is not None and values.dtype.kind in "iu":
        names = decoded(np.atleast_1d(categories[()]))
        # One name can stand for a column of obs and another of var.
        if not values.size or (values.min() >= -1 and values.max() < len(names)):
            values = _categorical(values, names)
    return pd.Series(values, dtype=values.dtype)


def _old_categories(root: Any, where: str, name: str) -> Any:
    """Return the array of a column's categories, which lie apart from it, or None."""
    for group in ("raw.cat", "uns") if where.startswith("raw") else ("uns",):
        place = f"{group}/{name}_categories"
        if group in root and place in root:
            return part_inside(root, place)
    return None


def _series(table: Any, name: str, n_rows: int) -> pd.Series:
    values = column_values(table, name)
    if len(values) != n_rows:
        raise ValueError(f"it has {len(values)} values for {n_rows} rows")
    # Given no type, pandas would look for a better one for texts.
    return pd.Series(values, dtype=values.dtype)


def _may_be_text(element: Any) -> bool:
    """Return whether a column may hold texts; plain numbers do not."""
    return getattr(element, "dtype", np.dtype(object)).kind not in "biufc" or (
        "categories" in element.attrs
    )


def _categorical(codes: npt.NDArray[Any], categories: Any) -> Any:
    if len(categories) > 1 and all(isinstance(name, str) and not name for name in categories):
        # What zarr gives for a chunk that is not there.
        raise ValueError(f"its {len(categories)} categories are all empty")
    if codes.dtype.kind not in "iu":
        raise ValueError(f"its category codes are {codes.dtype}, expected whole numbers")
    codes = codes.astype(np.int64)
    if codes.size and not (codes.min() >= -1 and codes.max() < len(categories)):
        raise ValueError(f"a category code is out of range; there are {len(categories)} categories")
    if len(set(categories)) == len(categories) and not pd.isna(categories).any():
        return pd.Categorical.from_codes(codes, categories)
    names = np.full(len(categories) + 1, None, dtype=object)
    names[:-1] = categories
    return names[codes]


def _nullable(values: npt.NDArray[Any], mask: npt.NDArray[Any]) -> Any:
    mask = mask.astype(bool)
    if values.shape != mask.shape:
        raise ValueError(f"it has {len(values)} values, but {len(mask)} marks of missing ones")
    if values.dtype.kind == "b":
        return pd.arrays.BooleanArray(values, mask)
    if values.dtype.kind in "iu":
        return pd.arrays.IntegerArray(values, mask)
    found = values.astype(object)
    found[mask] = None
    return found


def _whole(array: Any) -> npt.NDArray[Any]:
    """Read a one-dimensional array; its size is checked before anything is made of it."""
    _check_length(array, array.name)
    values = np.asarray(array[:])
    # StringDType of numpy (zarr 3) is none that pandas or the rest know.
    return values.astype(object) if values.dtype.kind == "T" else values


def _check_length(array: Any, what: str, *, names: bool = False) -> None:
    """Refuse what is no list, or claims more values than are there.

    Writers of zarr leave out chunks of zeros, so that only those of names must all be there.
    """
    shape = getattr(array, "shape", None)
    if shape is None or len(shape) != 1:
        raise ValueError(f"{what} is no list of values (shape {shape})")
    check_size(shape[0], 0)
    if names or isinstance(array, h5py.Dataset):
        require_whole(array, what)


def text_of(value: object) -> str:
    """Return a stored value as text.

    Args:
        value: Bytes of UTF-8, or anything that has a text.
    """
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
