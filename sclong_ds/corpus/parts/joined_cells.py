"""The cells of several stores as those of one: `JoinedCells`.

The cells stand split after split, and within a split part after part, so that the cells of a split
follow each other whatever the parts. Chunks never straddle a split, so every chunk of the whole is
one of a part, and the order of the chunks is that of the cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

from sclong_ds.annotations.columns import Rows
from sclong_ds.corpus.byte_code import PackedCells, slices_to_index
from sclong_ds.corpus.cell_store import CHUNK_TABLES, ROW_TABLES, CellStore, DamagedChunk
from sclong_ds.corpus.location import Location

DATASET = "dataset"
"""The table whose numbers count from the first dataset of a part."""


class JoinedCells(CellStore):
    """Cell stores as one; opening it reads no cells. Safe for threads and forks."""

    def __init__(
        self,
        location: Location,
        stores: Sequence[CellStore],
        *,
        splits: Sequence[Mapping[str, range]],
        n_datasets: Sequence[int],
    ) -> None:
        """Join stores.

        Args:
            location: The corpus folder.
            stores: At least one, with chunks of the same size.
            splits: Of each store its splits, in order, all of them with the same names.
            n_datasets: Of each store the number of its datasets.

        Raises:
            ValueError: Stores that do not go together.
        """
        for name in ("n_genes", "chunk_entries"):
            found = sorted({getattr(store, name) for store in stores})
            if len(found) > 1:
                raise ValueError(f"{location}: parts of different {name}: {found}")
        self.location, self._stores, self._splits = location, tuple(stores), tuple(splits)
        self._n_datasets = tuple(n_datasets)
        self.version = min(store.version for store in stores)
        self.n_cells = sum(store.n_cells for store in stores)
        self.n_values = sum(store.n_values for store in stores)
        self.n_genes, self.chunk_entries = stores[0].n_genes, stores[0].chunk_entries
        self._last = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as places, so that spawned workers map the tables instead of receiving copies."""
        arguments = self.location, self._stores, self._splits, self._n_datasets
        return _joined_again, arguments

    @cached_property
    def _segments(self) -> NDArray[np.int64]:
        """(segments, 4) part, its first chunk, its first row, and the rows; in order."""
        found = []
        for name in self._splits[0]:
            for part, (store, splits) in enumerate(zip(self._stores, self._splits, strict=True)):
                rows = splits[name]
                first = int(np.searchsorted(store.chunk_rows, rows.start))
                if len(rows):
                    found.append((part, first, rows.start, len(rows)))
        return np.array(found, np.int64).reshape(-1, 4)

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """(segments + 1,) first cell of each segment."""
        return np.concatenate(([0], np.cumsum(self._segments[:, 3])))

    @cached_property
    def _borders(self) -> list[NDArray[np.int64]]:
        """Of each segment (chunks + 1,) the borders of its chunks in its store."""
        found = []
        for part, first, row, n_rows in self._segments.tolist():
            rows = self._stores[part].chunk_rows
            last = int(np.searchsorted(rows, row + n_rows))
            found.append(np.asarray(rows[first : last + 1]))
        return found

    @cached_property
    def _chunks(self) -> NDArray[np.int64]:
        """(segments + 1,) first chunk of each segment."""
        return np.cumsum([0, *(len(borders) - 1 for borders in self._borders)])

    @cached_property
    def chunk_rows(self) -> NDArray[np.int64]:
        """(chunks + 1,) first cell of each chunk."""
        parts = [
            borders[:-1] - borders[0] + first
            for borders, first in zip(self._borders, self._firsts[:-1], strict=True)
        ]
        return np.concatenate([*parts, [self.n_cells]]).astype(np.int64)

    def by_part(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.int64]]]:
        """Yield for each part that has some of the cells: which of them, and their rows there.

        Args:
            rows: (cells,) positions.
        """
        segment = np.searchsorted(self._firsts, rows, side="right") - 1
        part, _, first, _ = self._segments[segment].T
        inside = rows - self._firsts[segment] + first
        for number in np.flatnonzero(np.bincount(part)).tolist():
            here = np.flatnonzero(part == number)
            yield number, here, inside[here]

    def rows_of(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return chosen rows of a table; no more of the parts' tables is read.

        Args:
            name: A table of the rows.
            rows: (cells,) positions.

        Raises:
            ValueError: No such table, or its file has another size than its shape says.
        """
        firsts = np.cumsum([0, *self._n_datasets]) if name == DATASET else None
        found = np.empty(len(rows), self._stores[0].table(name).dtype)
        for part, here, inside in self.by_part(rows):
            found[here] = self._stores[part].table(name)[inside]
            if firsts is not None:
                found[here] += firsts[part].astype(found.dtype)
        return found

    def table(self, name: str) -> NDArray[Any]:
        """Return a table, read-only; it is put together in memory.

        Raises:
            ValueError: No such table, or its file has another size than its shape says.
        """
        if name in CHUNK_TABLES:
            raise ValueError(f"{self.location}: '{name}' is a table of the chunks of one part")
        tables = [store.table(name) for store in self._stores]
        if name == DATASET:
            firsts = np.cumsum([0, *self._n_datasets]).astype(tables[0].dtype)
            tables = [table + first for table, first in zip(tables, firsts[:-1], strict=True)]
        return np.concatenate(
            [tables[part][row : row + n] for part, _, row, n in self._segments.tolist()]
            or [tables[0][:0]]
        )

    def largest_dataset(self) -> int:
        """Return the largest number of a cell's dataset; no table is put together."""
        firsts = np.cumsum([0, *self._n_datasets])[:-1].tolist()
        found = [
            int(store.table(DATASET).max()) + first
            for store, first in zip(self._stores, firsts, strict=True)
            if len(store)
        ]
        return max(found, default=-1)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the row tables beyond the store's own, those that all parts have."""
        return tuple(sorted(set.intersection(*({*store.tables} for store in self._stores))))

    def file_names(self) -> list[str]:
        """Return the names of all files of all parts, each inside its own part."""
        return [name for store in self._stores for name in store.file_names()]

    def has_read(self) -> tuple[int, int]:
        """Return bytes of cells that this object has read, and requests to a server for them."""
        read = [store.has_read() for store in self._stores]
        return sum(n_bytes for n_bytes, _ in read), sum(requests for _, requests in read)

    def read_packed(
        self, chunk: int, *, out: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    ) -> PackedCells:
        """Return the cells of one chunk, as `CellStore.read_packed`.

        Raises:
            DamagedChunk: The chunk is damaged; it names the part's file, and the cells here.
            IndexError: No such chunk.
        """
        n_chunks = len(self.chunk_rows) - 1
        if not 0 <= chunk < n_chunks:
            raise IndexError(f"chunk {chunk}: the store has chunks 0 to {n_chunks - 1}")
        segment = int(np.searchsorted(self._chunks, chunk, side="right")) - 1
        part, first = self._segments[segment, :2].tolist()
        store = self._stores[part]
        with self._numbered_here(part):
            return store.read_packed(first + chunk - int(self._chunks[segment]), out=out)

    @contextmanager
    def _numbered_here(self, part: int) -> Iterator[None]:
        """Give a damaged chunk of a part the number, and its cells the places, that they have here.

        Args:
            part: Number of the part that is read.
        """
        try:
            yield
        except DamagedChunk as error:
            segments = enumerate(zip(self._segments.tolist(), np.diff(self._chunks), strict=True))
            chunk = next(
                int(self._chunks[number]) + error.chunk - first
                for number, ((of_part, first, _, _), n_chunks) in segments
                if of_part == part and first <= error.chunk < first + n_chunks
            )
            rows = self.chunk_rows[chunk : chunk + 2].tolist()
            raise DamagedChunk(
                error.reason, chunk=chunk, path=error.path, first_cell=rows[0],
                last_cell=rows[1] - 1,
            ) from error  # fmt: skip

    def packed_rows(self, indices: Rows) -> PackedCells:
        """Return chosen cells, as `CellStore.packed_rows`; row tables of parts stay on the disk."""
        wanted = self._positions(indices)
        found = []
        for part, here, rows in self.by_part(wanted):
            with self._numbered_here(part):
                found.append((here, self._stores[part].packed_rows(rows)))
        if not found:
            return self._stores[0].packed_rows(wanted)
        back = np.argsort(np.concatenate([here for here, _ in found]), kind="stable")
        gap, count, *tables = (
            np.concatenate([getattr(cells, name) for _, cells in found])
            for name in ("gap", "count", *ROW_TABLES)
        )
        entries = tables[0].astype(np.int64)
        source = slices_to_index((np.cumsum(entries) - entries)[back], entries[back])
        return PackedCells(gap[source], count[source], *(table[back] for table in tables))


class JoinedTable(NDArrayOperatorsMixin):
    """A row table of several stores, like a read-only array; a piece of it is read when asked for.

    48 million cells put together take 190 MB in each process; the files of the parts are mapped,
    and all processes of a machine share them. What an array has otherwise, as `sum` or `tolist`,
    puts it together.
    """

    def __init__(self, cells: JoinedCells, name: str) -> None:
        """Read nothing.

        Args:
            cells: The stores.
            name: A table of their rows.
        """
        self._cells, self._name = cells, name
        self.shape, self.ndim, self.size = (len(cells),), 1, len(cells)

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.size

    def __getitem__(self, rows: Any) -> Any:
        """Return the values of some cells, a new array; of one cell, its value."""
        if isinstance(rows, slice):
            wanted = np.arange(*rows.indices(self.size))
        else:
            wanted = np.asarray(rows)
            if wanted.dtype == bool:
                if wanted.shape != self.shape:
                    raise IndexError(f"a mask of shape {wanted.shape} for {self.size} cells")
                wanted = np.flatnonzero(wanted)
            wanted = wanted.astype(np.int64)
        wanted = np.where(wanted < 0, wanted + self.size, wanted)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.size:
            raise IndexError(f"a cell outside 0 to {self.size - 1}")
        found = self._cells.rows_of(self._name, wanted.ravel()).reshape(wanted.shape)
        return found if found.ndim else found[()]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the whole table."""
        if copy is False:
            raise ValueError("a table of several parts is put together in new memory")
        return np.asarray(self._cells.table(self._name), dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Calculate with the whole table."""
        arrays = (np.asarray(i) if isinstance(i, JoinedTable) else i for i in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        """Return what an array has by that name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


def dataset_codes(cells: CellStore) -> tuple[NDArray[np.uint32], int]:
    """Return (cells,) the dataset of each cell, and the largest of these numbers, -1 without cells.

    Args:
        cells: A store; of a joined one what is returned is a `JoinedTable`.
    """
    if not isinstance(cells, JoinedCells):
        codes = cells.table(DATASET)
        return codes, int(codes.max()) if len(codes) else -1
    return cast("NDArray[np.uint32]", JoinedTable(cells, DATASET)), cells.largest_dataset()


def _joined_again(
    location: Location,
    stores: Sequence[CellStore],
    splits: Sequence[Mapping[str, range]],
    n_datasets: Sequence[int],
) -> JoinedCells:
    return JoinedCells(location, stores, splits=splits, n_datasets=n_datasets)
