"""Of cells that repeat one another the first stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cell_values import as_tuples
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.passes.dedup import find_duplicates
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


def test_duplicates_keep_the_first(stage_corpus: Stage, counts: Counts) -> None:
    a, b = counts(1, 50), counts(2, 40)
    a = sparse.vstack([a, a[[7]], a[[9]]], format="csr")
    b = sparse.vstack([b[:10], a[[3]], b[10:], b[[0]], a[[3]]], format="csr")
    folder = stage_corpus({"b": b, "a": a})
    result = finalize(folder, split_by="cell")
    corpus = Corpus(folder)
    assert result["n_cells"] == 90
    assert result["duplicates_dropped"] == 5
    assert [info.duplicates_dropped for info in corpus.datasets] == [2, 3]
    cells = as_tuples(corpus.rows(range(90)))
    assert len(set(cells)) == 90
    row = cells.index(as_tuples(a[3])[0])
    assert corpus.datasets[corpus.row_dataset[row]].dataset_id == "a"
    assert corpus.row_source[row] == 2 * 3 + 1


@pytest.mark.parametrize("run_bytes", [1, 2**33])
def test_duplicates_with_many_buckets(
    stage_corpus: Stage,
    counts: Counts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_bytes: int,
) -> None:
    matrix = counts(1, 60)
    matrix = sparse.vstack([matrix, matrix[::3]], format="csr")
    cells = CellStore(stage_corpus({"a": matrix}) / "staging" / "a" / "cells.zarr")
    monkeypatch.setattr("data_prep.passes.dedup.CELLS_PER_BUCKET", 7)
    monkeypatch.setattr("data_prep.passes.dedup.RUN_BYTES", run_bytes)
    repeated = find_duplicates(cells, tmp_path / "digests")
    np.testing.assert_array_equal(np.flatnonzero(repeated), np.arange(60, 80))
    assert not (tmp_path / "digests").exists()
