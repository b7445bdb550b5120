import hashlib
import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.fetch import download
from data_prep.fetch.budgets import DiskBudget, Stopped
from data_prep.fetch.download import Place, Rules, fetch_file, remove_fetched
from data_prep.fetch.item import Item
from data_prep.fetch.remote import FetchError
from sclong_ds.files.atomic import file_sha256


@pytest.fixture
def data(hdf5):
    return hdf5()


@pytest.fixture
def item(server, data):
    server.files["/a.h5ad"] = data
    return Item(dataset_id="d", url=server.url("/a.h5ad"))


def test_file_comes_whole_with_a_record(item, data, rules, tmp_path):
    record = fetch_file(item, tmp_path / "raw", rules)
    path = tmp_path / "raw" / "d.h5ad"
    assert path.read_bytes() == data
    assert record["sha256"] == file_sha256(path)
    assert (record["size"], record["url"], record["brought"]) == (len(data), item.url, False)
    left = sorted(p.name for p in (tmp_path / "raw" / ".fetched").iterdir())
    assert left == ["d.h5ad.json", "d.h5ad.lock"]


def test_file_that_is_there_is_not_asked_for(item, rules, tmp_path, server):
    first = fetch_file(item, tmp_path, rules)
    assert fetch_file(item, tmp_path, rules) == first
    assert server.requests["/a.h5ad"] == 1


def test_cut_bodies_are_continued_where_they_stopped(item, data, rules, tmp_path, server):
    server.fault = lambda path, number: "cut" if number < 6 else ""
    retried = []
    rules.retried = lambda item, reason: retried.append(reason)
    fetch_file(item, tmp_path, rules)
    assert (tmp_path / "d.h5ad").read_bytes() == data
    # More cuts than tries: each that brings enough begins the count again.
    assert len(retried) == 6 > rules.attempts
    assert server.sent == len(data)


def test_tries_end_where_nothing_comes(item, rules, tmp_path, server):
    server.fault = lambda path, number: "503"
    with pytest.raises(FetchError, match=r"busy.*503.*tried 4 times"):
        fetch_file(item, tmp_path, rules)
    assert server.requests["/a.h5ad"] == 4


@pytest.mark.parametrize("fault", ["404", "403"])
def test_hopeless_is_not_tried_again(item, rules, tmp_path, server, fault):
    server.fault = lambda path, number: fault
    with pytest.raises(FetchError):
        fetch_file(item, tmp_path, rules)
    assert server.requests["/a.h5ad"] == 1
    assert not (tmp_path / "d.h5ad").exists()


def test_web_pages_are_tried_a_few_times(item, rules, tmp_path, server):
    server.fault = lambda path, number: "html"
    with pytest.raises(FetchError, match="web page"):
        fetch_file(item, tmp_path, rules)
    assert server.requests["/a.h5ad"] == 3


def test_server_that_trickles_is_left(item, data, rules, tmp_path, server):
    server.fault = lambda path, number: "trickle" if number == 0 else ""
    retried = []
    rules.retried = lambda item, reason: retried.append(reason)
    fetch_file(item, tmp_path, rules)
    assert "too slow" in retried[0]
    assert (tmp_path / "d.h5ad").read_bytes() == data


def test_change_between_two_parts_begins_again(item, data, rules, tmp_path, server, hdf5):
    new = hdf5(seed=1)

    def fault(path, number):
        if number == 1:
            server.files[path] = new
        return "cut" if number == 0 else ""

    server.fault = fault
    fetch_file(item, tmp_path, rules)
    assert (tmp_path / "d.h5ad").read_bytes() == new


def test_length_of_the_list_is_binding(server, item, data, rules, tmp_path):
    other = Item(dataset_id="d", url=item.url, size=len(data) + 1)
    with pytest.raises(FetchError, match="changed under its name"):
        fetch_file(other, tmp_path, rules)
    assert not Place(tmp_path, other).part.exists()
    assert fetch_file(Item(dataset_id="d", url=item.url, size=len(data)), tmp_path, rules)


def test_digest_of_the_lock_is_binding(item, data, rules, tmp_path, server, hdf5):
    digest = fetch_file(item, tmp_path / "1", rules)["sha256"]
    locked = Item(dataset_id="d", url=item.url, size=len(data), sha256=digest)
    fetch_file(locked, tmp_path / "2", rules)
    server.files["/a.h5ad"] = hdf5(seed=1)
    assert len(server.files["/a.h5ad"]) == len(data)
    with pytest.raises(FetchError, match=r"another SHA-256.*changed under its name"):
        fetch_file(locked, tmp_path / "3", rules)
    assert not (tmp_path / "3" / "d.h5ad").exists()


def test_damaged_on_the_server(item, data, rules, tmp_path, server):
    server.files["/a.h5ad"] = data[:1000]
    with pytest.raises(FetchError, match="damaged or not whole"):
        fetch_file(item, tmp_path, rules)
    assert not list((tmp_path / ".fetched").glob("*.part*"))


