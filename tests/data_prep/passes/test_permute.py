"""Every order of the cells is equally likely."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import sparse

from data_prep.passes.buckets import BucketRuns, plan_runs
from data_prep.passes.permute import StagedCells, plan_layout, scatter_run, write_unit
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


def test_order_is_uniform(stage_corpus: Stage, tmp_path: Path) -> None:
    """Place says nothing about origin: dataset, row, or the place under another seed."""
    n = 2_000
    genes = np.stack([np.arange(2 * n) % 599, np.full(2 * n, 599)], axis=1).ravel()
    values = np.stack([np.arange(1, 2 * n + 1), np.ones(2 * n, np.int64)], axis=1).ravel()
    matrix = sparse.csr_matrix((values, genes, np.arange(0, 4 * n + 1, 2)), (2 * n, 600))
    folder = stage_corpus({"a": matrix[:n], "b": matrix[n:]})
    places = []
    for seed in (0, 1):
        staged = [
            StagedCells(
                dataset_id=name,
                cells=CellStore(folder / "staging" / name / "cells.zarr"),
                kept=np.ones(n, bool),
                split=np.zeros(n, np.uint8),
            )
            for name in ("a", "b")
        ]
        layout = plan_layout(staged, seed=seed, chunk_entries=2**9, unit_chunks=2)
        assert len(layout) > 5
        scratch = tmp_path / f"scattered{seed}"
        scratch.mkdir()
        for number, run in enumerate(plan_runs([s.cells for s in staged], run_bytes=2_000)):
            scatter_run(staged, run, layout, seed=seed, folder=scratch, number=number)
        runs = BucketRuns(scratch, n_buckets=len(layout))
        with CellWriter(tmp_path / f"{seed}.zarr", n_genes=600, chunk_entries=2**9) as writer:
            for unit in range(len(layout)):
                write_unit(runs, unit, layout, writer)
        result = CellStore(tmp_path / f"{seed}.zarr")
        origin = n * result.table("dataset").astype(int) + result.table("obs_row")
        np.testing.assert_array_equal(np.sort(origin), np.arange(2 * n))
        places.append(np.argsort(origin))
    # A correlation of 4,000 independent pairs has the standard deviation 0.016.
    for row in (places[0], places[1]):
        assert abs(np.corrcoef(row[:n], row[n:])[0, 1]) < 0.08
        assert abs(np.corrcoef(row, np.arange(2 * n))[0, 1]) < 0.07
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 0.07
        # Cells of dataset a in each tenth: 200 expected, standard deviation 9.5.
        assert np.abs(np.histogram(row[:n], 10, (0, 2 * n))[0] - 200).max() < 45
    assert abs(np.corrcoef(places[0], places[1])[0, 1]) < 0.07
