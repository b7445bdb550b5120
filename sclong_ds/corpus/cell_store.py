"""Cells on disk: the format of a cell store, and `CellStore`, which reads one.

A cell store, written by `sclong_ds.corpus.cell_writer`, is a Zarr v3 group (`cells.zarr`) that any
Zarr library reads; data preparation uses one per dataset while it collects cells, and a finished
corpus holds one. Two 1-D uint8 arrays, `gap` and `count`, hold the cells in the byte code of
`sclong_ds.corpus.byte_code`; they share one grid of chunks, grouped into shards. A chunk holds
whole cells and is padded with zeros to its end, so one chunk is the unit of reading, decoding and
shuffling. The inner codecs are zstd (or none) and crc32c. The rest are small tables, stored as one
uncompressed little-endian chunk each (`NAME/c/0` can be memory-mapped as it is):

    chunk_rows    (chunks + 1,) int64 first cell of each chunk
    gap_crc32c    (chunks,) uint32    CRC-32C of the stored bytes of each chunk of `gap`, without
    count_crc32c  (chunks,) uint32    the checksum at their end; 0 for a chunk that is not written
    row_entries   (cells,) uint32     entries of the cell in `gap` and `count`
    row_nnz       (cells,) uint32     genes with a count
    row_total     (cells,) int64      sum of the counts
    others        (cells,)            what the writer was given, for instance source_row

A chunk's own checksum tells that its bytes are sound, the tables that it is the chunk that belongs
to this store, stream and place: each chunk read is compared with both. Version 1 has no such
tables.

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

import errno
import threading
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from sclong_ds.annotations.columns import Rows, positions
from sclong_ds.corpus.byte_code import PackedCells, decode, slices_to_index
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import DamagedShard, ShardedArray, read_metadata
from sclong_ds.files.atomic import read_file
from sclong_ds.files.versions import refuse_later

CELLS_FORMAT = "sclong_ds-cells"
CELLS_VERSION = 2
"""Written; version 1 is read as well."""
STREAMS = ("gap", "count")
CHUNK_TABLES = ("chunk_rows", "gap_crc32c", "count_crc32c")
ROW_TABLES = ("row_entries", "row_nnz", "row_total")
OWN_TABLES = CHUNK_TABLES + ROW_TABLES
"""The store's own tables; a writer may be given more."""
_MISSING = "the file is missing"
_NUMBERS = ("n_cells", "n_genes", "n_values", "chunk_entries")
# A map keeps its file open: finalize would run out with 1,000 stores of up to 200,000 cells.
_MAPPED_BYTES, _MAPPED_CHUNK_BYTES = 2**20, 2**16


class DamagedChunk(ValueError):
    """A chunk of cells whose shard file is missing, cut, changed or unreadable on the disk."""

    def __init__(
        self, reason: str, *, chunk: int, path: str, first_cell: int, last_cell: int
    ) -> None:
        """Name the damage.

        Args:
            reason: What is wrong.
            chunk: Number of the chunk.
            path: Path or URL of the file.
            first_cell: First cell of the chunk.
            last_cell: Last cell of the chunk.
        """
        super().__init__(
            f"{path}: chunk {chunk} (cells {first_cell} to {last_cell}) is damaged: {reason}; "
            "restore the file, or convert and finalize again, or compact where the corpus has "
            "parts (python -m data_prep verify CORPUS lists all damage)"
        )
        self.reason, self.chunk, self.path = reason, chunk, path
        self.first_cell, self.last_cell = first_cell, last_cell

    @property
    def missing(self) -> bool:
        """Whether the file is not there at all."""
        return self.reason == _MISSING

    def __reduce__(self) -> tuple[Callable[[], DamagedChunk], tuple[()]]:
        """Pickle with all attributes, for instance on the way out of a worker process."""
        place = {"first_cell": self.first_cell, "last_cell": self.last_cell}
        return partial(DamagedChunk, self.reason, chunk=self.chunk, path=self.path, **place), ()


