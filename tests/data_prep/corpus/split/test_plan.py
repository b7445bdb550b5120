"""Splits are contiguous, hold out whole groups, move nobody, and say what they cannot do.

Covers also `data_prep/corpus/split/rule.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.corpus.split.plan import SplitCells, SplitPlan, plan_split
from data_prep.corpus.split.rule import (
    SplitBy,
    SplitOptions,
    SplitRule,
    read_rule,
    resolve,
    rule_of,
    write_rule,
)
from data_prep.verify.verify import verify
from sclong_ds.corpus.catalogue import write_catalogue
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


def sides_of(corpus: Corpus, donors: dict[str, list[str]]) -> set[tuple[str, str, str]]:
    """Return dataset, donor ('' for none) and split of every cell."""
    return {
        (name, donors[name][(corpus.row_source[row] - 1) // 2] if name in donors else "", split)
        for split in corpus.splits
        for row in corpus.split(split)
        for name in [corpus.datasets[corpus.row_dataset[row]].dataset_id]
    }


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
    assert sizes["validation"] == pytest.approx(0.2, abs=0.06)
    assert sizes["test"] == pytest.approx(0.1, abs=0.06)
    for name in ("validation", "test"):
        assert result["split_shares"][name]["cells"] == pytest.approx(sizes[name])
    groups: dict[str, set[str]] = {}
    for name, donor, split in sides_of(corpus, donors):
        groups.setdefault(donor or f"dataset {name}", set()).add(split)
    assert len(groups) == 14
    assert all(len(splits) == 1 for splits in groups.values())


def test_a_donor_whose_number_is_a_float_elsewhere_is_one_donor(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    donors = {
        "a": [f"{row % 12}" for row in range(240)],
        "b": [f"{row % 12}.0" if row % 5 else "" for row in range(126)],
    }
    folder = stage_corpus(three, donors=donors)
    result = finalize(folder, validation_fraction=0.4, seed=1)
    assert not [name for names in result["held_out"].values() for name in names if "." in name]
    corpus = Corpus(folder)
    held_out = {
        (donor.removesuffix(".0"), split)
        for name, donor, split in sides_of(corpus, donors)
        if name in donors
    }
    named = [donor for donor, _ in held_out if donor]
    assert sorted(named) == sorted(map(str, range(12)))
    assert verify(folder)["problems"] == []


def test_a_corpus_that_was_split_before_keeps_its_donors_apart(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    donors = {"a": [f"{row % 12}.0" for row in range(240)]}
    folder = stage_corpus(three, donors=donors)
    old = SplitRule(options=SplitOptions(validation_fraction=0.4), salt="s", whole_donors=False)
    assert "whole_donors" not in old.as_json()
    write_rule(folder, old.as_json())
    for _ in range(2):
        result = finalize(folder)
        expected = {f"donor {n}.0" for n in range(12) if old.side(f"donor {n}.0") == 1}
        assert expected
        assert {name for name in result["held_out"]["validation"] if "." in name} == expected
        assert verify(folder)["problems"] == []
    assert read_rule(folder) == replace(old, datasets=("a", "b", "c"))


def test_one_dataset_is_split_by_cell_with_a_warning(
    stage_corpus: Stage, counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage_corpus({"only": counts(1, 100)})
    result = finalize(folder, validation_fraction=0.1)
    assert result["split_unit"] == "cell"
    assert result["splits"] == {"train": [0, 90], "validation": [90, 100], "test": [100, 100]}
    assert "overrates the model" in caplog.text


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_a_corpus_that_grows_keeps_its_split_whatever_was_given_first(
    stage_corpus: Stage, counts: Counts, three: dict[str, sparse.csr_matrix]
) -> None:
    """Options that are not repeated are as before; a name that sorts first takes no cell over."""
    shared = counts(7, 20)
    first = {"m": sparse.vstack([three["a"], shared], format="csr"), "n": three["b"]}
    folder = stage_corpus(first)
    before = finalize(folder, validation_datasets=["m"], seed=3)
    more = first | {"a": sparse.vstack([shared, three["c"]], format="csr")}
    grown = stage_corpus(more, name="grown")
    shutil.copyfile(folder / "split.json", grown / "split.json")
    after = finalize(grown)
    assert after["held_out"] == before["held_out"] == {"validation": ["m"], "test": []}
    assert after["options"] == before["options"]
    assert [d["dataset_id"] for d in after["datasets"]] == ["m", "n", "a"]
    assert [d["duplicates_dropped"] for d in after["datasets"]] == [0, 0, 20]
    # The catalogue has the rule, too: a copy of the products alone can grow.
    (grown / "split.json").unlink()
    assert finalize(grown)["hash"] == after["hash"]
    assert verify(grown)["problems"] == []
    # Another draw is said, and only made when asked for.
    assert finalize(grown, validation_fraction=0.1)["options"]["validation_datasets"] == []


@pytest.mark.thorough
def test_another_seed_draws_again_and_says_so(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage_corpus(three)
    first = finalize(folder)
    assert finalize(folder, seed=0)["hash"] == first["hash"]
    assert "drawn again" not in caplog.text
    finalize(folder, seed=5)
    assert "the split is drawn again (seed 5, split_by auto; before: 0, auto)" in caplog.text


def test_a_rule_that_was_changed_is_refused(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    finalize(folder)
    path = folder / "split.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert any("split.json: damaged" in problem for problem in verify(folder)["problems"])
    with pytest.raises(
        ValueError, match=r"split.json: damaged .*delete it to draw the split again"
    ):
        finalize(folder)


def made(rng: np.random.Generator, number: int, *, donors: float) -> SplitCells:
    """Return a dataset of a size as atlases have them; a share of datasets names donors."""
    n_cells = int(rng.lognormal(4.0, 1.2)) + 2
    names = None
    donor = np.zeros(n_cells, np.int32)
    if rng.random() < donors:
        n_donors = int(rng.integers(1, 8))
        # Some donors are unknown, some are in other datasets, too.
        names = ("", *(f"p{rng.integers(10_000)}" for _ in range(n_donors)))
        donor = rng.integers(0, len(names), n_cells).astype(np.int32)
    kept = rng.random(n_cells) < 0.9
    rows = np.sort(rng.choice(10 * n_cells, n_cells, replace=False)).astype(np.int64)
    return SplitCells(
        dataset_id=f"d{rng.integers(10**9)}-{number}", donors=names, donor=donor, kept=kept,
        rows=rows,
    )  # fmt: skip


def sides(datasets: list[SplitCells], plan: SplitPlan) -> dict[tuple[str, int], int]:
    return {
        (d.dataset_id, row): side
        for d, codes in zip(datasets, plan.codes, strict=True)
        for row, side in zip(d.rows.tolist(), codes.tolist(), strict=True)
    }


@pytest.mark.thorough
@pytest.mark.parametrize("trial", range(60))
def test_growth_moves_nobody(trial: int) -> None:
    """From one dataset or many, with donors or without, in one step or several, by any unit."""
    rng = np.random.default_rng(trial)
    share = (0.0, 0.5, 1.0)[trial % 3]
    n_first = int(rng.choice([1, 2, 5, 40]))
    datasets = [made(rng, i, donors=share) for i in range(n_first)]
    by: SplitBy = "cell" if trial % 10 == 9 else "auto"
    options = SplitOptions(seed=trial, split_by=by, test_fraction=0.1 if trial % 4 == 0 else 0.0)
    if trial % 5 == 4 and n_first > 2:
        named = (datasets[0].dataset_id,)
        options = SplitOptions(seed=trial, validation_datasets=named)
    if n_first == 2 and options.test_fraction:
        datasets.append(made(rng, 99, donors=share))
    plan = plan_split(datasets, SplitRule(options=options))
    for step in range(3):
        before = sides(datasets, plan)
        # Names sort anywhere, and one step takes a dataset out.
        datasets = datasets + [made(rng, 100 * step + i, donors=0.5) for i in range(step * 5 + 1)]
        if step == 1 and len(datasets) > 9:
            gone = datasets.pop(int(rng.integers(1, 5)))
            before = {key: side for key, side in before.items() if key[0] != gone.dataset_id}
        rule = rule_of(json.loads(json.dumps(plan.rule.as_json())))
        plan = plan_split(datasets, rule)
        after = sides(datasets, plan)
        moved = [key for key, side in before.items() if after[key] != side]
        assert not moved


def test_larger_shares_take_in_and_let_none_go() -> None:
    rng = np.random.default_rng(5)
    datasets = [made(rng, i, donors=0.5) for i in range(60)]
    rule = plan_split(datasets, SplitRule(options=SplitOptions())).rule
    held_out: set[str] = set()
    for fraction in (0.05, 0.1, 0.3):
        more = resolve({"validation_fraction": fraction, "test_fraction": 0.1}, rule)
        plan = plan_split(datasets, more)
        assert held_out <= {*plan.held_out["validation"]}
        held_out = {*plan.held_out["validation"]}
        assert not held_out & {*plan.held_out["test"]}


def test_shares_of_an_atlas_mean_cells() -> None:
    """Of 1,618 datasets of very different sizes the first draw is within a few percent."""
    rng = np.random.default_rng(0)
    datasets = [made(rng, i, donors=0.0) for i in range(1618)]
    share = plan_split(datasets, SplitRule(options=SplitOptions())).shares["validation"]
    assert share.cells == pytest.approx(0.05, rel=0.05)
    assert share.groups == pytest.approx(0.05, rel=0.4)
    few = plan_split(datasets[:100], SplitRule(options=SplitOptions())).shares["validation"]
    assert few.cells == pytest.approx(0.05, rel=0.1)


def test_a_share_below_every_group_takes_the_smallest() -> None:
    rng = np.random.default_rng(1)
    datasets = [made(rng, i, donors=0.0) for i in range(3)]
    options = SplitOptions(validation_fraction=1e-7, test_fraction=1e-7)
    plan = plan_split(datasets, SplitRule(options=options))
    by_size = sorted(datasets, key=lambda d: int(d.kept.sum()))
    assert plan.held_out == {
        "validation": [by_size[0].dataset_id],
        "test": [by_size[1].dataset_id],
    }
    again = plan_split([*datasets, made(rng, 4, donors=0.0)], plan.rule)
    assert again.held_out["validation"] == plan.held_out["validation"]


@pytest.mark.thorough
@pytest.mark.parametrize("donors", [False, True])
def test_a_corpus_that_an_earlier_version_split_keeps_its_groups(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix], donors: bool
) -> None:
    named = {"a": [f"p{row % 12}" for row in range(240)]} if donors else None
    folder = stage_corpus(three, donors=named)
    catalogue = finalize(folder)
    (folder / "split.json").unlink()
    old = {k: v for k, v in catalogue.items() if k not in ("split_rule", "split_shares")}
    # What no hash of this version would choose.
    old["held_out"] = {"validation": ["donor p3", "donor p7", "dataset b"] if donors else ["b"],
                       "test": []}  # fmt: skip
    write_catalogue(folder, old)
    after = finalize(folder)
    assert {*after["held_out"]["validation"]} == {*old["held_out"]["validation"]}
    assert finalize(folder)["hash"] == after["hash"]


def test_an_earlier_split_by_single_cells_is_drawn_again_with_a_warning(
    stage_corpus: Stage, counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage_corpus({"only": counts(1, 30)}, donors={"only": ["p"] * 30})
    catalogue = finalize(folder)
    (folder / "split.json").unlink()
    write_catalogue(
        folder, {k: v for k, v in catalogue.items() if k not in ("split_rule", "split_shares")}
    )
    assert finalize(folder)["split_unit"] == "cell"
    assert "the split is drawn again" in caplog.text


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
