"""Row ranges put together are the dataset staged in one go, byte for byte; so is its verdict."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from data_prep.convert import one_dataset, source_identity
from data_prep.convert.convert import prepare_corpus
from data_prep.convert.limits import reason_of
from data_prep.convert.one_dataset import convert_dataset, convert_piece
from data_prep.convert.shares import Piece
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.ledger import LedgerEntry
from data_prep.manifest.manifest import Dataset
from data_prep.readers import arrays
from data_prep.source import source
from data_prep.staging.pieces import Pieces
from data_prep.staging.settings import Settings
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()
RESOLVER = GeneResolver(GENES)
SETTINGS = Settings(genes_hash=GENES.hash, min_genes=40, min_genes_mapped=10)
N_GENES = 150


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small files have many blocks, and new ones be at rest."""
    monkeypatch.setattr(source_identity, "SETTLED_S", -1.0)
    monkeypatch.setattr(source, "BLOCK_CELLS", 7)
    monkeypatch.setattr(arrays, "BLOCK_CELLS", 7)
    monkeypatch.setattr(arrays, "DENSE_ELEMENTS", 10 * N_GENES)


def write(path: Path, n_cells: int, seed: int, stored: str) -> Dataset:
    """Write cells of which some fail a threshold or a condition, stored in one way or another."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.uniform(0.1, 0.8, (n_cells, 1)), (n_cells, N_GENES)).astype(float)
    counts[0] = 1  # proves nothing of an empty first block
    obs = pd.DataFrame(
        {"donor_id": rng.choice(["p", "q"], n_cells), "kind": rng.choice(["x", "y"], n_cells)},
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=list(GENES.ids[:N_GENES]))
    if stored == "types":
        var["feature_types"] = ["Antibody Capture"] * 5 + ["Gene Expression"] * (N_GENES - 5)
    if stored == "rounded":
        counts[counts > 0] += rng.choice([0.0, 0.25], int((counts > 0).sum()))
    if stored == "bad value":
        counts[n_cells - 3, 4] = -1
    kind = np.asarray if stored == "dense" else sparse.csr_matrix
    cells = anndata.AnnData(kind(counts), obs=obs, var=var)
    if stored == "raw":
        cells.raw = cells.copy()
        cells.X = sparse.csr_matrix(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4))
    if stored == "twice":
        cells.layers["counts"] = cells.X.copy()
    if stored == "by gene":
        cells.X = sparse.csc_matrix(counts)
    cells.write_h5ad(path)
    how = "round:X" if stored == "rounded" else "auto"
    return Dataset(dataset_id="d", path=path, where="kind=x", counts=how)


def products(corpus: Path) -> dict[str, bytes]:
    """Return every file of the ledger and the staging."""
    return {
        str(path.relative_to(corpus)): path.read_bytes()
        for part in ("ledger", "staging")
        for path in sorted((corpus / part).rglob("*"))
        if path.is_file()
    }


def new_corpus(folder: Path) -> dict[str, Any]:
    prepare_corpus(folder, genes=GENES, settings=SETTINGS)
    return {"corpus": folder, "settings": SETTINGS, "resolver": RESOLVER}


STORED = ("csr", "dense", "raw", "types", "rounded", "twice", "by gene", "bad value")


@pytest.mark.thorough
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_cells=st.integers(3, 60),
    n_pieces=st.integers(2, 9),
    seed=st.integers(0, 10**6),
    stored=st.sampled_from(STORED),
)
def test_any_number_of_pieces_in_any_order_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, n_cells: int, n_pieces: int, seed: int, stored: str
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    dataset = write(folder / "d.h5ad", n_cells, seed, stored)
    straight, cut = new_corpus(folder / "straight"), new_corpus(folder / "cut")
    expected = convert_dataset(dataset, **straight)
    numbers = random.Random(seed).sample(range(n_pieces), n_pieces)
    found = [convert_piece(dataset, Piece(number=n, of=n_pieces), **cut) for n in numbers]
    entries = [entry for entry in found if entry is not None]
    assert entries
    assert all(entry == expected for entry in entries)
    assert products(folder / "cut") == products(folder / "straight")
    if expected["status"] != "failed":
        assert not (folder / "cut" / ".pieces" / "d").exists()
    if stored in ("csr", "dense", "raw", "types", "rounded") and expected["status"] == "ok":
        # They were cut: none but the last to be finished has given an entry.
        assert [entry is None for entry in found] == [True] * (n_pieces - 1) + [False]
    shutil.rmtree(folder)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write(tmp_path / "d.h5ad", 50, 0, "csr")


def run_pieces(dataset: Dataset, corpus: dict[str, Any], *numbers: int) -> list[LedgerEntry | None]:
    return [convert_piece(dataset, Piece(number=n, of=4), **corpus) for n in numbers]


@pytest.mark.thorough
def test_what_is_there_is_used_and_what_is_damaged_is_made_again(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, cut = new_corpus(tmp_path / "straight"), new_corpus(tmp_path / "cut")
    convert_dataset(dataset, **straight)
    made: list[int] = []
    plain = one_dataset.stage_piece

    def counted(*args: Any, number: int, **options: Any) -> None:
        made.append(number)
        plain(*args, number=number, **options)

    monkeypatch.setattr(one_dataset, "stage_piece", counted)
    assert run_pieces(dataset, cut, 0, 2, 0, 2, 3) == [None] * 5
    assert made == [0, 2, 3]
    (sums,) = (tmp_path / "cut" / ".pieces" / "d").glob("*/2/sums.npz")
    content = bytearray(sums.read_bytes())
    content[len(content) // 2] ^= 1
    sums.write_bytes(content)
    # Found when they are put together; the next one to come makes it again.
    assert run_pieces(dataset, cut, 1) == [None]
    assert not sums.exists()
    (entry,) = run_pieces(dataset, cut, 2)
    assert entry is not None
    assert made == [0, 2, 3, 1, 2]
    assert products(tmp_path / "cut") == products(tmp_path / "straight")


@pytest.mark.thorough
def test_a_dataset_that_is_done_is_looked_at_by_the_first_piece_alone(
    tmp_path: Path, dataset: Dataset
) -> None:
    cut = new_corpus(tmp_path / "cut")
    entry = run_pieces(dataset, cut, 0, 1, 2, 3)[-1]
    assert run_pieces(dataset, cut, 3, 2, 1, 0) == [None, None, None, entry]
    other = dataclasses.replace(dataset, where="kind=y")
    assert run_pieces(other, cut, 0, 1, 2) == [None] * 3
    # Meanwhile it is staged as it was.
    assert json.loads((tmp_path / "cut" / "ledger" / "d.json").read_text()) == entry
    changed = run_pieces(other, cut, 3)[0]
    assert changed is not None
    assert changed["n_cells"] != entry["n_cells"]


@pytest.mark.parametrize("status", ["ok", "excluded"])
def test_a_touched_file_of_a_dataset_that_is_done_is_hashed_once(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    cut = new_corpus(tmp_path / "cut")
    if status == "excluded":
        dataset = dataclasses.replace(dataset, organism="mouse")
    found = run_pieces(dataset, cut, 0, 1, 2, 3)
    # That of another species is not read at all.
    entry = found[0 if status == "excluded" else -1]
    assert entry is not None
    assert entry["status"] == status
    dataset.path.touch()
    hashed: list[Dataset] = []
    real = one_dataset.read_hash
    monkeypatch.setattr(one_dataset, "read_hash", lambda d: hashed.append(d) or real(d))
    monkeypatch.setattr(one_dataset, "stage_piece", None)
    assert run_pieces(dataset, cut, 0, 1, 2, 3) == [entry, None, None, None]
    assert len(hashed) == 1
    assert not (tmp_path / "cut" / ".pieces" / "d").exists()


def test_a_dataset_in_pieces_that_another_process_ends_gives_its_entry(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = new_corpus(tmp_path / "cut")
    assert run_pieces(dataset, cut, 0, 1, 2) == [None] * 3
    real = one_dataset.stage_piece

    def staged(*args: Any, **options: Any) -> None:
        convert_dataset(dataset, **cut)
        real(*args, **options)

    monkeypatch.setattr(one_dataset, "stage_piece", staged)
    (entry,) = run_pieces(dataset, cut, 3)
    assert entry is not None
    assert entry["status"] == "ok"
    assert not (tmp_path / "cut" / ".pieces" / "d").exists()


def test_pieces_of_a_file_that_was_replaced_are_not_put_together(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = new_corpus(tmp_path / "cut")
    assert run_pieces(dataset, cut, 0, 1) == [None] * 2
    about, content = dataset.path.stat(), dataset.path.read_bytes()
    dataset.path.write_bytes(content)
    # Equal in size and time of change, as a copy that keeps times may be.
    os.utime(dataset.path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run_pieces(dataset, cut, 2, 3) == [None] * 2
    assert run_pieces(dataset, cut, 0) == [None]
    sound = one_dataset.Pieces.drop_damaged

    def replaced(pieces: Any) -> bool:
        dataset.path.touch()
        return sound(pieces)

    monkeypatch.setattr(one_dataset.Pieces, "drop_damaged", replaced)
    with pytest.raises(ValueError, match="changed while it was read"):
        run_pieces(dataset, cut, 1)
    assert not (tmp_path / "cut" / "staging" / "d").exists()


def test_pieces_do_not_outlast_the_dataset(tmp_path: Path, dataset: Dataset) -> None:
    cut = new_corpus(tmp_path / "cut")
    left = tmp_path / "cut" / ".pieces" / "d"
    run_pieces(dataset, cut, 0, 1)
    assert left.is_dir()
    assert convert_dataset(dataset, **cut)["status"] == "ok"
    assert not left.exists()


def test_a_piece_that_another_process_has_made_stays(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = new_corpus(tmp_path / "cut")
    real = Pieces._name

    def twice(pieces: Pieces, part: Path, number: int) -> None:
        shutil.copytree(part, pieces.path(number))
        inode = pieces.path(number).stat().st_ino
        real(pieces, part, number)
        assert pieces.path(number).stat().st_ino == inode

    monkeypatch.setattr(Pieces, "_name", twice)
    entry = run_pieces(dataset, cut, 0, 1, 2, 3)[-1]
    assert entry is not None
    assert entry["status"] == "ok"


@pytest.mark.parametrize("direct", [True, False])
def test_a_lack_of_memory_is_no_reason_to_stage_in_one_go(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    cut = new_corpus(tmp_path / "cut")

    def greedy(*args: Any, **options: Any) -> None:
        if direct:
            raise MemoryError("8 GiB")
        raise ValueError("8 GiB") from MemoryError()

    monkeypatch.setattr(one_dataset, "stage_piece", greedy)
    with pytest.raises(MemoryError) as error:
        run_pieces(dataset, cut, 0)
    assert "not enough memory (8 GiB)" in reason_of(error.value)
    assert not list((tmp_path / "cut" / ".pieces" / "d").glob("*/whole"))


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = new_corpus(tmp_path / "cut")
    plain: Callable[..., None] = one_dataset.stage_piece

    def touched(*args: Any, **options: Any) -> None:
        plain(*args, **options)
        dataset.path.touch()

    monkeypatch.setattr(one_dataset, "stage_piece", touched)
    with pytest.raises(ValueError, match="changed while it was read"):
        run_pieces(dataset, cut, 1)
