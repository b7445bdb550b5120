"""Gathering of rows: any order, any skew, bounded, one reading, nothing left behind."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts.proof import exact_counts
from data_prep.readers import gather as readers_gather
from data_prep.readers.gather import gathered
from data_prep.source.source import Entries


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_gather, "RUN_ENTRIES", 100)
    monkeypatch.setattr(readers_gather, "BUCKET_ENTRIES", 64)


def shuffled(matrix: sparse.coo_matrix, *, times: list[int]) -> Iterator[Entries]:
    times.append(1)
    order = np.random.default_rng(1).permutation(matrix.nnz)
    for part in np.array_split(order, 13):
        yield (
            matrix.row[part].astype(np.int64),
            matrix.col[part].astype(np.int64),
            matrix.data[part],
        )


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.float64])
def test_any_order_gives_the_matrix_in_every_pass(tmp_path: Path, dtype: type) -> None:
    matrix = sparse.random(50, 300, density=0.1, format="coo", random_state=2)
    matrix.data = np.arange(1, matrix.nnz + 1).astype(dtype)
    times: list[int] = []
    blocks = gathered(
        lambda: shuffled(matrix, times=times),
        shape=matrix.shape,
        n_entries=matrix.nnz,
        scratch=tmp_path,
    )
    for _ in range(2):
        np.testing.assert_array_equal(sparse.vstack(list(blocks())).toarray(), matrix.toarray())
    assert len(times) == 1
    assert not os.listdir(tmp_path)


def test_rows_far_above_the_mean_are_put_together_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = np.zeros((64, 256), dtype=np.int64)
    dense[8:16] = np.arange(1, 257)
    sizes = []
    packed = readers_gather._packed

    def watched(parts: list[np.ndarray], **where: object) -> sparse.csr_matrix:
        sizes.append(sum(len(part) for part in parts))
        return packed(parts, **where)

    monkeypatch.setattr(readers_gather, "_packed", watched)
    matrix = sparse.coo_matrix(dense)
    entries = lambda: shuffled(matrix, times=[])  # noqa: E731
    blocks = gathered(entries, shape=dense.shape, n_entries=matrix.nnz, scratch=tmp_path)
    np.testing.assert_array_equal(sparse.vstack(list(blocks())).toarray(), dense)
    # One row is the least; all rows of the bucket would be eight times as many.
    assert max(sizes) == 256


def test_values_of_one_place_are_added_up() -> None:
    twice = (np.array([1, 1]), np.array([2, 2]), np.array([100, 200]))
    blocks = gathered(lambda: iter([twice]), shape=(3, 4), n_entries=2, scratch=None)
    found = sparse.vstack(list(blocks()))
    assert found.data.tolist() == [100, 200]
    assert exact_counts(found, where="X").toarray()[1, 2] == 300


@pytest.mark.parametrize(("row", "column", "what"), [(3, 0, "cell 3"), (0, -1, "gene -1")])
def test_values_outside_are_refused(row: int, column: int, what: str) -> None:
    outside = (np.array([row]), np.array([column]), np.array([1]))
    blocks = gathered(lambda: iter([outside]), shape=(3, 4), n_entries=1, scratch=None)
    with pytest.raises(ValueError, match=f"a value lies at {what}"):
        list(blocks())