def test_new_version_replaces_the_fetched_one(item, data, rules, tmp_path, server, hdf5):
    fetch_file(item, tmp_path, rules)
    server.files["/b.h5ad"] = hdf5(seed=1)
    newer = Item(dataset_id="d", url=server.url("/b.h5ad"))
    fetch_file(newer, tmp_path, rules)
    assert (tmp_path / "d.h5ad").read_bytes() == server.files["/b.h5ad"]


class TestFilesOfTheUser:
    def test_same_file_is_taken_and_never_removed(self, item, data, rules, tmp_path, server):
        (tmp_path / "d.h5ad").write_bytes(data)
        assert fetch_file(item, tmp_path, rules)["brought"]
        assert not server.requests
        assert not remove_fetched(item, tmp_path)
        assert (tmp_path / "d.h5ad").exists()

    @pytest.mark.parametrize("content", [b"", b"mine", "truncated"])
    def test_other_file_is_left_alone(self, item, data, rules, tmp_path, server, content):
        mine = data[:-5] if content == "truncated" else content
        (tmp_path / "d.h5ad").write_bytes(mine)
        with pytest.raises(FetchError, match="move it away"):
            fetch_file(item, tmp_path, rules)
        assert (tmp_path / "d.h5ad").read_bytes() == mine
        assert not remove_fetched(item, tmp_path)

    def test_fetched_file_that_was_changed_is_left_alone(self, item, rules, tmp_path):
        fetch_file(item, tmp_path, rules)
        (tmp_path / "d.h5ad").write_bytes(b"my notes")
        assert not remove_fetched(item, tmp_path)
        with pytest.raises(FetchError, match="move it away"):
            fetch_file(item, tmp_path, rules)
        assert (tmp_path / "d.h5ad").read_bytes() == b"my notes"

    def test_link_to_another_folder_is_not_written_through(self, item, data, rules, tmp_path):
        mine = tmp_path / "mine"
        mine.write_bytes(b"mine")
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / "d.h5ad").symlink_to(mine)
        with pytest.raises(FetchError, match="move it away"):
            fetch_file(item, tmp_path / "raw", rules)
        assert mine.read_bytes() == b"mine"

    def test_file_that_arrives_meanwhile_wins(self, item, rules, tmp_path):
        rules.progress = lambda *a: (tmp_path / "d.h5ad").write_bytes(b"mine")
        with pytest.raises(FetchError, match="move it away"):
            fetch_file(item, tmp_path, rules)
        assert (tmp_path / "d.h5ad").read_bytes() == b"mine"


def test_fetched_file_is_removed_with_its_record(item, rules, tmp_path):
    fetch_file(item, tmp_path, rules)
    assert remove_fetched(item, tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["d.h5ad.lock"]


def test_full_disk_by_the_free_space(item, rules, tmp_path, monkeypatch, server):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FetchError, match=r"the disk has 1000 left"):
        fetch_file(item, tmp_path, rules)
    assert server.requests["/a.h5ad"] == 1


def test_disk_that_fills_up_keeps_what_came(item, data, rules, tmp_path, monkeypatch, server):
    def full(*args):
        raise OSError(28, "No space left on device")

    rules.progress = lambda *a: monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FetchError, match="No space left on device"):
        fetch_file(item, tmp_path, rules)
    assert server.requests["/a.h5ad"] == 1
    monkeypatch.undo()
    rules.progress = lambda *a: None
    fetch_file(item, tmp_path, rules)
    assert (tmp_path / "d.h5ad").read_bytes() == data


def test_disk_budget_is_kept(item, data, rules, tmp_path):
    rules.disk = DiskBudget(len(data) - 1)
    with pytest.raises(FetchError, match="disk budget"):
        fetch_file(item, tmp_path, rules)
    assert not (tmp_path / "d.h5ad").exists()


def test_disk_budget_where_no_length_is_told(item, data, rules, tmp_path, server):
    server.fault = lambda path, number: "no_length"
    rules.disk = DiskBudget(len(data) - 1)
    with pytest.raises(FetchError, match="disk budget"):
        fetch_file(item, tmp_path, rules)
    rules.disk = DiskBudget(len(data))
    fetch_file(item, tmp_path, rules)
    assert (tmp_path / "d.h5ad").read_bytes() == data


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "fork"), reason="root writes anywhere")
def test_folder_that_cannot_be_written(item, rules, tmp_path, monkeypatch):
    fetch_file(item, tmp_path / "there", rules)

    def refuse(path, *a, **k):
        raise PermissionError(30, "Read-only file system", str(path))

    monkeypatch.setattr(download, "locked", refuse)
    assert fetch_file(item, tmp_path / "there", rules)
    with pytest.raises(FetchError, match="Read-only file system") as raised:
        fetch_file(item, tmp_path / "other", rules)
    assert not raised.value.again


