"""Datasets behind an address: fetched, converted, removed, within a budget."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_server import FaultServer, serving
from staged_h5ad import GENES, SETTINGS, counts, write

from data_prep.convert.convert import convert
from data_prep.convert.remote_sources import RemoteSources, item_of
from data_prep.fetch import download
from data_prep.fetch.download import Place, Rules
from data_prep.ledger.ledger import LedgerEntry, read_ledger
from data_prep.manifest.manifest import Dataset, read_manifest
from sclong_ds.files.atomic import file_sha256


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving() as state:
        yield state


@pytest.fixture
def datasets(tmp_path: Path, server: FaultServer) -> list[Dataset]:
    """Return three datasets behind addresses and one on this machine, from a manifest."""
    lines = ["dataset_id\tpath\tversion\ttitle"]
    for i in range(3):
        path = tmp_path / f"s{i}.h5ad"
        write(path, counts(seed=i))
        server.files[f"/{i}.h5ad"] = path.read_bytes()
        lines.append(f"d{i}\t{server.url(f'/{i}.h5ad')}\tv1\tNumber {i}")
    write(tmp_path / "mine.h5ad", counts(seed=9))
    lines.append("mine\tmine.h5ad\t\t")
    (tmp_path / "m.tsv").write_text("\n".join(lines))
    return list(read_manifest(tmp_path / "m.tsv"))


Run = Callable[..., list[LedgerEntry]]


@pytest.fixture
def run(tmp_path: Path, datasets: list[Dataset]) -> Run:
    def run(chosen: list[Dataset] | None = None, **options) -> list[LedgerEntry]:
        return convert(
            datasets if chosen is None else chosen,
            out=tmp_path / "corpus",
            genes=GENES,
            settings=SETTINGS,
            **options,
        )

    return run


def files_below(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_fetched_converted_removed_and_not_asked_for_again(run, tmp_path, server, datasets):
    entries = run(keep_bytes=max(len(data) for data in server.files.values()))
    assert [entry["status"] for entry in entries] == ["ok"] * 4
    assert entries[0]["path"] == server.url("/0.h5ad")
    digest = file_sha256(tmp_path / "s0.h5ad")
    assert entries[0]["origin"] == {
        **{"url": server.url("/0.h5ad"), "version": "v1", "title": "Number 0"},
        "sha256": digest,
    }
    assert files_below(tmp_path / "corpus" / ".sources") == []
    assert (tmp_path / "mine.h5ad").exists()
    assert (
        run()
        == entries
        == sorted(read_ledger(tmp_path / "corpus"), key=lambda e: e["path"][:4] != "http")
    )
    assert set(server.requests.values()) == {1}
    # The same staging as from a file on this machine.
    local = [dataclasses.replace(d, path=tmp_path / f"s{i}.h5ad", remote=False, url="")
             for i, d in enumerate(datasets[:3])]  # fmt: skip
    other = convert(local, out=tmp_path / "other", genes=GENES, settings=SETTINGS)
    assert [e["files"] for e in other] == [e["files"] for e in entries[:3]]


def test_signed_addresses_are_fetched_and_not_recorded(run, tmp_path, server, datasets):
    server.needs = "sig=5ec4e7&se=9"
    # The manifest is the user's; what convert writes is not.
    signed = [dataclasses.replace(d, url=f"{d.url}?{server.needs}") for d in datasets[:2]]
    del server.files["/1.h5ad"]
    entries = run(signed)
    assert [entry["status"] for entry in entries] == ["ok", "failed"]
    assert entries[0]["path"] == entries[0]["origin"]["url"] == server.url("/0.h5ad")
    text = b"".join(p.read_bytes() for p in (tmp_path / "corpus").rglob("*") if p.is_file())
    assert b"5ec4e7" not in text + repr(entries).encode()
    # Signed again, it is the same file.
    server.needs = "sig=5ec4e8&se=10"
    run([dataclasses.replace(datasets[0], url=f"{datasets[0].url}?{server.needs}")])
    assert server.requests["/0.h5ad"] == 1


def test_damage_is_fetched_again_and_another_address_refused(run, tmp_path, server, datasets):
    run(datasets[:1])
    path = tmp_path / "corpus" / "staging" / "d0" / "obs.parquet"
    whole = path.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run(datasets[:1])[0]["status"] == "ok"
    assert server.requests["/0.h5ad"] == 2
    assert path.read_bytes() == whole
    other = dataclasses.replace(datasets[0], url=server.url("/1.h5ad"))
    with pytest.raises(ValueError, match="dataset_id 'd0' is already http"):
        run([other])
    assert server.requests["/1.h5ad"] == 0


def test_file_of_the_name_of_a_dataset_where_convert_is_started_is_not_read(
    run, tmp_path, datasets, monkeypatch
):
    first = run(datasets[:1])
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d0", counts(seed=5))
    assert run(datasets[:1]) == first


def test_file_that_a_killed_run_left_behind_its_conversion_is_removed(run, tmp_path, datasets):
    run(datasets[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.convert.remote_sources.remove_fetched", lambda item, folder: False)
        run(datasets[:2])
    assert files_below(tmp_path / "corpus" / ".sources") == ["d1.h5ad", "d1.h5ad.json"]
    run(datasets[:2])
    assert files_below(tmp_path / "corpus" / ".sources") == []


def test_another_version_of_the_same_bytes_is_fetched_once(run, server, datasets):
    first = run(datasets[:1])[0]
    newer = dataclasses.replace(datasets[0], version="v2")
    assert run([newer]) == run([newer])
    assert server.requests["/0.h5ad"] == 2
    entry = run([newer])[0]
    assert (entry["origin"], entry["files"]) == (
        first["origin"] | {"version": "v2"},
        first["files"],
    )
    server.files["/new.h5ad"] = server.files["/0.h5ad"]
    moved = dataclasses.replace(newer, url=server.url("/new.h5ad"))
    run([moved], replace=True)
    assert run([moved])[0]["path"] == server.url("/new.h5ad")
    assert server.requests["/new.h5ad"] == 1


def test_folder_that_fetch_keeps_is_refused(run, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "fetch.lock.json").write_text("{}")
    with pytest.raises(ValueError, match=r"raw: a folder of fetch.*another folder"):
        run(sources=tmp_path / "raw")


def test_what_cannot_be_had_costs_no_other_and_files_of_the_user_stay(
    run, tmp_path, server, datasets
):
    folder = tmp_path / "sources"
    folder.mkdir()
    shutil.copy(tmp_path / "s0.h5ad", folder / "d0.h5ad")
    (folder / "d1.h5ad").write_bytes(b"mine")
    server.fault = lambda path, number: "404" if number == 0 else ""
    entries = run(sources=folder)
    assert [entry["status"] for entry in entries] == ["ok", "failed", "failed", "ok"]
    assert "move it away" in entries[1]["reason"]
    assert "no such file on the server (404)" in entries[2]["reason"]
    assert (folder / "d1.h5ad").read_bytes() == b"mine"
    assert (folder / "d0.h5ad").exists()
    assert server.requests == {"/2.h5ad": 1}
    (folder / "d1.h5ad").unlink()
    assert [entry["status"] for entry in run(sources=folder)][2:] == ["ok", "ok"]


@pytest.mark.parametrize(
    "path", ["gopher://x/a.h5ad", "x://y/z", "https://x.org/", "https://x.org/matrix.mtx.gz"]
)
def test_addresses_that_are_not_fetched(tmp_path, path):
    (tmp_path / "m.tsv").write_text(f"dataset_id\tpath\na\t{path}\n")
    with pytest.raises(ValueError, match=r"line 2: .*(allowed: http|one of several files)"):
        read_manifest(tmp_path / "m.tsv")


class TestBudget:
    """The parent's part alone: no worker, no counts."""

    @pytest.fixture
    def items(self, server: FaultServer, tmp_path: Path) -> list[Dataset]:
        found = []
        for i in range(8):
            data = json.dumps({"n": i}).encode().ljust(1000 + i)
            server.files[f"/{i}.txt"] = data
            found.append(
                Dataset(
                    dataset_id=f"t{i}", path=Path("x"), url=server.url(f"/{i}.txt"), remote=True
                )
            )
        return found

    def work(
        self, items: list[Dataset], folder: Path, keep: int | None
    ) -> tuple[list[str], int, list]:
        """Convert nothing: take each file, see how much is on the disk, give it back."""
        sources = RemoteSources(
            items, corpus=folder / "none", settings=SETTINGS, folder=folder, keep_bytes=keep,
            jobs=1, rules=Rules(attempts=2, first_wait_s=0.0),
        )  # fmt: skip
        seen, high, lost = [], 0, []
        while len(seen) + len(lost) < len(items):
            ready, failed = sources.advance()
            lost += failed
            on_disk = [p.stat().st_size for p in folder.rglob("t*.txt") if p.is_file()]
            high = max(high, sum(on_disk))
            for dataset in ready:
                assert dataset.path.read_bytes()
                seen.append(dataset.dataset_id)
                assert sources.finish({"dataset_id": dataset.dataset_id, "status": "ok"})
        sources.close()
        return seen, high, lost

    @pytest.mark.parametrize("known", [True, False])
    def test_never_more_on_the_disk(self, items, server, tmp_path, known):
        if known:
            items = [
                dataclasses.replace(d, bytes=len(server.files[f"/{i}.txt"]))
                for i, d in enumerate(items)
            ]
        seen, high, lost = self.work(items, tmp_path / "s", 2500)
        assert (sorted(seen), lost) == ([f"t{i}" for i in range(8)], [])
        assert 0 < high <= 2500
        assert files_below(tmp_path / "s") == []

    @pytest.mark.parametrize(("keep", "left"), [(2500, 0), (None, 500)])
    def test_part_of_a_file_that_cannot_be_had_stays_where_there_is_room(
        self, items, server, tmp_path, keep, left
    ):
        server.fault = lambda path, number: ("cut", "403")[number]
        _, _, lost = self.work(items[:1], tmp_path / "s", keep)
        assert "403" in lost[0][1]
        assert Place(tmp_path / "s", item_of(items[0])).bytes_here() == left

    @pytest.mark.parametrize("known", [True, False])
    def test_file_larger_than_the_budget_costs_no_other(self, items, server, tmp_path, known):
        server.files["/3.txt"] = b" " * 5000
        if known:
            items[3] = dataclasses.replace(items[3], bytes=5000)
        seen, high, lost = self.work(items, tmp_path / "s", 2500)
        assert sorted(seen) == [f"t{i}" for i in range(8) if i != 3]
        assert len(lost) == 1
        assert "2500" in lost[0][1]
        assert high <= 2500

    def test_leftovers_of_a_killed_run_come_first_and_never_block(self, items, tmp_path):
        folder = tmp_path / "s"
        for number in (5, 6):
            place = Place(folder, item_of(items[number]))
            place.part.parent.mkdir(parents=True, exist_ok=True)
            place.part.write_bytes(b"x" * 900)
        seen, _, lost = self.work(items, folder, 1900)
        assert (seen[0], sorted(seen), lost) == ("t5", [f"t{i}" for i in range(8)], [])
        assert files_below(folder) == []


def test_a_disk_that_holds_one_file_takes_them_one_after_the_other(
    run, tmp_path, server, monkeypatch
):
    """Nobody gave a limit; four downloads at once would fill it, and none be whole."""
    folder = tmp_path / "corpus" / ".sources"
    size = int(1.5 * max(len(data) for data in server.files.values()))
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(path):
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return usage._replace(free=size - used)

    monkeypatch.setattr(download.shutil, "disk_usage", disk_usage)
    assert [entry["status"] for entry in run(jobs=2)] == ["ok"] * 4
    # One that no disk of this size holds is named, and the others are done.
    size = min(len(data) for data in server.files.values()) - 1
    shutil.rmtree(tmp_path / "corpus")
    entries = run(jobs=2)
    assert [entry["status"] for entry in entries] == ["failed"] * 3 + ["ok"]
    assert all("the disk has" in entry["reason"] for entry in entries[:3])
