"""Near duplicates are found by a search over all pairs, and by nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from data_prep.corpus.near import gene_sets as module
from data_prep.corpus.near import near_duplicates as search
from data_prep.corpus.near.gene_sets import FEWEST_GENES, gene_sets
from data_prep.corpus.near.near_duplicates import (
    PRIMARY,
    SECONDARY,
    UNKNOWN,
    NearDuplicates,
    NearSearch,
)
from data_prep.passes.buckets import BucketRuns
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter

N_GENES = 300


def written(folder: Path, counts: list[np.ndarray]) -> list[CellStore]:
    """Write one small store a dataset."""
    stores = []
    for number, cells in enumerate(counts):
        path = folder / f"{number}.zarr"
        with CellWriter(path, n_genes=N_GENES, chunk_entries=512, chunks_per_shard=2) as writer:
            writer.append(sparse.csr_matrix(cells.astype(np.uint32)), source={})
        stores.append(CellStore(path))
    return stores


def drawn(seed: int, n_datasets: int) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Datasets of one pool of cells, each with a gene list of its own or of another.

    Some copies differ in one count of a gene that both lists name: they are no near duplicates.
    """
    rng = np.random.default_rng(seed)
    pool = rng.poisson(0.6, (12, N_GENES)) + (rng.random((12, N_GENES)) < 0.02) * 300
    pool[0] = 0
    pool[0, :20] = 1  # too few genes to be told from another
    lists, counts, primary = [], [], []
    for _ in range(n_datasets):
        if lists and rng.random() < 0.3:
            genes = lists[int(rng.integers(len(lists)))]
        else:
            genes = rng.random(N_GENES) < rng.choice([0.08, 0.3, 0.7, 1.0])
        lists.append(genes)
        cells = pool[rng.integers(0, len(pool), int(rng.integers(1, 7)))].copy()
        for cell in cells[rng.random(len(cells)) < 0.3]:
            cell[rng.integers(N_GENES)] += 1
        counts.append(cells * genes)
        primary.append(rng.integers(0, 3, len(cells)).astype(np.uint8))
    return counts, np.array(lists), primary


def expected(
    counts: list[np.ndarray],
    measured: np.ndarray,
    primary: list[np.ndarray],
    kept: list[np.ndarray],
    rule: str,
) -> tuple[list[bool], list[bool]]:
    """Compare every cell with every other, gene by gene."""
    sets = gene_sets(measured)
    cells = [(d, row) for d, table in enumerate(counts) for row in range(len(table))]
    pairs, dropped = [], [False] * len(cells)
    for (m, (a, i)), (n, (b, j)) in itertools.permutations(enumerate(cells), 2):
        if (measured[a] == measured[b]).all() or not (kept[a][i] and kept[b][j]):
            continue
        on = sets.set_of[sets.of_dataset[a], sets.of_dataset[b]]
        shared = measured[a] & measured[b]
        if on < 0 or (counts[a][i][sets.genes[on]] > 0).sum() < FEWEST_GENES:
            continue
        if not (counts[a][i][shared] == counts[b][j][shared]).all():
            continue
        pairs.append((m, n))
        if rule == "primary":
            dropped[m] |= primary[a][i] == SECONDARY and primary[b][j] == PRIMARY
        elif rule == "drop":
            mine = (primary[a][i], (~measured[a]).sum(), m)
            dropped[m] |= (primary[b][j], (~measured[b]).sum(), n) < mine
    kept_beside = [False] * len(cells)
    for m, n in pairs:
        kept_beside[m] |= not (dropped[m] or dropped[n])
    return kept_beside, dropped


@pytest.mark.thorough
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 5),
    rule=st.sampled_from(["primary", "drop", "keep"]),
)
def test_what_is_found_is_what_a_search_over_all_pairs_finds(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, rule: search.NearRule
) -> None:
    folder = tmp_path_factory.mktemp("near")
    counts, measured, primary = drawn(seed, n)
    rng = np.random.default_rng(seed)
    kept = [rng.random(len(table)) < 0.9 for table in counts]
    near = found_in(folder, counts, measured, primary, kept, rule)
    still, dropped = expected(counts, measured, primary, kept, rule)
    assert near.kept.tolist() == still
    assert near.dropped.tolist() == dropped


def found_in(
    folder: Path,
    counts: list[np.ndarray],
    measured: np.ndarray,
    primary: list[np.ndarray],
    kept: list[np.ndarray],
    rule: search.NearRule,
) -> NearDuplicates:
    stores = written(folder, counts)
    return searched(stores, kept, measured, primary, folder / "near", rule)


