"""Reads a staged dataset back and compares it with what was written, before its ledger says ok.

The cells are compared by running CRC-32C digests of their genes, counts, sizes and source rows, one
made while they are written and one while every chunk is decoded again. What `finalize` would refuse
is refused here, where it costs one dataset.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from data_prep.splits import read_donors
from sclong_ds.obs_table import read_obs
from sclong_ds.store import CellStore

_AGAIN = "the disk or the memory of this machine is at fault; run convert again, elsewhere"


class CellDigest:
    """Digest of cells in order; how they are cut into blocks does not matter."""

    def __init__(self) -> None:
        """Begin with no cell."""
        self.n_cells = 0
        self._crc = dict.fromkeys(("genes", "counts", "sizes", "totals", "source rows"), 0)

    def add(self, cells: sparse.csr_matrix, source_row: npt.NDArray[np.int64]) -> None:
        """Add cells.

        Args:
            cells: (cells, genes) counts, column indices increasing in each row.
            source_row: (cells,) row of each in its source.
        """
        if not cells.data.all():
            cells = cells.copy()
            cells.eliminate_zeros()
        self.n_cells += cells.shape[0]
        totals = np.asarray(cells.sum(axis=1, dtype=np.int64)).ravel()
        self._extend("totals", totals, "<i8")
        self._extend("sizes", np.diff(cells.indptr), "<i8")
        self._extend("genes", cells.indices, "<i4")
        self._extend("counts", cells.data, "<u4")
        self._extend("source rows", source_row, "<i8")

    def _extend(self, name: str, values: npt.NDArray[np.generic], dtype: str) -> None:
        content = values.astype(dtype, copy=False).tobytes()
        self._crc[name] = google_crc32c.extend(self._crc[name], content)

    def differences(self, other: CellDigest) -> list[str]:
        """Return in what cells differ from others; nothing where they are equal.

        Args:
            other: Digest of the others.
        """
        names = [name for name, crc in self._crc.items() if crc != other._crc[name]]
        return ["number of cells", *names] if self.n_cells != other.n_cells else names


def check_cells(path: Path, written: CellDigest, *, n_genes: int) -> None:
    """Decode all cells of a store and compare them with what was written.

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
    for chunk in range(len(rows) - 1):
        here = slice(int(rows[chunk]), int(rows[chunk + 1]))
        cells = store.read_chunk(chunk)
        found.add(cells, source_row[here])
        totals = np.asarray(cells.sum(axis=1, dtype=np.int64)).ravel()
        for name, values, stored in (
            ("row_total", totals, store.row_total[here]),
            ("row_nnz", np.diff(cells.indptr), store.row_nnz[here]),
        ):
            if not np.array_equal(values, stored):
                raise ValueError(f"{path}/{name}: not what was written; {_AGAIN}")
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
