"""The verdict names what the model is not better than; the table starts with the strongest row."""

import numpy as np

from sclong_ds.evaluation.scores import Scores
from sclong_ds.evaluation.verdict import interval_table, score_table, shown_table, verdict

NAME = "knn_accuracy"


def made(value: float, *, noise: float = 0.01, seed: int = 0) -> Scores:
    draws = value + noise * np.random.default_rng(seed).standard_normal(1000)
    return Scores(values={NAME: value, "batch_asw": None}, draws={NAME: draws}, units={NAME: 1000})


def sentence(**rows: Scores) -> str:
    return verdict(rows, name=NAME, no_context=("depth", "untrained"))


def test_names_every_row_that_the_model_is_not_better_than_the_strongest_first() -> None:
    rows = {"depth": made(0.30), "untrained": made(0.44, seed=1), "pca": made(0.9)}
    said = sentence(sclong=made(0.45), **rows)
    assert said.startswith("knn_accuracy 0.450 [0.43")
    assert ": not better than pca (-0.450 [-0.450, -0.450]), untrained (+0.010 [-0.0" in said
    assert "depth" not in said
    assert "; " not in said


def test_differences_are_of_the_same_resamples() -> None:
    """Two rows whose errors are the same differ surely, however wide their own intervals are."""
    said = sentence(sclong=made(0.50, noise=0.1), depth=made(0.48, noise=0.1), pca=made(0.9))
    assert "better than every row without context by +0.020 [+0.020, +0.020]" in said
    assert said.count("not better than") == 1


def test_a_model_above_all_rows_says_so() -> None:
    said = sentence(sclong=made(0.95), depth=made(0.3), untrained=made(0.4), pca=made(0.9))
    assert "not better" not in said
    assert "better than every row without context by +0.550" in said
    assert said.endswith("better than pca by +0.050 [+0.050, +0.050]")


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    said = sentence(sclong=made(0.5), pca=made(0.50001), depth=made(0.3), untrained=made(0.3))
    assert "not better than pca (+0.000 [+0.000, +0.000])" in said


def test_tables_start_with_the_strongest_row() -> None:
    rows = {"sclong": made(0.5), "pca": made(0.9), "depth": made(0.3)}
    table = score_table(rows)
    assert list(table.index) == ["pca", "sclong", "depth"]
    assert table["batch_asw"].isna().all()
    shown = shown_table(rows, table)
    assert shown.loc["pca", NAME].startswith("0.900 [0.88")
    assert shown["batch_asw"].isna().all()
    assert list(interval_table(rows).columns) == [f"{NAME}_low", f"{NAME}_high"]
