"""Small corpora, loaders over them and what they must deliver."""

import numpy as np
from scipy import sparse

from sclong_ds.corpus.byte_code import decode
from sclong_ds.corpus.catalogue import write_catalogue
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.loader.loader import CellLoader, open_stream
from sclong_ds.loader.order import ONE

GENES = 40
DATASET = {
    "duplicates_dropped": 0, "split_cells": {}, "n_genes_mapped": None, "counts_kept": None,
    "organism": None, "tissue": None, "format": None, "source": None, "source_hash": None,
}  # fmt: skip


def counts_of(n_cells):
    """Counts of many sizes; some cells have none."""
    rng = np.random.default_rng(5)
    counts = rng.poisson(0.4, (n_cells, GENES)) * rng.choice([1, 3, 300, 70_000], (n_cells, GENES))
    counts[rng.random(n_cells) < 0.1] = 0
    return counts.astype(np.uint32)


def make_corpus(folder, *, n_train, n_validation=0, chunk_entries=200, chunks_per_shard=2):
    folder.mkdir()
    counts = counts_of(n_train + n_validation)
    options = {"chunk_entries": chunk_entries, "chunks_per_shard": chunks_per_shard}
    with CellWriter(folder / "cells.zarr", n_genes=GENES, **options) as writer:
        for rows in (slice(0, n_train), slice(n_train, None)):
            n = len(counts[rows])
            source = {"dataset": (np.arange(n) % 3).astype(np.uint32)}
            writer.append(sparse.csr_matrix(counts[rows]), source=source)
            writer.end_chunk()
    n = len(counts)
    splits = {"train": [0, n_train], "validation": [n_train, n], "test": [n, n]}
    datasets = [{"dataset_id": f"d{i}", "n_cells": 1, **DATASET} for i in range(3)]
    about = {"hash": "", "genes_hash": "", "n_cells": n, "splits": splits, "datasets": datasets}
    write_catalogue(folder, about)
    return Corpus(folder)


def order_of(group=2, lanes=None):
    """Arguments of `open_stream` for either order."""
    return {"group_chunks": group} if lanes is None else {"lanes": lanes[0], "batch": lanes[1]}


def open_loader(corpus, *, seed=0, group=2, lanes=None, weights=None, split="train", **options):
    order = order_of(group, lanes)
    stream = open_stream(corpus, split=split, seed=seed, weights=weights, **order)
    defaults = {
        "cells_seen": 0, "rank": 0, "world_size": 1, "train_batch_size": 8, "micro_batch_size": 4,
        "prefetch_batches": 2,
    }  # fmt: skip
    return CellLoader(corpus, stream=stream, **(defaults | options))


def dense(counts):
    """Counts of any output but dense_norm as a fresh dense array."""
    if isinstance(counts, np.ndarray):
        return counts.copy()
    if sparse.issparse(counts):
        return counts.toarray()
    return decode(counts.gap, counts.count, counts.row_entries, GENES).toarray()


def visits(batch):
    return list(
        zip(batch.cell_ids.tolist(), batch.epochs.tolist(), batch.passes.tolist(), strict=True)
    )


def take(corpus, steps=None, *, check=True, **options):
    """Return the visits of each micro-batch of each step; checks what belongs to the cells."""
    truth = counts_of(len(corpus))
    got = []
    with open_loader(corpus, **options) as loader:
        for step in loader:
            for b in step.micro_batches if check else ():
                assert np.array_equal(dense(b.counts), truth[b.cell_ids])
                assert b.skipped.shape == b.cell_ids.shape
                assert not b.skipped.any()
            got.append([visits(b) for b in step.micro_batches])
            if len(got) == steps:
                break
    return got


def in_order(ranks):
    """Put the micro-batches of all ranks back together into the global stream."""
    return [v for step in zip(*ranks, strict=True) for micro in zip(*step, strict=True)
            for batch in micro for v in batch]  # fmt: skip


def in_stream(corpus, n, *, start=0, **options):
    """Return the first n visits of the stream itself."""
    batches = open_stream(corpus, **options).batches(start, size=n, stop=start + n)
    return [
        v for b in batches
        for v in zip(b.rows.tolist(), b.epochs.tolist(), b.passes.tolist(), strict=True)
    ]  # fmt: skip


WEIGHTS = np.array([ONE // 2, ONE * 7 // 4, ONE])
