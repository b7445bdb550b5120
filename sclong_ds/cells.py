"""Cells on disk: the format of a cell store, and `CellStore`, which reads one.

A cell store, written by `sclong_ds.cell_writer`, is a Zarr v3 group (`cells.zarr`) that any Zarr
library reads; data preparation uses one per dataset while it collects cells, and a finished corpus
holds one. Two 1-D uint8 arrays, `gap` and `count`, hold the cells in the byte code of
`sclong_ds.streams`; they share one grid of chunks, grouped into shards. A chunk holds whole cells
and is padded with zeros to its end, so one chunk is the unit of reading, decoding and shuffling.
The inner codecs are zstd (or none) and crc32c. The rest are small tables, stored as one
uncompressed little-endian chunk each (`NAME/c/0` can be memory-mapped as it is):

    chunk_rows  (chunks + 1,) int64   first cell of each chunk
    row_entries (cells,) uint32       entries of the cell in `gap` and `count`
    row_nnz     (cells,) uint32       genes with a count
    row_total   (cells,) int64        sum of the counts
    others      (cells,)              what the writer was given, for instance source_row

Group attributes: format, version, n_cells, n_genes, n_values, chunk_entries, codec. Chunk c without
this module:

    group = zarr.open_group("cells.zarr", mode="r")
    first, last = group["chunk_rows"][c : c + 2]
    n, size = group["row_entries"][first:last].astype(int), group.attrs["chunk_entries"]
    cell = np.repeat(np.arange(first, last), n)
    gap = group["gap"][c * size : c * size + n.sum()].astype(int)
    count = group["count"][c * size : c * size + n.sum()].astype(int)
    ends = np.cumsum(gap)
    gene = ends - np.repeat(np.concatenate(([0], ends))[np.cumsum(n) - n], n) - 1
    order = np.arange(len(gap)) - np.maximum.accumulate(np.where(gap > 0, np.arange(len(gap)), 0))
    X = scipy.sparse.coo_array((count << 8 * order, (cell - first, gene))).tocsr()
    X.eliminate_zeros()

(`order` is 0 except in the continuations of counts above 255, whose bytes tocsr() adds up.)
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix

from sclong_ds.streams import PackedCells, decode, slices_to_index

CELLS_FORMAT = "sclong_ds-cells"
CELLS_VERSION = 1
STREAMS = ("gap", "count")
OWN_TABLES = ("chunk_rows", "row_entries", "row_nnz", "row_total")
"""The store's own tables; a writer may be given more."""
_MAPPED_BYTES = 2**20  # a map keeps its file open: finalize would run out with 1,000 small stores


