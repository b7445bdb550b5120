"""Cells on disk: `CellWriter` writes a cell store, `CellStore` reads it.

A cell store is a Zarr v3 group (`cells.zarr`) that any Zarr library reads; data preparation uses
one per dataset while it collects cells, and a finished corpus holds one. Two 1-D uint8 arrays,
`gap` and `count`, hold the cells in the byte code of `sclong_ds.streams`; they share one grid of
chunks, grouped into shards. A chunk holds whole cells and is padded with zeros to its end, so one
chunk is the unit of reading, decoding and shuffling. The inner codecs are zstd (or none) and
crc32c. The rest are small tables, stored as one uncompressed little-endian chunk each (`NAME/c/0`
can be memory-mapped as it is):

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

import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, ZstdCodec

from sclong_ds.files import sync_tree
from sclong_ds.streams import PackedCells, decode, encode, slices_to_index

CELLS_FORMAT = "sclong_ds-cells"
CELLS_VERSION = 1
CHUNK_ENTRIES = 2**19
CHUNKS_PER_SHARD = 32
_OWN_TABLES = ("chunk_rows", "row_entries", "row_nnz", "row_total")


class CellWriter:
    """Writes a cell store; a context manager that leaves the finished store or nothing.

    Cells are kept in the order given. Memory is one shard (2 x chunk_entries x chunks_per_shard
    bytes).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_genes: int,
        codec: Literal["zstd", "none"] = "zstd",
        chunk_entries: int = CHUNK_ENTRIES,
        chunks_per_shard: int = CHUNKS_PER_SHARD,
    ) -> None:
        """Start a store in a temporary folder beside `path`.

        Args:
            path: Folder to create; it must not exist.
            n_genes: Number of columns of every matrix appended.
            codec: zstd (about half the bytes) or none (for fast local disks).
            chunk_entries: Entries of a chunk; about one entry per non-zero count.
            chunks_per_shard: Chunks in one file.

        Raises:
            ValueError: Unknown codec, or sizes below 1.
            FileExistsError: `path` exists.
        """
        if codec not in ("zstd", "none"):
            raise ValueError(f"codec '{codec}': allowed are zstd and none")
        if min(n_genes, chunk_entries, chunks_per_shard) < 1:
            raise ValueError(
                f"n_genes {n_genes}, chunk_entries {chunk_entries}, chunks_per_shard "
                f"{chunks_per_shard}: each must be at least 1"
            )
        self.path = Path(path)
        if self.path.exists():
            raise FileExistsError(
                f"{self.path}: exists already; remove it or choose another folder"
            )
        self.n_genes, self.codec, self.chunk_entries = n_genes, codec, chunk_entries
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        self._temporary.chmod(0o755)
        self._group = zarr.create_group(self._temporary, attributes={})
        self._streams = [self._create_stream(name, chunks_per_shard) for name in ("gap", "count")]
        self._shard = np.zeros((2, chunks_per_shard, chunk_entries), np.uint8)
        self._shards_written = 0
        self._chunk = 0
        """Chunk of the shard that is being filled."""
        self._fill = 0
        """Entries in that chunk."""
        self._chunk_rows = [0]
        self._n_rows = 0
        self._n_values = 0
        self._tables: dict[str, np.dtype] = {}

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the store, or remove what was written when the block failed."""
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, matrix: csr_matrix, *, source: Mapping[str, ArrayLike] | None = None) -> None:
        """Add cells.

        Args:
            matrix: (cells, n_genes) CSR of integer counts, column indices increasing in each row.
            source: Integer columns (cells,) of the row table, the same names in every call;
                `finalize` needs `source_row`, the row of the cell in its source file.

        Raises:
            ValueError: Another number of columns, counts that cannot be stored, or other columns
            than before.
        """
        if matrix.shape[1] != self.n_genes:
            raise ValueError(f"cells with {matrix.shape[1]} genes: this store has {self.n_genes}")
        self.append_packed(encode(matrix), source=source)

    def append_packed(
        self, cells: PackedCells, *, source: Mapping[str, ArrayLike] | None = None
    ) -> None:
        """Add cells that are encoded already; as `append`."""
        if len(cells.row_entries) == 0:
            return
        ends = np.cumsum(cells.row_entries, dtype=np.int64)
        largest = int(cells.row_entries.max())
        if largest > self.chunk_entries:
            raise ValueError(
                f"a cell of {largest} entries does not fit a chunk of {self.chunk_entries}: "
                "raise chunk_entries"
            )
        columns: dict[str, NDArray[Any]] = {
            name: np.asarray(values) for name, values in (source or {}).items()
        }
        own: dict[str, NDArray[Any]] = {
            "row_entries": cells.row_entries,
            "row_nnz": cells.row_nnz,
            "row_total": cells.row_total,
        }
        self._append_tables(own | columns, len(ends))
        row, done = 0, 0
        while row < len(ends):
            room = self.chunk_entries - self._fill
            stop = int(np.searchsorted(ends, done + room, side="right"))
            if stop == row:
                self.end_chunk()
                continue
            size = int(ends[stop - 1]) - done
            for stream, values in enumerate((cells.gap, cells.count)):
                self._shard[stream, self._chunk, self._fill : self._fill + size] = values[
                    done : done + size
                ]
            self._fill, self._n_rows = self._fill + size, self._n_rows + stop - row
            row, done = stop, done + size
        self._n_values += int(cells.row_nnz.sum(dtype=np.int64))

    def end_chunk(self) -> None:
        """Pad the current chunk, so that the next cell begins a new one."""
        if self._chunk_rows[-1] == self._n_rows:
            return
        self._chunk_rows.append(self._n_rows)
        self._chunk, self._fill = self._chunk + 1, 0
        if self._chunk == self._shard.shape[1]:
            self._write_shard()

    @property
    def n_rows(self) -> int:
        """Number of cells so far."""
        return self._n_rows

    def _append_tables(self, columns: Mapping[str, NDArray[Any]], n_rows: int) -> None:
        """Append to the files that become the row tables; no table is held in memory."""
        if self._tables and set(columns) != set(self._tables):
            raise ValueError(
                f"row columns {sorted(columns)}: the cells before had {sorted(self._tables)}"
            )
        for name, values in columns.items():
            if values.shape != (n_rows,) or values.dtype.kind not in "iu":
                raise ValueError(
                    f"row column '{name}': got {values.dtype}{values.shape}, "
                    f"need integers of shape ({n_rows},)"
                )
            dtype = self._tables.setdefault(name, values.dtype.newbyteorder("<"))
            if not np.can_cast(values.dtype, dtype, "equiv"):
                raise ValueError(
                    f"row column '{name}': got {values.dtype}, the cells before had {dtype}"
                )
            folder = self._temporary / name / "c"
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "0").open("ab") as file:
                file.write(np.ascontiguousarray(values, dtype=dtype).tobytes())

    def _write_shard(self) -> None:
        n_chunks, size = self._chunk, self._shard.shape[1] * self.chunk_entries
        start = self._shards_written * size
        stop = start + n_chunks * self.chunk_entries
        for stream, array in enumerate(self._streams):
            array.resize((stop,))
            array[start:stop] = self._shard[stream, :n_chunks].reshape(-1)
        self._shard[:] = 0
        self._shards_written, self._chunk = self._shards_written + 1, 0

    def _finish(self) -> None:
        self.end_chunk()
        if self._chunk:
            self._write_shard()
        if not self._tables:
            self._tables = {
                "row_entries": np.dtype("<u4"),
                "row_nnz": np.dtype("<u4"),
                "row_total": np.dtype("<i8"),
            }
        for name, dtype in self._tables.items():
            self._create_table(name, self._n_rows, dtype)
        self._create_table("chunk_rows", len(self._chunk_rows), np.dtype("<i8"))[:] = np.array(
            self._chunk_rows
        )
        self._group.update_attributes(
            {
                "format": CELLS_FORMAT,
                "version": CELLS_VERSION,
                "n_cells": self._n_rows,
                "n_genes": self.n_genes,
                "n_values": self._n_values,
                "chunk_entries": self.chunk_entries,
                "codec": self.codec,
            }
        )
        sync_tree(self._temporary)
        os.rename(self._temporary, self.path)

    def _create_stream(self, name: str, chunks_per_shard: int) -> zarr.Array:
        compressors: list[BytesBytesCodec] = [Crc32cCodec()]
        if self.codec == "zstd":
            compressors.insert(0, ZstdCodec(level=1))
        return self._group.create_array(
            name,
            shape=(0,),
            chunks=(self.chunk_entries,),
            shards=(self.chunk_entries * chunks_per_shard,),
            dtype="u1",
            compressors=compressors,
            fill_value=0,
        )

    def _create_table(self, name: str, length: int, dtype: np.dtype) -> zarr.Array:
        return self._group.create_array(
            name,
            shape=(length,),
            chunks=(max(length, 1),),
            dtype=dtype,
            compressors=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )


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
        if attributes.get("format") != CELLS_FORMAT or attributes.get("version") != CELLS_VERSION:
            raise ValueError(
                f"{self.path}: format {attributes.get('format')} version "
                f"{attributes.get('version')}, this program reads {CELLS_FORMAT} version "
                f"{CELLS_VERSION}"
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
        return tuple(sorted(set(self._group.array_keys()) - {"gap", "count", *_OWN_TABLES}))

    def table(self, name: str) -> NDArray[Any]:
        """Return a table as a read-only memory map.

        Raises:
            ValueError: No such table, or its file has another size than its shape says.
        """
        if name not in self._group:
            raise ValueError(
                f"{self.path}: no table '{name}'; there are "
                f"{', '.join((*_OWN_TABLES, *self.tables))}"
            )
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        dtype, file = np.dtype(array.dtype), self.path / name / "c" / "0"
        if array.shape[0] == 0:
            return np.empty(0, dtype)
        if not file.is_file() or file.stat().st_size != array.shape[0] * dtype.itemsize:
            raise ValueError(f"{file}: missing or cut; restore the file or write the store again")
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
        last = self._last
        if last is not None and last[0] == chunk:
            return last[1]
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
        cells = PackedCells(
            gap, count, entries, np.array(self.row_nnz[rows]), np.array(self.row_total[rows])
        )
        self._last = chunk, cells
        return cells

    def read_chunk(self, chunk: int) -> csr_matrix:
        """Return the cells of one chunk as (cells, n_genes) CSR of uint32 counts."""
        cells = self.read_packed(chunk)
        return decode(cells.gap, cells.count, cells.row_entries, self.n_genes)

    def rows(self, indices: ArrayLike) -> csr_matrix:
        """Return chosen cells; each chunk they lie in is read once.

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
            cells = self.read_packed(int(chunk))
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
