"""Folders of files, local and remote, and a corpus in them."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.spec import AbstractFileSystem
from scipy import sparse

from sclong_ds.corpus.catalogue import DatasetInfo, write_catalogue
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.location import CACHE_VARIABLE, Location
from sclong_ds.files.obs_table import write_obs
from sclong_ds.remote.storage import WAIT_VARIABLE

CONTENT = bytes(range(256)) * 10


class Faulty(AbstractFileSystem):
    """A remote file system whose reads can be made to fail."""

    protocol = "faulty"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    fault: ClassVar[str] = ""
    reads: ClassVar[list[str]] = []

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        inside = [name[len(path) + 1 :] for name in self.files if name.startswith(f"{path}/")]
        return sorted({f"{path}/{name.partition('/')[0]}" for name in inside})

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        if self.fault == "whole":
            return self.files[self._strip_protocol(path)]
        return super().cat_file(path, start, end, **kwargs)

    def _open(self, path: str, *args: Any, **kwargs: Any) -> io.BytesIO:
        self.info(path)
        self.reads.append(path)
        content = self.files[path]
        if self.fault == "short":
            content = content[:-5]
        if self.fault == "error":
            raise OSError("connection reset by peer")
        if self.fault == "foreign":
            raise RuntimeError("the client's own kind of error")
        return io.BytesIO(content)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    monkeypatch.setenv(WAIT_VARIABLE, "0")
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.files, Faulty.fault, Faulty.reads = {"bucket/a/data.bin": CONTENT}, "", []
    return Faulty


@pytest.fixture(params=["path", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """A folder with a/data.bin and a/empty."""
    memory = fsspec.filesystem("memory")
    if request.param == "memory":
        memory.pipe({"/corpus/a/data.bin": CONTENT, "/corpus/a/empty": b""})
        yield Location("memory://corpus", cache_dir=tmp_path / "cache")
        memory.rm("/corpus", recursive=True)
        return
    (tmp_path / "corpus" / "a").mkdir(parents=True)
    (tmp_path / "corpus" / "a" / "data.bin").write_bytes(CONTENT)
    (tmp_path / "corpus" / "a" / "empty").write_bytes(b"")
    path = tmp_path / "corpus"
    yield Location(path if request.param == "path" else f"file://{path}/")


def test_every_kind_of_folder_reads_alike(location: Location) -> None:
    assert location.exists("a/data.bin")
    assert not location.exists("a/none")
    assert not location.exists("a")
    assert (location.names(), (location / "a").names()) == (["a"], ["data.bin", "empty"])
    assert location.size("a/data.bin") == len(CONTENT)
    for inside in (location / "a", pickle.loads(pickle.dumps(location / "a"))):
        assert inside.read_bytes("data.bin") == CONTENT
        assert inside.read_bytes("empty") == b""
        for start, length in ((0, 10), (300, 1), (0, len(CONTENT)), (7, 0)):
            assert inside.read_range("data.bin", start, length) == CONTENT[start : start + length]
        assert inside.read_range("data.bin", len(CONTENT) - 3, 10) == CONTENT[-3:]
        assert inside.local_path("data.bin").read_bytes() == CONTENT
    for read in (location.size, location.read_bytes):
        with pytest.raises(FileNotFoundError, match="a/none"):
            read("a/none")
    with pytest.raises(FileNotFoundError, match="a/none"):
        location.read_range("a/none", 0, 5)


def test_equal_urls_are_equal() -> None:
    first, second = Location("s3://bucket/corpus"), Location("s3://bucket/corpus/", version="x")
    assert first == second
    assert len({first, second, first / "a", Location("s3://bucket/corpus/a")}) == 2
    assert (first.is_local, Location("corpus").is_local) == (False, True)
    assert Location("file:///corpus").folder == Path("/corpus")
    with pytest.raises(ValueError, match="s3://bucket/corpus: needs a folder on this machine"):
        first.folder  # noqa: B018


def test_a_remote_file_is_downloaded_once(
    faulty: type[Faulty], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found: list[Path] = []
    places = [Location("faulty://bucket", version="1") / "a" for _ in range(8)]
    threads = [
        threading.Thread(target=lambda place=place: found.append(place.local_path("data.bin")))
        for place in places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {path.read_bytes() for path in found} == {CONTENT}
    assert len(set(found)) == len(faulty.reads) == 1
    assert found[0].is_relative_to(tmp_path / "cache")
    again = Location("faulty://bucket", version="1", cache_dir=tmp_path / "cache") / "a"
    assert again.local_path("data.bin") == found[0]
    assert len(faulty.reads) == 1


@pytest.mark.parametrize("version", [None, "version"])
def test_a_changed_folder_is_not_read_from_the_old_cache(
    faulty: type[Faulty], tmp_path: Path, version: str | None
) -> None:
    def read() -> bytes:
        state = version and f"{version}{len(faulty.files['bucket/a/data.bin'])}"
        folder = Location("faulty://bucket", cache_dir=tmp_path, version=state)
        return folder.local_path("a/data.bin").read_bytes()

    assert read() == CONTENT
    faulty.files = {"bucket/a/data.bin": CONTENT[:50]}
    assert read() == CONTENT[:50]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", r"2555 of 2560 bytes arrived"),
        ("error", r"connection reset"),
        ("foreign", r"RuntimeError: the client's own"),
    ],
)
def test_a_failed_download_is_named_and_leaves_nothing(
    faulty: type[Faulty], tmp_path: Path, fault: str, message: str
) -> None:
    folder = Location("faulty://bucket/a", cache_dir=tmp_path)
    faulty.fault = fault
    with pytest.raises(OSError, match=rf"faulty://bucket/a/data.bin: cannot be read .*{message}"):
        folder.local_path("data.bin")
    if fault != "short":
        with pytest.raises(OSError, match=r"data\.bin: cannot be read"):
            folder.read_range("data.bin", 0, 10)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    faulty.fault = ""
    assert folder.local_path("data.bin").read_bytes() == CONTENT


def test_unusable_urls_say_what_to_do() -> None:
    fsspec.register_implementation("absent", "no_such_package.Files", errtxt="Install nopackage")
    with pytest.raises(ValueError, match=r"absent://x: .*not installed \(Install nopackage\); ins"):
        Location("absent://x").read_bytes("corpus.json")
    with pytest.raises(ValueError, match=r"nothing://x: .*nothing.*; give a path or an fsspec URL"):
        Location("nothing://x").read_bytes("corpus.json")


def make_corpus(folder: Path, seed: int) -> sparse.csr_matrix:
    """Write a corpus of 60 cells of two datasets; return the counts."""
    rng = np.random.default_rng(seed)
    counts = sparse.random(60, 40, density=0.3, format="csr", random_state=rng)
    counts.data = rng.integers(1, 300, counts.nnz)
    dataset, row = np.repeat(np.arange(2, dtype=np.uint32), 30), np.tile(np.arange(30), 2)
    folder.mkdir()
    with CellWriter(
        folder / "cells.zarr", n_genes=40, chunk_entries=128, chunks_per_shard=2
    ) as writer:
        for part in (slice(0, 50), slice(50, 60)):
            tables = {"dataset": dataset[part], "obs_row": row[part], "source_row": 10 * row[part]}
            writer.append(counts[part], source=tables)
            writer.end_chunk()
    names = tuple(f"gene{number}" for number in range(40))
    genes = GeneVocabulary(names, names, ("unknown",) * 40)
    genes.write(folder / "genes.tsv")
    (folder / "obs").mkdir()
    for code in "ab":
        barcodes = pd.DataFrame({"barcode": [f"{code}{number}" for number in range(30)]})
        write_obs(folder / "obs" / f"{code}.parquet", barcodes)
    statistics = {
        "n_expressing": np.zeros(40, np.int64),
        "total_counts": np.zeros(40, np.int64),
        "mean_expressed": np.full(40, float(seed)),
        "mean_expressed_all": 1.0,
        "var_expressed_all": 2.0,
        "target_sum": 1.0e4,
    }
    np.savez(folder / "gene_stats.npz", **statistics)  # type: ignore[arg-type]
    unknown = dict.fromkeys(field.name for field in fields(DatasetInfo))
    known = {"n_cells": 30, "duplicates_dropped": 0, "split_cells": {}}
    catalogue = {
        "hash": f"hash{seed}",
        "n_cells": 60,
        "genes_hash": genes.hash,
        "splits": {"train": [0, 50], "validation": [50, 60], "test": [60, 60]},
        "datasets": [{**unknown, **known, "dataset_id": code} for code in "ab"],
    }
    write_catalogue(folder, catalogue)
    return counts


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", ["file", "memory", "faulty"])
def test_a_remote_corpus_is_the_local_one(faulty: type[Faulty], tmp_path: Path, kind: str) -> None:
    counts = make_corpus(tmp_path / "corpus", 0)
    url = {"file": f"file://{tmp_path}/corpus"}.get(kind, f"{kind}://bucket/corpus")
    files = {f"/bucket/corpus/{n}": data for n, data in contents(tmp_path / "corpus").items()}
    fsspec.filesystem("memory").pipe(files)
    faulty.files = {name[1:]: data for name, data in files.items()}
    local, opened = Corpus(tmp_path / "corpus"), Corpus(url, tmp_path / "cache")
    for remote in (opened, pickle.loads(pickle.dumps(opened))):
        assert (len(remote), remote.n_genes, remote.chunk_entries) == (60, 40, 128)
        assert (remote.hash, remote.datasets) == (local.hash, local.datasets)
        assert remote.genes == local.genes
        assert remote.cells.tables == ("dataset", "obs_row", "source_row")
        assert (remote.rows(range(60)) != counts).nnz == 0
        assert (remote[-1] != counts[59]).nnz == 0
        np.testing.assert_array_equal(remote.split("validation"), np.arange(50, 60))
        with pytest.raises(ValueError, match="split 'none': this corpus has train, validation"):
            remote.split("none")
        for name in ("none", "gap"):
            with pytest.raises(ValueError, match=f"no table '{name}'; there are chunk_rows, .*obs"):
                remote.cells.table(name)
        np.testing.assert_array_equal(remote.row_source, local.row_source)
        assert remote.gene_stats.target_sum == 1.0e4
        for found, expected in (
            (remote.packed_rows([5, 55]), local.packed_rows([5, 55])),
            (remote.read_packed(1), local.read_packed(1)),
        ):
            assert found.gap.tobytes() == expected.gap.tobytes()
            assert found.count.tobytes() == expected.count.tobytes()
        picked = [33, 2]
        assert remote.to_anndata(picked).obs.equals(local.to_anndata(picked).obs)
    cached = contents(tmp_path / "cache") if kind != "file" else {}
    assert not [name for name in cached if "gap/c/" in name or "count/c/" in name]
    assert bool(cached) == (kind != "file")


def test_a_corpus_written_again_is_read_anew(faulty: type[Faulty], tmp_path: Path) -> None:
    for seed in (1, 2):
        counts = make_corpus(tmp_path / str(seed), seed)
        files = contents(tmp_path / str(seed))
        faulty.files = {f"bucket/{name}": data for name, data in files.items()}
        faulty.reads.clear()
        corpus = Corpus("faulty://bucket", cache_dir=tmp_path / "cache")
        # Whatever the number of cells: opening reads no table.
        assert faulty.reads == ["bucket/corpus.json", "bucket/cells.zarr/zarr.json"]
        assert (corpus.rows(range(60)) != counts).nnz == 0
        assert corpus.gene_stats.mean_expressed[0] == seed
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_remote_that_fails_in_the_middle(faulty: type[Faulty], tmp_path: Path) -> None:
    counts = make_corpus(tmp_path / "corpus", 3)
    files = contents(tmp_path / "corpus")
    faulty.files = {f"bucket/{name}": data for name, data in files.items()}
    corpus = Corpus("faulty://bucket", cache_dir=tmp_path / "cache")
    corpus.read_packed(0)
    where = "faulty://bucket/cells.zarr/gap/c/0"
    for fault, reason in (("error", "connection reset"), ("foreign", "the client's own kind")):
        faulty.fault = fault
        with pytest.raises(OSError, match=rf"^(\[Errno \d+\] )?{where}: cannot be read .*{reason}"):
            corpus.read_packed(0)
    faulty.fault = "whole"
    with pytest.raises(
        ValueError, match=rf"^{where}: .*does not answer range requests.*copy it to"
    ):
        corpus.read_packed(0)
    faulty.fault = "short"
    last = len(corpus.chunk_rows) - 2
    with pytest.raises(DamagedChunk, match=r"the file is cut: \d+ of its index's \d+ bytes"):
        corpus.read_packed(last)
    faulty.fault = ""
    assert (corpus.rows(range(60)) != counts).nnz == 0
    del faulty.files["bucket/cells.zarr/gap/c/0"]
    with pytest.raises(DamagedChunk, match=rf"{where}: chunk 0 .* is damaged: the file is m"):
        corpus.read_packed(0)
    with pytest.raises(FileNotFoundError, match=r"faulty://none: no corpus\.json at this address"):
        Corpus("faulty://none", cache_dir=tmp_path / "cache")
    faulty.files["none/corpus.json"] = b"<html>"
    with pytest.raises(ValueError, match=r"faulty://none/corpus\.json: .*; copy the corpus there"):
        Corpus("faulty://none", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="needs a folder on this machine"):
        corpus.path  # noqa: B018


def test_a_damaged_copy_in_the_cache_is_downloaded_once_more(
    faulty: type[Faulty], tmp_path: Path
) -> None:
    counts = make_corpus(tmp_path / "corpus", 4)
    files = contents(tmp_path / "corpus")
    faulty.files = {f"bucket/{name}": data for name, data in files.items()}
    assert Corpus("faulty://bucket", cache_dir=tmp_path / "cache").genes
    (cached,) = (tmp_path / "cache").rglob("genes.tsv")
    for damage in (b"", cached.read_bytes()[:-1] + b"x"):
        cached.write_bytes(damage)
        faulty.reads.clear()
        assert Corpus("faulty://bucket", cache_dir=tmp_path / "cache").genes.symbols[0] == "gene0"
        assert faulty.reads.count("bucket/genes.tsv") == 1
        assert cached.read_bytes() == files["genes.tsv"]
    name = "cells.zarr/row_total/c/0"
    faulty.files[f"bucket/{name}"] = bytes(len(files[name]))
    message = rf"row_total/c/0: damaged \(CRC.*copy of faulty://bucket/{name}"
    with pytest.raises(ValueError, match=message):
        _ = Corpus("faulty://bucket", cache_dir=tmp_path / "cache").row_total
    faulty.files[f"bucket/{name}"] = files[name]
    corpus = Corpus("faulty://bucket", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(corpus.row_total, np.asarray(counts.sum(axis=1)).ravel())
