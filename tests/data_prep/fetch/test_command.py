import functools
import json

import pytest
from fault_server import entry

from data_prep.__main__ import main
from data_prep.fetch import command
from data_prep.fetch.download import Rules
from data_prep.manifest.manifest import read_manifest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let no try wait, nor a file be flushed."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr(command, "Rules", functools.partial(Rules, first_wait_s=0.0))


@pytest.fixture
def atlas(server, hdf5):
    """Serve four datasets: two human ones, one of the mouse, one without a field."""
    server.listing = []
    mouse = [{"label": "Mus musculus", "ontology_term_id": "NCBITaxon:10090"}]
    for name, changes in {
        "a": {},
        "b": {"primary_cell_count": 0},
        "m": {"organism": mouse},
        "x": {"organism": "absent", "cell_count": "absent"},
    }.items():
        data = hdf5(seed=len(server.listing), n_bytes=9000)
        server.files[f"/{name}.h5ad"] = data
        asset = {"filetype": "H5AD", "filesize": len(data), "url": server.url(f"/{name}.h5ad")}
        server.listing.append(entry(name, assets=[asset], **changes))
    return server


@pytest.fixture
def run(atlas, tmp_path, capsys):
    """Return a function that runs `fetch` and returns status, stdout and stderr."""

    def run(*options, source=("--from", "cellxgene"), out="raw"):
        listing = ("--listing", atlas.url("/datasets"))
        words = ["fetch", *source, "--out", str(tmp_path / out), *listing, *options]
        status = main(words)
        return status, *capsys.readouterr()

    return run


def test_dry_run_takes_nothing(run, tmp_path):
    status, out, _ = run("--organism", "human", "--dry-run", "--rate", "10kB")
    assert status == 0
    assert "2 datasets, 200 cells, of which 60 primary" in out
    assert "left out: 1 other organism, 1 the list has no organism" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json(run, atlas):
    facts = json.loads(run("--dry-run", "--json", "--rate", "1000")[1])
    total = sum(len(data) for data in atlas.files.values())
    assert (facts["datasets"], facts["cells"], facts["bytes"]) == (4, 300, total)
    assert facts["cells_unknown"] == 1
    assert facts["hours"] == pytest.approx(total / 3.6e6, abs=0.01)


def test_files_lock_and_manifest(run, atlas, tmp_path):
    status, _, _ = run("--organism", "human", "--primary-only")
    assert status == 0
    (dataset,) = read_manifest(tmp_path / "raw" / "manifest.tsv")
    assert dataset.path == tmp_path / "raw" / "a.h5ad"
    assert dataset.path.read_bytes() == atlas.files["/a.h5ad"]
    assert (dataset.version, dataset.licence, dataset.doi) == ("a-v1", "CC BY 4.0", "10.1/2")
    lock = json.loads((tmp_path / "raw" / "fetch.lock.json").read_bytes())
    assert lock["filters"] == {"organism": ["human"], "primary_only": True}
    assert lock["items"][0]["sha256"] == dataset.sha256 != ""


def test_lock_gives_the_same_list_when_the_source_has_moved_on(run, atlas, tmp_path):
    run("--ids", "a", "b")
    lock = (tmp_path / "raw" / "fetch.lock.json").read_bytes()
    atlas.listing = [entry("new")]
    elsewhere = ("--lock", str(tmp_path / "raw" / "fetch.lock.json"))
    assert run(*elsewhere, source=(), out="second")[0] == 0
    for name in "ab":
        path = tmp_path / "second" / f"{name}.h5ad"
        assert path.read_bytes() == atlas.files[f"/{name}.h5ad"]
    assert (tmp_path / "raw" / "fetch.lock.json").read_bytes() == lock
    # The digest of the first time tells a file of the same length that was put in its place.
    atlas.files["/a.h5ad"] = atlas.files["/a.h5ad"][:-1] + b"!"
    status, _, err = run(*elsewhere, source=(), out="third")
    assert status == 1
    assert "a: another SHA-256" in err


def test_other_filters_than_those_of_the_lock_are_refused(run):
    run("--ids", "a")
    status, _, err = run("--ids", "b")
    assert status == 1
    assert "was made from cellxgene" in err
    assert err.count("\n") == 1
    # A list of one dataset is not all of cellxgene.
    status, _, err = run()
    assert (status, "with {}" in err) == (1, True)
    status, _, err = run(source=())
    assert (status, "--update makes a new one" in err) == (0, True)
    assert run("--ids", "b", "--update")[0] == 0


