"""Chosen cells of Matrix Market folders, npz files and text tables, read line by line.

The slow second way of `verify_sources.py` for formats that are text, and for npz, whose members are
read in stretches; see `plain_arrays.py`. It shares no code with `readers*.py`.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.verify.plain_arrays import STRETCH, PlainSource, Stored

_MEMBER_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0}


def plain_matrix_market(path: Path, *, rows: Sequence[int]) -> PlainSource:
    """Read cells of a Matrix Market folder, genes or cells in rows.

    Args:
        path: The folder, or the matrix file with its names beside it.
        rows: Cells, by their place among the barcodes.
    """
    matrix = path
    if path.is_dir():
        matrix = next(p for p in sorted(path.iterdir()) if "matrix.mtx" in p.name)
    front = matrix.name.partition("matrix.mtx")[0]
    barcodes = _name_rows(_beside(matrix, front, ("barcodes.tsv",)))
    names = _name_rows(_beside(matrix, front, ("features.tsv", "genes.tsv")))
    wanted, stored = set(rows), {row: list[tuple[int, Any]]() for row in rows}
    with _text_lines(matrix) as lines:
        line = next(lines)
        while line.startswith("%") or not line.strip():
            line = next(lines)
        n_first = int(line.split()[0])
        # Where both sizes are the same, features are the rows, as 10x writes them.
        cell_at = 1 if n_first == len(names) else 0
        for line in lines:
            fields = line.split()
            if fields and (cell := int(fields[cell_at]) - 1) in wanted:
                stored[cell].append((int(fields[1 - cell_at]) - 1, _number(fields[2])))
    features = {f"column {n + 1}": [row[n] for row in names] for n in range(min(2, len(names[0])))}
    if len(names[0]) > 2:
        features["feature_type"] = [row[2] for row in names]
    return PlainSource(
        n_cells=len(barcodes),
        features=features,
        stored={"X": stored},
        barcodes={row: barcodes[row][0] for row in rows},
        annotations={row: {} for row in rows},
    )


def plain_npz(path: Path, *, rows: Sequence[int], gene_list: Path | None) -> PlainSource:
    """Read cells of a file of scipy.sparse.save_npz.

    Args:
        path: The file.
        rows: Cells, by their row.
        gene_list: File that names the genes; None looks beside the file.
    """
    with np.load(path) as members:
        n_cells, n_genes = (int(size) for size in members["shape"])
        kind = members["format"].item()
        pointers = members["indptr"].astype(np.int64)
    by_cell = (kind.decode() if isinstance(kind, bytes) else kind) == "csr"
    wanted, stored = np.array(sorted(rows), dtype=np.int64), {row: list[Any]() for row in rows}
    with zipfile.ZipFile(path) as packed:
        pairs = zip(_stretches(packed, "indices"), _stretches(packed, "data"), strict=True)
        start = 0
        for indices, values in pairs:
            places = np.arange(start, start + len(values))
            lines = np.searchsorted(pointers, places, side="right") - 1
            cells, features = (lines, indices) if by_cell else (indices, lines)
            for place in np.flatnonzero(np.isin(cells, wanted)):
                stored[int(cells[place])].append((int(features[place]), values[place]))
            start += len(values)
    names = _name_rows(gene_list or _list_beside(path))
    if len(names) == n_genes + 1:
        titles, names = names[0], names[1:]
    else:
        titles = [f"column {number}" for number in range(1, len(names[0]) + 1)]
    return PlainSource(
        n_cells=n_cells,
        features={title: [row[n] for row in names] for n, title in enumerate(titles)},
        stored={"X": stored},
        barcodes={row: str(row) for row in rows},
        annotations={row: {} for row in rows},
    )


def plain_table(
    path: Path,
    *,
    rows: Sequence[int],
    separator: str,
    n_cells: int,
    are_genes: Callable[[list[str]], float],
) -> PlainSource:
    """Read cells of a text table with names in its first line and its first column.

    Args:
        path: The file.
        rows: Cells, by their place in the file.
        separator: Between fields.
        n_cells: Cells of the table; tells rows from columns where their numbers differ.
        are_genes: Returns the share of names that are genes; asked where they are equal.
    """
    with _text_lines(path) as lines:
        table = csv.reader(lines, delimiter=separator)
        header = next(table)
        line_names = [fields[0] for fields in table if fields]
    with _text_lines(path) as lines:
        table = csv.reader(lines, delimiter=separator)
        next(table)
        # write.table of R leaves out the name of the first column.
        columns = header if len(next(table)) > len(header) else header[1:]
    by_cell = len(line_names) == n_cells
    if by_cell and len(columns) == n_cells:
        by_cell = are_genes(columns) >= are_genes(line_names)
    stored: Stored = {row: [] for row in rows}
    with _text_lines(path) as lines:
        table = csv.reader(lines, delimiter=separator)
        next(table)
        for line, fields in enumerate(fields for fields in table if fields):
            if not by_cell:
                for row in rows:
                    if value := _number(fields[row + 1]):
                        stored[row].append((line, value))
            elif line in stored:
                values = enumerate(map(_number, fields[1:]))
                stored[line] += [(place, value) for place, value in values if value]
    cells, genes = (line_names, columns) if by_cell else (columns, line_names)
    return PlainSource(
        n_cells=len(cells),
        features={"index": genes},
        stored={"X": stored},
        barcodes={row: cells[row] for row in rows},
        annotations={row: {} for row in rows},
    )


def _number(text: str) -> int | float:
    text = text.strip().strip('"')
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


class _text_lines:
    """Lines of a text file, gzip or not, without the mark that some editors put in front."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        raw: Any = gzip.open(path) if packed else path.open("rb")
        self._file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")

    def __enter__(self) -> Iterator[str]:
        return iter(self._file)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _beside(matrix: Path, front: str, names: Sequence[str]) -> Path:
    paths = [matrix.with_name(f"{front}{name}{end}") for name in names for end in ("", ".gz")]
    return next(path for path in paths if path.is_file())


def _list_beside(path: Path) -> Path:
    names = [f"{path.stem}.genes.txt", f"{path.stem}.genes.tsv"]
    names += ["genes.txt", "genes.tsv", "gene_list.txt"]
    paths = [path.with_name(f"{name}{end}") for name in names for end in ("", ".gz")]
    return next(path for path in paths if path.is_file())


def _name_rows(path: Path) -> list[list[str]]:
    with _text_lines(path) as lines:
        return [line.rstrip("\r\n").split("\t") for line in lines if line.strip()]


def _stretches(packed: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """Yield the values of a member of an npz file, STRETCH at a time."""
    with packed.open(f"{name}.npy") as file:
        read = _MEMBER_HEADERS.get(
            np.lib.format.read_magic(file), np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        for start in range(0, shape[0], STRETCH):
            number = min(STRETCH, shape[0] - start)
            yield np.frombuffer(file.read(number * dtype.itemsize), dtype=dtype)