class CellStore:
    """A cell store on disk; opening it reads no cells, so every process can."""

    def __init__(self, path: str | Path) -> None:
        """Open a store.

        Raises:
            FileNotFoundError: No such store.
            ValueError: Another format or version.
        """
        self.path = Path(path)
        if not (self.path / "zarr.json").is_file():
            raise FileNotFoundError(f"{self.path}: no cell store here")
        self._group = zarr.open_group(self.path, mode="r")
        attributes = dict(self._group.attrs)
        found = attributes.get("format"), attributes.get("version")
        if found != (CELLS_FORMAT, CELLS_VERSION):
            raise ValueError(
                f"{self.path}: format {found[0]} version {found[1]}, this program reads "
                f"{CELLS_FORMAT} version {CELLS_VERSION}"
            )
        self.n_cells: int = attributes["n_cells"]  # type: ignore[assignment]
        self.n_genes: int = attributes["n_genes"]  # type: ignore[assignment]
        self.n_values: int = attributes["n_values"]  # type: ignore[assignment]
        self.chunk_entries: int = attributes["chunk_entries"]  # type: ignore[assignment]
        self._last: tuple[int, PackedCells] | None = None

    def __reduce__(self) -> tuple[type[CellStore], tuple[Path]]:
        """Pickle as a path, so that spawned workers map the tables instead of receiving copies."""
        return CellStore, (self.path,)

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.n_cells

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the row tables beyond the store's own."""
        return tuple(sorted(set(self._group.array_keys()) - {*STREAMS, *OWN_TABLES}))

    def table(self, name: str) -> NDArray[Any]:
        """Return a table, read-only; a large one as a memory map that processes share.

        Raises:
            ValueError: No such table, or its file has another size than its shape says.
        """
        if name not in self._group:
            raise ValueError(
                f"{self.path}: no table '{name}'; there are "
                f"{', '.join((*OWN_TABLES, *self.tables))}"
            )
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        dtype, file = np.dtype(array.dtype), self.path / name / "c" / "0"
        if array.shape[0] == 0:
            return np.empty(0, dtype)
        if not file.is_file() or file.stat().st_size != array.shape[0] * dtype.itemsize:
            raise ValueError(f"{file}: missing or cut; restore the file or write the store again")
        if file.stat().st_size < _MAPPED_BYTES:
            return np.frombuffer(file.read_bytes(), dtype)
        return np.memmap(file, dtype=dtype, mode="r", shape=array.shape)

    @cached_property
    def chunk_rows(self) -> NDArray[np.int64]:
        """(chunks + 1,) first cell of each chunk."""
        return self.table("chunk_rows")

    @cached_property
    def row_entries(self) -> NDArray[np.uint32]:
        """(cells,) entries of each cell in the streams."""
        return self.table("row_entries")

    @cached_property
    def row_nnz(self) -> NDArray[np.uint32]:
        """(cells,) genes with a count."""
        return self.table("row_nnz")

    @cached_property
    def row_total(self) -> NDArray[np.int64]:
        """(cells,) sum of the counts."""
        return self.table("row_total")

    @cached_property
    def _streams(self) -> tuple[zarr.Array, zarr.Array]:
        gap, count = self._group["gap"], self._group["count"]
        assert isinstance(gap, zarr.Array)
        assert isinstance(count, zarr.Array)
        return gap, count

    def read_packed(self, chunk: int) -> PackedCells:
        """Return the cells of one chunk in the byte code of `sclong_ds.streams`.

        Raises:
            ValueError: The chunk is damaged.
        """
        rows = slice(int(self.chunk_rows[chunk]), int(self.chunk_rows[chunk + 1]))
        entries = np.array(self.row_entries[rows])
        start = chunk * self.chunk_entries
        stop = start + int(entries.sum(dtype=np.int64))
        try:
            gap, count = (np.asarray(stream[start:stop]) for stream in self._streams)
        except (ValueError, RuntimeError) as error:
            # A failed crc32c is a ValueError, a broken zstd frame a RuntimeError, and neither says
            # where it is.
            raise ValueError(
                f"{self.path}: chunk {chunk} (cells {rows.start} to {rows.stop - 1}) is damaged: "
                f"{error}"
            ) from None
        return PackedCells(
            gap, count, entries, np.array(self.row_nnz[rows]), np.array(self.row_total[rows])
        )

    def read_chunk(self, chunk: int) -> csr_matrix:
        """Return the cells of one chunk as (cells, n_genes) CSR of uint32 counts."""
        cells = self.read_packed(chunk)
        return decode(cells.gap, cells.count, cells.row_entries, self.n_genes)

    def rows(self, indices: ArrayLike) -> csr_matrix:
        """Return chosen cells; each chunk is read once, the last one is kept for the next call.

        Args:
            indices: (cells,) positions, in any order, repeats allowed.

        Returns:
            (cells, n_genes) CSR of uint32 counts, in the order given.

        Raises:
            ValueError: Not a list of integers.
            IndexError: A position outside the store.
        """
        wanted = self._positions(indices)
        entries = np.asarray(self.row_entries[wanted], dtype=np.int64)
        target = np.cumsum(entries) - entries
        gap, count = np.empty(int(entries.sum()), np.uint8), np.empty(int(entries.sum()), np.uint8)
        chunks = np.searchsorted(self.chunk_rows, wanted, side="right") - 1
        for chunk in np.unique(chunks):
            if self._last is None or self._last[0] != chunk:
                self._last = int(chunk), self.read_packed(int(chunk))
            cells = self._last[1]
            starts = np.cumsum(cells.row_entries, dtype=np.int64) - cells.row_entries
            here = np.flatnonzero(chunks == chunk)
            source = slices_to_index(starts[wanted[here] - self.chunk_rows[chunk]], entries[here])
            place = slices_to_index(target[here], entries[here])
            gap[place], count[place] = cells.gap[source], cells.count[source]
        return decode(gap, count, entries, self.n_genes)

    def _positions(self, indices: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and wanted.size):
            raise ValueError(
                f"cell indices: got {wanted.dtype} of shape {wanted.shape}, need a list of integers"
            )
        wanted = wanted.astype(np.int64)
        outside = wanted[(wanted < 0) | (wanted >= self.n_cells)]
        if len(outside):
            raise IndexError(f"cell {outside[0]}: the store has cells 0 to {self.n_cells - 1}")
        return wanted
