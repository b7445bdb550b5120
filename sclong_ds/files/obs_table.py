"""Annotations of cells on disk: one Parquet file per dataset, every column text.

    write_obs("obs/DATASET.parquet", frame)
    read_obs("obs/DATASET.parquet", columns=["donor"])

Any text comes back as it was: line breaks, tabs, quotation marks, NUL, a million characters. A
column is stored by its distinct values. The same frame gives the same bytes with the same pyarrow.
Corpora of version 1 hold `DATASET.tsv.gz` instead, which `read_obs` reads too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.atomic import write_atomic

if TYPE_CHECKING:
    from pandas import DataFrame


def write_obs(path: str | Path, frame: DataFrame) -> None:
    """Write annotations.

    Args:
        path: File to write, ending in .parquet.
        frame: One row per cell; the values are str, the column names differ.

    Raises:
        ValueError: A value that is no text, or text that UTF-8 cannot hold (a lone surrogate).
    """
    # 0.2 s to import, which readers of counts do not need.
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = []
    for name in frame.columns:
        try:
            array = pa.array(frame[name].to_numpy(object), type=pa.large_string())
        except (pa.ArrowException, UnicodeError, TypeError) as error:
            raise ValueError(f"{path}: column '{name}' holds no plain text ({error})") from None
        if array.null_count:
            raise ValueError(f"{path}: column '{name}' lacks {array.null_count} values")
        arrays.append(array)
    table = pa.table(arrays, names=[str(name) for name in frame.columns])
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd", write_page_checksum=True)
    write_atomic(path, content.getvalue())


def read_obs(path: str | Path, *, columns: Sequence[str] | None = None) -> DataFrame:
    """Read annotations.

    Args:
        path: A file of `write_obs`, or the `.tsv.gz` of a version 1 corpus.
        columns: Columns to read; those that the file lacks are left out. None reads all.

    Returns:
        One row per cell, values of type str.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    import pandas as pd

    path = Path(path)
    with _named_damage(path):
        if path.name.endswith(".tsv.gz"):
            wanted = None if columns is None else (lambda name: name in columns)
            return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, usecols=wanted)
        return _read_parquet(path, columns)


def obs_names(path: str | Path) -> list[str]:
    """Return the names of the columns without reading them.

    Args:
        path: A file of `write_obs`, or the `.tsv.gz` of a version 1 corpus.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if path.name.endswith(".tsv.gz"):
        return [*read_obs(path)]
    with _named_damage(path), path.open("rb") as file:
        return list(pq.ParquetFile(file).schema_arrow.names)


def read_coded(path: str | Path, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Read one column by its distinct values.

    Args:
        path: A file of `write_obs`.
        name: A column that it has.

    Returns:
        (cells,) positions among the distinct values, and these.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    with _named_damage(path), path.open("rb") as file:
        content = pq.ParquetFile(file, page_checksum_verification=True)
        coded = content.read(columns=[name])[name].combine_chunks().dictionary_encode()
        return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist()


@contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Raise what a file cannot be read for as one error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged ({reason}); restore the file") from None


def _read_parquet(path: Path, columns: Sequence[str] | None) -> DataFrame:
    import pandas as pd
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        content = pq.ParquetFile(file, page_checksum_verification=True)
        names = content.schema_arrow.names
        chosen = names if columns is None else [name for name in names if name in columns]
        table = content.read(columns=chosen)
    frame = {name: table[name].to_numpy(zero_copy_only=False) for name in chosen}
    return pd.DataFrame(frame, index=range(table.num_rows), dtype=object)
