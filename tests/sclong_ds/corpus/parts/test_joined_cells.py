"""A table of several stores is that of one, wherever it is asked for, and stays on the disk."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.parts.joined_cells import JoinedCells, JoinedTable, dataset_codes

N_GENES = 20
SPLITS = [(30, 5), (0, 12), (400, 0), (3, 3)]
"""Cells of the training and validation split of each store."""


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[JoinedCells, np.ndarray]:
    """Four stores, one without training cells; and the datasets of their cells in order."""
    folder, rng = tmp_path_factory.mktemp("joined"), np.random.default_rng(0)
    stores, splits, codes = [], [], []
    for number, sizes in enumerate(SPLITS):
        path = folder / f"{number}.zarr"
        here = [rng.integers(0, 2, n).astype(np.uint32) for n in sizes]
        with CellWriter(path, n_genes=N_GENES, chunk_entries=512, chunks_per_shard=2) as writer:
            for of_split in here:
                if len(of_split):
                    cells = sparse.csr_matrix(rng.poisson(1, (len(of_split), N_GENES)), dtype="u4")
                    writer.append(cells, source={"dataset": of_split})
                    writer.end_chunk()
        stores.append(CellStore(path))
        splits.append({"train": range(sizes[0]), "validation": range(sizes[0], sum(sizes))})
        codes.append([of_split + 2 * number for of_split in here])
    expected = np.concatenate([of[split] for split in range(2) for of in codes])
    cells = JoinedCells(Location(folder), stores, splits=splits, n_datasets=[2] * len(SPLITS))
    return cells, expected


INDICES = st.one_of(
    st.slices(453),
    st.integers(-453, 452),
    st.lists(st.integers(-453, 452), max_size=40).map(lambda rows: np.array(rows, np.int64)),
    st.lists(st.integers(0, 452), min_size=4, max_size=4).map(
        lambda rows: np.array(rows, np.uint32).reshape(2, 2)
    ),
    st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).random(453) < 0.2),
)


@settings(max_examples=60, deadline=None)
@given(rows=INDICES)
def test_pieces_are_those_of_the_whole_table(
    joined: tuple[JoinedCells, np.ndarray], rows: object
) -> None:
    cells, expected = joined
    for table in (
        JoinedTable(cells, "dataset"),
        pickle.loads(pickle.dumps(cells)).table("dataset"),
    ):
        found = table[rows]
        np.testing.assert_array_equal(found, expected[rows])
        assert found.dtype == expected.dtype
        assert np.shape(found) == np.shape(expected[rows])


def test_it_is_used_as_an_array(joined: tuple[JoinedCells, np.ndarray]) -> None:
    cells, expected = joined
    table, most = dataset_codes(cells)
    assert most == expected.max() == table.max()
    assert len(table) == len(expected)
    assert table.shape == expected.shape
    assert table.dtype == expected.dtype
    assert table.tolist() == expected.tolist()
    np.testing.assert_array_equal(table == 3, expected == 3)
    np.testing.assert_array_equal(np.bincount(table), np.bincount(expected))
    np.testing.assert_array_equal(table.astype(np.int64) + table, 2 * expected)
    np.testing.assert_array_equal(np.argsort(table, kind="stable"), expected.argsort(kind="stable"))
    for wrong in (453, -454, [0, 453]):
        with pytest.raises(IndexError, match="outside 0 to 452"):
            table[wrong]
    with pytest.raises(IndexError, match="a mask of shape"):
        table[np.ones(7, bool)]
    with pytest.raises(AttributeError):
        table._anything  # noqa: B018


def test_a_block_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    """Opened and read in blocks, a table of four parts of 2 million cells is never whole."""
    n = 2_000_000
    with CellWriter(tmp_path / "cells.zarr", n_genes=N_GENES) as writer:
        writer.append(sparse.csr_matrix((1, N_GENES), dtype=np.uint32), source={"dataset": [1]})
    store = CellStore(tmp_path / "cells.zarr")
    codes = np.arange(n, dtype=np.uint32) % 2
    codes.tofile(tmp_path / "codes")

    class Long(CellStore):
        """As many cells as the table has."""

        def table(self, name: str) -> np.ndarray:
            return np.memmap(tmp_path / "codes", np.uint32, mode="r")

        def __len__(self) -> int:
            return n

        @property
        def chunk_rows(self) -> np.ndarray:
            return np.array([0, n])

    longer = Long(store.location)
    longer.n_cells = n
    cells = JoinedCells(
        Location(tmp_path), [longer] * 4, splits=[{"train": range(n)}] * 4, n_datasets=[2] * 4
    )
    tracemalloc.start()
    table, most = dataset_codes(cells)
    assert most == 7
    for start in range(0, len(table), 100_000):
        block = table[start : start + 100_000]
        assert block[:2].tolist() == [2 * (start // n), 2 * (start // n) + 1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16e6 < 4 * 4 * n
