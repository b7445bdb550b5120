"""What a reader hands over: a dataset as cells in rows, streamed in blocks of bounded size.

The readers (`readers*.py`) return a `Source`; everything after them (counts,
harmonize, convert) knows only the types of this module and none of the file formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from scipy import sparse

READERS: Mapping[str, str] = {
    "h5ad": "data_prep.readers.anndata",
    "zarr": "data_prep.readers.anndata",
    "10x_h5": "data_prep.readers.hdf5",
    "loom": "data_prep.readers.hdf5",
    "scipy_npz": "data_prep.readers.npz",
    "10x_mtx": "data_prep.readers.text",
    "csv": "data_prep.readers.text",
    "tsv": "data_prep.readers.text",
}
"""The module that reads a format. It has `tell(path, start)`, which returns the format if the
content is one of its own, and `open_format(path, format, reading)`. Modules are asked in this
order; that of text rejects what none of them reads, so that the lines of others come before."""
FORMATS = tuple(READERS)
BLOCK_ENTRIES = 2**21
"""Stored values of one block; harmonising one takes about 150 bytes a value, 0.3 GB."""
BLOCK_CELLS = 8192
"""Cells of one block at most."""

MAX_CELLS = 2**27
"""Cells of one dataset, 134 million: the largest public one has 100 million. Names take 100 bytes a
cell, so that a header that claims more cells than this must not be believed."""
MAX_FEATURES = 2**24
"""Features of one dataset, 17 million: a genome in tiles of 500 bases, beside genes, has 6."""
USUAL_OBS_COLUMNS = (
    "donor_id",
    "donor",
    "sample",
    "batch",
    "assay",
    "cell_type",
    "tissue",
    "disease",
    "sex",
    "development_stage",
    "suspension_type",
    "is_primary_data",
    "assay_ontology_term_id",
    "cell_type_ontology_term_id",
    "tissue_ontology_term_id",
    "disease_ontology_term_id",
    "sex_ontology_term_id",
    "development_stage_ontology_term_id",
)
"""Cell annotations kept where the manifest names none: the usual ones, and CELLxGENE's with the
terms of their ontologies."""
_SURROGATES = re.compile("[\ud800-\udfff]")

StringArray: TypeAlias = "npt.NDArray[np.object_]"
RowRange: TypeAlias = "tuple[int, int, Iterator[sparse.csr_matrix]]"
"""First cell, the one behind the last, and the blocks between them."""
Entries: TypeAlias = "tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.generic]]"


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
    ranges: Callable[[int, int], RowRange] | None = None
    """Starts a pass over those blocks of `blocks` whose first cell lies in [start, stop), without
    reading the values of others; None where that is not possible."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Features of the file that are not read, by reason (`features.genes_only`)."""
    by_gene: bool = False
    """Whether the values are stored gene by gene: the first block then costs a pass over all."""
    features: npt.NDArray[np.int64] | None = None
    """(genes,) which features of the file are read; None: all."""


class Annotations:
    """Columns of a table about cells; each is read when it is asked for, and not before.

    Args:
        n_cells: Rows of the table.
        columns: What reads each column: a Series of `n_cells` values, or ValueError.
    """

    def __init__(self, n_cells: int, columns: Mapping[str, Callable[[], pd.Series]]) -> None:
        self._n_cells = n_cells
        self._columns = dict(columns)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of the file."""
        return list(self._columns)

    def __len__(self) -> int:
        """Return the number of cells."""
        return self._n_cells

    def __getitem__(self, name: str) -> pd.Series:
        """Read one column.

        Raises:
            ValueError: There is none, or it cannot be read.
        """
        if name not in self._columns:
            raise ValueError(
                f"there is no cell annotation '{name}'; the file has "
                f"{', '.join(self._columns) or 'none'}"
            )
        return self._columns[name]()

    def frame(
        self, names: Collection[str] | None = None, *, required: Collection[str] = ()
    ) -> tuple[pd.DataFrame, dict[str, str]]:
        """Read some columns.

        Args:
            names: Which; None for all.
            required: Those that must be readable; others are left out.

        Returns:
            The columns that can be read, and why each other one cannot.

        Raises:
            ValueError: A required one cannot be read.
        """
        # 0.3 s to import, which those who need the names of this module alone do not wait for.
        import pandas as pd

        found, notes = {}, {}
        for name in self.columns if names is None else dict.fromkeys(names):
            try:
                found[name] = self[name]
            except ValueError as error:
                if name in required:
                    raise
                notes[f"obs/{name}"] = str(error)
        return pd.DataFrame(found, index=range(self._n_cells)), notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a dataset is to be read; a reader takes what concerns it."""

    gene_share: Callable[[StringArray], float]
    """Returns the share (0 to 1) of names that are known genes."""
    genome: str
    """Genome to keep of a file with several, or auto."""
    gene_list: Path | None
    """File that names the genes of a file that does not; None looks beside it."""
    scratch: Path | None
    """Folder of temporary files; None: the system's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened dataset: its cells, what is known about them, and the matrices it holds."""

    path: Path
    format: str
    """One of FORMATS."""
    barcodes: StringArray
    """Cell names in file order."""
    obs: Annotations
    """Annotation of the cells, same order as `barcodes`; no columns where the format has none."""
    matrices: tuple[Matrix, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    """Parts of the file that are not read, or only after a repair, and why."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What the file states of where it comes from (`source.about`)."""


def check_size(n_cells: int, n_features: int) -> None:
    """Refuse sizes that no dataset has, before anything is made of them.

    Args:
        n_cells: As the file claims.
        n_features: As the file claims.

    Raises:
        ValueError: Negative, or above MAX_CELLS or MAX_FEATURES.
    """
    for number, most, what in (
        (n_cells, MAX_CELLS, "cells"),
        (n_features, MAX_FEATURES, "features"),
    ):
        if not 0 <= number <= most:
            raise ValueError(f"the file claims {number} {what}; 0 to {most} are read. Damaged?")


def repaired_texts(values: StringArray) -> tuple[StringArray, int]:
    """Return texts with U+FFFD for each byte that was not UTF-8, and how many texts had any.

    Args:
        values: Texts as the readers decode them, with a surrogate for each such byte.
    """
    broken = [
        place
        for place, value in enumerate(values)
        if not value.isascii() and _SURROGATES.search(value)
    ]
    if not broken:
        return values, 0
    values = values.copy()
    for place in broken:
        values[place] = _SURROGATES.sub("\ufffd", values[place])
    return values, len(broken)


def row_blocks(row_ptr: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most BLOCK_ENTRIES values and BLOCK_CELLS rows (one row at least).

    Args:
        row_ptr: (n + 1,) first value of each row, as in CSR.

    Yields:
        Half-open row ranges that cover 0..n in order.
    """
    start, n_rows = 0, len(row_ptr) - 1
    while start < n_rows:
        stop = int(row_ptr.searchsorted(row_ptr[start] + BLOCK_ENTRIES, side="right")) - 1
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
