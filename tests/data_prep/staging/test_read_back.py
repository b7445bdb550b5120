"""What was staged is compared with what was written: counts, genes, sizes, rows, annotations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from data_prep.staging.read_back import CellDigest, check_cells, check_obs
from sclong_ds.corpus.byte_code import PackedCells, encode
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.files.obs_table import write_obs

N_GENES = 2000


def cells_of(seed: int, n_cells: int) -> sparse.csr_matrix:
    """Sparse and dense rows, empty rows, counts of one to four bytes."""
    rng = np.random.default_rng(seed)
    density = rng.choice([0, 0.002, 0.3], n_cells)
    values = rng.choice([1, 2, 255, 256, 65_536, 70_000, 2**24, 2**32 - 1], (n_cells, N_GENES))
    return sparse.csr_matrix(np.where(rng.random((n_cells, N_GENES)) < density[:, None], values, 0))


def digests(cells: sparse.csr_matrix, packed: PackedCells, rows: np.ndarray) -> list[str]:
    written, found = CellDigest(), CellDigest()
    written.add(cells, rows)
    sound = found.add_packed(packed, rows)
    return found.differences(written) + ([] if sound else ["tables"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_cells=st.integers(0, 12))
def test_the_byte_code_read_by_another_decoder_is_what_was_written(seed: int, n_cells: int) -> None:
    cells = cells_of(seed, n_cells)
    assert digests(cells, encode(cells), np.arange(n_cells)) == []


def test_blocks_and_stored_zeros_do_not_matter() -> None:
    cells = cells_of(3, 9)
    whole, parts = CellDigest(), CellDigest()
    whole.add(cells, np.arange(9))
    cells.data[::7] = 0
    clean = cells.copy()
    clean.eliminate_zeros()
    for first in range(0, 9, 4):
        parts.add(cells[first : first + 4], np.arange(first, min(first + 4, 9)))
    assert whole.differences(parts)
    whole = CellDigest()
    whole.add(clean, np.arange(9))
    assert whole.differences(parts) == []


@settings(max_examples=60, deadline=None)
@given(bit=st.integers(0, 2**31), stream=st.sampled_from(["gap", "count", "row_nnz", "row_total"]))
def test_any_flipped_bit_shows(bit: int, stream: str) -> None:
    cells = cells_of(5, 6)
    packed = encode(cells)
    data = bytearray(getattr(packed, stream).tobytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    parts = {name: getattr(packed, name) for name in PackedCells.__slots__}
    parts[stream] = np.frombuffer(bytes(data), parts[stream].dtype)
    assert digests(cells, PackedCells(**parts), np.arange(6)) != []


def test_a_store_with_other_cells_or_rows_is_refused(tmp_path: Path) -> None:
    cells, path = cells_of(7, 30), tmp_path / "cells.zarr"
    with CellWriter(path, n_genes=N_GENES, chunk_entries=4096, chunks_per_shard=2) as writer:
        writer.append(cells, source={"source_row": np.arange(30)})
    assert len(CellStore(path).chunk_rows) > 2

    def written(cells: sparse.csr_matrix, rows: np.ndarray) -> CellDigest:
        digest = CellDigest()
        digest.add(cells, rows)
        return digest

    check_cells(path, written(cells, np.arange(30)), n_genes=N_GENES)
    other = cells.copy()
    other.data[5] += 1
    for digest, what in (
        (written(other, np.arange(30)), "counts"),
        (written(cells, np.arange(30)[::-1].copy()), "source rows"),
        (written(cells[:29], np.arange(29)), "number of cells"),
    ):
        with pytest.raises(ValueError, match=rf"cells\.zarr: reads back other .*{what}"):
            check_cells(path, digest, n_genes=N_GENES)
    with pytest.raises(ValueError, match="its attributes"):
        check_cells(path, written(cells, np.arange(30)), n_genes=N_GENES + 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda obs: obs.iloc[:1],
        lambda obs: obs.assign(donor=["d", "e "]),
        lambda obs: obs.rename(columns={"donor": "giver"}),
        lambda obs: obs.assign(more=["", ""]),
    ],
)
def test_annotations_that_read_back_otherwise_are_refused(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]
) -> None:
    obs = pd.DataFrame({"barcode": ["a\r", "\0"], "donor": ["d", "e"]})
    write_obs(tmp_path / "obs.parquet", change(obs))
    with pytest.raises(ValueError, match=r"obs\.parquet"):
        check_obs(tmp_path / "obs.parquet", obs)
    write_obs(tmp_path / "obs.parquet", obs)
    check_obs(tmp_path / "obs.parquet", obs)
