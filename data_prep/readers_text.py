"""Readers of Matrix Market folders (10x mtx) and of text tables (csv, tsv).

Both are streamed in blocks of lines through the C parsers of pandas and numpy. Tables are checked
field by field: a line with a missing field or a word for a number is an error that names the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from data_prep.readers_hdf5 import expression_features, pick_genome
from data_prep.source import (
    BLOCK_ENTRIES,
    Entries,
    Matrix,
    Source,
    StringArray,
    dense_blocks,
    gather_rows,
)

SEPARATORS = {"csv": ",", "tsv": "\t"}
_MATRIX_NAMES = ("matrix.mtx", "matrix.mtx.gz")
_PARTS = {"barcodes": ("barcodes.tsv",), "features": ("features.tsv", "genes.tsv")}


def matrix_market_files(path: Path) -> list[Path]:
    """Return the matrix files of a folder.

    Public archives put the sample in front of the name: GSM123_matrix.mtx.gz.

    Args:
        path: The folder.
    """
    return sorted(file for file in path.iterdir() if file.name.endswith(_MATRIX_NAMES))


def open_matrix_market(path: Path, *, genome: str) -> Source:
    """Open a 10x folder: matrix.mtx, barcodes.tsv and features.tsv (version 3) or genes.tsv (2).

    Args:
        path: The folder, or its matrix file.
        genome: Genome to keep where the ids carry one in front (GRCh38_ENSG...), or auto.

    Raises:
        ValueError: A part is missing, or the sizes do not fit.
    """
    matrices = matrix_market_files(path) if path.is_dir() else [path]
    if len(matrices) != 1:
        raise ValueError(
            f"{len(matrices)} matrix files ({', '.join(file.name for file in matrices)}); "
            "list each by itself"
        )
    matrix_file = matrices[0]
    prefix = matrix_file.name.removesuffix(".gz").removesuffix("matrix.mtx")
    barcodes = _name_columns(_part(matrix_file.parent, prefix, "barcodes"))[0]
    features = _name_columns(_part(matrix_file.parent, prefix, "features"))
    n_rows, n_columns, n_entries = _matrix_size(matrix_file)
    transposed = (n_rows, n_columns) == (len(barcodes), len(features[0])) and n_rows != n_columns
    if not transposed and (n_rows, n_columns) != (len(features[0]), len(barcodes)):
        raise ValueError(
            f"the matrix has {n_rows} rows and {n_columns} columns, "
            f"but {len(features[0])} features and {len(barcodes)} barcodes are named"
        )
    genes = {f"column {number}": values for number, values in enumerate(features[:2], 1)}
    keep = _kept_features(features, genome)
    shape = (len(barcodes), len(features[0]))

    def blocks() -> Iterator[sparse.csr_matrix]:
        entries = lambda: _matrix_entries(matrix_file, n_entries, transposed=transposed)  # noqa: E731
        for block in gather_rows(entries, shape=shape, n_entries=n_entries):
            yield block if keep.all() else block[:, np.flatnonzero(keep)]

    matrix = Matrix(
        name="X",
        shape=(shape[0], int(keep.sum())),
        gene_columns={name: values[keep] for name, values in genes.items()},
        blocks=blocks,
    )
    obs = pd.DataFrame(index=range(len(barcodes)))
    return Source(path=path, format="10x_mtx", barcodes=barcodes, obs=obs, matrices=(matrix,))


def _part(folder: Path, prefix: str, part: str) -> Path:
    names = [f"{prefix}{name}{suffix}" for name in _PARTS[part] for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"no {part}: expected one of {', '.join(names)} beside the matrix")


def _open_text(path: Path) -> io.TextIOBase:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _name_columns(path: Path) -> list[StringArray]:
    with _open_text(path) as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    if not rows:
        raise ValueError(f"{path.name} is empty")
    width = min(len(row) for row in rows)
    return [np.array([row[column] for row in rows], dtype=object) for column in range(width)]


def _kept_features(features: list[StringArray], genome: str) -> npt.NDArray[np.bool_]:
    keep = (
        expression_features(features[2])
        if len(features) > 2
        else np.ones(len(features[0]), dtype=bool)
    )
    if genome != "auto":
        fronts = np.array(
            [str(name).rsplit("_", 1)[0].rstrip("_") for name in features[0]], dtype=object
        )
        keep &= fronts == pick_genome(sorted(set(fronts)), genome)
    return keep


def _matrix_size(path: Path) -> tuple[int, int, int]:
    with _open_text(path) as file:
        banner = file.readline().lower().split()
        if len(banner) < 5 or banner[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
            raise ValueError(f"{path.name} does not begin with '%%MatrixMarket matrix coordinate'")
        if banner[3] not in ("integer", "real") or banner[4] != "general":
            raise ValueError(
                f"{path.name} is '{' '.join(banner[3:])}'; supported: integer general, real general"
            )
        sizes = _size_line(file, path)
    return sizes


def _size_line(file: io.TextIOBase, path: Path) -> tuple[int, int, int]:
    line = "%"
    while line.startswith("%") or (line and not line.strip()):
        line = file.readline()
    fields = line.split()
    if len(fields) != 3 or not all(field.isdecimal() for field in fields):
        raise ValueError(f"{path.name} has no size line (rows, columns, values)")
    return int(fields[0]), int(fields[1]), int(fields[2])


def _matrix_entries(path: Path, n_entries: int, *, transposed: bool) -> Iterator[Entries]:
    n_read = 0
    with _open_text(path) as file:
        file.readline()
        _size_line(file, path)
        if n_entries:
            table = pd.read_csv(
                file,
                sep=r"\s+",
                header=None,
                names=["row", "column", "value"],
                dtype={"row": np.int64, "column": np.int64},
                chunksize=BLOCK_ENTRIES,
            )
            for part in table:
                if part["value"].dtype.kind not in "iuf":
                    raise ValueError(f"{path.name} holds a value that is not a number")
                n_read += len(part)
                genes, cells = part["row"].to_numpy() - 1, part["column"].to_numpy() - 1
                if transposed:
                    genes, cells = cells, genes
                yield cells, genes, part["value"].to_numpy()
    if n_read != n_entries:
        raise ValueError(
            f"{path.name} announces {n_entries} values and holds {n_read}; "
            "it is cut short or damaged"
        )


def open_table(path: Path, format: str, *, gene_share: Callable[[StringArray], float]) -> Source:
    """Open a text table whose first line and first column hold names.

    Args:
        path: The file, gzip or not.
        format: csv or tsv.
        gene_share: See `readers.open_source`; decides whether genes lie in rows or in columns.

    Raises:
        ValueError: No cells or genes, unequal lines.
    """
    separator = SEPARATORS[format]
    header, row_names = _table_names(path, separator)
    if not header or not len(row_names):
        raise ValueError(f"a table with {len(row_names)} rows and {len(header)} columns of values")
    columns = np.array(header, dtype=object)
    genes_in_rows = gene_share(row_names) > gene_share(columns)
    genes, barcodes = (row_names, columns) if genes_in_rows else (columns, row_names)
    shape = (len(barcodes), len(genes))
    table_shape = (len(row_names), len(columns))

    def blocks() -> Iterator[sparse.csr_matrix]:
        if not genes_in_rows:
            yield from (block for _, block in _table_blocks(path, separator, *table_shape))
            return

        def entries() -> Iterator[Entries]:
            for first, block in _table_blocks(path, separator, *table_shape):
                part = block.tocoo()
                yield part.col.astype(np.int64), part.row.astype(np.int64) + first, part.data

        # Zeros of the table are dropped before they are gathered; this bound only decides whether
        # to count first.
        yield from gather_rows(entries, shape=shape, n_entries=shape[0] * shape[1])

    named: Mapping[str, StringArray] = {"index": genes}
    matrix = Matrix(name="X", shape=shape, gene_columns=named, blocks=blocks)
    obs = pd.DataFrame(index=range(len(barcodes)))
    return Source(path=path, format=format, barcodes=barcodes, obs=obs, matrices=(matrix,))


def _table_names(path: Path, separator: str) -> tuple[list[str], StringArray]:
    """Return the column names and the row names; every line must have the same number of fields."""
    names = []
    with _open_text(path) as file:
        lines = csv.reader(file, delimiter=separator)
        header = next(lines)
        width = None
        for number, fields in enumerate(lines, 2):
            if not fields:
                continue
            # write.table of R leaves out the name of the first column.
            width = width or (len(header) + 1 if len(fields) == len(header) + 1 else len(header))
            if len(fields) != width:
                raise ValueError(
                    f"line {number} has {len(fields)} fields, "
                    f"expected {width} as in the first lines"
                )
            names.append(fields[0])
    return header[1:] if width == len(header) else header, np.array(names, dtype=object)


def _table_blocks(
    path: Path, separator: str, n_rows: int, n_columns: int
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield the number of the first row and the values of consecutive blocks of lines.

    numpy parses these tables: pandas needs a minute for 30,000 columns.
    """
    with _open_text(path) as file:
        lines = (line for line in file if line.strip())
        next(lines)
        for first, stop in dense_blocks(n_rows, n_columns):
            try:
                values = np.loadtxt(
                    itertools.islice(lines, stop - first),
                    delimiter=separator,
                    usecols=range(1, n_columns + 1),
                    quotechar='"',
                    comments=None,
                    ndmin=2,
                )
            except ValueError:
                _raise_word(path, separator)
                raise
            yield first, sparse.csr_matrix(values)


def _raise_word(path: Path, separator: str) -> None:
    """Raise the error that names the first field that is not a number."""
    with _open_text(path) as file:
        lines = csv.reader(file, delimiter=separator)
        next(lines)
        for number, fields in enumerate(lines, 2):
            for column, field in enumerate(fields[1:], 2):
                try:
                    float(field)
                except ValueError:
                    raise ValueError(
                        f"line {number}, field {column} is '{field[:20]}', not a number"
                    ) from None