def test_stop_keeps_what_came(item, data, rules, tmp_path, server):
    rules.progress = lambda *a: rules.stop.set()
    with pytest.raises(Stopped):
        fetch_file(item, tmp_path, rules)
    came = (tmp_path / ".fetched" / "d.h5ad.part").stat().st_size
    assert came > 0
    rules.progress = lambda *a: None
    rules.stop.clear()
    fetch_file(item, tmp_path, rules)
    assert server.ranges == ["", f"bytes={came}-"]
    assert (tmp_path / "d.h5ad").read_bytes() == data


class TestKilled:
    """What a process that ended without a word has left."""

    @pytest.fixture
    def part(self, item, data, tmp_path):
        place = Place(tmp_path, item)
        place.part.parent.mkdir()

        def leave(n_bytes, **changes):
            place.part.write_bytes(data[:n_bytes])
            mark = '"' + hashlib.sha256(data).hexdigest()[:16] + '"'
            begun = {"url": item.url, "version": "", "mark": mark, "total": len(data)}
            begun |= {"synced": 0, "boot": download._boot()} | changes
            place.begun.write_text(json.dumps(begun))
            return place

        return leave

    @pytest.mark.parametrize(
        ("changes", "again"),
        [
            ({}, 0),
            ({"boot": "an earlier one", "synced": 0}, 5000),
            ({"boot": "an earlier one", "synced": 2000}, 3000),
            ({"url": "http://x/other"}, 5000),
            ({"mark": ""}, 5000),
            ({"mark": '"another content"'}, 5000),
            ({"synced": "x", "boot": ""}, 5000),
        ],
    )
    def test_part_is_used_as_far_as_it_is_certain(
        self, part, item, data, rules, tmp_path, server, changes, again
    ):
        part(5000, **changes)
        fetch_file(item, tmp_path, rules)
        assert (tmp_path / "d.h5ad").read_bytes() == data
        assert server.sent == len(data) - 5000 + again

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null"])
    def test_state_that_cannot_be_read(self, part, item, data, rules, tmp_path, content):
        part(5000).begun.write_bytes(content)
        fetch_file(item, tmp_path, rules)
        assert (tmp_path / "d.h5ad").read_bytes() == data

    def test_before_the_move(self, part, item, data, rules, tmp_path, server):
        part(len(data))
        fetch_file(item, tmp_path, rules)
        assert (tmp_path / "d.h5ad").read_bytes() == data
        assert not server.requests

    @pytest.mark.parametrize("damage", [None, b"", b"{}", b"{"])
    def test_record_that_is_gone_or_damaged(self, item, data, rules, tmp_path, damage):
        fetch_file(item, tmp_path, rules)
        record = Place(tmp_path, item).record
        record.unlink() if damage is None else record.write_bytes(damage)
        assert fetch_file(item, tmp_path, rules)["size"] == len(data)


FAULTS = st.sampled_from(
    "404 429 503 cut html no_range late_range drop flipped_mark weak no_length changed".split()
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(faults=st.lists(FAULTS, max_size=12), cut_at=st.floats(0, 1), runs=st.integers(1, 3))
def test_whatever_happens_the_file_is_whole_or_absent(
    faults, cut_at, runs, item, server, rules, hdf5, tmp_path_factory
):
    """Any faults in any order: the file is one that the server had, or the part is kept."""
    folder = tmp_path_factory.mktemp("raw")
    versions = [hdf5(seed, 70_000) for seed in range(2)]
    server.files["/a.h5ad"] = versions[0]
    server.requests.clear()
    server.cut_at = cut_at

    def fault(path, number):
        name = faults[number] if number < len(faults) else ""
        if name == "changed":
            server.files["/a.h5ad"] = versions[1]
        return "" if name == "changed" else name

    server.fault = fault
    quick = Rules(attempts=3, first_wait_s=0.0, longest_wait_s=0.0)
    for _ in range(runs):
        try:
            fetch_file(item, folder, quick)
        except FetchError:
            assert not (folder / "d.h5ad").exists()
    server.fault = lambda path, number: ""
    fetch_file(item, folder, rules)
    assert (folder / "d.h5ad").read_bytes() in versions
    assert not list(folder.glob(".fetched/*.part*"))


def test_room_set_aside_for_a_file_of_unknown_length_stays_its_own(server, rules, tmp_path, hdf5):
    server.files["/d.h5ad"] = hdf5()
    server.fault = lambda path, number: "no_length"
    item = Item(dataset_id="d", url=server.url("/d.h5ad"))
    rules.disk = DiskBudget(1_000_000)
    rules.disk.hold(item.file_name, 1_000_000)
    others = []
    rules.progress = lambda item, done, total: others.append(rules.disk.hold("other", 1))
    assert fetch_file(item, tmp_path, rules)["size"] == len(server.files["/d.h5ad"])
    assert others
    assert not any(others)
