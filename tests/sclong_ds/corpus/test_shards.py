"""The direct reader of sharded arrays: the same bytes as zarr, and no damage unseen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import DamagedShard, ShardedArray

CHUNK, PER_SHARD = 64, 4


def write_array(folder: Path, values: NDArray[np.uint8], codec: str = "zstd") -> None:
    compressors: list[Any] = [Crc32cCodec()]
    if codec == "zstd":
        compressors.insert(0, ZstdCodec(level=1))
    array = zarr.create_array(
        folder,
        shape=values.shape,
        chunks=(CHUNK,),
        shards=(CHUNK * PER_SHARD,),
        dtype="u1",
        compressors=compressors,
        fill_value=0,
    )
    array[:] = values


def random_values(seed: int, n_chunks: int) -> NDArray[np.uint8]:
    """Return compressible chunks; the third holds zeros only, which zarr does not write."""
    rng = np.random.default_rng(seed)
    values = rng.choice(np.arange(4, dtype=np.uint8), size=(n_chunks, CHUNK))
    values[2:3] = 0
    return values.reshape(-1)


def read(array: ShardedArray, chunk: int) -> NDArray[np.uint8]:
    out = np.full(CHUNK, 255, np.uint8)
    array.read(chunk, out=out)
    return out


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_same_bytes_as_zarr(tmp_path: Path, codec: str) -> None:
    values = random_values(0, 11)
    write_array(tmp_path / "x", values, codec)
    array = ShardedArray(Location(tmp_path / "x"))
    assert (len(array), array.length, array.chunk_entries) == (11, len(values), CHUNK)
    for chunk in np.random.default_rng(1).permutation(np.repeat(np.arange(11), 2)).tolist():
        np.testing.assert_array_equal(
            read(array, chunk), values[chunk * CHUNK : (chunk + 1) * CHUNK]
        )
    for wrong in (-1, 11):
        with pytest.raises(IndexError, match="has 11 chunks"):
            read(array, wrong)


def index_of(raw: bytes) -> list[tuple[int, int]]:
    """Return offset and length of each chunk of a shard file."""
    entries = np.frombuffer(raw[-16 * PER_SHARD - 4 : -4], "<u8").reshape(-1, 2)
    return [(int(offset), int(length)) for offset, length in entries]


def outcomes(folder: Path, values: NDArray[np.uint8]) -> list[str]:
    """Read every chunk of the first shard with a fresh reader; wrong bytes must not come out."""
    array, found = ShardedArray(Location(folder)), []
    for chunk in range(PER_SHARD):
        try:
            right = np.array_equal(read(array, chunk), values[chunk * CHUNK : (chunk + 1) * CHUNK])
            found.append("right" if right else "WRONG")
        except DamagedShard:
            found.append("damaged")
    return found


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_every_changed_byte_is_seen(tmp_path: Path, codec: str) -> None:
    """In the data, the checksums and the index: the changed chunk is refused, or the shard."""
    values = random_values(2, 6)
    write_array(tmp_path / "x", values, codec)
    file = tmp_path / "x" / "c" / "0"
    raw = file.read_bytes()
    index = len(raw) - 16 * PER_SHARD - 4
    for position in range(len(raw)):
        for bit in {1 << position % 8, 255}:
            changed = bytearray(raw)
            changed[position] ^= bit
            file.write_bytes(changed)
            found = outcomes(tmp_path / "x", values)
            assert "WRONG" not in found
            # The chunk of zeros is in the index alone.
            assert found.count("damaged") == (1 if position < index else PER_SHARD), position


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_gives_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Several bytes overwritten, cut off or added, anywhere."""
    folder = tmp_path_factory.mktemp("shard") / "x"
    values = random_values(data.draw(st.integers(0, 9)), 4)
    write_array(folder, values, data.draw(st.sampled_from(["zstd", "none"])))
    file = folder / "c" / "0"
    raw = file.read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(start + 40, len(raw))))
    changed = raw[:start] + data.draw(st.binary(max_size=40)) + raw[stop:]
    file.write_bytes(changed)
    found = outcomes(folder, values)
    assert "WRONG" not in found
    assert changed != raw or "damaged" not in found


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_chunk_that_is_lost_or_doubled_gives_no_other_chunk(tmp_path: Path, codec: str) -> None:
    """The index is whole: of chunks of one length, the next would be read as the lost one."""
    values = random_values(0, 4)
    write_array(tmp_path / "x", values, codec)
    file = tmp_path / "x" / "c" / "0"
    raw = file.read_bytes()
    written = [entry for entry in index_of(raw) if entry[1] < len(raw)]
    assert len(written) == PER_SHARD - 1
    for start, size in written:
        lost, doubled = raw[:start] + raw[start + size :], raw[: start + size] + raw[start:]
        for changed in (lost, doubled):
            file.write_bytes(changed)
            assert outcomes(tmp_path / "x", values) == ["damaged"] * PER_SHARD


