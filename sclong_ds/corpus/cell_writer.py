"""Writes a cell store, the format that `sclong_ds.corpus.cell_store` describes.

    with CellWriter("cells.zarr", n_genes=27_874) as writer:
        writer.append(counts, source={"source_row": rows})

Reads and writes a temporary folder beside the store, which gets its name when it is whole. Each
shard is read back from there, which garbled bytes do not survive, and gives the tables of chunk
checksums.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import google_crc32c
import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, ZstdCodec

from sclong_ds.corpus.byte_code import PackedCells, encode
from sclong_ds.corpus.cell_store import (
    CELLS_FORMAT,
    CELLS_VERSION,
    CHUNK_TABLES,
    ROW_TABLES,
    STREAMS,
    CellStore,
)
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import DamagedShard, ShardedArray
from sclong_ds.files.atomic import (
    files_below,
    link_or_copy,
    partial_name,
    sync_folder,
    sync_tree,
)
from sclong_ds.files.checksums import file_crc32c

CHUNK_ENTRIES = 2**19
CHUNKS_PER_SHARD = 32
_GARBLED = "does not hold what was written; the disk or the memory is at fault, run this elsewhere"


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
            raise FileExistsError(f"{self.path}: exists already; remove it or choose another name")
        self.n_genes, self.codec, self.chunk_entries = n_genes, codec, chunk_entries
        self._store = partial_name(self.path)
        """What becomes `path`."""
        self._shape = (2, chunks_per_shard, chunk_entries)
        # Pages of zeros that are never written to cost nothing: most datasets are small.
        self._shard = np.zeros(self._shape, np.uint8)
        self._shards_written = self._chunk = 0
        """Whole shards on disk, and chunk of the shard that is being filled."""
        self._fill = 0
        """Entries in that chunk."""
        self._chunk_rows = [0]
        self._crc32c: list[list[int]] = [[], []]
        """Per stream the checksum of each chunk written."""
        self._n_rows = self._n_values = 0
        self._tables: dict[str, np.dtype] = {}
        self._table_crc32c: dict[str, int] = {}
        self._store.mkdir(parents=True)
        self._group = zarr.create_group(self._store, attributes={})
        for name in STREAMS:
            self._create_stream(name)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the store, or remove what was written when the block failed."""
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._store, ignore_errors=True)

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
        columns: dict[str, NDArray[Any]] = {name: getattr(cells, name) for name in ROW_TABLES}
        columns |= {name: np.asarray(values) for name, values in (source or {}).items()}
        if len(cells.row_entries) == 0:
            if source and not self._tables:
                # A store without cells has their tables, too.
                self._append_tables(columns, 0)
            return
        ends = np.cumsum(cells.row_entries, dtype=np.int64)
        largest = int(cells.row_entries.max())
        if largest > self.chunk_entries:
            raise ValueError(
                f"a cell of {largest} entries does not fit a chunk of {self.chunk_entries}: "
                "raise chunk_entries"
            )
        self._append_tables(columns, len(ends))
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

    def adopt(self, path: str | Path) -> None:
        """Add all cells of a finished store, its chunks and shards as they are.

        The shards are linked, or copied where the file system has no links: the store stays. What
        was added before must end with a whole shard.

        Args:
            path: A store of the same genes, sizes and tables.

        Raises:
            ValueError: It does not fit, or the last shard is not full.
        """
        store, per_shard = CellStore(path), self._shape[1]
        if (store.n_genes, store.chunk_entries) != (self.n_genes, self.chunk_entries):
            raise ValueError(f"{path}: {store.n_genes} genes in chunks of {store.chunk_entries}")
        if self._chunk_rows[-1] != self._n_rows or len(self._crc32c[0]) % per_shard or self._chunk:
            raise ValueError(f"{path}: the cells before it end within a shard")
        names = (*ROW_TABLES, *store.tables)
        self._append_tables({name: store.table(name) for name in names}, len(store))
        n_chunks = len(store.chunk_rows) - 1
        n_shards = -(-n_chunks // per_shard)
        for stream, name in enumerate(STREAMS):
            folder = self._store / name / "c"
            folder.mkdir(exist_ok=True)
            for shard in range(n_shards):
                source = Path(path) / name / "c" / str(shard)
                # A shard of zeros only is not written.
                if source.exists():
                    link_or_copy(source, folder / str(self._shards_written + shard))
            self._crc32c[stream] += store.table(f"{name}_crc32c").tolist()
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            array.resize((len(self._crc32c[stream]) * self.chunk_entries,))
        self._chunk_rows += (store.chunk_rows[1:] + self._n_rows).tolist()
        self._n_rows, self._n_values = self._n_rows + len(store), self._n_values + store.n_values
        self._shards_written += n_shards

    @property
    def n_rows(self) -> int:
        """Number of cells so far."""
        return self._n_rows

    def _check_tables(self) -> None:
        """Read the row tables back; raises ValueError where one is not what was written."""
        for name, crc32c in self._table_crc32c.items():
            if self._n_rows and file_crc32c(self._store / name / "c" / "0") != crc32c:
                raise ValueError(f"{self._store / name}: {_GARBLED}")

    def _read_back(self, name: str, first: int = 0) -> list[int]:
        """Return the checksums of the stored chunks of a stream, each compared with its bytes."""
        stream = ShardedArray(Location(self._store / name))
        chunks = range(first, len(stream))
        # A shard of zeros only is not written.
        files = {name: stream.location.exists(name) for name in map(stream.shard_name, chunks)}
        try:
            return [stream.crc32c(c) if files[stream.shard_name(c)] else 0 for c in chunks]
        except DamagedShard as error:
            raise ValueError(f"{stream.location}: {_GARBLED} ({error})") from None

    def _remove_all_but(self, names: Iterable[str]) -> None:
        """Remove every file that is not named."""
        keep = {self._store / name for name in names}
        for path in files_below(self._store):
            if path not in keep:
                path.unlink()

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
            folder = self._store / name / "c"
            folder.mkdir(parents=True, exist_ok=True)
            content = np.ascontiguousarray(values, dtype=dtype).tobytes()
            with (folder / "0").open("ab") as file:
                file.write(content)
            before = self._table_crc32c.get(name, 0)
            self._table_crc32c[name] = google_crc32c.extend(before, content)

    def _write_shard(self) -> None:
        n_chunks, size = self._chunk, self._shard.shape[1] * self.chunk_entries
        start = self._shards_written * size
        stop = start + n_chunks * self.chunk_entries
        for stream, name in enumerate(STREAMS):
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            array.resize((stop,))
            array[start:stop] = self._shard[stream, :n_chunks].reshape(-1)
            found = self._read_back(name, start // self.chunk_entries)
            for chunk, crc32c in enumerate(found):
                if not crc32c and self._shard[stream, chunk].any():
                    raise ValueError(f"{self._store / name}: {_GARBLED}")
            self._crc32c[stream] += found
        self._shard = np.zeros(self._shape, np.uint8)
        self._shards_written, self._chunk = self._shards_written + 1, 0

    def _finish(self) -> None:
        self.end_chunk()
        if self._chunk:
            self._write_shard()
        if not self._tables:
            dtypes = zip(ROW_TABLES, ("<u4", "<u4", "<i8"), strict=True)
            self._tables = {name: np.dtype(dtype) for name, dtype in dtypes}
        self._check_tables()
        for name, dtype in self._tables.items():
            self._create_table(name, self._n_rows, dtype)
        contents = (np.array(self._chunk_rows, "<i8"), *(np.array(c, "<u4") for c in self._crc32c))
        for name, values in zip(CHUNK_TABLES, contents, strict=True):
            self._create_table(name, len(values), values.dtype)[:] = values
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
        self._remove_all_but(CellStore(self._store).file_names())
        sync_tree(self._store)
        os.rename(self._store, self.path)
        sync_folder(self.path.parent)

    def _create_stream(self, name: str) -> None:
        shard = self._shard[0].size
        compressors: list[BytesBytesCodec] = [Crc32cCodec()]
        if self.codec == "zstd":
            compressors.insert(0, ZstdCodec(level=1))
        self._group.create_array(
            name,
            shape=(0,),
            chunks=(self.chunk_entries,),
            shards=(shard,),
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
