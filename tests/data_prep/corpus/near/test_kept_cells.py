"""finalize drops near duplicates where is_primary_data tells which is the copy, and counts all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.corpus.near.kept_cells import read_primary
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


def test_the_same_staging_and_rule_give_the_same_bytes(staged: Path) -> None:
    first = finalize(staged, split_by="cell")
    assert finalize(staged, split_by="cell")["hash"] == first["hash"]
    assert finalize(staged, near_duplicates="keep")["hash"] != first["hash"]


def test_what_is_neither_true_nor_false_is_unknown(staged: Path) -> None:
    table = staged / "staging" / "c" / "obs.parquet"
    assert np.bincount(read_primary(table)).tolist() == [20, 20, 20]
