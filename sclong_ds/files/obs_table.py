"""Annotations of cells on disk: one Parquet file per dataset, every column text.

    write_obs("obs/DATASET.parquet", frame)
    read_obs("obs/DATASET.parquet", columns=["donor"])

Any text comes back as it was: line breaks, tabs, quotation marks, NUL, a million characters. A
column is stored by its distinct values. The same frame gives the same bytes with the same pyarrow.
Corpora of version 1 hold `DATASET.tsv.gz` instead, which `read_obs` reads too. While a corpus is
built, `write_coded` keeps a table by the codes of its values (`DATASET.npz`): `obs_names` and
`read_coded` take it for the table, and opening it column by column costs next to nothing.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.atomic import write_atomic
from sclong_ds.files.npz import write_npz

if TYPE_CHECKING:
    from pandas import DataFrame
    from pyarrow.parquet import ParquetFile


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
        path: A file of `write_obs` or `write_coded`, or the `.tsv.gz` of a version 1 corpus.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if path.name.endswith(".tsv.gz"):
        return [*read_obs(path)]
    if path.suffix == ".npz":
        return list(_coded_member(path, "names"))
    with _named_damage(path), path.open("rb") as file:
        return list(pq.ParquetFile(file).schema_arrow.names)


def obs_length(path: str | Path) -> int:
    """Return the number of cells of a table without reading them.

    Args:
        path: A file of `write_obs` or `write_coded`, or the `.tsv.gz` of a version 1 corpus.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if path.name.endswith(".tsv.gz"):
        return len(read_obs(path))
    if path.suffix == ".npz":
        return int(_coded_member(path, "codes_n"))
    with _named_damage(path), path.open("rb") as file:
        return int(pq.ParquetFile(file).metadata.num_rows)


def read_coded(path: str | Path, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Read one column by its distinct values.

    Args:
        path: A file of `write_obs` or `write_coded`.
        name: A column that it has.

    Returns:
        (cells,) positions among the distinct values, and these.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if path.name.endswith(".tsv.gz"):
        import pandas as pd

        found, known = pd.factorize(read_obs(path, columns=[name])[name])
        return found.astype(np.int64), list(known)
    if path.suffix == ".npz":
        place = _coded_member(path, "names").index(name)
        codes = _coded_member(path, f"codes_{place}")
        return np.asarray(codes, np.int64), _coded_member(path, f"values_{place}")
    with _named_damage(path), path.open("rb") as file:
        return _coded(pq.ParquetFile(file, page_checksum_verification=True), name)


def _coded(content: ParquetFile, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return a column of an open table by its distinct values, in the order of their cells."""
    coded = content.read(columns=[name])[name].combine_chunks().dictionary_encode()
    return coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist()


def write_coded(
    path: str | Path, table: str | Path, *, n_cells: int, without: Sequence[str] = ()
) -> None:
    """Keep a table by the codes of its values; the table is opened once.

    Args:
        path: File to write, ending in .npz.
        table: A file of `write_obs`.
        n_cells: Cells that it must have.
        without: Columns to leave out.

    Raises:
        FileNotFoundError: No such table.
        ValueError: It is damaged, or of another number of cells.
    """
    import pyarrow.parquet as pq

    members: dict[str, NDArray[Any]] = {}
    with _named_damage(Path(table)), Path(table).open("rb") as file:
        content = pq.ParquetFile(file, page_checksum_verification=True)
        names = [name for name in content.schema_arrow.names if name not in without]
        n_rows = content.metadata.num_rows
        for place, name in enumerate(names):
            codes, values = _coded(content, name)
            members[f"codes_{place}"] = codes.astype(np.min_scalar_type(len(values)))
            members[f"values_{place}"] = _json_bytes(values)
    if n_rows != n_cells:
        raise ValueError(f"{table}: {n_rows} rows for {n_cells} cells; convert the dataset again")
    write_npz(path, names=_json_bytes(names), codes_n=n_rows, **members)


def _json_bytes(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)


def _coded_member(path: Path, member: str) -> Any:
    """Return the codes, or the texts, that a member of a file of `write_coded` holds."""
    with _named_damage(path), np.load(path, allow_pickle=False) as content:
        found = content[member]
    return found if member.startswith("codes") else json.loads(found.tobytes())


@contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Raise what a file cannot be read for as one error that names it."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
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
