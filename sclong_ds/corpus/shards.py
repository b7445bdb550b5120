"""Reads chunks of a sharded Zarr v3 array of bytes straight from its files.

A shard file holds the chunks one after the other and ends in an index: for each chunk its offset
and length (two little-endian uint64, both 2^64 - 1 for a chunk of zeros that was not written), then
the crc32c of the index. A chunk is compressed by zstd, or not, and ends in its own crc32c. One
range read and one decompression into the caller's buffer give a chunk, both without the GIL. Of the
possible Zarr arrays only those that `sclong_ds.corpus.cell_writer` makes are read; all others are
refused.

Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import json
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from sclong_ds.corpus.location import Location
from sclong_ds.files.atomic import read_file

_CODECS = (["bytes", "zstd", "crc32c"], ["bytes", "crc32c"])
_CHECKSUM_BYTES = 4
_NOT_WRITTEN = 2**64 - 1
_TRIES = 5
_CACHED_INDICES = 8192  # of 32 chunks: 0.6 KB each; a corpus of 48 million cells has 5,600 shards


class DamagedShard(ValueError):
    """A shard file that is cut or changed."""


class ShardedArray:
    """A 1-D uint8 array in shards; safe for threads and forked processes, keeps no file open."""

    def __init__(self, location: Location, *, checks_size: bool = True) -> None:
        """Read the description of the array.

        Args:
            location: Folder of the array.
            checks_size: Compare the size of each shard with its index; of no use where the checksum
                of every chunk that is read is known, and one more request to a server.

        Raises:
            FileNotFoundError: No array there.
            ValueError: Not an array of the supported kind.
        """
        self.location, self._checks_size = location, checks_size
        about = read_metadata(location)
        try:
            length, shard, inner, compressed = _layout(about)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{location}/zarr.json: not an array that this program reads "
                f"({type(error).__name__}: {error}); restore the file or write the store again"
            ) from None
        self.length: int = length
        """Bytes of the array."""
        self.chunk_entries: int = inner
        """Bytes of a chunk."""
        self._compressed, self._chunks_per_shard = compressed, shard // inner
        self.read_bytes = 0
        """Bytes read so far; threads that read at the same time may leave some out."""
        # One slot for a shard number modulo the slots: reading and setting an item need no lock,
        # so that a fork at any moment leaves nothing locked.
        self._indices: dict[int, tuple[int, NDArray[np.uint64]]] = {}

    def __len__(self) -> int:
        """Return the number of chunks."""
        return -(-self.length // self.chunk_entries)

    def shard_name(self, chunk: int) -> str:
        """Return the name of the file with a chunk, inside the array's folder."""
        return f"c/{chunk // self._chunks_per_shard}"

    def read(self, chunk: int, *, out: NDArray[np.uint8], crc32c: int | None = None) -> None:
        """Read one chunk.

        Args:
            chunk: Number of the chunk.
            out: (chunk_entries,) contiguous buffer, overwritten.
            crc32c: `crc32c` of the chunk that belongs here; None trusts the one beside the chunk.

        Raises:
            IndexError: No such chunk.
            FileNotFoundError: Its shard is missing.
            OSError: Its shard cannot be read.
            DamagedShard: Its shard is cut or changed, or the chunk is of another place.
        """
        payload = self._belonging(chunk, crc32c)
        if payload is None:
            out[:] = 0
            return
        if self._compressed:
            try:
                zstd.decompress(payload, out)
            except (RuntimeError, ValueError) as error:
                raise DamagedShard(f"not zstd data ({error})") from None
        elif len(payload) != len(out):
            raise DamagedShard(f"a chunk of {len(payload)} bytes instead of {len(out)}")
        else:
            out[:] = payload

    def check(self, chunk: int, *, crc32c: int | None = None) -> None:
        """Look at the shard of a chunk: whether it is there, and as long as its index says.

        Args:
            chunk: Number of the chunk.
            crc32c: `crc32c` of the chunk that belongs here, which is read, too; None: it is not.

        Raises:
            FileNotFoundError: The shard is missing.
            OSError: It cannot be read.
            DamagedShard: It is cut or changed, or the chunk is of another place.
        """
        if crc32c is None:
            self._index(chunk // self._chunks_per_shard)
        else:
            self._belonging(chunk, crc32c)

    def _belonging(self, chunk: int, crc32c: int | None) -> NDArray[np.uint8] | None:
        """Return the stored bytes of a chunk, None for one not written, if they belong there."""
        payload, found = self._stored(chunk)
        if crc32c is not None and found != crc32c:
            raise DamagedShard(
                f"the chunk's crc32c is {found:08x}, here belongs {crc32c:08x}: a chunk of another "
                "place, array or store"
            )
        return payload

    def crc32c(self, chunk: int) -> int:
        """Return the CRC-32C of a chunk's stored bytes after comparing it with the one beside them.

        It is that of no bytes, 0, for a chunk of zeros that was not written.

        Args:
            chunk: Number of the chunk.

        Raises:
            IndexError: No such chunk.
            FileNotFoundError: Its shard is missing.
            OSError: Its shard cannot be read.
            DamagedShard: Its shard is cut or changed.
        """
        return self._stored(chunk)[1]

    def _stored(self, chunk: int) -> tuple[NDArray[np.uint8] | None, int]:
        """Return the stored bytes of a chunk, None for one not written, and their CRC-32C."""
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk {chunk}: {self.location} has {len(self)} chunks")
        shard, place = divmod(chunk, self._chunks_per_shard)
        offset, length = self._index(shard)[place].tolist()
        if offset == length == _NOT_WRITTEN:
            return None, 0
        return self._sound(self.shard_name(chunk), offset, length, "chunk")

    def _index(self, shard: int) -> NDArray[np.uint64]:
        """Return (chunks, 2) offset and length of each chunk of a shard."""
        cached = self._indices.get(shard % _CACHED_INDICES)
        if cached is not None and cached[0] == shard:
            return cached[1]
        name, length = f"c/{shard}", 16 * self._chunks_per_shard + _CHECKSUM_BYTES
        index = self._sound(name, -length, length, "index")[0].view("<u8").reshape(-1, 2)
        lengths = index[:, 1]
        written = int(lengths[lengths != _NOT_WRITTEN].sum()) + length
        if self._checks_size and written != (size := self.location.size(name)):
            # With whole chunks lost, others of the same length would pass for them.
            raise DamagedShard(f"the file has {size} bytes, of {written} that its index names")
        self._indices[shard % _CACHED_INDICES] = shard, index
        return index

    def _sound(
        self, name: str, start: int, length: int, what: str
    ) -> tuple[NDArray[np.uint8], int]:
        """Return a part of a file without the checksum at its end, and the checksum.

        One that arrives changed or cut from another machine is asked for again: its checksum tells
        whether it is the file or the way.
        """
        tries = 1 if self.location.is_local else _TRIES
        for attempt in range(1, tries + 1):
            if start < 0:
                data = self.location.read_end(name, length, fresh=attempt > 1)
            else:
                data = self.location.read_range(name, start, length, fresh=attempt > 1)
            self.read_bytes += len(data)
            try:
                if len(data) != length:
                    whose = "its index's" if what == "index" else "the chunk's"
                    raise DamagedShard(f"the file is cut: {len(data)} of {whose} {length} bytes")
                content = _verified(data, what)
            except DamagedShard:
                if attempt == tries:
                    raise
            else:
                self.location.keep_part(name, start, length, data)
                return content
        raise AssertionError("unreachable")


def read_metadata(location: Location) -> dict[str, Any]:
    """Return the content of the `zarr.json` of an array or group.

    Args:
        location: Its folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    try:
        about = json.loads(read_file(location.local_path("zarr.json")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{location}/zarr.json: no such file") from None
    except ValueError as error:
        raise ValueError(
            f"{location}/zarr.json: damaged ({error}); restore the file or write the store again"
        ) from None
    if not isinstance(about, dict) or about.get("zarr_format") != 3:
        raise ValueError(f"{location}/zarr.json: not Zarr version 3; write the store again")
    return about


def _layout(about: dict[str, Any]) -> tuple[int, int, int, bool]:
    """Return length, shard size and chunk size of an array, and whether chunks are compressed."""
    (length,), (shard,) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    (sharding,) = about["codecs"]
    options = sharding["configuration"]
    (inner,) = options["chunk_shape"]
    codecs = [codec["name"] for codec in options["codecs"]]
    index = [(codec["name"], codec.get("configuration", {})) for codec in options["index_codecs"]]
    expected = {
        "node_type": "array",
        "data_type": "uint8",
        "fill_value": 0,
        "storage_transformers": [],
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    wrong = [name for name, value in expected.items() if about.get(name, value) != value]
    wrong += [] if about["chunk_grid"]["name"] == "regular" else ["chunk_grid"]
    wrong += [] if sharding["name"] == "sharding_indexed" else ["codecs"]
    wrong += [] if codecs in _CODECS else ["codecs of a chunk"]
    wrong += [] if index == [("bytes", {"endian": "little"}), ("crc32c", {})] else ["index_codecs"]
    wrong += [] if options.get("index_location", "end") == "end" else ["index_location"]
    sizes_fit = all(type(n) is int for n in (length, shard, inner)) and 0 < inner <= shard
    wrong += [] if sizes_fit and length >= 0 and shard % inner == 0 else ["shapes"]
    if wrong:
        raise ValueError(f"unsupported {', '.join(wrong)}")
    return length, shard, inner, codecs == _CODECS[0]


def _verified(data: bytes, what: str) -> tuple[NDArray[np.uint8], int]:
    """Return bytes without the crc32c at their end, and the crc32c after comparing it."""
    content = np.frombuffer(data, np.uint8)[:-_CHECKSUM_BYTES]
    found, stored = google_crc32c.value(content), int.from_bytes(data[-_CHECKSUM_BYTES:], "little")
    if found != stored:
        raise DamagedShard(f"the {what}'s crc32c is {found:08x}, stored is {stored:08x}")
    return content, found
