"""Reading a cell store: chunks into buffers, chosen cells, other processes, damage."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import sparse

from sclong_ds.corpus.byte_code import encode
from sclong_ds.corpus.cell_store import CellStore, DamagedChunk
from sclong_ds.corpus.cell_writer import CellWriter


def random_counts(seed: int, n_cells: int = 200) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    matrix = sparse.random(n_cells, 2_000, density=0.05, format="csr", random_state=rng)
    matrix.data = rng.choice([1] * 10 + [255, 256, 70_000], size=matrix.nnz)
    matrix.sort_indices()
    return matrix


def write_store(path: Path, matrix: sparse.csr_matrix, *, codec: str = "zstd") -> None:
    with CellWriter(
        path,
        n_genes=2_000,
        codec=codec,  # type: ignore[arg-type]
        chunk_entries=1024,
        chunks_per_shard=4,
    ) as writer:
        writer.append(matrix)


def assert_same(found: sparse.csr_matrix, expected: sparse.csr_matrix) -> None:
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data, expected.data)


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("stream", ["gap", "count"])
def test_damaged_chunk_is_named(tmp_path: Path, codec: str, stream: str) -> None:
    matrix = random_counts(7)
    write_store(tmp_path / "cells.zarr", matrix, codec=codec)
    file = tmp_path / "cells.zarr" / stream / "c" / "0"
    raw = file.read_bytes()
    last = int(CellStore(tmp_path / "cells.zarr").chunk_rows[1]) - 1

    def check(reason: str) -> None:
        store = CellStore(tmp_path / "cells.zarr")
        message = rf"{stream}/c/0: chunk 0 \(cells 0 to {last}\) is damaged: {reason}.*verify"
        with pytest.raises(DamagedChunk, match=message) as caught:
            store.read_chunk(0)
        for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
            found = error.chunk, error.path, error.first_cell, error.last_cell
            assert found == (0, str(file), 0, last)
        with pytest.raises(DamagedChunk, match=reason):
            store.packed_rows([199, 0])
        # The cells of other shards are read all the same.
        assert_same(store.rows([199]), matrix[[199]])

    file.write_bytes(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])
    check("the chunk's crc32c")
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    check("the index's crc32c")
    file.write_bytes(raw[:30])
    check("the file is cut")
    file.unlink()
    check("the file is missing")


@pytest.mark.parametrize("kind", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_unreadable_chunk_is_named(
    tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad disk is damage; for other reasons the cells may be sound, so nobody may skip them."""
    write_store(tmp_path / "cells.zarr", random_counts(7, n_cells=20))
    store = CellStore(tmp_path / "cells.zarr")

    def fail(*args: object, **options: object) -> bytes:
        raise OSError(kind, os.strerror(kind))

    store.read_packed(0)
    monkeypatch.setattr("sclong_ds.corpus.location.Location.read_range", fail)
    expected = DamagedChunk if kind == errno.EIO else OSError
    what = r"chunk 0 \(cells 0 to \d+\) .*" if kind == errno.EIO else "cells cannot be read: "
    message = f"gap/c/0: {what}{os.strerror(kind)}"
    with pytest.raises(expected, match=message) as caught:
        store.read_packed(0)
    assert isinstance(caught.value, PermissionError) == (kind == errno.EACCES)


