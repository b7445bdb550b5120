"""corpus.json: its own checksum, what it may hold, and the files that it vouches for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sclong_ds.corpus.catalogue import (
    _catalogue_bytes,
    catalogue_checksum,
    corpus_files,
    read_catalogue,
    write_catalogue,
)
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.obs_table import write_obs
from sclong_ds.loader.loader import CellLoader, open_stream

OLDEST = Path(__file__).parents[2] / "golden" / "corpus_version_1"
MINIMAL: dict[str, Any] = {
    "hash": "abc",
    "genes_hash": "",
    "n_cells": 3,
    "splits": {"train": [0, 3], "validation": [3, 3], "test": [3, 3]},
    "datasets": [],
    "warnings": ["Zürich"],
}
DATASET: dict[str, Any] = dict.fromkeys(
    ("n_genes_mapped", "counts_kept", "organism", "tissue", "format", "source", "source_hash")
) | {"dataset_id": "a", "n_cells": 3, "duplicates_dropped": 0, "split_cells": {"train": 3}}
N_CELLS, N_GENES = 60, 40


def make_corpus(folder: Path, seed: int = 0) -> sparse.csr_matrix:
    """Write a corpus with all files; corpora of different seeds have files of the same sizes."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    expressed = rng.random((N_CELLS, N_GENES)).argsort(axis=1) < N_GENES // 2
    counts = sparse.csr_matrix(expressed * (rng.poisson(3, (N_CELLS, N_GENES)) + 1))
    names = tuple(f"gene{number}" for number in range(N_GENES))
    genes = GeneVocabulary(names, names, ("unknown",) * N_GENES)
    genes.write(folder / "genes.tsv")
    options = {"n_genes": N_GENES, "chunk_entries": 256, "chunks_per_shard": 4}
    with CellWriter(folder / "cells.zarr", codec="none", **options) as writer:
        row = rng.permutation(N_CELLS)
        tables = {"dataset": np.zeros(N_CELLS, np.uint32), "obs_row": row, "source_row": 2 * row}
        writer.append(counts, source=tables)
    (folder / "obs").mkdir()
    write_obs(folder / "obs" / "a.parquet", pd.DataFrame({"barcode": list(map(str, range(60)))}))
    stats = {"n_expressing": 1 + np.arange(N_GENES), "total_counts": seed + np.arange(N_GENES)}
    numbers = {"mean_expressed_all": 1.0, "var_expressed_all": 2.0, "target_sum": 1e4}
    np.savez(folder / "gene_stats.npz", **stats, mean_expressed=np.ones(N_GENES), **numbers)
    measured = np.arange(N_GENES)[None] % 3 > 0
    np.save(folder / "measured_genes.npy", np.packbits(measured, axis=1, bitorder="little"))
    splits = {"train": [0, N_CELLS], "validation": [N_CELLS] * 2, "test": [N_CELLS] * 2}
    about = {"hash": str(seed), "genes_hash": genes.hash, "n_cells": N_CELLS, "splits": splits}
    dataset = DATASET | {"n_cells": N_CELLS, "split_cells": {"train": N_CELLS}}
    write_catalogue(folder, about | {"datasets": [dataset]})
    return counts


def everything(corpus: Corpus) -> dict[str, Any]:
    """Read all that a corpus offers."""
    cells = np.arange(len(corpus))
    stats = corpus.gene_stats
    return {
        "counts": corpus.rows(cells).toarray().tolist(),
        "tables": [
            np.asarray(table).tolist()
            for table in (
                corpus.row_total, corpus.row_nnz, corpus.row_dataset, corpus.row_source,
                corpus.chunk_rows, corpus.cells.row_entries,
            )
        ],
        "obs": corpus.obs(cells).to_dict(),
        "genes": (corpus.genes.ids, corpus.genes.symbols, corpus.genes.classes),
        "stats": [np.asarray(getattr(stats, name)).tolist() for name in vars(stats)],
        "measured": corpus.measured_genes.tolist() if corpus.measured_genes is not None else None,
    }  # fmt: skip


def test_every_changed_byte_of_the_catalogue_is_seen(tmp_path: Path) -> None:
    write_catalogue(tmp_path, MINIMAL)
    path = tmp_path / "corpus.json"
    assert read_catalogue(tmp_path)["splits"] == MINIMAL["splits"]
    raw = path.read_bytes()
    assert json.loads(raw)["version"] == 5
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(ValueError, match=r"corpus.json"):
            read_catalogue(tmp_path)


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda catalogue: catalogue.pop(key)


def with_dataset(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda catalogue: catalogue.update(datasets=[DATASET | changes])


def with_key(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda catalogue: catalogue.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("hash"), "'hash' is missing"),
        (without("files"), "'files' is missing"),
        (with_key("colour", 1), "'colour' is unknown"),
        (with_key("n_cells", "3"), "'n_cells' is 3"),
        (with_key("n_cells", True), "'n_cells' is True"),
        (with_key("splits", {"train": [0, 3]}), r"split validation is \[\]"),
        (with_key("splits", MINIMAL["splits"] | {"test": [2, 4]}), r"split test is \[2, 4\]"),
        (with_key("datasets", {}), "'datasets' is {}"),
        (with_key("files", {"x": [1]}), "files: 'x' is no file"),
        (with_key("files", {"../x": [1, 2]}), "files: '../x' is no file"),
        (with_key("files", {"/etc/passwd": [1, 2]}), "files: '/etc/passwd' is no file"),
        (with_dataset(colour=1), "dataset 0: 'colour' is unknown"),
        (with_dataset(n_cells=None), "dataset 0: 'n_cells' is None"),
        (with_dataset(warnings=[1]), "dataset 0: 'warnings' is"),
        (with_dataset(dataset_id="../../secret"), r"dataset 0 is called '../../secret'"),
        (with_dataset(dataset_id="a/b"), "dataset 0 is called 'a/b'"),
    ],
)
def test_a_catalogue_that_this_program_does_not_write_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """With a right checksum, as another program or a newer version would write it."""
    write_catalogue(tmp_path, MINIMAL | {"datasets": [DATASET]})
    catalogue = read_catalogue(tmp_path)
    change(catalogue)
    document = catalogue | {"checksum": catalogue_checksum(catalogue)}
    (tmp_path / "corpus.json").write_bytes(_catalogue_bytes(document))
    with pytest.raises(ValueError, match=rf"corpus\.json: not a catalogue .*{message}.*; run: "):
        Corpus(tmp_path)


