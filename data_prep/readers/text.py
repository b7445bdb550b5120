"""Readers of Matrix Market folders (10x mtx) and of text tables (csv, tsv).

Both are streamed in blocks of lines through the C parsers of pandas and numpy. Tables are checked
field by field: a line with a missing field or a word for a number is an error that names the line.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from data_prep.readers.gather import gathered
from data_prep.readers.lines import (
    LONGEST_NAME,
    NUMBER,
    first_of_same,
    name_columns,
    open_bytes,
    open_text,
    require_line_feeds,
    require_whole_end,
    text_bytes,
)
from data_prep.source.source import (
    BLOCK_ENTRIES,
    FORMATS,
    Annotations,
    Entries,
    Matrix,
    Reading,
    Source,
    StringArray,
    check_size,
    dense_blocks,
)

_MATRIX_MARKET = b"%%MatrixMarket"
_MOST_REPLACED = 0.1
SEPARATORS = {"csv": ",", "tsv": "\t"}
_OTHER_SEPARATORS = {"semicolons": ";", "vertical bars": "|", "blanks": None}
_CORNER_WORDS = frozenset(
    "barcode barcodes bc cb cell cells cellid gene genes geneid id ids idx index key name names "
    "number row rowname rownames sample spot symbol unnamed v1 x".split()
)
"""Words in the usual names of the column of row names."""
ANNOTATIONS = frozenset(
    "batch chr chrom chromosome cluster clusters doublet_score eff_len eff_length effective_length "
    "end entrez entrez_gene_id entrez_id entrezid exon_length g2m_score gene_length leiden length "
    "library_size log10_total_counts log1p_total_counts louvain n_counts n_features n_genes "
    "n_genes_by_counts n_umi n_umis ncount ncount_rna nfeature nfeature_rna ngene ngenes "
    "ngenes_rna numi numis pct_counts_mt pct_counts_ribo pct_mito pct_mt percent_mito percent_mt "
    "percent_ribo res_0_6 res_0_8 s_score seurat_clusters size_factor size_factors start strand "
    "sum total total_count total_counts total_genes total_umi total_umis transcript_length tsne_1 "
    "tsne_2 umap_1 umap_2 width".split()
)
"""Names of numbers about a cell or a gene that are saved beside the counts; in lower case, all
else than letters and digits as `_`."""
_GENES_TOO = frozenset(["end"])
"""Those of ANNOTATIONS that are names of genes, too."""
_SHORTEST_ENTRY = len("1 1 1\n")
_FEWEST = 20
"""Fewer rows may add up to one of their columns by chance, and fewer columns to a row."""
_MATRIX_NAMES = ("matrix.mtx", "matrix.mtx.gz")
_PARTS = {"barcodes": ("barcodes.tsv",), "features": ("features.tsv", "genes.tsv")}


def matrix_market_files(path: Path) -> list[Path]:
    """Return the matrix files of a folder.

    Public archives put the sample in front of the name: GSM123_matrix.mtx.gz.

    Args:
        path: The folder.
    """
    return sorted(file for file in path.iterdir() if file.name.endswith(_MATRIX_NAMES))


def tell(path: Path, start: bytes | None) -> str | None:
    """Return 10x_mtx, csv or tsv if the content is one, None for any other folder.

    Args:
        path: File or folder.
        start: The first bytes of a file, of a compressed one decompressed; None for a folder.

    Raises:
        ValueError: No text, or no table; what it is instead.
    """
    if start is None:
        return "10x_mtx" if matrix_market_files(path) else None
    if start.startswith(_MATRIX_MARKET):
        return "10x_mtx"
    if not start.strip():
        raise ValueError("the file is empty")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"text in UTF-16; iconv -f utf-16 -t utf-8 {path.name} > NEW")
    text = start.decode("utf-8-sig", errors="replace")
    # Texts in another encoding have a few such characters, which are repaired and counted.
    if "\0" in text or text.count("\ufffd") > _MOST_REPLACED * len(text):
        raise ValueError(
            f"neither HDF5 nor text (it begins with {start[:8]!r}); supported: {', '.join(FORMATS)}"
        )
    suffix = path.suffix.lower()
    if suffix in (".h5ad", ".h5", ".hdf5", ".loom"):
        raise ValueError(f"the name ends in {suffix}, but the content is text, not HDF5")
    header, *others = text.splitlines()
    tabs, commas = header.count("\t"), header.count(",")
    if not tabs and not commas:
        for name, separator in _OTHER_SEPARATORS.items():
            n_names = len(header.split(separator))
            # write.table of R leaves out the name of the first column.
            if n_names > 1 and others and len(others[0].split(separator)) - n_names in (0, 1):
                raise ValueError(
                    f"text separated by {name}; save the table with commas (csv) or tabs (tsv) "
                    "between its fields, and with decimal points"
                )
        raise ValueError(
            "text, but the first line has neither tabs nor commas; "
            "expected a table with a header line"
        )
    return "tsv" if tabs >= commas else "csv"


def open_format(path: Path, format: str, reading: Reading) -> Source:
    """Open a dataset of a format that `tell` returned.

    Args:
        path: File or folder.
        format: The format.
        reading: How to read it.
    """
    if format == "10x_mtx":
        return open_matrix_market(path, scratch=reading.scratch)
    gene_share, scratch = reading.gene_share, reading.scratch
    return open_table(path, format, gene_share=gene_share, scratch=scratch)


def open_matrix_market(path: Path, *, scratch: Path | None) -> Source:
    """Open a 10x folder: matrix.mtx, barcodes.tsv and features.tsv (version 3) or genes.tsv (2).

    Args:
        path: The folder, or its matrix file.
        scratch: See `readers.open_source`.

    Raises:
        ValueError: A part is missing or there twice and not the same, or the sizes do not fit.
    """
    matrices = matrix_market_files(path) if path.is_dir() else [path]
    if len(matrices) != 1:
        raise ValueError(
            f"{len(matrices)} matrix files ({', '.join(file.name for file in matrices)}); "
            "list each by itself"
        )
    matrix_file = matrices[0]
    prefix = matrix_file.name.removesuffix(".gz").removesuffix("matrix.mtx")
    parts = [_part(matrix_file.parent, prefix, name) for name in ("barcodes", "features")]
    n_rows, n_columns, n_entries = _matrix_size(matrix_file)
    # One more line than any axis has places: the error then gives both numbers.
    (barcodes, *_), features = (
        name_columns(part, most=max(n_rows, n_columns) + 1) for part in parts
    )
    transposed = (n_rows, n_columns) == (len(barcodes), len(features[0])) and n_rows != n_columns
    if not transposed and (n_rows, n_columns) != (len(features[0]), len(barcodes)):
        raise ValueError(
            f"the matrix has {n_rows} rows and {n_columns} columns, "
            f"but {len(features[0])} features and {len(barcodes)} barcodes are named"
        )
    genes = {f"column {number}": values for number, values in enumerate(features[:2], 1)}
    if len(features) > 2:
        genes["feature_types"] = features[2]
    shape = (len(barcodes), len(features[0]))
    check_size(*shape)
    blocks = gathered(
        lambda: _matrix_entries(matrix_file, n_entries, transposed=transposed),
        shape=shape,
        n_entries=n_entries,
        scratch=scratch,
    )
    matrix = Matrix(name="X", shape=shape, gene_columns=genes, blocks=blocks)
    obs = Annotations(len(barcodes), {})
    return Source(path=path, format="10x_mtx", barcodes=barcodes, obs=obs, matrices=(matrix,))


def _part(folder: Path, prefix: str, part: str) -> Path:
    names = [f"{prefix}{name}{suffix}" for name in _PARTS[part] for suffix in ("", ".gz")]
    found = first_of_same([folder / name for name in names])
    if found is None:
        raise ValueError(f"no {part}: expected one of {', '.join(names)} beside the matrix")
    return found


def _matrix_size(path: Path) -> tuple[int, int, int]:
    require_whole_end(path)
    with open_bytes(path, longest=LONGEST_NAME) as file:
        banner = file.readline().decode(errors="replace").lower().split()
        if len(banner) < 5 or banner[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
            raise ValueError(f"{path.name} does not begin with '%%MatrixMarket matrix coordinate'")
        if banner[3] not in ("integer", "real") or banner[4] != "general":
            raise ValueError(
                f"{path.name} is '{' '.join(banner[3:])}'; supported: integer general, real general"
            )
        n_rows, n_columns, n_entries = _size_line(file, path)
    check_size(max(n_rows, n_columns), 0)
    most = text_bytes(path) // _SHORTEST_ENTRY
    if n_entries > most:
        raise ValueError(
            f"{path.name} announces {n_entries} values and holds {most} at most; "
            "it is cut short or damaged"
        )
    return n_rows, n_columns, n_entries


def _size_line(file: IO[bytes], path: Path) -> tuple[int, int, int]:
    line = b"%"
    while line.startswith(b"%") or (line and not line.strip()):
        line = file.readline()
    fields = line.split()
    if len(fields) != 3 or not all(field.isdigit() for field in fields):
        raise ValueError(f"{path.name} has no size line (rows, columns, values)")
    return int(fields[0]), int(fields[1]), int(fields[2])


def _matrix_entries(path: Path, n_entries: int, *, transposed: bool) -> Iterator[Entries]:
    n_read = 0
    with open_bytes(path, longest=LONGEST_NAME) as file:
        file.readline()
        _size_line(file, path)
        for part in _triples(file):
            if part.empty:
                continue
            if part["value"].dtype.kind not in "iuf" or not isinstance(part.index, pd.RangeIndex):
                raise ValueError(
                    f"{path.name}: a line holds something that is not a number, or too many of them"
                )
            n_read += len(part)
            if n_read > n_entries:
                break
            genes, cells = part["row"].to_numpy() - 1, part["column"].to_numpy() - 1
            if transposed:
                genes, cells = cells, genes
            yield cells, genes, part["value"].to_numpy()
    if n_read != n_entries:
        raise ValueError(
            f"{path.name} announces {n_entries} values and holds "
            f"{n_read}{' or more' if n_read > n_entries else ''}; it is cut short or damaged"
        )


def _triples(file: IO[bytes]) -> Iterator[pd.DataFrame]:
    """Yield the lines that follow in blocks, with the columns row, column and value."""
    try:
        yield from pd.read_csv(
            file,
            sep=r"\s+",
            header=None,
            names=["row", "column", "value"],
            dtype={"row": np.int64, "column": np.int64},
            na_filter=False,
            float_precision="round_trip",
            quoting=csv.QUOTE_NONE,
            chunksize=BLOCK_ENTRIES,
        )
    except pd.errors.EmptyDataError:
        return


def open_table(
    path: Path, format: str, *, gene_share: Callable[[StringArray], float], scratch: Path | None
) -> Source:
    """Open a text table whose first line and first column hold names.

    Args:
        path: The file, gzip or not.
        format: csv or tsv.
        gene_share: See `readers.open_source`; decides whether genes lie in rows or in columns.
        scratch: See `readers.open_source`.

    Raises:
        ValueError: No cells or genes, unequal lines, no names of cells or genes, numbers about them
            among the counts.
    """
    separator = SEPARATORS[format]
    require_line_feeds(path)
    require_whole_end(path, separator)
    corner, header, row_names = _table_names(path, separator)
    if not header or not len(row_names):
        raise ValueError(f"a table with {len(row_names)} rows and {len(header)} columns of values")
    columns = np.array(header, dtype=object)
    genes_in_rows = gene_share(row_names) > gene_share(columns)
    _check_names(corner, columns, row_names, gene_share, genes_in_rows=genes_in_rows)
    genes, barcodes = (row_names, columns) if genes_in_rows else (columns, row_names)
    shape = (len(barcodes), len(genes))
    table_shape = (len(row_names), len(columns))

    def by_cell() -> Iterator[sparse.csr_matrix]:
        yield from (block for _, block in _table_blocks(path, separator, *table_shape))

    def entries() -> Iterator[Entries]:
        for first, block in _table_blocks(path, separator, *table_shape):
            part = block.tocoo()
            yield part.col.astype(np.int64), part.row.astype(np.int64) + first, part.data

    blocks = by_cell
    if genes_in_rows:
        n_entries = shape[0] * shape[1]
        blocks = gathered(entries, shape=shape, n_entries=n_entries, scratch=scratch)
    named: Mapping[str, StringArray] = {"index": genes}
    matrix = Matrix(name="X", shape=shape, gene_columns=named, blocks=blocks)
    obs = Annotations(len(barcodes), {})
    return Source(path=path, format=format, barcodes=barcodes, obs=obs, matrices=(matrix,))


def _check_names(
    corner: str,
    columns: StringArray,
    rows: StringArray,
    gene_share: Callable[[StringArray], float],
    *,
    genes_in_rows: bool,
) -> None:
    """Refuse a first column or line of numbers instead of names, and annotations in between."""
    words = re.split(r"[^a-z0-9]+", corner.lower())
    if corner.strip() and _CORNER_WORDS.isdisjoint(words):
        is_gene = gene_share(np.array([corner], dtype=object)) > 0
        if _are_numbers(rows) and (is_gene or gene_share(columns) > 0):
            raise ValueError(
                f"the first column '{corner}' looks like a gene, not cell names; "
                "write the table with row names"
            )
        if is_gene and _are_numbers(columns):
            raise ValueError(
                f"the first line begins with the gene '{corner}' and continues with numbers, not "
                "cell names; write the table with column names"
            )
    for place, names in (("column", columns), ("row", rows)):
        of_genes = genes_in_rows == (place == "row")
        refused = ANNOTATIONS - _GENES_TOO if of_genes else ANNOTATIONS
        for name in names:
            if re.sub(r"[^a-z0-9]+", "_", name.lower()) in refused:
                raise ValueError(
                    f"the {place} '{name}' is no cell or gene but a number about them; "
                    f"remove the {place} from the table"
                )


def _are_numbers(names: StringArray) -> bool:
    return all(NUMBER.fullmatch(name.strip()) for name in names)


def _table_names(path: Path, separator: str) -> tuple[str, list[str], StringArray]:
    """Return the corner ('' if there is none), the column names and the row names.

    Every line must have the same number of fields.
    """
    names = []
    with open_text(path) as file:
        lines = csv.reader(file, delimiter=separator)
        header = next(lines)
        width = None
        for number, fields in enumerate(lines, 2):
            if not fields:
                continue
            # write.table of R leaves out the name of the first column.
            if width is None:
                no_corner = len(fields) == len(header) + 1 and header[0].strip()
                width = len(header) + 1 if no_corner else len(header)
            if len(fields) != width:
                raise ValueError(
                    f"line {number} has {len(fields)} fields, "
                    f"expected {width} as in the first lines"
                )
            names.append(fields[0])
            check_size(len(names), 0)
    corner, columns = (header[0], header[1:]) if width == len(header) else ("", header)
    return corner, columns, np.array(names, dtype=object)


def _table_blocks(
    path: Path, separator: str, n_rows: int, n_columns: int
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield the number of the first row and the values of consecutive blocks of lines.

    A row or column that is the sum of all others is refused before the last block.
    numpy parses these tables: pandas needs a minute for 30,000 columns.
    """
    with open_text(path) as file:
        lines = (line for line in file if line.strip())
        next(lines)
        totals = _Totals(n_columns)
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
            if values.shape != (stop - first, n_columns):
                raise ValueError("a line break inside quotes; write one line for each row")
            totals.add(values)
            if stop == n_rows:
                totals.check()
            yield first, sparse.csr_matrix(values)


