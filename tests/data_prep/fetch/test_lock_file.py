import json

import pytest

from data_prep.fetch.item import Item
from data_prep.fetch.lock_file import Lock, read_lock, with_digests, write_lock


@pytest.fixture
def lock():
    items = [
        Item(dataset_id="b", url="https://x/b.h5ad"),
        Item(dataset_id="a", url="https://x/a.h5ad", size=0, terms={"assay": [["10x", "EFO:1"]]}),
    ]
    return Lock(
        sources=["cellxgene"], filters={"primary_only": True}, made="2026-01-02", items=items
    )


def test_read_what_was_written_sorted(tmp_path, lock):
    write_lock(tmp_path / "x" / "l.json", lock)
    found = read_lock(tmp_path / "x" / "l.json")
    assert found.items == lock.items[::-1]
    assert (found.sources, found.filters, found.made) == (lock.sources, lock.filters, lock.made)


def test_same_content_is_not_written_again(tmp_path, lock):
    path = tmp_path / "l.json"
    write_lock(path, lock)
    path.chmod(0o444)
    before = path.stat().st_ino
    write_lock(path, lock)
    assert path.stat().st_ino == before


def test_digests_fill_in_and_never_replace(lock):
    first = with_digests(lock, {"a": (5, "aa"), "c": (6, "cc")})
    assert [(item.size, item.sha256) for item in first.items] == [(None, ""), (5, "aa")]
    again = with_digests(first, {"a": (7, "bb")})
    assert again.items == first.items


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"fetch_lock": 1}',
        b'{"fetch_lock": 1, "sources": [], "filters": {}, "made": "", "items": [{}]}',
    ],
)
def test_damaged_lock(tmp_path, content):
    path = tmp_path / "l.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"l\.json.*--update"):
        read_lock(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset_id", "../../x"),
        ("url", "/etc/passwd"),
        ("size", -1),
        ("size", True),
        ("terms", "x"),
        ("other", "x"),
        ("title", 3),
    ],
)
def test_lock_that_somebody_changed(tmp_path, lock, name, value):
    path = tmp_path / "l.json"
    write_lock(path, lock)
    content = json.loads(path.read_bytes())
    content["items"][0][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        read_lock(path)


def test_dataset_twice_in_a_lock(tmp_path, lock):
    twice = Lock(sources=[], filters={}, made="", items=[*lock.items, lock.items[0]])
    write_lock(tmp_path / "l.json", twice)
    with pytest.raises(ValueError, match=r"l\.json: damaged .*dataset 'b' twice.*--update"):
        read_lock(tmp_path / "l.json")


def test_newer_lock(tmp_path):
    (tmp_path / "l.json").write_text('{"fetch_lock": 2}')
    with pytest.raises(ValueError, match="version 2, this program reads 1"):
        read_lock(tmp_path / "l.json")