def searched(
    stores: list[CellStore],
    kept: list[np.ndarray],
    measured: np.ndarray,
    primary: list[np.ndarray],
    folder: Path,
    rule: search.NearRule,
    *,
    run_bytes: int = 2**28,
    seed: int = 0,
) -> NearDuplicates:
    """Do every unit of every step by a process of its own, in any order, some of them twice."""
    rng = np.random.default_rng(seed)

    def one() -> NearSearch:
        sets = gene_sets(measured)
        return NearSearch(stores, np.concatenate(kept), sets, folder, run_bytes=run_bytes)

    plan = one()
    for step, n_units in (
        ("compare", len(plan.runs)), ("ask", plan.n_buckets), ("answer", plan.n_buckets)
    ):  # fmt: skip
        units = np.concatenate([rng.permutation(n_units), rng.permutation(n_units)[: n_units // 2]])
        for unit in units.tolist():
            assert getattr(one(), step)(unit).is_file()
    found = one().found(np.concatenate(primary), rule)
    one().forget_records()
    left = [path.name for path in folder.rglob("*") if path.is_file()]
    assert all(name.endswith(".bounds.npz") for name in left)
    return found


def copies() -> tuple[list[np.ndarray], np.ndarray]:
    """The same 40 cells with all genes, with half of them, and 40 others with the other half."""
    rng = np.random.default_rng(5)
    pool = rng.poisson(1.0, (40, N_GENES))
    half = np.arange(N_GENES) < 150
    measured = np.array([np.ones(N_GENES, bool), half, ~half])
    return [pool, pool * half, pool * ~half], measured


def test_lists_without_a_gene_in_common_are_not_compared(tmp_path: Path) -> None:
    """Both halves are near duplicates of the whole, and of each other nobody can say."""
    counts, measured = copies()
    unknown = [np.full(40, UNKNOWN, np.uint8)] * 3
    near = found_in(tmp_path, counts, measured, unknown, [np.ones(40, bool)] * 3, "drop")
    assert not near.kept.any()
    assert near.dropped.tolist() == [False] * 40 + [True] * 80
    assert near.n_left_out == 0
    sets = gene_sets(measured)
    assert sets.set_of[1, 2] == -1


@pytest.mark.thorough
def test_units_in_any_order_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many buckets and runs."""
    counts, measured, primary = drawn(3, 5)
    kept = [np.ones(len(table), bool) for table in counts]
    stores = written(tmp_path, counts)
    still, dropped = expected(counts, measured, primary, kept, "drop")
    monkeypatch.setattr(search, "CELLS_PER_BUCKET", 4)
    monkeypatch.setattr(search, "_BLOCK", 7)
    for seed in range(3):
        folder = tmp_path / f"near{seed}"
        near = searched(stores, kept, measured, primary, folder, "drop", run_bytes=600, seed=seed)
        assert len(list((folder / "compared").glob("*.npz"))) > 3
        assert len(list((folder / "shared").glob("*.npz"))) > 3
        assert near.kept.tolist() == still
        assert near.dropped.tolist() == dropped
    assert any(dropped)


def test_the_runs_of_a_step_are_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, measured = copies()
    stores, kept, opened = written(tmp_path, counts), np.ones(120, bool), []
    monkeypatch.setattr(search, "CELLS_PER_BUCKET", 40)
    one = NearSearch(stores, kept, gene_sets(measured), tmp_path / "near", run_bytes=600)
    real = BucketRuns.complete

    def complete(folder: Path, **options: int) -> BucketRuns:
        opened.append(folder.name)
        return real(folder, **options)

    monkeypatch.setattr(BucketRuns, "complete", complete)
    for step, n_units in (
        (one.compare, len(one.runs)), (one.ask, one.n_buckets), (one.answer, one.n_buckets)
    ):  # fmt: skip
        assert n_units > 3
        for unit in range(n_units):
            step(unit)
    assert opened == ["compared", "asked"]


def test_a_unit_makes_about_as_many_records_as_a_bucket_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The more sets a cell is compared on, the fewer cells."""
    counts, measured = copies()
    stores, sets = written(tmp_path, counts), gene_sets(measured)
    most_sets = int(sets.takes.sum(axis=0).max())
    assert most_sets == 2
    largest_chunk = max(int(np.diff(store.chunk_rows).max()) for store in stores)
    monkeypatch.setattr(search, "CELLS_PER_BUCKET", 60)
    one = NearSearch(stores, np.ones(120, bool), sets, tmp_path / "near", run_bytes=2**28)
    cells = [one.n_cells(run) for run in range(len(one.runs))]
    # Cells have different numbers of values.
    assert max(cells) <= 2 * 60 // most_sets + largest_chunk
    monkeypatch.setattr(search, "CELLS_PER_BUCKET", 1000)
    one = NearSearch(stores, np.ones(120, bool), sets, tmp_path / "near", run_bytes=2**28)
    assert len(one.runs) == 1


def test_a_run_that_is_missing_is_told(tmp_path: Path) -> None:
    counts, measured = copies()
    stores, kept = written(tmp_path, counts), np.ones(120, bool)
    lost = NearSearch(stores, kept, gene_sets(measured), tmp_path / "near", run_bytes=600)
    for run in range(1, len(lost.runs)):
        lost.compare(run)
    with pytest.raises(ValueError, match=f"0 whole runs of {len(lost.runs)}; run finalize again"):
        lost.ask(0)


def test_pairs_of_lists_beyond_the_most_sets_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, measured = copies()
    monkeypatch.setattr(module, "MOST_SETS", 1)
    unknown = [np.full(40, UNKNOWN, np.uint8)] * 3
    near = found_in(tmp_path, counts, measured, unknown, [np.ones(40, bool)] * 3, "keep")
    assert near.n_left_out == 1
    assert near.kept.tolist() == [True] * 80 + [False] * 40
