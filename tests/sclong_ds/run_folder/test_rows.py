"""Which validations compare, and what is said of them.

Covers also `sclong_ds/files/json_lines.py`.
"""

from __future__ import annotations

import math

import pytest

from sclong_ds.run_folder.rows import (
    Judged,
    compared,
    judged,
    like_the_last,
    sentence,
    standing,
    strongest,
    unlisted,
    verdict,
)

HIDDEN = {"val/n_hidden": 90.0, "val/mse": 0.25}
BESIDE = {"val/gene_mean/mse": 0.5, "val/linear/mse": 0.2, "val/strongest_mse": 0.2}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.1, "below"), (0.2, "equal to"), (0.3, "above"), (math.inf, "above"),
        (math.nan, "not a number, against"), (0.20001, "equal at four decimals to"),
        (0.2001, "above"),
    ],
)  # fmt: skip
def test_an_error_that_is_no_number_is_called_so(error: float, words: str) -> None:
    row = HIDDEN | BESIDE | {"val/mse": error}
    assert standing(row) == f"{words} the strongest baseline (linear, 0.2000)"
    assert compared(0.1, math.nan) == "not comparable with"


@pytest.mark.parametrize(
    ("error", "low", "high", "words"),
    [
        (0.199, -0.007, 0.003, "not told apart from"),
        (0.199, -0.002, -0.0005, "below"),
        (0.201, -0.0005, 0.002, "not told apart from"),
        (0.201, 0.0005, 0.002, "above"),
        (0.20001, 0.000001, 0.00002, "equal at four decimals to"),
    ],
)
def test_a_difference_within_its_bounds_is_none(
    error: float, low: float, high: float, words: str
) -> None:
    row = HIDDEN | BESIDE | {"val/mse": error}
    row |= {"val/vs_strongest_low": low, "val/vs_strongest_high": high}
    assert verdict(row) == words
    assert standing(row) == (
        f"{words} the strongest baseline (linear, 0.2000; difference {error - 0.2:+.4f} "
        f"[{low:+.4f}, {high:+.4f}])"
    )
    assert "vs_strongest" not in sentence(row)


def test_a_baseline_that_is_no_number_is_not_the_strongest() -> None:
    assert strongest(HIDDEN | {"val/gene_mean/mse": math.nan, "val/offset/mse": 2.0}) == "offset"
    assert strongest(HIDDEN | {"val/gene_mean/mse": math.nan}) is None


def test_errors_of_hidden_values_are_kept_apart_from_those_of_shown_ones_too() -> None:
    old = [{"val/mse": 0.1}, {"val/mse": 0.2}]
    assert like_the_last([*old, HIDDEN, HIDDEN]) == [HIDDEN, HIDDEN]
    assert like_the_last([HIDDEN, *old]) == old
    assert like_the_last([]) == []
    assert "shown" in sentence(old[0])
    assert sentence(HIDDEN) == "MSE of hidden values 0.2500"


def test_checkpoints_are_judged_relative_to_the_baselines_that_were_there() -> None:
    assert judged({"val/pearson": 1.0}) is None
    assert judged({"val/mse": 0.1}) == Judged("val/mse (hidden and shown)", 0.1)
    assert judged(HIDDEN) == Judged("val/mse (hidden)", 0.25)
    row = HIDDEN | BESIDE | {"val/relative_mse": 1.25}
    assert judged(row) == Judged("val/relative_mse (gene_mean, linear)", 1.25)


def test_a_sentence_names_the_number_of_cells_and_what_no_list_names() -> None:
    row = HIDDEN | {"val/n_cells": 1.0, "val/spearman": 0.5, "val/mae": 0.125}
    parts = {"val/mae/bin_0": 1.0, "val/mae/large": 1.0, "val/mae/dataset/a/b": 1.0}
    row |= parts | {"val/linear/mae": 1.0, "perf/validation_s": 1.0}
    assert unlisted(row) == {"val/mae": 0.125}
    assert sentence(row) == "MSE of hidden values of 1 held-out cell 0.2500; mae 0.125"
    assert "of 32 held-out cells" in sentence(row | {"val/n_cells": 32.0})