def test_list_names_addresses_and_fetches_nothing(run, atlas, tmp_path):
    assert run("--list", "--organism", "human")[0] == 0
    assert set(atlas.requests) == {"/datasets"}
    text = (tmp_path / "raw" / "manifest.tsv").read_text()
    assert f"\t{atlas.url('/a.h5ad')}\t" in text


def test_failed_files_are_named_and_the_others_listed(run, atlas, tmp_path):
    atlas.fault = lambda path, number: "404" if path == "/b.h5ad" else ""
    status, out, err = run("--ids", "a", "b")
    assert status == 1
    assert "1 of 2 files" in out
    assert "error: not there: 1 of 2 files (b: no such file on the server (404))" in err
    assert "# not fetched: b: no such file" in (tmp_path / "raw" / "manifest.tsv").read_text()
    assert [d.dataset_id for d in read_manifest(tmp_path / "raw" / "manifest.tsv")] == ["a"]


def test_addresses_and_lists_of_them(run, atlas, tmp_path):
    (tmp_path / "list.txt").write_text(f"liver\t{atlas.url('/a.h5ad')}\n")
    source = ("--from", str(tmp_path / "list.txt"), atlas.url("/b.h5ad"))
    local = tmp_path / "local.h5ad"
    local.write_bytes(atlas.files["/m.h5ad"])
    assert run(source=(*source, local.as_uri()))[0] == 0
    names = {path.name for path in (tmp_path / "raw").glob("*.h5ad")}
    assert names == {"liver.h5ad", "b.h5ad", "local.h5ad"}
    assert local.exists()
    status, _, err = run("--tissue", "lung", source=source, out="other")
    assert (status, "filters are for --from cellxgene" in err) == (1, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<html>", "no JSON list"), (b"{}", "got dict"), (b"[]", "it is empty")],
)
def test_listing_that_is_none_is_one_line(run, atlas, tmp_path, content, words):
    atlas.listing = content
    status, out, err = run()
    assert (status, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "raw").exists()


def test_manifest_that_somebody_wrote_stays(run, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "manifest.tsv").write_text("dataset_id\tpath\n")
    status, _, err = run("--ids", "a")
    assert status == 1
    assert "was not written by fetch" in err
    assert not (tmp_path / "raw" / "a.h5ad").exists()
    assert (tmp_path / "raw" / "manifest.tsv").read_text() == "dataset_id\tpath\n"


def test_nothing_to_fetch(run):
    status, _, err = run("--tissue", "brain")
    assert status == 1
    assert "no dataset to fetch (4 other tissue" in err
    assert "--from is missing" in run(source=())[2]


def everything_below(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_signatures_open_files_and_are_written_nowhere(run, atlas, tmp_path):
    secret = b"5ec4e7"
    atlas.needs = "X-Amz-Signature=5ec4e7"
    source = ("--from", *(atlas.url(f"/{name}.h5ad?v=1&{atlas.needs}") for name in "ab"))
    atlas.fault = lambda path, number: "404" if path == "/b.h5ad" else ""
    status, out, err = run(source=source)
    assert (status, "5ec4e7" in out + err) == (1, False)
    assert (tmp_path / "raw" / "a.h5ad").read_bytes() == atlas.files["/a.h5ad"]
    assert secret not in everything_below(tmp_path / "raw")
    # Signed again, and the list of the lock; without a signature the server refuses.
    atlas.fault, atlas.needs = lambda path, number: "", "X-Amz-Signature=5ec4e8"
    source = tuple(text.replace("5ec4e7", "5ec4e8") for text in source)
    assert run(source=())[0] == 1
    assert run(source=source)[0] == 0
    assert b"5ec4e8" not in everything_below(tmp_path / "raw")
    # What `convert` is to fetch needs them.
    status, _, err = run("--list", source=source, out="list")
    assert (status, "holds signed addresses" in err) == (0, True)
    assert secret[:-1] not in (tmp_path / "list" / "fetch.lock.json").read_bytes()
    first = read_manifest(tmp_path / "list" / "manifest.tsv")[0]
    assert (first.address, first.url) == (source[1], atlas.url("/a.h5ad?v=1"))
    assert "5ec4e8" not in repr(first)
