"""Parts of remote files kept on a machine: whole, unchanged, within the limit."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sclong_ds.remote import range_cache
from sclong_ds.remote.range_cache import RangeCache

HEAD = 12


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*/*"))


def test_a_part_is_kept_for_its_file_place_and_corpus(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, of="a", limit_bytes=10_000)
    cache.put("gap/c/0", 5, 3, b"abc")
    cache.put("gap/c/0", -3, 3, b"end")
    again = RangeCache(tmp_path, of="a", limit_bytes=10_000)
    assert again.get("gap/c/0", 5, 3) == b"abc"
    assert again.get("gap/c/0", -3, 3) == b"end"
    for name, start, length in (("gap/c/1", 5, 3), ("gap/c/0", 4, 3), ("gap/c/0", 5, 2)):
        assert again.get(name, start, length) is None
    assert RangeCache(tmp_path, of="b", limit_bytes=10_000).get("gap/c/0", 5, 3) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_a_part_that_changed_on_the_disk_is_not_there(tmp_path: Path, damage: str) -> None:
    cache = RangeCache(tmp_path, of="a", limit_bytes=10_000)
    cache.put("x", 0, 100, bytes(range(100)))
    (path,) = tmp_path.glob("*/*/*")
    content = bytearray(path.read_bytes())
    content[50] ^= 4
    path.write_bytes({
        "flip": bytes(content), "cut": path.read_bytes()[:-1], "empty": b"",
        "longer": path.read_bytes() + b"0",
    }[damage])  # fmt: skip
    assert cache.get("x", 0, 100) is None
    cache.put("x", 0, 100, bytes(range(100)))
    assert cache.get("x", 0, 100) == bytes(range(100))


def test_the_limit_holds_and_what_is_kept_stays(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, of="a", limit_bytes=1000)
    for k in range(20):
        cache.put("x", k, 100, bytes([k]) * 100)
    assert kept_bytes(tmp_path) == 8 * (100 + HEAD)
    assert [cache.get("x", k, 100) is not None for k in range(20)] == [True] * 8 + [False] * 12


def test_other_corpora_go_when_they_are_not_used_for_long(tmp_path: Path) -> None:
    old = RangeCache(tmp_path, of="old", limit_bytes=1000)
    for k in range(8):
        old.put("x", k, 100, bytes(100))
    RangeCache(tmp_path, of="new", limit_bytes=1000).put("x", 0, 100, bytes(100))
    assert RangeCache(tmp_path, of="new", limit_bytes=1000).get("x", 0, 100) is None
    long_ago = time.time() - 2 * 3600
    for path in tmp_path.glob("*/*/*"):
        os.utime(path, (long_ago, long_ago))
    assert old.get("x", 5, 100) == bytes(100)  # in use again
    new = RangeCache(tmp_path, of="new", limit_bytes=1000)
    for k in range(8):
        new.put("x", k, 100, bytes(100))
    assert old.get("x", 5, 100) == bytes(100)
    assert sum(new.get("x", k, 100) is not None for k in range(8)) == 7
    assert kept_bytes(tmp_path) <= 1000


def test_what_killed_processes_leave_is_counted_and_removed(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, of="a", limit_bytes=1000)
    cache.put("x", 0, 100, bytes(100))
    (path,) = tmp_path.glob("*/*/*")
    left = path.with_name(f".{path.name}.{'0' * 16}.partial")
    left.write_bytes(bytes(800))
    long_ago = time.time() - 2 * 3600
    os.utime(left, (long_ago, long_ago))
    (tmp_path / "used").write_text("1000")
    for k in range(8):
        cache.put("x", k, 100, bytes(100))
    assert not left.exists()
    assert kept_bytes(tmp_path) == 8 * (100 + HEAD)


def test_processes_share_the_limit(tmp_path: Path) -> None:
    code = (
        "import sys; from sclong_ds.remote.range_cache import RangeCache\n"
        "cache = RangeCache(sys.argv[1], of='a', limit_bytes=20_000)\n"
        "for k in range(200): cache.put(sys.argv[2], k, 100, bytes(100))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abcd"
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert 19_900 - 100 - HEAD < kept_bytes(tmp_path) <= 20_000
    assert int((tmp_path / "used").read_text()) == kept_bytes(tmp_path)


def test_a_disk_that_fails_is_said_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = RangeCache(tmp_path, of="a", limit_bytes=10_000)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING, logger=range_cache.__name__):
        for k in range(3):
            cache.put("x", k, 4, b"abcd")
    assert cache.get("x", 0, 4) is None
    assert [record.getMessage().count("disk is full") for record in caplog.records] == [1]
