"""The source cells of the loader benchmark, and the plain ways to read them.

Reads FOLDER/datasetK.h5ad, the files of `benchmarks.synthetic_corpus`; cells are numbered through
all of them. `write_npz` and `read_npz` do what many published training scripts do: one compressed
.npz file a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.corpus.byte_code import PackedCells, decode

TARGET_SUM = 1.0e4


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A batch, as whatever a loader delivers."""

    n_cells: int
    counts: Any
    """PackedCells, CSR or a dense array or tensor; may be overwritten by the next batch."""
    cells: NDArray[np.int64] | None
    """(n_cells,) number of each source cell; None where nobody asked for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A store and one way to read it."""

    name: str
    kind: str
    """packed, sparse, dense or ready (dense, scaled to 1e4, log1p)."""
    n_cells: int
    """Cells of an epoch."""
    batches: Callable[[int, bool], Iterator[Loaded]]
    """Called with the number of the epoch and whether the cells' numbers are wanted."""
    settings: str = ""
    """Of the loader, for the table."""
    owned: bool = True
    """Each batch has memory of its own, so that it can be kept; else the next one overwrites it."""


class SourceCells:
    """The cells of the h5ad files, read a row at a time."""

    def __init__(self, folder: Path) -> None:
        """Open the files; they stay open."""
        self.paths = sorted(folder.glob("dataset*.h5ad"))
        if not self.paths:
            raise FileNotFoundError(f"{folder}: no dataset*.h5ad; benchmarks.synthetic_corpus")
        self._x = [h5py.File(path, "r")["X"] for path in self.paths]
        self._indptr = [x["indptr"][:] for x in self._x]
        self.n_genes = int(self._x[0].attrs["shape"][1])
        self.starts = np.cumsum([0, *(len(indptr) - 1 for indptr in self._indptr)])
        self.n_cells = int(self.starts[-1])

    def file(self, number: int) -> csr_matrix:
        """Return all cells of one file, float32."""
        x = self._x[number]
        shape = (len(self._indptr[number]) - 1, self.n_genes)
        return csr_matrix((x["data"][:], x["indices"][:], self._indptr[number]), shape=shape)

    def dense(self, cells: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return chosen cells as (cells, genes) float32, each read on its own."""
        out = np.zeros((len(cells), self.n_genes), np.float32)
        files = np.searchsorted(self.starts, cells, side="right") - 1
        for row, file, cell in zip(out, files, cells - self.starts[files], strict=True):
            part = slice(*self._indptr[file][cell : cell + 2])
            row[self._x[file]["indices"][part]] = self._x[file]["data"][part]
        return out

    def fingerprints(self) -> NDArray[np.uint64]:
        """Return the fingerprint of every cell."""
        return np.concatenate([fingerprints(self.file(k)) for k in range(len(self.paths))])


def fingerprints(counts: csr_matrix) -> NDArray[np.uint64]:
    """Return 64 bits a cell, equal for equal genes and counts in whatever order.

    Args:
        counts: (cells, genes) CSR of whole numbers, of any type.
    """
    mixed = counts.indices.astype(np.uint64) << np.uint64(32) | counts.data.astype(np.uint64)
    # The finaliser of splitmix64: a sum of unmixed values would miss exchanged counts.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed)))
    return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]


def as_csr(counts: Any, n_genes: int) -> csr_matrix:
    """Return what a contender delivered as CSR.

    Args:
        counts: PackedCells, CSR, dense array, or torch tensor (dense or CSR).
        n_genes: Number of columns.
    """
    if isinstance(counts, PackedCells):
        return decode(counts.gap, counts.count, counts.row_entries, n_genes)
    if isinstance(counts, (csr_matrix, np.ndarray)):
        return csr_matrix(counts)
    if counts.is_sparse_csr:
        parts = (counts.values(), counts.col_indices(), counts.crow_indices())
        # SCDL's tensors end at the last gene that a batch expresses.
        return csr_matrix(tuple(part.numpy() for part in parts), shape=(counts.shape[0], n_genes))
    return csr_matrix(counts.numpy())


def write_npz(source: SourceCells, folder: Path, n_cells: int) -> int:
    """Write one compressed file a cell, its dense float32 values.

    Args:
        source: Where the cells are.
        folder: Folder, created.
        n_cells: Number of cells, from the first.

    Returns:
        Non-zero values written.
    """
    folder.mkdir(parents=True)
    n_values = 0
    for cell in range(n_cells):
        values = source.dense(np.array([cell]))[0]
        n_values += int(np.count_nonzero(values))
        np.savez_compressed(folder / f"{cell}.npz", values=values)
    return n_values


def npz_contender(folder: Path, n_cells: int, *, batch: int) -> Contender:
    """Return the reading of `write_npz`'s files in random order.

    Args:
        folder: Folder of the files.
        n_cells: Number of files.
        batch: Cells of a batch.
    """

    def batches(epoch: int, _: bool) -> Iterator[Loaded]:
        order = np.random.default_rng([1, epoch]).permutation(n_cells)
        for start in range(0, n_cells, batch):
            cells = order[start : start + batch]
            rows = []
            for cell in cells:
                with np.load(folder / f"{cell}.npz") as file:
                    rows.append(file["values"])
            yield Loaded(len(cells), np.stack(rows), cells)

    return Contender("one .npz a cell", "dense", n_cells, batches, f"batch {batch}")


def h5ad_contender(source: SourceCells, n_cells: int, *, batch: int) -> Contender:
    """Return the reading of random rows of the h5ad files themselves.

    Args:
        source: The files.
        n_cells: Cells of an epoch.
        batch: Cells of a batch.
    """

    def batches(epoch: int, _: bool) -> Iterator[Loaded]:
        order = np.random.default_rng([2, epoch]).permutation(source.n_cells)[:n_cells]
        for start in range(0, n_cells, batch):
            cells = order[start : start + batch]
            yield Loaded(len(cells), source.dense(cells), cells)

    return Contender("h5ad, random rows", "dense", n_cells, batches)
