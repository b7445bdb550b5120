"""`embed --jobs`: the rows, the order and the bytes of one process; one that ends is reported."""

from __future__ import annotations

import os
import signal
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
from sclong_ds.embedding.processes.workers import Embedded, started_workers
from sclong_ds.exported.head import FittedHead
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes

N_GENES, N_CELLS = 60, 45
GENES = named_genes(N_GENES)


def made_counts() -> csr_matrix:
    counts = np.random.default_rng(0).poisson(1.0, (N_CELLS, N_GENES))
    counts[7] = 0
    return csr_matrix(counts)


def sums(
    model: ScLong,
    counts: csr_matrix,
    head: FittedHead | None,
    *,
    batch_size: int,
    measured: MeasuredGenes | None,
) -> Embedded:
    """Say of cells what is easily known: sums, measured genes; of those without counts, nothing."""
    assert model.n_genes == N_GENES
    assert head is None
    assert counts.shape[0] <= batch_size
    assert measured is not None
    totals = np.asarray(counts.sum(axis=1)).ravel()
    if not totals.all():
        raise ValueError("a cell without counts")
    of_measured = (~measured.unmeasured()).sum(axis=1)
    return totals[:, None].astype(np.float32), {"measured": of_measured}


def test_two_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process has
    model = write_model(tmp_path, GENES, seed=0)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(index=list(GENES.ids))
    cells = tmp_path / "cells.h5ad"
    anndata.AnnData(made_counts().astype(np.float32), obs=obs, var=var).write_h5ad(cells)
    words = ["embed", str(model), str(cells), "--min-genes-mapped", "1", "--device", "cpu"]
    for jobs in ("1", "2"):
        out = str(tmp_path / f"{jobs}.h5ad")
        assert main([*words, "--out", out, "--batch-size", "4", "--jobs", jobs]) == 0
    one, two = (anndata.read_h5ad(tmp_path / f"{jobs}.h5ad") for jobs in "12")
    assert one.obsm["X_sclong"].tobytes() == two.obsm["X_sclong"].tobytes()
    assert len(np.unique(one.obsm["X_sclong"], axis=0)) == N_CELLS
    assert (one.X != two.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, two.obs)


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
        rows = np.concatenate([rows for rows, _ in found])[:, 0]
        np.testing.assert_array_equal(rows, np.asarray(counts[filled].sum(axis=1)).ravel())
        of_measured = np.concatenate([columns["measured"] for _, columns in found])
        assert of_measured.tolist() == [9 + 2 * (row % 2) for row in filled]
        assert told == [4] * 11
        how = {"batch_size": 4, "measured": measured, "on_cells": told.append}
        with pytest.raises(ValueError, match="a cell without counts"):
            workers.each(counts, **how)
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