def test_cut_at_every_length_and_missing(tmp_path: Path) -> None:
    values = random_values(3, 4)
    write_array(tmp_path / "x", values)
    file = tmp_path / "x" / "c" / "0"
    raw = file.read_bytes()
    for length in range(len(raw)):
        file.write_bytes(raw[:length])
        assert outcomes(tmp_path / "x", values) == ["damaged"] * PER_SHARD
    file.write_bytes(raw)
    array = ShardedArray(Location(tmp_path / "x"))
    read(array, 0)
    # The index is known already: the chunk itself must notice.
    file.write_bytes(raw[:10])
    with pytest.raises(DamagedShard, match=r"cut: 10 of the chunk's \d+ bytes"):
        read(array, 0)
    file.unlink()
    for reader in (array, ShardedArray(Location(tmp_path / "x"))):
        with pytest.raises(FileNotFoundError):
            read(reader, 0)


def change(*path: str | int, to: Any) -> Callable[[Any], None]:
    def apply(about: Any) -> None:
        for step in path[:-1]:
            about = about[step]
        about[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("data_type", to="uint16"), "unsupported data_type"),
        (change("fill_value", to=1), "unsupported fill_value"),
        (change("node_type", to="group"), "unsupported node_type"),
        (change("storage_transformers", to=[{}]), "unsupported storage_transformers"),
        (change("chunk_key_encoding", "name", to="v2"), "unsupported chunk_key_encoding"),
        (change("chunk_grid", "name", to="rectilinear"), "unsupported chunk_grid"),
        (change("shape", to=[2, 3]), "ValueError"),
        (change("shape", to=[-1]), "unsupported shapes"),
        (change("shape", to=["9"]), "unsupported shapes"),
        (change("codecs", 0, "name", to="other"), "unsupported codecs"),
        (change("codecs", 0, "configuration", "index_location", to="start"), "index_location"),
        (change("codecs", 0, "configuration", "chunk_shape", to=[63]), "unsupported shapes"),
        (change("codecs", 0, "configuration", "index_codecs", to=[]), "unsupported index_codecs"),
        (change("codecs", to=[]), "ValueError"),
        (change("codecs", 0, "configuration", to={}), "KeyError"),
        (change("zarr_format", to=2), "not Zarr version 3"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    write_array(tmp_path / "x", random_values(4, 4))
    file = tmp_path / "x" / "zarr.json"
    about = json.loads(file.read_bytes())
    edit(about)
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"x/zarr.json: .*{message}"):
        ShardedArray(Location(tmp_path / "x"))


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff"])
def test_broken_metadata_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "zarr.json").write_text(content)
    with pytest.raises(ValueError, match=r"zarr.json: (damaged|not Zarr version 3)"):
        ShardedArray(Location(tmp_path))


def test_other_codecs_are_refused(tmp_path: Path) -> None:
    codec = ShardingCodec(chunk_shape=(CHUNK,), codecs=[BytesCodec(), GzipCodec(), Crc32cCodec()])
    zarr.create_array(
        tmp_path / "x", shape=(256,), chunks=(256,), dtype="u1", serializer=codec, compressors=None
    )
    with pytest.raises(ValueError, match="unsupported codecs of a chunk"):
        ShardedArray(Location(tmp_path / "x"))


def test_threads_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two slots for three shards: the threads keep replacing each other's index.
    monkeypatch.setattr("sclong_ds.corpus.shards._CACHED_INDICES", 2)
    values = random_values(5, 12)
    write_array(tmp_path / "x", values)
    array, wrong = ShardedArray(Location(tmp_path / "x")), []

    def work(seed: int) -> None:
        for chunk in np.random.default_rng(seed).integers(0, 12, 200).tolist():
            if not np.array_equal(read(array, chunk), values[chunk * CHUNK : (chunk + 1) * CHUNK]):
                wrong.append(chunk)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(array._indices) <= 2
