"""The writer of cell stores: neither what a kill leaves nor garbled bytes become part of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter

N_GENES, BLOCK = 300, 20


def counts() -> sparse.csr_matrix:
    rng = np.random.default_rng(0)
    return sparse.csr_matrix(rng.poisson(0.5, (6 * BLOCK, N_GENES)))


def write(path: Path) -> None:
    with CellWriter(path, n_genes=N_GENES, chunk_entries=2048, chunks_per_shard=2) as writer:
        for block in range(6):
            rows = np.arange(block * BLOCK, (block + 1) * BLOCK)
            writer.append(counts()[rows], source={"source_row": rows})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_store_is_the_same_files_beside_what_a_kill_has_left(tmp_path: Path) -> None:
    write(tmp_path / "whole.zarr")
    expected = contents(tmp_path / "whole.zarr")
    assert sorted(expected) == CellStore(tmp_path / "whole.zarr").file_names()
    # A writer that is never ended.
    killed = CellWriter(tmp_path / "x.zarr", n_genes=N_GENES, chunk_entries=2048)
    killed.append(counts())
    killed.end_chunk()
    (left,) = tmp_path.glob(".x.zarr.*")
    write(tmp_path / "x.zarr")
    assert contents(tmp_path / "x.zarr") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole.zarr", "x.zarr", left.name}


@pytest.mark.parametrize("name", ["gap/c/0", "row_nnz/c/0"])
def test_garbled_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk gives other bytes than were written, before the store has its name."""
    garbled = []

    def garble(folder: Path) -> None:
        file = folder / name
        if file.exists() and not garbled:
            garbled.append(name)
            content = bytearray(file.read_bytes())
            content[20] ^= 1
            file.write_bytes(content)

    real = CellWriter._read_back, CellWriter._check_tables

    def read_back(self: CellWriter, stream: str, first: int = 0) -> list[int]:
        if name.startswith("gap"):
            garble(self._store)
        return real[0](self, stream, first)

    def check_tables(self: CellWriter) -> None:
        if name.startswith("row"):
            garble(self._store)
        real[1](self)

    monkeypatch.setattr(CellWriter, "_read_back", read_back)
    monkeypatch.setattr(CellWriter, "_check_tables", check_tables)
    with pytest.raises(ValueError, match="does not hold what was written"):
        write(tmp_path / "x.zarr")
    assert garbled
    assert not list(tmp_path.iterdir())


def test_files_of_a_store_follow_the_umask(tmp_path: Path) -> None:
    with CellWriter(tmp_path / "x.zarr", n_genes=N_GENES) as writer:
        writer.append(counts(), source={})
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "x.zarr").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_cells_without_counts_fill_chunks_that_are_not_written(tmp_path: Path) -> None:
    empty = sparse.csr_matrix((50, N_GENES), dtype=np.int64)
    with CellWriter(tmp_path / "x.zarr", n_genes=N_GENES) as writer:
        writer.append(empty)
        writer.end_chunk()
        writer.append(counts())
    store = CellStore(tmp_path / "x.zarr")
    assert store.table("gap_crc32c")[0] == 0
    assert store.rows(np.arange(len(store))).sum() == counts().sum()
