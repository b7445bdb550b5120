"""Parts of remote files: slow requests are sent twice, limits are our own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from served_files import FileServer

from sclong_ds.corpus.cell_store import CellStore, DamagedChunk
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.location import Location
from sclong_ds.remote import ranges, storage
from sclong_ds.remote.ranges import RangeRequests, client_options, try_once
from sclong_ds.remote.storage import WAIT_VARIABLE

CONTENT = bytes(range(256)) * 40


class Files:
    """An asynchronous file system that takes as long as it is told."""

    async_impl = True
    protocol: str | tuple[str, ...] = "s3"

    def __init__(self) -> None:
        self.sizes = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.waits: list[float | Exception] = []
        self.asked = self.ended = 0

    def size(self, path: str) -> int:
        self.sizes += 1
        return len(CONTENT)

    async def _cat_file(self, path: str, start: int, end: int | None) -> bytes:
        self.asked += 1
        wait = self.waits.pop(0) if self.waits else 0.0
        try:
            if isinstance(wait, Exception):
                raise wait
            await asyncio.sleep(wait)
        finally:
            self.ended += 1
        return CONTENT[start:end]


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    files.loop.call_soon_threadsafe(files.loop.stop)
    files.thread.join()
    files.loop.close()


def learnt(files: Files, monkeypatch: pytest.MonkeyPatch) -> RangeRequests:
    """Return requests to a file system that was quick so far."""
    monkeypatch.setattr(ranges, "_QUICKEST_S", 0.02)
    requests = RangeRequests(files)
    for _ in range(ranges._FEWEST):
        assert requests.read("x", 3, 9) == CONTENT[3:9]
    return requests


def test_the_first_answer_to_a_slow_request_sent_twice_counts(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = learnt(files, monkeypatch)
    assert requests.sent_twice == 0
    files.waits = [3600.0]
    assert requests.read("x", 5, 9) == CONTENT[5:9]
    assert (requests.sent_twice, requests.asked) == (1, ranges._FEWEST + 2)
    # The first one is given up, not left open.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), files.loop).result()
    assert files.ended == files.asked


def test_a_storage_that_is_slow_as_a_whole_gets_few_requests_twice(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = learnt(files, monkeypatch)
    files.waits = [0.03] * 100
    monkeypatch.setattr(requests, "_learn", lambda took_s: None)
    for _ in range(30):
        requests.read("x", 0, 9)
    assert requests.sent_twice <= 3 + 0.05 * requests.asked


@pytest.mark.parametrize(("protocol", "sizes"), [("abfs", 1), (("s3", "s3a"), 0), ("gs", 0)])
def test_the_last_bytes_come_without_the_size_where_a_client_can(
    files: Files, protocol: str | tuple[str, ...], sizes: int
) -> None:
    files.protocol = protocol
    assert RangeRequests(files).read("x", -7, None) == CONTENT[-7:]
    assert files.sizes == sizes


def test_one_that_fails_waits_for_the_other(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = learnt(files, monkeypatch)
    files.waits = [0.2, OSError("busy")]
    assert requests.read("x", 5, 9) == CONTENT[5:9]
    files.waits = [OSError("first"), OSError("second")]
    with pytest.raises(OSError, match="first"):
        requests.read("x", 5, 9)


def test_a_request_that_is_never_answered_ends(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CONNECT_S", 0.01)
    monkeypatch.setattr(ranges, "READ_S", 0.02)
    files.waits = [3600.0]
    with pytest.raises(TimeoutError) as met:
        RangeRequests(files).read("x", 0, 9)
    assert storage.passes(met.value)


def test_clients_wait_as_long_as_we_say_and_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    limits = client_options("https://host/corpus")["client_kwargs"]["timeout"]
    assert (limits.total, limits.sock_connect, limits.sock_read) == (None, 5.0, 20.0)
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 60, "x": 1}})
    told = client_options("s3://bucket/corpus")["config_kwargs"]
    assert (told["read_timeout"], told["x"], told["connect_timeout"]) == (60, 1, 5.0)
    assert told["max_pool_connections"] >= 64
    assert told["retries"] == {"total_max_attempts": 1}
    assert client_options("memory://x") == client_options("simplecache::s3://b/x") == {}

    class Client:
        retries = 5

    client: Any = Client()
    try_once(client)
    assert (client.retries, Client.retries) == (1, 5)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FileServer, Location]]:
    monkeypatch.setenv(WAIT_VARIABLE, "30")
    counts = sparse.random(300, 90, 0.3, "csr", rng=np.random.default_rng(0))
    counts.data = np.ceil(counts.data * 9)
    with CellWriter(tmp_path / "cells", n_genes=90, chunk_entries=512, chunks_per_shard=4) as made:
        made.append(counts.astype(np.int64), source={})
    files = {
        f"cells/{path.relative_to(tmp_path / 'cells')}": path.read_bytes()
        for path in (tmp_path / "cells").rglob("*")
        if path.is_file()
    }
    server = FileServer(files)
    yield (
        server,
        Location(
            f"{server.url}/cells", version="1", cache_dir=tmp_path / "cache", kept_bytes=10**6
        ),
    )
    server.released.set()
    server.stop()


@pytest.mark.thorough
def test_cells_through_faults_and_from_the_cache_are_the_cells(
    store: tuple[FileServer, Location], tmp_path: Path
) -> None:
    server, location = store
    expected = CellStore(tmp_path / "cells").rows(range(300))
    faults = ["", "503", "", "changed", "", "cut", "", "reset", ""]
    remote = CellStore(location)
    remote.read_packed(0)  # the tables, which have no record here
    server.fault = lambda number: faults[number % len(faults)]
    assert (remote.rows(range(300)) != expected).nnz == 0
    server.stop()
    # Every part is on this machine now, and none that arrived changed.
    again = CellStore(location)
    assert (again.rows(range(300)) != expected).nnz == 0


def test_a_shard_that_is_changed_on_the_server_is_named(
    store: tuple[FileServer, Location], tmp_path: Path
) -> None:
    server, location = store
    name = next(name for name in server.files if "/count/c/" in name)
    content = bytearray(server.files[name])
    content[20] ^= 1
    server.files = {**server.files, name: bytes(content)}
    with pytest.raises(DamagedChunk, match=r"count/c/\d+: chunk \d+ .*crc32c"):
        CellStore(location).rows(range(300))
