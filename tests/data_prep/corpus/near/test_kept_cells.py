"""finalize drops near duplicates where is_primary_data tells which is the copy, and counts all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.corpus.near.kept_cells import read_primary
from data_prep.corpus.near.near_duplicates import NearSearch
from data_prep.verify.verify import verify
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.datasheet.health import health_of

Stage = Callable[..., Path]


@pytest.fixture
def staged(stage_corpus: Stage, counts: Callable[..., sparse.csr_matrix]) -> Path:
    """60 cells of `c` are those of `a` without ten genes; 10 repeat `a` exactly."""
    whole, own = counts(1, 240).tolil(), counts(2, 126)
    whole[:, 599] = 1  # without it a copy would be the same cell exactly
    whole = whole.tocsr()
    part = np.arange(600) < 590
    copy = sparse.csr_matrix(whole[:60].toarray() * part)
    tables = {"a": whole, "b": own, "c": copy, "d": whole[60:70]}
    primary = {
        "a": {"is_primary_data": ["True"] * 200 + ["False"] * 40},
        "c": {"is_primary_data": ["False"] * 20 + ["True"] * 20 + [""] * 20},
    }
    return stage_corpus(tables, measured={"c": part}, obs=primary)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("rule", "dropped", "kept"),
    [("primary", [0, 0, 20, 0], [40, 0, 40, 0]), ("drop", [0, 0, 60, 0], [0, 0, 0, 0]),
     ("keep", [0, 0, 0, 0], [60, 0, 60, 0])],
)  # fmt: skip
def test_the_copies_that_are_not_primary_are_left_out(
    staged: Path, rule: str, dropped: list[int], kept: list[int]
) -> None:
    result = finalize(staged, near_duplicates=rule, split_by="cell")
    infos = Corpus(staged).datasets
    assert [info.near_dropped for info in infos] == dropped
    assert [info.near_kept for info in infos] == kept
    assert [info.duplicates_dropped for info in infos] == [0, 0, dropped[2], 10]
    assert result["n_cells"] == 240 + 126 + 60 - dropped[2]
    assert result["near_duplicates"] == rule
    assert any("near duplicates" in line for line in result["warnings"])
    assert verify(staged)["ok"]
    health = health_of(result).text()
    assert ("are the same as one of another" in health) == (rule != "drop")


@pytest.mark.thorough
def test_the_same_staging_and_rule_give_the_same_bytes(staged: Path) -> None:
    first = finalize(staged, split_by="cell")
    assert finalize(staged, split_by="cell")["hash"] == first["hash"]
    assert finalize(staged, near_duplicates="keep")["hash"] != first["hash"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "lost",
    [["near.npz"], ["near/asked/000000.bounds.npz"],
     ["near.npz", "near/compared/000000.bounds.npz"],
     ["done/near.000000.json"], ["done/near-pairs.000000.json"]],
)  # fmt: skip
def test_what_is_damaged_after_the_records_are_gone_is_done_again(
    staged: Path, monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    expected = finalize(shutil.copytree(staged, staged.with_name("whole")), split_by="cell")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.corpus.finalize.seal", fail)
        with pytest.raises(OSError, match="disk full"):
            finalize(staged, split_by="cell")
    (work,) = staged.glob(".finalize-*")
    kept = (work / "plan.npz").stat().st_ino
    for name in lost:
        (work / name).unlink()
    plans: set[int] = set()

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "recheck":
            plans.add((work / "plan.npz").stat().st_ino)

    assert finalize(staged, split_by="cell", progress=watch)["hash"] == expected["hash"]
    # What does not depend on it stays.
    assert plans == {kept}


def test_a_small_new_part_is_searched_in_units_of_all_cells(
    staged: Path, counts: Callable[..., sparse.csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("data_prep.corpus.build.LEAST_BYTES", 10)
    monkeypatch.setattr("data_prep.corpus.build.USUAL_UNITS", 4)

    def search(*arguments: Any, run_bytes: int) -> NearSearch:
        seen.append(run_bytes)
        return NearSearch(*arguments, run_bytes=run_bytes)

    monkeypatch.setattr("data_prep.corpus.build.NearSearch", search)
    entry = staged / "ledger" / "d.json"
    later = entry.read_bytes()
    entry.unlink()
    finalize(staged, split_by="cell")
    entry.write_bytes(later)
    finalize(staged, split_by="cell")
    assert len(Corpus(staged).parts) == 2
    assert seen[1] >= seen[0]


def test_what_is_neither_true_nor_false_is_unknown(staged: Path) -> None:
    table = staged / "staging" / "c" / "obs.parquet"
    assert np.bincount(read_primary(table)).tolist() == [20, 20, 20]
