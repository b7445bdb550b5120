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
    find_near_duplicates,
)
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
    assert not (folder / "near").exists()


def found_in(
    folder: Path,
    counts: list[np.ndarray],
    measured: np.ndarray,
    primary: list[np.ndarray],
    kept: list[np.ndarray],
    rule: search.NearRule,
) -> NearDuplicates:
    stores = written(folder, counts)
    return find_near_duplicates(stores, kept, measured, primary, folder / "near", rule=rule)


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


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_search_continues_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every single write, over many buckets and runs, cells read once."""
    counts, measured, primary = drawn(3, 5)
    kept = [np.ones(len(table), bool) for table in counts]
    stores = written(tmp_path, counts)
    still, dropped = expected(counts, measured, primary, kept, "drop")
    monkeypatch.setattr(search, "CELLS_PER_BUCKET", 4)
    monkeypatch.setattr(search, "RUN_BYTES", 600)
    append = search._append
    writes, kills = [0], 0

    def appended(*args: object) -> None:
        if writes[0] == 1:
            raise Killed
        writes[0] += 1
        append(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "_append", appended)
    while True:
        writes[0] = 0
        try:
            near = find_near_duplicates(
                stores, kept, measured, primary, tmp_path / "near", rule="drop"
            )
            break
        except Killed:
            kills += 1
    assert kills > 10
    assert near.kept.tolist() == still
    assert near.dropped.tolist() == dropped


def test_pairs_of_lists_beyond_the_most_sets_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, measured = copies()
    monkeypatch.setattr(module, "MOST_SETS", 1)
    unknown = [np.full(40, UNKNOWN, np.uint8)] * 3
    near = found_in(tmp_path, counts, measured, unknown, [np.ones(40, bool)] * 3, "keep")
    assert near.n_left_out == 1
    assert near.kept.tolist() == [True] * 80 + [False] * 40
