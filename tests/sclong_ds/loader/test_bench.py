"""What `bench-loader` says of a machine is what its ranks read."""

import argparse
import json

import numpy as np
import pytest
from scipy import sparse

from sclong_ds.corpus.catalogue import write_catalogue
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.bench import Asked, add_arguments, measure_rank, run
from sclong_ds.planning.loading import read_rate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    counts = np.random.default_rng(0).poisson(0.6, (500, 40)).astype(np.uint32)
    with CellWriter(folder / "cells.zarr", n_genes=40, chunk_entries=900) as writer:
        source = {"dataset": np.zeros(500, np.uint32)}
        writer.append(sparse.csr_matrix(counts), source=source)
    about = {"hash": "", "genes_hash": "", "n_cells": 500, "datasets": []}
    splits = {"train": [0, 500], "validation": [500, 500], "test": [500, 500]}
    write_catalogue(folder, about | {"splits": splits})
    return Corpus(folder)


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.thorough
@pytest.mark.parametrize("output", ["packed", "dense_norm"])
def test_a_rank_counts_its_own_cells_and_their_bytes(corpus, output):
    asked = Asked(
        corpus=str(corpus.path), world_size=4, batch=64, output=output, seconds=0.2,
        memory_bytes=50_000_000, cache_dir=None, cells_cache_bytes=0,
    )  # fmt: skip
    found = measure_rank(asked, 1)
    assert found.cells > 0
    assert found.cells % 16 == 0
    assert found.wall_s >= 0.2
    assert 0 < found.cpu_s < 60
    assert found.requests == 0
    assert found.read_bytes > 0
    assert found.first_batch_s > 0


def test_every_byte_that_is_read_counts(corpus):
    store = Corpus(corpus.path).cells
    assert store.has_read() == (0, 0)
    for chunk in range(len(store.chunk_rows) - 1):
        store.read_packed(chunk)
    # The chunks, and the index of each shard once.
    shards = [path for name in ("gap", "count") for path in corpus.path.glob(f"*/{name}/c/*")]
    assert store.has_read() == (sum(path.stat().st_size for path in shards), 0)


def test_the_figures_of_all_ranks_go_to_a_file_that_plan_takes(corpus, tmp_path, capsys):
    out = tmp_path / "rate.json"
    words = ("--batch", "64", "--seconds", "0.1", "--json", str(out))
    assert run(parsed(str(corpus.path), *words, "--world-size", "2")) == 0
    rate = read_rate(out)
    assert (rate["ranks"], rate["world_size"], rate["remote"]) == (1, 2, False)
    printed = capsys.readouterr().out
    assert f"{rate['cells_per_s']:,.0f} cells/s" in printed
    assert "1 of 2 ranks, " in printed
    assert run(parsed(str(corpus.path), *words[:4])) == 0
    assert "1 of 1 rank, " in capsys.readouterr().out
    out.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="bench-loader --json"):
        read_rate(out)


@pytest.mark.parametrize("words", [("--ranks", "4", "--world-size", "2"), ("--ranks", "3")])
def test_ranks_that_no_run_has_are_refused(corpus, words):
    with pytest.raises(ValueError, match="whose number divides the batch"):
        run(parsed(str(corpus.path), "--batch", "64", *words))