def test_every_file_is_on_record_and_compared_when_it_is_first_used(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    make_corpus(folder)
    expected = everything(Corpus(folder))
    on_record = Corpus(folder).catalogue["files"]
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    shards = {name for name in found if "gap/c/" in name or "count/c/" in name}
    assert set(on_record) == found - shards - {"corpus.json"}
    assert set(corpus_files(folder)) == found - {"corpus.json"}
    rng = np.random.default_rng(0)
    for name in sorted(found - {"corpus.json"}):
        file, sound = folder / name, (folder / name).read_bytes()
        for damage in ("flip", "flip", "flip", "cut", "grow", "remove"):
            content = bytearray(sound)
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            cut, grown = sound[: len(sound) // 2], sound + b"\n"
            file.write_bytes({"flip": content, "cut": cut, "grow": grown}.get(damage, b""))
            if damage == "remove":
                file.unlink()
            with pytest.raises((ValueError, OSError), match=name):
                everything(Corpus(folder))
        file.write_bytes(sound)
    assert everything(Corpus(folder)) == expected


def test_cells_of_another_finalize_are_refused(tmp_path: Path) -> None:
    """The same number of cells, genes and chunks, the same sizes of files: other counts."""
    make_corpus(tmp_path / "one", 1)
    make_corpus(tmp_path / "two", 2)
    for name in ("cells.zarr", "gene_stats.npz", "cells.zarr/row_total", "cells.zarr/gap"):
        mixed = tmp_path / "mixed"
        shutil.copytree(tmp_path / "one", mixed)
        for path in [mixed / name, *(mixed / name).rglob("*")]:
            if path.is_file():
                path.write_bytes((tmp_path / "two" / path.relative_to(mixed)).read_bytes())
        with pytest.raises(ValueError, match=name):
            everything(Corpus(mixed))
        shutil.rmtree(mixed)


def test_measured_genes(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    measured = Corpus(tmp_path / "corpus").measured_genes
    assert measured is not None
    np.testing.assert_array_equal(measured, np.arange(N_GENES)[None] % 3 > 0)
    assert Corpus(OLDEST).measured_genes is None


def test_a_pickled_corpus_is_not_opened_as_another_one(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus", 1)
    pickled = pickle.dumps(Corpus(tmp_path / "corpus"))
    assert pickle.loads(pickled).hash == "1"
    shutil.rmtree(tmp_path / "corpus")
    make_corpus(tmp_path / "corpus", 2)
    with pytest.raises(ValueError, match="another corpus than before"):
        pickle.loads(pickled)


def test_a_corpus_of_version_1_feeds_the_loader() -> None:
    corpus = Corpus(OLDEST)
    stream = open_stream(corpus, seed=0, group_chunks=2)
    with CellLoader(
        corpus, stream=stream, cells_seen=0, rank=0, world_size=1, train_batch_size=6,
        micro_batch_size=6, prefetch_batches=1, output="csr",
    ) as loader:  # fmt: skip
        step = next(loader)
        np.testing.assert_array_equal(
            step.micro_batches[0].counts.toarray(), corpus.rows(step.cell_ids).toarray()
        )


def test_cells_of_datasets_that_the_catalogue_lacks_are_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    catalogue = read_catalogue(tmp_path / "corpus") | {"datasets": []}
    write_catalogue(tmp_path / "corpus", catalogue)
    with pytest.raises(ValueError, match=r"dataset/c/0: damaged \(a cell of dataset 0, the corpus"):
        Corpus(tmp_path / "corpus").obs()


@pytest.mark.parametrize(
    ("name", "position", "message"),
    [
        ("cells.zarr/dataset/c/0", 1, r"cells.zarr/dataset/c/0: damaged \(a cell of dataset"),
        ("cells.zarr/obs_row/c/0", 1, r"cells.zarr/obs_row/c/0: damaged \(row \d+ of the 8"),
        ("cells.zarr/chunk_rows/c/0", 8, "cells.zarr/chunk_rows/c/0: damaged"),
        ("gene_stats.npz", 0, "gene_stats.npz: damaged"),
        ("gene_stats.npz", 3_000, "gene_stats.npz: damaged"),
        ("obs/ds1.tsv.gz", 30, "obs/ds1.tsv.gz: damaged"),
    ],
)
def test_damage_of_version_1_is_named(
    tmp_path: Path, name: str, position: int, message: str
) -> None:
    """It has no checksums of these files: what cannot be is named, with the file."""
    shutil.copytree(OLDEST, tmp_path / "corpus")
    file = tmp_path / "corpus" / name
    content = bytearray(file.read_bytes())
    content[position] ^= 0x7F
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        everything(Corpus(tmp_path / "corpus"))
