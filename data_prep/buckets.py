"""Files that collect records by bucket: how finalize sorts more than fits in memory.

Records are appended to one file per bucket and field in a first pass; in a second pass one bucket
at a time is read whole. Buckets are ranges of a 64-bit key, so the buckets in order, each sorted by
its key, are all records sorted by key, whatever the number of buckets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def bucket_of(key: NDArray[np.uint64], n_buckets: int) -> NDArray[np.int64]:
    """Return the bucket of each key: n_buckets equal ranges of the 64-bit numbers, in order.

    Args:
        key: (n,) sort keys, evenly spread over all 64-bit numbers.
        n_buckets: Number of buckets, below 2^32.
    """
    return (((key >> np.uint64(32)) * np.uint64(n_buckets)) >> np.uint64(32)).astype(np.int64)


class BucketFiles:
    """Append-only files in one folder, one per bucket and field.

    Files are opened for each write: thousands of buckets would exceed the limit of open files.
    """

    def __init__(self, folder: Path) -> None:
        """Use an empty folder; it is created."""
        self.folder = folder
        folder.mkdir(parents=True)

    def append(
        self, field: str, bucket: NDArray[np.int64], values: NDArray[Any], ends: NDArray[np.int64]
    ) -> None:
        """Append the values of many records to the files of their buckets.

        Args:
            field: Name of the field.
            bucket: (records,) bucket of each record, non-decreasing.
            values: (values,) the records' values, one record after the other.
            ends: (records,) end of each record in `values`.
        """
        names, first = np.unique(bucket, return_index=True)
        stops = ends[np.append(first[1:], len(bucket)) - 1]
        start = 0
        for name, stop in zip(names, stops, strict=True):
            with self._path(int(name), field).open("ab") as file:
                file.write(values[start:stop].tobytes())
            start = int(stop)

    def read(self, bucket: int, field: str, dtype: np.dtype | type) -> NDArray[Any]:
        """Return a field of all records of a bucket in the order appended; empty if none were."""
        path = self._path(bucket, field)
        return np.fromfile(path, dtype=dtype) if path.exists() else np.empty(0, dtype)

    def drop(self, bucket: int) -> None:
        """Delete the files of a bucket."""
        for path in self.folder.glob(f"{bucket}.*"):
            path.unlink()

    def _path(self, bucket: int, field: str) -> Path:
        return self.folder / f"{bucket}.{field}"