class CellStore:
    """A cell store; opening it reads no cells, so every process can. Safe for threads and forks."""

    def __init__(self, path: str | Path | Location) -> None:
        """Open a store.

        Args:
            path: Its folder: a path, an fsspec URL, or a Location.

        Raises:
            FileNotFoundError: No such store.
            ValueError: Another format or version.
        """
        self.location = path if isinstance(path, Location) else Location(path)
        try:
            about = read_metadata(self.location)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.location}: no cell store here ({self.location}/zarr.json is missing)"
            ) from None
        attributes = about.get("attributes") or {}
        found = attributes.get("format"), attributes.get("version")
        if found[0] == CELLS_FORMAT:
            refuse_later(found[1], newest=CELLS_VERSION, what=CELLS_FORMAT, where=self.location)
        if found not in [(CELLS_FORMAT, version) for version in range(1, CELLS_VERSION + 1)]:
            raise ValueError(
                f"{self.location}: format {found[0]} version {found[1]}, this program reads "
                f"{CELLS_FORMAT} version 1 to {CELLS_VERSION}"
            )
        wrong = [name for name in _NUMBERS if type(attributes.get(name)) is not int]
        if wrong:
            raise ValueError(
                f"{self.location}/zarr.json: damaged (no whole number {', '.join(wrong)}); "
                "restore the file or write the store again"
            )
        self.version: int = attributes["version"]
        """Version of the format."""
        self.n_cells: int = attributes["n_cells"]
        self.n_genes: int = attributes["n_genes"]
        self.n_values: int = attributes["n_values"]
        self.chunk_entries: int = attributes["chunk_entries"]
        self._last: tuple[int, PackedCells] | None = None

    def __reduce__(self) -> tuple[type[CellStore], tuple[Location]]:
        """Pickle as a place, so that spawned workers map the tables instead of receiving copies."""
        return CellStore, (self.location,)

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.n_cells

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the row tables beyond the store's own."""
        names = set(self.location.names()) - {*STREAMS, *OWN_TABLES}
        return tuple(sorted(n for n in names if self.location.exists(f"{n}/zarr.json")))

    @property
    def _own_tables(self) -> tuple[str, ...]:
        return OWN_TABLES if self.version > 1 else (CHUNK_TABLES[0], *ROW_TABLES)

    def file_names(self) -> list[str]:
        """Return the sorted names of all files that the store consists of, by its own description.

        Raises:
            ValueError: Its description is damaged.
        """
        names = ["zarr.json"]
        for name in (*self._own_tables, *self.tables):
            names += [f"{name}/zarr.json", *([f"{name}/c/0"] if len(self.table(name)) else [])]
        for name, stream, checksums in zip(STREAMS, self._streams, self._checksums, strict=True):
            chunks = range(len(stream)) if checksums is None else np.flatnonzero(checksums)
            shards = {stream.shard_name(int(chunk)) for chunk in chunks}
            if checksums is None:
                # A shard of zeros only is not written.
                shards = {shard for shard in shards if stream.location.exists(shard)}
            names += [f"{name}/zarr.json", *(f"{name}/{shard}" for shard in shards)]
        return sorted(names)

    def table(self, name: str) -> NDArray[Any]:
        """Return a table, read-only; a large one as a memory map that processes share.

        Raises:
            ValueError: No such table, or its file has another size than its shape says.
        """
        folder = self.location / name
        try:
            if name in STREAMS:
                raise FileNotFoundError
            about = read_metadata(folder)
        except FileNotFoundError:
            tables = (*self._own_tables, *self.tables)
            if name in tables:
                raise ValueError(
                    f"{folder}/zarr.json: missing; restore the file or write the store again"
                ) from None
            raise ValueError(
                f"{self.location}: no table '{name}'; there are {', '.join(tables)}"
            ) from None
        try:
            (length,), dtype = about["shape"], np.dtype(about["data_type"]).newbyteorder("<")
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}/zarr.json: damaged ({type(error).__name__}: {error}); restore the file "
                "or write the store again"
            ) from None
        if name not in CHUNK_TABLES and length != self.n_cells:
            raise ValueError(
                f"{folder}/zarr.json: damaged ({length} rows, the store has {self.n_cells} cells); "
                "restore the file or write the store again"
            )
        if length == 0:
            return np.empty(0, dtype)
        problem = ValueError(
            f"{folder}/c/0: missing or cut; restore the file or write the store again"
        )
        try:
            file = folder.local_path("c/0")
            size = file.stat().st_size
        except FileNotFoundError:
            raise problem from None
        if size != length * dtype.itemsize:
            raise problem
        if size < (_MAPPED_CHUNK_BYTES if name in CHUNK_TABLES else _MAPPED_BYTES):
            return np.frombuffer(read_file(file), dtype)
        # As a plain array: slices of np.memmap itself take ten times as long.
        return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(length,)))

    def rows_of(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return chosen rows of a table.

        Args:
            name: A table of the rows.
            rows: (cells,) positions.

        Raises:
            ValueError: As for `table`.
        """
        return self.table(name)[rows]

    @cached_property
    def chunk_rows(self) -> NDArray[np.int64]:
        """(chunks + 1,) first cell of each chunk."""
        # Who asks for it reads cells, which takes all of these.
        needed = [f"{table}/{file}" for table in self._own_tables for file in ("zarr.json", "c/0")]
        self.location.fetch([*needed, *(f"{stream}/zarr.json" for stream in STREAMS)])
        rows = self.table("chunk_rows")
        ends = (int(rows[0]), int(rows[-1])) if len(rows) else None
        if ends != (0, self.n_cells) or (np.diff(rows) < 0).any():
            raise ValueError(
                f"{self.location}/chunk_rows/c/0: damaged (not the first cells of chunks of "
                f"{self.n_cells} cells); restore the file or write the store again"
            )
        return rows

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
    def _streams(self) -> tuple[ShardedArray, ...]:
        sized = self.location.is_local or self.version == 1
        streams = tuple(ShardedArray(self.location / n, checks_size=sized) for n in STREAMS)
        for stream in streams:
            size = stream.chunk_entries
            if (size, len(stream)) != (self.chunk_entries, len(self.chunk_rows) - 1):
                raise ValueError(
                    f"{stream.location}: {len(stream)} chunks of {size} bytes, the store has "
                    f"{len(self.chunk_rows) - 1} of {self.chunk_entries}; restore its files or "
                    "write the store again"
                )
        return streams

    @cached_property
    def _checksums(self) -> tuple[NDArray[np.uint32] | None, ...]:
        """Per stream (chunks,) checksum of each chunk; None for version 1."""
        if self.version == 1:
            return (None,) * len(STREAMS)
        tables = tuple(self.table(f"{name}_crc32c") for name in STREAMS)
        for name, table in zip(STREAMS, tables, strict=True):
            if len(table) != len(self.chunk_rows) - 1:
                raise ValueError(
                    f"{self.location}/{name}_crc32c: {len(table)} checksums of "
                    f"{len(self.chunk_rows) - 1} chunks; restore the file or write the store again"
                )
        return tables

    def check_shards(self, *, chunks: bool = False) -> None:
        """Look whether all shards are there, and as long as their indices say.

        A store of version 1 does not tell which shards it has.

        Args:
            chunks: Compare every chunk with its checksum, too, which reads all of them.

        Raises:
            ValueError: One is missing, cut or changed, or the store's metadata are damaged.
            OSError: One cannot be read for another reason.
        """
        for stream, checksums in zip(self._streams, self._checksums, strict=True):
            if checksums is None:
                continue
            for chunk in np.flatnonzero(checksums).tolist():
                path = f"{stream.location}/{stream.shard_name(chunk)}"
                cure = "restore the file or write the store again"
                try:
                    stream.check(chunk, crc32c=int(checksums[chunk]) if chunks else None)
                except FileNotFoundError:
                    raise ValueError(f"{path}: missing; {cure}") from None
                except DamagedShard as error:
                    raise ValueError(f"{path}: damaged ({error}); {cure}") from None

    def has_read(self) -> tuple[int, int]:
        """Return bytes of cells that this object has read, and requests to a server for them."""
        return (
            sum(stream.read_bytes for stream in self._streams),
            sum(stream.location.requests for stream in self._streams),
        )

    def read_packed(
        self, chunk: int, *, out: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    ) -> PackedCells:
        """Return the cells of one chunk in the byte code of `sclong_ds.corpus.byte_code`.

        Args:
            chunk: Number of the chunk.
            out: Two contiguous buffers of at least chunk_entries bytes, whose first chunk_entries
                bytes are overwritten; gap and count of the result are views of them.

        Raises:
            DamagedChunk: The chunk is damaged.
            OSError: It cannot be read for another reason (permission, network, ...).
            IndexError: No such chunk.
            ValueError: A buffer is too small, or the store's metadata are damaged.
        """
        n_chunks, size = len(self.chunk_rows) - 1, self.chunk_entries
        if not 0 <= chunk < n_chunks:
            raise IndexError(f"chunk {chunk}: the store has chunks 0 to {n_chunks - 1}")
        own = out is None
        if out is None:
            out = np.empty(size, np.uint8), np.empty(size, np.uint8)
        elif min(len(buffer) for buffer in out) < size:
            raise ValueError(
                f"buffers of {len(out[0])} and {len(out[1])} bytes: a chunk needs {size} each"
            )
        rows = slice(int(self.chunk_rows[chunk]), int(self.chunk_rows[chunk + 1]))
        entries = np.array(self.row_entries[rows])
        used = int(entries.sum(dtype=np.int64))
        if used > size:
            raise self._damaged(
                f"{used} entries in a chunk of {size}", chunk, f"{self.location}/row_entries/c/0"
            )
        if used:
            self._read_streams(chunk, [buffer[:size] for buffer in out])
        gap, count = (buffer[:used] for buffer in out)
        if own and used < size // 2:
            # A view would keep the whole buffer: a thousand small stores are a thousand of them.
            gap, count = gap.copy(), count.copy()
        return PackedCells(
            gap,
            count,
            entries,
            np.array(self.row_nnz[rows]),
            np.array(self.row_total[rows]),
        )

    def _read_streams(self, chunk: int, buffers: list[NDArray[np.uint8]]) -> None:
        """Read a chunk of both streams; of a remote store at the same time."""
        if self.location.is_local:
            for number, buffer in enumerate(buffers):
                self._read_stream(number, chunk, buffer)
            return
        failures: list[Exception] = []

        def read_other() -> None:
            try:
                self._read_stream(1, chunk, buffers[1])
            except Exception as error:  # noqa: BLE001
                # Whatever it is: who waits for the chunk must learn of it.
                failures.append(error)

        _ = self._streams, self._checksums  # opened by one thread
        # A daemon: a process can end while a server does not answer.
        other = threading.Thread(target=read_other, name="cells-read-count", daemon=True)
        other.start()
        try:
            self._read_stream(0, chunk, buffers[0])
        finally:
            # It writes to the buffer until it ends.
            other.join()
        if failures:
            raise failures[0]

    def _read_stream(self, number: int, chunk: int, buffer: NDArray[np.uint8]) -> None:
        stream, checksums = self._streams[number], self._checksums[number]
        path = f"{stream.location}/{stream.shard_name(chunk)}"
        try:
            crc32c = None if checksums is None else int(checksums[chunk])
            stream.read(chunk, out=buffer, crc32c=crc32c)
        except FileNotFoundError:
            raise self._damaged(_MISSING, chunk, path) from None
        except DamagedShard as error:
            raise self._damaged(str(error), chunk, path) from None
        except OSError as error:
            if error.errno == errno.EIO and stream.location.is_local:
                raise self._damaged(f"the disk cannot read it ({error})", chunk, path) from None
            # Permissions, network, descriptors: the cells may be sound.
            text = error.strerror or str(error)
            if path in text:
                raise
            text = f"{path}: cells cannot be read: {text}"
            raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error

    def _damaged(self, reason: str, chunk: int, path: str) -> DamagedChunk:
        first, last = self._bounds(chunk)
        return DamagedChunk(reason, chunk=chunk, path=path, first_cell=first, last_cell=last)

    def _bounds(self, chunk: int) -> tuple[int, int]:
        """Return the first and the last cell of a chunk."""
        return int(self.chunk_rows[chunk]), int(self.chunk_rows[chunk + 1]) - 1

    def read_chunk(self, chunk: int) -> csr_matrix:
        """Return the cells of one chunk as (cells, n_genes) CSR of uint32 counts."""
        cells = self.read_packed(chunk)
        return decode(cells.gap, cells.count, cells.row_entries, self.n_genes)

    def rows(self, indices: Rows) -> csr_matrix:
        """Return chosen cells as counts; as `packed_rows`.

        Args:
            indices: (cells,) positions, in any order, repeats allowed; or a slice.

        Returns:
            (cells, n_genes) CSR of uint32 counts, in the order given.
        """
        cells = self.packed_rows(indices)
        return decode(cells.gap, cells.count, cells.row_entries, self.n_genes)

    def packed_rows(self, indices: Rows) -> PackedCells:
        """Return chosen cells; each chunk is read once, the last one is kept for the next call.

        Args:
            indices: (cells,) positions, in any order, repeats allowed; or a slice.

        Returns:
            The cells in the byte code of `sclong_ds.corpus.byte_code`, in the order given.

        Raises:
            ValueError: Not a list of whole numbers, nor a slice.
            IndexError: A position outside the store.
            DamagedChunk: A chunk with one of the cells is damaged.
        """
        wanted = self._positions(indices)
        row_entries = self.row_entries[wanted]
        entries = row_entries.astype(np.int64)
        target = np.cumsum(entries) - entries
        gap, count = np.empty(int(entries.sum()), np.uint8), np.empty(int(entries.sum()), np.uint8)
        chunks = np.searchsorted(self.chunk_rows, wanted, side="right") - 1
        order = np.argsort(chunks, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1):
            if not len(here):  # no cells at all
                break
            chunk = int(chunks[here[0]])
            # Another thread may change what is kept at any moment.
            last = self._last
            if last is None or last[0] != chunk:
                self._last = last = chunk, self.read_packed(chunk)
            cells = last[1]
            starts = np.cumsum(cells.row_entries, dtype=np.int64) - cells.row_entries
            source = slices_to_index(starts[wanted[here] - self.chunk_rows[chunk]], entries[here])
            place = slices_to_index(target[here], entries[here])
            gap[place], count[place] = cells.gap[source], cells.count[source]
        return PackedCells(gap, count, row_entries, self.row_nnz[wanted], self.row_total[wanted])

    def _positions(self, indices: Rows) -> NDArray[np.int64]:
        if indices is None:
            raise ValueError("cells: got None; give their positions, or slice(None) for all")
        return np.asarray(positions(indices, self.n_cells), dtype=np.int64)
