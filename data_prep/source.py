"""What a reader hands over: a dataset as cells in rows, streamed in blocks of bounded size.

The readers (`readers*.py`) return a `Source`; everything after them (counts,
harmonize, convert) knows only the types of this module and none of the file formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

BLOCK_ENTRIES = 2**21
"""Stored values of one block; harmonising one takes about 150 bytes a value, 0.3 GB."""
BLOCK_CELLS = 8192
"""Cells of one block at most."""

StringArray = npt.NDArray[np.object_]
Entries = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.generic]]


class UnusableError(ValueError):
    """A readable dataset that the corpus does not take: not counts, or not known human genes.

    Such a dataset is `excluded`; any other error while reading makes it `failed`.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix of a dataset, cells in rows."""

    name: str
    """Where it lies: X, raw.X or layers/NAME."""
    shape: tuple[int, int]
    """Cells, genes."""
    gene_columns: Mapping[str, StringArray]
    """Every text column that may name the genes, by column name; `index` is the index of the gene
    table."""
    blocks: Callable[[], Iterator[sparse.csr_matrix]]
    """Starts a new pass over all cells in file order; consecutive blocks of (cells, genes), with
    values as they are stored: columns may be unsorted and places repeated, but nothing is added up
    (`counts.exact_counts` does, in int64, once each value is proven)."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Features of the file that are not read, by reason (`features.genes_only`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened dataset: its cells, what is known about them, and the matrices it holds."""

    path: Path
    format: str
    """One of `readers.FORMATS`."""
    barcodes: StringArray
    """Cell names in file order."""
    obs: pd.DataFrame
    """Annotation of the cells, same order as `barcodes`; no columns where the format has none."""
    matrices: tuple[Matrix, ...]


def row_blocks(row_ptr: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most BLOCK_ENTRIES values and BLOCK_CELLS rows (one row at least).

    Args:
        row_ptr: (n + 1,) first value of each row, as in CSR.

    Yields:
        Half-open row ranges that cover 0..n in order.
    """
    start, n_rows = 0, len(row_ptr) - 1
    while start < n_rows:
        stop = int(np.searchsorted(row_ptr, row_ptr[start] + BLOCK_ENTRIES, side="right")) - 1
        stop = min(max(stop, start + 1), start + BLOCK_CELLS, n_rows)
        yield start, stop
        start = stop


def dense_blocks(n_rows: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """Cut the rows of a dense matrix into runs of at most BLOCK_ENTRIES elements.

    Args:
        n_rows: Rows in all.
        n_columns: Elements of a row.

    Yields:
        Half-open row ranges that cover 0..n_rows in order.
    """
    step = min(BLOCK_CELLS, max(1, BLOCK_ENTRIES // max(1, n_columns)))
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)
