"""Splits are contiguous, hold out whole groups, and say what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


def test_splits_are_contiguous_and_whole_datasets(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    result = finalize(folder)
    corpus = Corpus(folder)
    # The 5 % asked for fit no dataset, so the smallest is held out and the user is told.
    assert result["split_unit"] == "dataset"
    assert result["held_out"] == {"validation": ["c"], "test": []}
    assert any("14.9%" in warning for warning in result["warnings"])
    assert corpus.splits == {
        "train": range(366),
        "validation": range(366, 430),
        "test": range(430, 430),
    }
    np.testing.assert_array_equal(corpus.split("validation"), np.arange(366, 430))
    assert len(corpus.split("test")) == 0
    assert set(corpus.row_dataset[366:]) == {2}
    assert set(corpus.row_dataset[:366]) == {0, 1}
    assert {0, 366, 430} <= set(corpus.chunk_rows.tolist())
    with pytest.raises(ValueError, match="this corpus has train, validation, test"):
        corpus.split("valid")


def test_explicit_validation_datasets(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    result = finalize(folder, validation_datasets=["b"], test_fraction=0.2)
    assert result["held_out"] == {"validation": ["b"], "test": ["c"]}
    assert [info.split_cells for info in Corpus(folder).datasets] == [
        {"train": 240, "validation": 0, "test": 0},
        {"train": 0, "validation": 126, "test": 0},
        {"train": 0, "validation": 0, "test": 64},
    ]


def test_donors_stay_together_across_datasets(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    donors = {
        "a": [f"p{row % 12}" for row in range(240)],
        "b": [f"p{row % 12}" if row % 5 else "" for row in range(126)],
    }
    folder = stage_corpus(three, donors=donors)
    result = finalize(folder, validation_fraction=0.2, test_fraction=0.1, seed=1)
    corpus = Corpus(folder)
    assert result["split_unit"] == "donor"
    sizes = {name: len(rows) / 430 for name, rows in corpus.splits.items()}
    assert 0.1 < sizes["validation"] <= 0.2
    assert 0.02 < sizes["test"] <= 0.1
    groups: dict[str, set[str]] = {}
    for split in corpus.splits:
        for row in corpus.split(split):
            name = corpus.datasets[corpus.row_dataset[row]].dataset_id
            donor = donors[name][(corpus.row_source[row] - 1) // 2] if name in donors else ""
            groups.setdefault(donor or f"dataset {name}", set()).add(split)
    assert len(groups) == 14
    assert all(len(splits) == 1 for splits in groups.values())


def test_one_dataset_is_split_by_cell_with_a_warning(
    stage_corpus: Stage, counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage_corpus({"only": counts(1, 100)})
    result = finalize(folder, validation_fraction=0.1)
    assert result["split_unit"] == "cell"
    assert result["splits"] == {"train": [0, 90], "validation": [90, 100], "test": [100, 100]}
    assert "overrates the model" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction 1.0: allowed"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave no cells to train on"),
        ({"split_by": "gene"}, "allowed are auto, dataset, donor, cell"),
        ({"split_by": "donor"}, "no dataset has a donor column"),
        ({"validation_datasets": ["z"]}, "not among the usable datasets a, b, c"),
        ({"validation_datasets": ["a", "b", "c"]}, "no dataset to train on"),
        ({"validation_datasets": ["a"], "validation_fraction": 0.1}, "not both"),
        ({"validation_datasets": ["a"], "split_by": "cell"}, "does not go with split_by cell"),
    ],
)
def test_impossible_options(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], options: dict, message: str
) -> None:
    folder = stage_corpus(three)
    with pytest.raises(ValueError, match=message):
        finalize(folder, **options)
    assert not (folder / "corpus.json").exists()
    assert not list(folder.glob(".finalize*"))


def test_no_validation_split(stage_corpus: Stage, three: dict[str, sparse.csr_matrix]) -> None:
    folder = stage_corpus(three)
    result = finalize(folder, validation_fraction=0.0)
    assert result["splits"] == {"train": [0, 430], "validation": [430, 430], "test": [430, 430]}


def test_too_few_groups(stage_corpus: Stage, counts: Counts) -> None:
    folder = stage_corpus({"only": counts(1, 30)}, donors={"only": ["p"] * 30})
    for unit in ("donor", "dataset"):
        with pytest.raises(ValueError, match="too few for the splits"):
            finalize(folder, split_by=unit)  # type: ignore[arg-type]
    assert finalize(folder)["split_unit"] == "cell"