class _Totals:
    """Looks for a column that is the sum of all others in every row, and for a last such row."""

    def __init__(self, n_columns: int) -> None:
        # Of two columns, equal ones are each other's sum.
        self._columns = np.arange(n_columns if n_columns > 2 else 0)
        self._n_rows = self._n_all = 0
        self._sums = np.zeros(n_columns)
        self._last = np.zeros(n_columns)

    def add(self, values: npt.NDArray[np.float64]) -> None:
        """Take in the next rows."""
        self._n_all += len(values)
        self._sums += values.sum(axis=0)
        self._last = values[-1]
        if not len(self._columns):
            return
        sums = values.sum(axis=1)
        values, sums = values[sums > 0], sums[sums > 0]
        self._n_rows += len(sums)
        # The first row leaves few columns, so that the others cost nothing.
        for part in (slice(0, 1), slice(1, None)):
            equal = 2 * values[part, self._columns] == sums[part, None]
            self._columns = self._columns[equal.all(axis=0)]

    def check(self) -> None:
        """Raise if there is such a column, or the last row is such a one."""
        n_filled = np.count_nonzero(self._sums)
        if self._n_all > 2 and n_filled >= _FEWEST and np.array_equal(2 * self._last, self._sums):
            raise ValueError("the last line is the sum of all others; remove it from the table")
        if len(self._columns) and self._n_rows >= _FEWEST:
            raise ValueError(
                f"column {self._columns[0] + 2} is the sum of all others in every line; "
                "remove it from the table"
            )


def _raise_word(path: Path, separator: str) -> None:
    """Raise the error that names the first field that is not a number."""
    with open_text(path) as file:
        lines = csv.reader(file, delimiter=separator)
        next(lines)
        for number, fields in enumerate(lines, 2):
            for column, field in enumerate(fields[1:], 2):
                try:
                    float(field)
                except ValueError:
                    second = "; only the first column may hold names" if column == 2 else ""
                    raise ValueError(
                        f"line {number}, field {column} is '{field[:20]}', not a number{second}"
                    ) from None
