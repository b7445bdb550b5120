"""`embed --jobs`: rows, order and bytes of one process; what is wrong in a process is reported."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from exported import named_genes, write_model
from scipy.sparse import csr_matrix

from sclong_ds.__main__ import main
from sclong_ds.embedding import embed, opening
from sclong_ds.embedding.embed import embed_and_predict, embedding_width
from sclong_ds.embedding.processes.workers import Workers, started_workers
from sclong_ds.exported.head import FittedHead, Head, HeadShape, Reference
from sclong_ds.exported.model_dir import load_model
from sclong_ds.model.pooling import Part
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes

N_GENES, N_CELLS = 60, 45
GENES = named_genes(N_GENES)


def made_counts() -> csr_matrix:
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES))
    counts[7] = 0
    return csr_matrix(counts)


def made_head() -> FittedHead:
    """Return a head of three classes with random weights, for the model of `write_model`."""
    parts = (Part("gene_vectors", "value"), Part("decoder", "expressed"))
    shape = HeadShape(parts=parts, base_dim=8, n_outputs=3, hidden=16)
    generator = torch.Generator().manual_seed(1)
    head = Head(shape)
    for weights in head.parameters():
        weights.data.normal_(generator=generator)
    centroids = torch.randn(3, shape.n_features, generator=generator).numpy()
    reference = Reference(centroids=centroids, precision=np.eye(shape.n_features, dtype=np.float32))
    return FittedHead(
        head=head.eval(), label="cell_type", classes=("a", "b", "c"), reference=reference
    )


def write_cells(folder: Path) -> Path:
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(index=list(GENES.ids))
    anndata.AnnData(made_counts().astype(np.float32), obs=obs, var=var).write_h5ad(
        folder / "cells.h5ad"
    )
    return folder / "cells.h5ad"


class Odd(Exception):
    """An error that cannot be made again from what it says."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def sums(
    model: ScLong,
    counts: csr_matrix,
    head: FittedHead | None,
    *,
    batch_size: int,
    measured: MeasuredGenes | None,
) -> np.ndarray:
    """Return (n, 2) what is easily known of cells, sums and measured genes; refuse empty cells."""
    if batch_size == 3:
        raise Odd("one", "another")
    assert model.n_genes == N_GENES
    assert head is None
    assert counts.shape[0] <= batch_size
    assert measured is not None
    totals = np.asarray(counts.sum(axis=1)).ravel()
    if not totals.all():
        raise ValueError("a cell without counts")
    of_measured = (~measured.unmeasured()).sum(axis=1)
    return np.stack([totals, of_measured], axis=1)


@pytest.mark.parametrize("with_head", [False, True])
def test_two_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_head: bool
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process has
    model = write_model(tmp_path, GENES, seed=0, head=made_head() if with_head else None)
    cells = write_cells(tmp_path)
    words = ["embed", str(model), str(cells), "--min-genes-mapped", "1", "--device", "cpu"]
    for jobs in ("1", "2"):
        out = str(tmp_path / f"{jobs}.h5ad")
        assert main([*words, "--out", out, "--batch-size", "8", "--jobs", jobs]) == 0
    one, two = (anndata.read_h5ad(tmp_path / f"{jobs}.h5ad") for jobs in "12")
    assert one.obsm["X_sclong"].tobytes() == two.obsm["X_sclong"].tobytes()
    assert len(np.unique(one.obsm["X_sclong"], axis=0)) == N_CELLS
    assert (one.X != two.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, two.obs, check_exact=True)
    assert ("predicted_cell_type" in one.obs) == with_head


def test_a_block_without_cells_asks_no_process(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, GENES, seed=0), device="cpu")
    with ThreadPoolExecutor(1) as threads:
        workers = Workers(queue.Queue(), threads, torch.device("cpu"))
        rows, columns = embed_and_predict(model, made_counts()[:0], made_head(), workers=workers)
    assert rows.shape == (0, embedding_width(model))
    assert {len(values) for values in columns.values()} == {0}


