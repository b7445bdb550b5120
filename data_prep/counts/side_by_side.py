"""Reads several matrices of the same cells side by side: compares or adds them, in blocks.

Their blocks may be cut at different cells, and their genes may differ; values of one place are
counts, proven by `counts.exact_counts` where they are not equal byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from data_prep.counts.proof import exact_counts
from data_prep.source.source import Matrix, StringArray, UnusableError

_MOST_COLUMNS = 5
"""Text columns of each gene table that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which genes two matrices share; (n,) positions in each, or None where they are all the same.

    Genes that a matrix names twice are left out.
    """

    one: npt.NDArray[np.int64] | None
    other: npt.NDArray[np.int64] | None


def shared_columns(one: Matrix, other: Matrix) -> Columns | None:
    """Return the genes that two matrices share by name, None if they share none.

    Args:
        one: A matrix.
        other: One of the same dataset.
    """
    if one.shape == other.shape and all(
        np.array_equal(names, other.gene_columns.get(column, ()))
        for column, names in one.gene_columns.items()
    ):
        return Columns(one=None, other=None)
    best: Columns | None = None
    n_best = 0
    for names, other_names in _pairs(one, other):
        found = _shared(names, other_names)
        assert found.one is not None
        if len(found.one) > n_best:
            best, n_best = found, len(found.one)
        if n_best > min(one.shape[1], other.shape[1]) / 2:
            break
    return best


def count_differences(one: sparse.csr_matrix, other: sparse.csr_matrix, columns: Columns) -> int:
    """Return how many values of shared genes differ.

    Args:
        one: (cells, genes) counts.
        other: The same cells of the other matrix.
        columns: From `shared_columns`.
    """
    if columns.one is not None:
        one, other = one[:, columns.one], other[:, columns.other]
    return int((one != other).nnz)


def compared(one: Matrix, other: Matrix, columns: Columns) -> Matrix:
    """Return a matrix that, while it is read, is compared with another one to the last cell.

    Args:
        one: The matrix.
        other: One that has held the same counts so far.
        columns: From `shared_columns`.

    Returns:
        `one`; its blocks raise UnusableError where the other one holds something else.
    """

    def blocks() -> Iterator[sparse.csr_matrix]:
        rows, first = Rows(other), 0
        for block in one.blocks():
            twin = rows.take(block.shape[0])
            if not _identical(block, twin, columns):
                _check_equal(block, twin, columns, names=(one.name, other.name), first=first)
            first += block.shape[0]
            yield block

    return replace(one, blocks=blocks, ranges=None)


def added(matrices: Sequence[Matrix], *, proven: bool) -> Matrix:
    """Return the sum of matrices of the same cells and genes.

    Args:
        matrices: At least one.
        proven: Prove that each holds counts and add in int64; otherwise add in float64.

    Raises:
        ValueError: Other genes, or in another order.
    """
    first, others = matrices[0], matrices[1:]
    for matrix in others:
        columns = shared_columns(first, matrix)
        if columns is None or columns.one is not None:
            raise ValueError(
                f"{first.name} has {first.shape[1]} genes, {matrix.name} {matrix.shape[1]}, or in "
                "another order; only matrices of the same cells and genes are added"
            )

    def values(block: sparse.csr_matrix, matrix: Matrix) -> sparse.csr_matrix:
        return exact_counts(block, where=matrix.name) if proven else block.astype(np.float64)

    def blocks() -> Iterator[sparse.csr_matrix]:
        readers = [Rows(matrix) for matrix in others]
        for block in first.blocks():
            total = values(block, first)
            for matrix, rows in zip(others, readers, strict=True):
                total = total + values(rows.take(block.shape[0]), matrix)
            yield total.tocsr()

    name = "+".join(matrix.name for matrix in matrices)
    return replace(first, name=name, blocks=blocks, ranges=None)


class Rows:
    """One pass over a matrix, taken in runs of any number of cells.

    Args:
        matrix: The matrix.
    """

    def __init__(self, matrix: Matrix) -> None:
        self._name, self._n_genes = matrix.name, matrix.shape[1]
        self._blocks = matrix.blocks()
        self._left: sparse.csr_matrix | None = None

    def take(self, n_cells: int) -> sparse.csr_matrix:
        """Return the next cells.

        Args:
            n_cells: How many.

        Raises:
            ValueError: There are fewer.
        """
        parts: list[sparse.csr_matrix] = []
        while n_cells:
            block = self._left if self._left is not None else next(self._blocks, None)
            if block is None:
                raise ValueError(f"{self._name} has fewer cells than were announced")
            part, self._left = block, None
            if block.shape[0] > n_cells:
                part, self._left = block[:n_cells], block[n_cells:]
            parts.append(part)
            n_cells -= part.shape[0]
        if len(parts) == 1:
            return parts[0]
        return sparse.vstack(parts or [sparse.csr_matrix((0, self._n_genes))], format="csr")


def _pairs(one: Matrix, other: Matrix) -> Iterator[tuple[StringArray, StringArray]]:
    """Yield gene columns to compare, those of one name first."""
    mine, theirs = list(one.gene_columns.items()), list(other.gene_columns.items())
    for name, names in mine:
        if name in other.gene_columns:
            yield names, other.gene_columns[name]
    for name, names in mine[:_MOST_COLUMNS]:
        for other_name, other_names in theirs[:_MOST_COLUMNS]:
            if name != other_name:
                yield names, other_names


def _shared(names: StringArray, other_names: StringArray) -> Columns:
    mine, theirs = pd.Index(names, dtype=object), pd.Index(other_names, dtype=object)
    once = np.flatnonzero(~mine.duplicated(keep=False) & (mine != ""))
    other_once = np.flatnonzero(~theirs.duplicated(keep=False))
    at = theirs[other_once].get_indexer(mine[once])
    return Columns(one=once[at >= 0], other=other_once[at[at >= 0]])


def _identical(block: sparse.csr_matrix, twin: sparse.csr_matrix, columns: Columns) -> bool:
    """Whether two blocks are stored alike, which needs no proof of their values."""
    return columns.one is None and all(
        np.array_equal(getattr(block, part), getattr(twin, part))
        for part in ("indptr", "indices", "data")
    )


def _check_equal(
    block: sparse.csr_matrix,
    twin: sparse.csr_matrix,
    columns: Columns,
    *,
    names: tuple[str, str],
    first: int,
) -> None:
    name, other = names
    choice = f"write counts = {name} or counts = {other} in the manifest (--counts)"
    where = f"in cells {first} to {first + block.shape[0] - 1}"
    counts = exact_counts(block, where=name)
    try:
        others = exact_counts(twin, where=other)
    except ValueError as error:
        raise UnusableError(
            f"{name} and {other} hold the same counts in the first {first} cells, but {where} "
            f"{error}; {choice}"
        ) from error
    n_different = count_differences(counts, others, columns)
    if n_different:
        raise UnusableError(
            f"{name} and {other} both look like raw counts and differ in {n_different} values "
            f"{where} (totals {counts.sum()} and {others.sum()}); find out which holds the raw "
            f"counts, and {choice}"
        )
