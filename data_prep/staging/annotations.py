"""Which annotations of cells are kept, and how any value of them becomes text.

One rule for every format and type: a missing value (None, NaN, NaT, NA) is the empty text; text
stays exactly as it is; bytes are decoded as UTF-8; a floating-point number is the shortest text
that reads back as the same number of its type; everything else is `str(value)` (True, 12,
2024-01-31 00:00:00). What UTF-8 cannot hold or decode is repaired to U+FFFD and counted.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_prep.manifest.manifest import Dataset
from data_prep.source.source import USUAL_OBS_COLUMNS, Annotations, Source

_SURROGATES = re.compile("[\ud800-\udfff]")


def read_annotations(
    obs: Annotations, dataset: Dataset
) -> tuple[pd.DataFrame, dict[str, str], dict[str, str]]:
    """Read the annotations to keep, and no others.

    Args:
        obs: Those of the file.
        dataset: Its options say which; what they name must be readable.

    Returns:
        The columns of the file, name in the corpus to column of the file, and why others that would
        be kept cannot be read.

    Raises:
        ValueError: A column that the options name is not there, there twice, or not readable.
    """
    columns = kept_columns(obs, dataset)
    named = {name.strip() for name in dataset.obs_columns.split(",")} | {*dataset.roles().values()}
    frame, notes = obs.frame(columns.values(), required=named)
    return frame, {name: column for name, column in columns.items() if column in frame}, notes


def kept_columns(obs: pd.DataFrame | Annotations, dataset: Dataset) -> dict[str, str]:
    """Choose the annotations to keep.

    Args:
        obs: Those of the file.
        dataset: Its options say which; the columns that it gives a role get their fixed names.

    Returns:
        Name in the corpus to column of the file.

    Raises:
        ValueError: A column that the file lacks or has twice.
    """
    columns = [str(name) for name in obs.columns]
    wanted = [name.strip() for name in dataset.obs_columns.split(",") if name.strip()]
    if wanted == ["*"]:
        wanted = columns
    elif wanted == ["none"]:
        wanted = []
    elif not wanted:
        wanted = [name for name in USUAL_OBS_COLUMNS if name in columns]
    roles = dataset.roles()
    for name in (*wanted, *roles.values()):
        if name not in columns:
            raise ValueError(
                f"there is no cell annotation '{name}'; the file has {', '.join(columns) or 'none'}"
            )
        if columns.count(name) > 1:
            raise ValueError(
                f"there are {columns.count(name)} cell annotations '{name}'; rename them, or name "
                "those to keep in obs_columns"
            )
    kept = {name: name for name in wanted if name not in ("barcode", *roles)}
    return kept | roles


def annotation_table(
    barcodes: npt.NDArray[np.object_], obs: pd.DataFrame, columns: dict[str, str]
) -> tuple[pd.DataFrame, int]:
    """Return annotations as text.

    Args:
        barcodes: (cells,) names of the cells.
        obs: Annotations of the same cells.
        columns: Of `kept_columns`.

    Returns:
        The table, whose first column is `barcode`, and how many of its values were repaired.

    Raises:
        ValueError: Two columns whose names differ only in what had to be repaired.
    """
    text, repaired = as_text(pd.Series(barcodes, dtype=object))
    table = {"barcode": text}
    places = {str(name): place for place, name in enumerate(obs.columns)}
    for name, column in columns.items():
        fixed = _SURROGATES.sub("\ufffd", name)
        if fixed in table:
            raise ValueError(f"there are two cell annotations '{fixed}'; rename one in the file")
        table[fixed], number = as_text(obs.iloc[:, places[column]])
        repaired += number
    return pd.DataFrame(table, index=range(len(barcodes)), dtype=object), repaired


def valid_annotations(source: Source) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read all annotations as a table that any program can write, by the names of the cells.

    Args:
        source: The opened dataset.

    Returns:
        The columns that can be read, with their types; those with texts that are not UTF-8 as
        repaired text. And why others cannot be read, or how many texts were repaired.
    """
    frame, notes = source.obs.frame()
    barcodes, repaired = as_text(pd.Series(source.barcodes, dtype=object))
    if repaired:
        notes["names of cells"] = f"{repaired} texts were not UTF-8 and are repaired"
    for name, values in frame.items():
        if values.dtype == object or isinstance(values.dtype, pd.CategoricalDtype):
            text, number = as_text(values)
            if number:
                frame[name] = text
                notes[f"obs/{name}"] = f"{number} texts were not UTF-8 and are repaired"
    return frame.set_axis(pd.Index(barcodes, dtype=object), axis=0), notes


def as_text(values: pd.Series) -> tuple[npt.NDArray[np.object_], int]:
    """Return values as text, by the rule of this module.

    Args:
        values: Of any type.

    Returns:
        (values,) str, and how many of them were repaired.
    """
    if isinstance(values.dtype, pd.CategoricalDtype):
        return _categories_as_text(values)
    missing = pd.isna(values).to_numpy(bool)
    array = values[~missing].to_numpy()
    if array.dtype.kind in "biuf":
        words, repaired = array.astype(str).tolist(), 0
    else:
        words, repaired = _words(values[~missing].astype(object).tolist())
    text = np.full(len(values), "", dtype=object)
    text[~missing] = words
    return text, repaired


def _categories_as_text(values: pd.Series) -> tuple[npt.NDArray[np.object_], int]:
    """Convert each category once."""
    codes = values.cat.codes.to_numpy()
    names = np.full(len(values.cat.categories) + 1, "", dtype=object)
    repaired = np.zeros(len(names), dtype=np.int64)
    for code, category in enumerate(values.cat.categories):
        one, number = as_text(pd.Series([category], dtype=values.cat.categories.dtype))
        names[code], repaired[code] = one[0], number
    # Code -1, a missing value, takes the last name, the empty one.
    return names[codes], int(repaired[codes].sum())


def _words(values: list[object]) -> tuple[list[str], int]:
    """Return each value as text, and how many were repaired."""
    words: list[str] = []
    repaired = 0
    for value in values:
        if isinstance(value, bytes):
            try:
                word = value.decode()
            except UnicodeDecodeError:
                word, repaired = value.decode(errors="replace"), repaired + 1
        else:
            word = value if type(value) is str else str(value)
        words.append(word)
    broken = {word for word in set(words) if not word.isascii() and _SURROGATES.search(word)}
    if broken:
        repaired += sum(word in broken for word in words)
        words = [_SURROGATES.sub("\ufffd", word) if word in broken else word for word in words]
    return words, repaired