def test_processes_are_sent_the_batches_of_one_and_a_head_reads_a_whole_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (opening, embed):
        monkeypatch.setattr(module, "cells_of_a_batch", lambda _, size, __: min(size, 5))
    model = load_model(write_model(tmp_path, GENES, seed=0), device="cpu")
    head, counts, read = made_head(), made_counts(), list[int]()
    columns_of = FittedHead.columns

    def columns(head: FittedHead, features: np.ndarray) -> dict[str, np.ndarray]:
        read.append(len(features))
        return columns_of(head, features)

    monkeypatch.setattr(FittedHead, "columns", columns)
    ours, theirs = multiprocessing.Pipe()
    free: queue.Queue[Connection] = queue.Queue()
    free.put(ours)

    def answer() -> None:
        with theirs, suppress(EOFError):
            while True:
                part, size, measured = theirs.recv()
                how = {"batch_size": size, "measured": measured}
                theirs.send((None, embed.embed_and_features(model, part, head, **how)))

    batches: dict[str, list[int]] = {"one": [], "sent": []}
    with ThreadPoolExecutor(1) as threads, ThreadPoolExecutor(1) as other, ours:
        other.submit(answer)
        workers = Workers(free, threads, torch.device("cpu"))
        sent, _ = embed_and_predict(
            model, counts, head, batch_size=8, on_cells=batches["sent"].append, workers=workers
        )
    one, _ = embed_and_predict(model, counts, head, batch_size=8, on_cells=batches["one"].append)
    assert batches["sent"] == batches["one"] == [5] * 9
    assert read == [N_CELLS, N_CELLS]
    assert sent.tobytes() == one.tobytes()


def test_beside_processes_the_model_takes_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def started(*_: object, device: torch.device, n: int) -> nullcontext[None]:
        assert n == 2
        asked.append(device)
        return nullcontext()

    monkeypatch.setattr(embed, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(embed, "started_workers", started)
    held: list[torch.device] = []
    rows_of = embed.embed_and_features

    def watched(model: ScLong, *given: object, **how: object) -> np.ndarray:
        held.append(next(model.parameters()).device)
        return rows_of(model, *given, **how)

    monkeypatch.setattr(embed, "embed_and_features", watched)
    words = ["embed", str(write_model(tmp_path, GENES, seed=0)), str(write_cells(tmp_path))]
    words += ["--min-genes-mapped", "1", "--out", str(tmp_path / "out.h5ad"), "--jobs", "2"]
    assert main(words) == 0
    assert asked == [torch.device("cuda")]
    assert held == [torch.device("cpu")]


def test_processes_end_where_a_later_one_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[psutil.Process] = []
    start = multiprocessing.context.SpawnProcess.start

    def starts_two(process: multiprocessing.context.SpawnProcess) -> None:
        if len(begun) == 2:
            raise BlockingIOError("no more processes")
        start(process)
        begun.append(psutil.Process(process.pid))

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", starts_two)
    with (
        pytest.raises(BlockingIOError, match="no more processes"),
        started_workers(sums, tmp_path, device=torch.device("cpu"), n=3),
    ):
        raise AssertionError("one is missing")
    assert len(begun) == 2
    assert not any(child.is_running() for child in begun)


def test_batches_come_in_order_and_a_process_that_ends_is_reported(tmp_path: Path) -> None:
    model = write_model(tmp_path, GENES, seed=0)
    counts = made_counts()
    table = np.zeros((2, N_GENES), dtype=bool)
    table[0, :9], table[1, :11] = True, True
    measured = MeasuredGenes(table, np.arange(N_CELLS) % 2)
    filled = np.flatnonzero(counts.sum(axis=1))
    told: list[int] = []
    before = {child.pid for child in psutil.Process().children()}
    with started_workers(sums, model, device=torch.device("cpu"), n=2) as workers:
        found = workers.each(
            counts[filled], batch_size=4, measured=measured.of(filled), on_cells=told.append
        )
        np.testing.assert_array_equal(found[:, 0], np.asarray(counts[filled].sum(axis=1)).ravel())
        assert found[:, 1].tolist() == [9 + 2 * (row % 2) for row in filled]
        assert told == [4] * 11
        how = {"batch_size": 4, "measured": measured, "on_cells": told.append}
        with pytest.raises(ValueError, match="a cell without counts"):
            workers.each(counts, **how)
        with pytest.raises(RuntimeError, match="Odd: one and another"):
            workers.each(counts[:1], **how | {"batch_size": 3})
        spawned = [
            child
            for child in psutil.Process().children()
            if child.pid not in before and "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(spawned) == 2
        os.kill(spawned[0].pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="--jobs: one of the processes ended"):
            workers.each(counts[filled], **how | {"measured": measured.of(filled)})
    assert not any(child.is_running() for child in spawned)
