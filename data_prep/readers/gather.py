"""Rows of a matrix whose values are stored in any order, within bounded memory.

CSC matrices, Matrix Market files and tables with genes in rows hold the values of a cell far apart.
`gathered` reads such a matrix once, sorts runs of RUN_ENTRIES values into buckets of neighbouring
rows and puts the runs one after the other into a temporary file; a bucket then is one stretch of
each run. The file has no name, so that nothing is left of it however the process ends. Later passes
start from the file.
"""

from __future__ import annotations

import io
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.source.source import Entries, row_blocks

RUN_ENTRIES = 2**22
"""Values sorted at a time, about 0.25 GB; a matrix with no more never touches the disk."""
BUCKET_ENTRIES = 2**22
"""Values of the rows that are put together at a time, about 0.25 GB."""
_MOST_BUCKETS = 2**15


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Some values of the matrix, sorted by bucket, in the temporary file."""

    offset: int
    """First byte."""
    dtype: np.dtype[np.void]
    """Of a value: row in its bucket, column, value; narrow types, chosen run by run."""
    bucket_ptr: npt.NDArray[np.int64]
    """(buckets + 1,) first value of each bucket."""


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class _Spill:
    """All values of a matrix in runs."""

    file: IO[bytes]
    runs: list[_Run]
    bucket_rows: int
    """Rows of a bucket; the last may have fewer."""

    def records(self, bucket: int) -> Iterator[npt.NDArray[np.void]]:
        """Yield the values of one bucket, in the order in which they were read."""
        for run in self.runs:
            start, stop = (int(number) for number in run.bucket_ptr[bucket : bucket + 2])
            if stop > start:
                self.file.seek(run.offset + start * run.dtype.itemsize)
                data = self.file.read((stop - start) * run.dtype.itemsize)
                yield np.frombuffer(data, dtype=run.dtype)


def gathered(
    entries: Callable[[], Iterator[Entries]],
    *,
    shape: tuple[int, int],
    n_entries: int,
    scratch: Path | None,
) -> Callable[[], Iterator[sparse.csr_matrix]]:
    """Return what yields the row blocks of a matrix given as (row, column, value) triples.

    Args:
        entries: Reads the triples, in any order and in arrays of about BLOCK_ENTRIES; called once,
            by the first pass. Values of the same place stay apart.
        shape: Rows, columns.
        n_entries: Upper bound of the number of triples; decides the number of buckets.
        scratch: Folder for the temporary file (8 to 16 bytes a value); None: the system's.

    Returns:
        Function that starts a pass over consecutive row blocks. It raises ValueError if a triple
        lies outside the matrix.
    """
    kept: list[_Spill] = []

    def blocks() -> Iterator[sparse.csr_matrix]:
        if not kept:
            kept.append(_spill(entries(), shape=shape, n_entries=n_entries, scratch=scratch))
        spill = kept[0]
        for bucket, first in enumerate(range(0, shape[0], spill.bucket_rows)):
            n_rows = min(spill.bucket_rows, shape[0] - first)
            yield from _bucket_blocks(spill, bucket, n_rows=n_rows, n_columns=shape[1])

    return blocks


def _spill(
    entries: Iterator[Entries], *, shape: tuple[int, int], n_entries: int, scratch: Path | None
) -> _Spill:
    n_buckets = min(-(-n_entries // BUCKET_ENTRIES) or 1, _MOST_BUCKETS, max(1, shape[0]))
    file: IO[bytes] = (
        io.BytesIO() if n_entries <= RUN_ENTRIES else tempfile.TemporaryFile(dir=scratch)
    )
    spill = _Spill(file=file, runs=[], bucket_rows=-(-shape[0] // n_buckets) or 1)
    # The last pass cannot know that it is the last.
    weakref.finalize(spill, file.close)
    waiting: list[Entries] = []
    for part in entries:
        _check_range(part[0], shape[0], "cell")
        _check_range(part[1], shape[1], "gene")
        waiting.append(part)
        if sum(len(rows) for rows, _, _ in waiting) >= RUN_ENTRIES:
            _write_run(spill, waiting, shape)
            waiting.clear()
    if waiting:
        _write_run(spill, waiting, shape)
    return spill


def _write_run(spill: _Spill, parts: list[Entries], shape: tuple[int, int]) -> None:
    rows, columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    bucket, row = np.divmod(rows, spill.bucket_rows)
    # numpy sorts 16-bit keys by radix, in linear time; stable, so that columns stay in order.
    order = np.argsort(bucket.astype(np.uint16), kind="stable")
    if values.dtype.kind in "iu" and len(values):
        narrow = np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max()))
        values = values.astype(narrow, copy=False)
    dtype = np.dtype(
        [
            ("row", np.min_scalar_type(spill.bucket_rows - 1)),
            ("column", np.min_scalar_type(max(0, shape[1] - 1))),
            ("value", values.dtype),
        ]
    )
    records = np.empty(len(rows), dtype=dtype)
    for name, field in (("row", row), ("column", columns), ("value", values)):
        records[name] = field[order]
    n_buckets = -(-shape[0] // spill.bucket_rows)
    bucket_ptr = np.zeros(n_buckets + 1, dtype=np.int64)
    np.cumsum(np.bincount(bucket, minlength=n_buckets), out=bucket_ptr[1:])
    offset = spill.file.seek(0, io.SEEK_END)
    spill.file.write(records.tobytes())
    spill.runs.append(_Run(offset=offset, dtype=dtype, bucket_ptr=bucket_ptr))


def _bucket_blocks(
    spill: _Spill, bucket: int, *, n_rows: int, n_columns: int
) -> Iterator[sparse.csr_matrix]:
    """Yield the row blocks of one bucket.

    Buckets have equal numbers of rows; where cells of many genes lie together one may be far above
    the mean, and is put together in several parts.
    """
    row_ptr = np.zeros(n_rows + 1, dtype=np.int64)
    for part in spill.records(bucket):
        row_ptr[1:] += np.bincount(part["row"], minlength=n_rows)
    np.cumsum(row_ptr, out=row_ptr)
    for start, stop in _ranges(row_ptr, 2 * BUCKET_ENTRIES):
        parts = []
        for part in spill.records(bucket):
            inside = (part["row"] >= start) & (part["row"] < stop)
            parts.append(part if stop - start == n_rows else part[inside])
        shape = (stop - start, n_columns)
        block = _packed(parts, first_row=start, shape=shape)
        for first, last in row_blocks(block.indptr.astype(np.int64)):
            yield block[first:last]


def _packed(
    parts: list[npt.NDArray[np.void]], *, first_row: int, shape: tuple[int, int]
) -> sparse.csr_matrix:
    if not parts:
        return sparse.csr_matrix(shape, dtype=np.int64)
    rows = np.concatenate([part["row"] for part in parts]).astype(np.int32) - first_row
    columns = np.concatenate([part["column"] for part in parts]).astype(np.int32)
    values = np.concatenate([part["value"] for part in parts])
    # scipy has no 16-bit floats.
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    packed = sparse.coo_matrix((values, (rows, columns)), shape=shape)
    # scipy would add up values of one place in the type that they are stored in: 100 + 200 = 44.
    packed.has_canonical_format = True
    return packed.tocsr()


def _ranges(row_ptr: npt.NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most `limit` values, one row at least."""
    start, n_rows = 0, len(row_ptr) - 1
    while start < n_rows:
        stop = int(np.searchsorted(row_ptr, row_ptr[start] + limit, side="right")) - 1
        stop = min(max(stop, start + 1), n_rows)
        yield start, stop
        start = stop


def _check_range(indices: npt.NDArray[np.int64], size: int, what: str) -> None:
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"a value lies at {what} {wrong}, but there are {size} (counted from 0)")
