"""Reads a staged dataset back and compares it with what was written, before its ledger says ok.

The cells are compared by running CRC-32C digests: one is made of the counts while they are written,
one of every chunk that is read again. The byte code (`sclong_ds.corpus.byte_code`) is taken apart
by a decoder of its own, so that a fault of the encoder shows as well; it compares distances between
genes, not genes, which takes a third of the time of `streams.decode`. What `finalize` would refuse
is refused here, where it costs one dataset.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from data_prep.corpus.split.plan import read_donors
from sclong_ds.corpus.byte_code import PackedCells
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.files.obs_table import read_obs

_AGAIN = "the disk or the memory of this machine is at fault; run convert again, elsewhere"
_STEP = 255
"""Largest distance between two genes that one entry covers."""


class CellDigest:
    """Digest of cells in order; how they are cut into blocks does not matter."""

    def __init__(self) -> None:
        """Begin with no cell."""
        self.n_cells = 0
        self._crc = dict.fromkeys(("sizes", "genes", "counts", "source rows"), 0)

    def add(self, cells: sparse.csr_matrix, source_row: npt.NDArray[np.int64]) -> None:
        """Add cells that are to be written.

        Args:
            cells: (cells, genes) counts below 2^32, column indices increasing in each row.
            source_row: (cells,) row of each in its source.
        """
        if not cells.data.all():
            cells = cells.copy()
            cells.eliminate_zeros()
        indices, sizes = cells.indices, np.diff(cells.indptr)
        steps = np.empty(len(indices), np.int32)
        np.subtract(indices[1:], indices[:-1], out=steps[1:], casting="same_kind")
        first = cells.indptr[:-1][sizes > 0]
        steps[first] = indices[first] + 1
        self._add(sizes, steps, cells.data, source_row)

    def add_packed(self, cells: PackedCells, source_row: npt.NDArray[np.int64]) -> bool:
        """Add cells that were read.

        Args:
            cells: Of a store.
            source_row: (cells,) row of each in its source.

        Returns:
            Whether their sizes and totals are those of their counts.
        """
        sizes, steps, values = _unpacked(cells)
        self._add(sizes, steps, values, source_row)
        totals = np.zeros(len(sizes), np.int64)
        filled = np.flatnonzero(sizes)
        starts = (np.cumsum(sizes) - sizes)[filled]
        if len(filled):
            totals[filled] = np.add.reduceat(values, starts, dtype=np.int64)
        return np.array_equal(sizes, cells.row_nnz) and np.array_equal(totals, cells.row_total)

    def _add(
        self,
        sizes: npt.NDArray[np.integer],
        steps: npt.NDArray[np.integer],
        values: npt.NDArray[np.integer],
        source_row: npt.NDArray[np.integer],
    ) -> None:
        self.n_cells += len(sizes)
        for name, array, dtype in (
            ("sizes", sizes, "<i8"),
            ("genes", steps, "<i4"),
            ("counts", values, "<u4"),
            ("source rows", source_row, "<i8"),
        ):
            content = np.ascontiguousarray(array, dtype).view(np.uint8)
            # The library takes read-only bytes.
            content.flags.writeable = False
            self._crc[name] = google_crc32c.extend(self._crc[name], content)

    def differences(self, other: CellDigest) -> list[str]:
        """Return in what cells differ from others; nothing where they are equal.

        Args:
            other: Digest of the others.
        """
        names = [name for name, crc in self._crc.items() if crc != other._crc[name]]
        return ["number of cells", *names] if self.n_cells != other.n_cells else names


def _unpacked(
    cells: PackedCells,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
    """Return (cells,) genes of each cell, and (genes of all,) distances and counts.

    A distance is that to the gene before, or to -1. Nonsense gives nonsense: the digest shows it.
    """
    gap, steps, values = cells.gap, cells.gap.astype(np.int32), cells.count.astype(np.uint32)
    bounds = np.concatenate(([0], np.cumsum(cells.row_entries, dtype=np.int64)))
    more = np.flatnonzero(gap == 0)
    if len(more):
        # The k-th of a run of continuations is about the entry k places before it.
        run = np.maximum.accumulate(
            np.where(np.diff(more, prepend=-2) > 1, np.arange(len(more)), 0)
        )
        depth = np.arange(len(more)) - run + 1
        shifted = values[more] << (8 * np.minimum(depth, 3)).astype(np.uint32)
        values[more] = 0
        np.add.at(values, np.maximum(more - depth, 0), shifted)
    gone = np.flatnonzero(values == 0)
    if len(gone):
        stones = gone[gap[gone] > 0]
        kept = np.ones(len(values), dtype=bool)
        kept[gone] = False
        steps, values = steps[kept], values[kept]
        target = stones - np.searchsorted(gone, stones)
        inside = target < len(steps)
        np.add.at(steps, target[inside], _STEP)
        bounds = bounds - np.searchsorted(gone, bounds)
    return np.diff(bounds), steps, values


def check_cells(path: Path, written: CellDigest, *, n_genes: int) -> None:
    """Read all cells of a store and compare them with what was written.

    Args:
        path: The store.
        written: Digest of what was written.
        n_genes: Genes of the vocabulary.

    Raises:
        ValueError: It holds something else, or cannot be decoded.
    """
    store = CellStore(path)
    found = CellDigest()
    rows, source_row = store.chunk_rows, store.table("source_row")
    buffers = np.empty(store.chunk_entries, np.uint8), np.empty(store.chunk_entries, np.uint8)
    for chunk in range(len(rows) - 1):
        cells = store.read_packed(chunk, out=buffers)
        if not found.add_packed(cells, source_row[int(rows[chunk]) : int(rows[chunk + 1])]):
            raise ValueError(f"{path}: row_nnz or row_total are not those of the counts; {_AGAIN}")
    different = found.differences(written)
    if different or (store.n_genes, len(store)) != (n_genes, written.n_cells):
        what = ", ".join(different) or "its attributes"
        raise ValueError(f"{path}: reads back other than it was written ({what}); {_AGAIN}")


def check_obs(path: Path, written: pd.DataFrame) -> None:
    """Read annotations back as `finalize` does and compare them with what was written.

    Args:
        path: The table.
        written: What was written.

    Raises:
        ValueError: It holds something else, or cannot be read.
    """
    read_donors(path, len(written))
    found = read_obs(path)
    if list(found.columns) != list(written.columns) or not all(
        np.array_equal(found[name].to_numpy(), written[name].to_numpy()) for name in found.columns
    ):
        raise ValueError(f"{path}: reads back other than it was written; {_AGAIN}")
