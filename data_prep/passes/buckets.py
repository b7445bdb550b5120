"""Records on disk by bucket: how finalize sorts more than fits in memory, and can be killed.

A first pass writes runs: as many records as fit in memory, ordered by bucket. A second pass reads
one bucket from all runs at a time. Buckets are ranges of a 64-bit key, so the buckets in order,
each sorted by its key, are all records sorted by key, whatever the number of buckets and runs.

A run is a few files, `RUN.FIELD` and last `RUN.bounds.npz`, so it is there whole or does not count.
Runs have numbers and are written in any order, by any number of processes; a bucket is read from
all of them in the order of their numbers. With the bounds of each bucket stands the CRC-32C of its
records, which is compared whenever they are read.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.files.atomic import listed, partial_name, write_atomic
from sclong_ds.files.checksums import crc32c
from sclong_ds.files.npz import read_npz

RUN_BYTES = 2**28
"""Encoded cells of one run."""


def bucket_of(key: NDArray[np.uint64], n_buckets: int) -> NDArray[np.int64]:
    """Return the bucket of each key: n_buckets equal ranges of the 64-bit numbers, in order.

    Args:
        key: (n,) sort keys, evenly spread over all 64-bit numbers.
        n_buckets: Number of buckets, below 2^32.
    """
    return (((key >> np.uint64(32)) * np.uint64(n_buckets)) >> np.uint64(32)).astype(np.int64)


def plan_runs(
    stores: Sequence[CellStore], *, run_bytes: int = RUN_BYTES
) -> list[list[tuple[int, int]]]:
    """Group the chunks of many stores into runs, without reading any cell.

    Args:
        stores: The stores, in order.
        run_bytes: Encoded cells of a run, exceeded by less than a chunk.

    Returns:
        Per run the (position of the store, chunk) it takes, in order.
    """
    runs: list[list[tuple[int, int]]] = []
    room = 0
    for number, store in enumerate(stores):
        before = np.concatenate(([0], np.cumsum(store.row_entries, dtype=np.int64)))
        sizes = 2 * np.diff(before[store.chunk_rows])
        for chunk, size in enumerate(sizes.tolist()):
            if room <= 0:
                runs.append([])
                room = run_bytes
            runs[-1].append((number, chunk))
            room -= size
    return runs


class BucketRuns:
    """Runs of records in one folder, each ordered by bucket."""

    def __init__(self, folder: Path, *, n_buckets: int) -> None:
        """Open a folder; it is created if needed, and finished runs in it are taken over.

        Args:
            folder: The folder; runs in it have the same number of buckets.
            n_buckets: Number of buckets.
        """
        self.folder, self.n_buckets = folder, n_buckets
        folder.mkdir(parents=True, exist_ok=True)
        self._bounds: list[dict[str, NDArray[Any]]] = []
        """Per run and field where each bucket begins, and by `_sums` of the field its checksums."""
        while (path := bounds_path(folder, len(self._bounds))).exists():
            self._bounds.append(read_npz(path, cure="run finalize again"))

    @classmethod
    def complete(cls, folder: Path, *, n_buckets: int, n_runs: int) -> BucketRuns:
        """Open a folder in which other processes have written all runs.

        Args:
            folder: The folder.
            n_buckets: Number of buckets.
            n_runs: Number of runs.

        Raises:
            ValueError: Runs are missing.
        """
        # Listed first, a folder on a network file system is seen as it is now.
        os.listdir(folder)
        found = cls(folder, n_buckets=n_buckets)
        if len(found) != n_runs:
            raise ValueError(f"{folder}: {len(found)} whole runs of {n_runs}; run finalize again")
        return found

    def __len__(self) -> int:
        """Return the number of finished runs."""
        return len(self._bounds)

    def append(
        self,
        bounds: Mapping[str, NDArray[np.int64]],
        blocks: Iterable[Mapping[str, NDArray[Any]]],
    ) -> None:
        """Write one more run; as `write_run`."""
        self._bounds.append(write_run(self.folder, len(self._bounds), bounds, blocks))

    def read(self, bucket: int, field: str, dtype: np.dtype | type) -> NDArray[Any]:
        """Return a field of all records of a bucket, run after run.

        Args:
            bucket: The bucket.
            field: Name of the field.
            dtype: Type of its values.

        Raises:
            ValueError: A run's file is cut or changed.
        """
        dtype = np.dtype(dtype)
        pieces = [bounds[field][bucket : bucket + 2].tolist() for bounds in self._bounds]
        values = np.empty(sum(stop - start for start, stop in pieces), dtype)
        done = 0
        for run, (start, stop) in enumerate(pieces):
            path, here = _path(self.folder, run, field), values[done : done + stop - start]
            if len(here):
                with path.open("rb") as file:
                    file.seek(start * dtype.itemsize)
                    if file.readinto(here.view(np.uint8).data) != here.nbytes:
                        raise ValueError(f"{path}: cut; run finalize again")
                if crc32c(here) != self._bounds[run][_sums(field)][bucket]:
                    raise ValueError(f"{path}: damaged (its CRC-32C differs); run finalize again")
            done += len(here)
        return values


def write_run(
    folder: Path,
    run: int,
    bounds: Mapping[str, NDArray[np.int64]],
    blocks: Iterable[Mapping[str, NDArray[Any]]],
) -> dict[str, NDArray[Any]]:
    """Write one run; what a killed call has left of it is replaced.

    Args:
        folder: Of all runs.
        run: Its number.
        bounds: Per field (n_buckets + 1,) where each bucket begins and the last one ends, in
            values.
        blocks: The values of all fields piece by piece, ordered by bucket.

    Returns:
        The bounds, and the checksums of the buckets.
    """
    sums = {field: _BucketSums(b) for field, b in bounds.items()}
    with ExitStack() as stack:
        files = {
            field: stack.enter_context(_path(folder, run, field).open("wb")) for field in bounds
        }
        for block in blocks:
            for field, values in block.items():
                values = np.ascontiguousarray(values)
                files[field].write(values.data)
                sums[field].add(values)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    content = io.BytesIO()
    document: dict[str, NDArray[Any]] = dict(bounds) | {
        _sums(field): sums[field].crc32c for field in bounds
    }
    np.savez(content, **document)  # type: ignore[arg-type]
    write_atomic(bounds_path(folder, run), content.getvalue())
    return document


def bounds_path(folder: Path, run: int) -> Path:
    """Return the last file of a run, which holds the checksums of the others.

    Args:
        folder: Of all runs.
        run: Its number.
    """
    return _path(folder, run, "bounds.npz")


def _path(folder: Path, run: int, field: str) -> Path:
    return folder / f"{run:06d}.{field}"


class _BucketSums:
    """The CRC-32C of each bucket of a run, from its values piece by piece."""

    def __init__(self, bounds: NDArray[np.int64]) -> None:
        self._bounds, self._done = bounds, 0
        self.crc32c = np.zeros(len(bounds) - 1, np.uint32)

    def add(self, values: NDArray[Any]) -> None:
        start, stop = self._done, self._done + len(values)
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        last = int(np.searchsorted(self._bounds, stop, side="left"))
        for bucket in range(first, last):
            low, high = self._bounds[bucket : bucket + 2].tolist()
            piece = values[max(low, start) - start : min(high, stop) - start]
            self.crc32c[bucket] = crc32c(piece, int(self.crc32c[bucket]))
        self._done = stop


def _sums(field: str) -> str:
    return f"{field}.crc32c"


def forget_records(folder: Path, field: str) -> None:
    """Remove the records of a field from all runs, and nothing that a marker of a unit names.

    Args:
        folder: Of all runs; it need not be there.
        field: Name of the field.
    """
    for path in listed(folder):
        if path.suffix == f".{field}":
            path.unlink(missing_ok=True)


def lacks_records(folder: Path, field: str) -> bool:
    """Tell whether records of a field were removed from a run that is there.

    Args:
        folder: Of all runs; it need not be there.
        field: Name of the field.
    """
    names = {path.name for path in listed(folder)}
    ends = ".bounds.npz"
    return any(
        f"{name.removesuffix(ends)}.{field}" not in names for name in names if name.endswith(ends)
    )


def discard_scratch(folder: Path) -> None:
    """Remove a folder of runs; a kill never leaves half of it under its name.

    Args:
        folder: The folder.
    """
    old = partial_name(folder)
    os.rename(folder, old)
    shutil.rmtree(old)