def test_damaged_tables_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    write_store(path, random_counts(7))
    table = path / "row_entries" / "c" / "0"
    raw = table.read_bytes()
    table.write_bytes(b"\xff\xff" + raw[2:])
    with pytest.raises(DamagedChunk, match=r"row_entries/c/0: chunk 0 .*\d+ entries in a chunk of"):
        CellStore(path).read_packed(0)
    table.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="missing or cut"):
        CellStore(path).row_entries  # noqa: B018
    table.unlink()
    with pytest.raises(ValueError, match="missing or cut"):
        CellStore(path).row_entries  # noqa: B018
    table.write_bytes(raw)
    for file, old, new, message in (
        ("row_nnz/zarr.json", "uint32", "uint99", r"row_nnz/zarr.json: damaged"),
        ("row_nnz/zarr.json", '"zarr_format": 3', '"zarr_format": 2', "not Zarr version 3"),
        ("gap/zarr.json", "1024", "512", "chunks of 512 bytes, the store has"),
        ("zarr.json", '"n_cells": 200', '"n_cells": "200"', "no whole number n_cells"),
        ("zarr.json", "{", "", "damaged"),
    ):
        content = (path / file).read_text()
        assert old in content
        (path / file).write_text(content.replace(old, new))
        with pytest.raises(ValueError, match=message):
            CellStore(path).read_packed(0)
        (path / file).write_text(content)
    CellStore(path).read_packed(0)


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_read_packed_into_buffers(tmp_path: Path, codec: str) -> None:
    write_store(tmp_path / "cells.zarr", random_counts(14), codec=codec)
    store = CellStore(tmp_path / "cells.zarr")
    out = np.full(1024, 9, np.uint8), np.full(1500, 9, np.uint8)
    for chunk in range(len(store.chunk_rows) - 1):
        expected, found = store.read_packed(chunk), store.read_packed(chunk, out=out)
        for name in ("gap", "count", "row_entries", "row_nnz", "row_total"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert np.shares_memory(found.gap, out[0])
        assert np.shares_memory(found.count, out[1])
        assert not np.shares_memory(expected.gap, found.gap)
    assert np.all(out[1][1024:] == 9)
    with pytest.raises(ValueError, match="a chunk needs 1024 each"):
        store.read_packed(0, out=(out[0], out[1][:1023]))
    for wrong in (-1, len(store.chunk_rows) - 1):
        with pytest.raises(IndexError, match="the store has chunks 0 to"):
            store.read_packed(wrong)


def test_packed_rows_are_the_encoded_rows(tmp_path: Path) -> None:
    matrix = random_counts(15)
    write_store(tmp_path / "cells.zarr", matrix)
    store = CellStore(tmp_path / "cells.zarr")
    for indices in ([], [7], np.random.default_rng(0).integers(0, 200, 150)):
        found, expected = store.packed_rows(indices), encode(matrix[indices])
        for name in ("gap", "count", "row_entries", "row_nnz", "row_total"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_a_store_that_is_in_use(tmp_path: Path, method: str) -> None:
    matrix = random_counts(16, n_cells=40)
    write_store(tmp_path / "cells.zarr", matrix)
    store = CellStore(tmp_path / "cells.zarr")
    store.rows([0, 39])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert_same(pool.submit(store.rows, [39, 3]).result(), matrix[[39, 3]])
    assert_same(store.rows([3, 20]), matrix[[3, 20]])


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_a_sound_chunk_of_another_place_is_damage(tmp_path: Path, codec: str) -> None:
    """Each chunk carries a right checksum; the store's tables tell that it does not belong here."""
    write_store(tmp_path / "cells.zarr", random_counts(7), codec=codec)
    write_store(tmp_path / "other.zarr", random_counts(8), codec=codec)
    folder = tmp_path / "cells.zarr"
    for name, donor in (
        ("gap/c/0", folder / "gap/c/1"),
        ("gap/c/1", folder / "count/c/1"),
        ("count/c/2", tmp_path / "other.zarr/count/c/2"),
    ):
        sound = (folder / name).read_bytes()
        shard = int(name[-1])
        expected = CellStore(folder).read_chunk(4 * shard)
        (folder / name).write_bytes(donor.read_bytes())
        with pytest.raises(DamagedChunk, match=f"{name}: chunk {4 * shard} .* of another place"):
            CellStore(folder).read_chunk(4 * shard)
        (folder / name).write_bytes(sound)
        assert_same(CellStore(folder).read_chunk(4 * shard), expected)


def test_a_chunk_that_is_lost_from_its_shard_is_damage(tmp_path: Path) -> None:
    """A shard of another finalize may lack a chunk: zeros would be read as cells without counts."""
    write_store(tmp_path / "cells.zarr", random_counts(7))
    group = zarr.open_group(tmp_path / "cells.zarr", mode="r+")
    array = group["count"]
    assert isinstance(array, zarr.Array)
    array[1024:2048] = 0
    store = CellStore(tmp_path / "cells.zarr")
    assert store.read_chunk(0).nnz
    with pytest.raises(
        DamagedChunk, match=r"chunk 1 .* is damaged: the chunk's crc32c is 00000000"
    ):
        store.read_chunk(1)


@pytest.mark.parametrize("rows", [[1, 2, 200], [0, 150, 100, 200], [0, 10, 199]])
def test_chunk_rows_that_are_none_are_named(tmp_path: Path, rows: list[int]) -> None:
    write_store(tmp_path / "cells.zarr", random_counts(7))
    file = tmp_path / "cells.zarr/chunk_rows/c/0"
    found = np.frombuffer(file.read_bytes(), "<i8").copy()
    found[:] = np.interp(np.linspace(0, 1, len(found)), np.linspace(0, 1, len(rows)), rows)
    file.write_bytes(found.tobytes())
    with pytest.raises(ValueError, match="chunk_rows/c/0: damaged"):
        CellStore(tmp_path / "cells.zarr").read_chunk(0)
