"""Which cells are learnt from, their folds, and one line for each input that cannot be learnt."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from sclong_ds.embedding.cells import Cells, CountBlock
from sclong_ds.finetune.examples import choose_examples

N, GENES = 60, 20


def made(**columns: object) -> Cells:
    """Return 60 different cells of 6 donors, 10 each, with two labels in every donor."""
    counts = np.random.default_rng(0).poisson(3.0, (N, GENES)) + np.eye(N, GENES, dtype=int)
    counts[:, 0] = np.arange(1, N + 1)
    obs = pd.DataFrame(
        {"kind": np.tile(["a", "b"], N // 2), "donor": np.repeat(list("uvwxyz"), N // 6)},
        index=[str(i) for i in range(N)],
    ).assign(**columns)
    matrix = csr_matrix(counts[: len(obs)].astype(np.int64))
    return Cells(
        obs=obs, blocks=lambda: iter([CountBlock(counts=matrix, n_input_counts=0)]),
        n_genes_input=GENES, n_genes_mapped=GENES, rows=np.arange(len(obs)), measured=None,
    )  # fmt: skip


def choose(cells: Cells, *, label: str = "kind", n_folds: int = 3, regress: bool = False):
    return choose_examples(cells, label=label, group="donor", regress=regress, n_folds=n_folds)


def test_folds_are_of_whole_groups_and_the_parts_of_a_fold_share_none():
    found = choose(made())
    for fold in range(3):
        parts = [set(found.groups[rows]) for rows in found.parts_of(fold)]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]
        assert sum(map(len, found.parts_of(fold))) == N
    assert {len(set(found.fold[found.groups == name])) for name in "uvwxyz"} == {1}


def test_cells_without_a_label_group_or_counts_are_named_and_not_used():
    labels = np.tile(["a", "b"], N // 2).astype(object)
    labels[:3], labels[3] = np.nan, "rare"
    donors = np.repeat(list("uvwxyz"), N // 6).astype(object)
    donors[5] = None
    found = choose(made(kind=labels, donor=donors))
    assert found.left_out == {"no kind": 3, "no donor": 1, "label with fewer than 5 cells": 1}
    assert found.used.tolist() == [False] * 4 + [True, False] + [True] * (N - 6)
    assert found.classes == ("a", "b")
    assert np.isnan(found.target[~found.used]).all()


def test_numbers_are_kept_and_missing_ones_left_out():
    ages = np.linspace(20, 80, N)
    ages[7] = np.nan
    found = choose(made(age=ages), label="age", regress=True)
    assert found.classes == ()
    assert found.width == 1
    assert found.left_out == {"no age": 1}
    assert not found.used[7]
    np.testing.assert_array_equal(found.target[found.used], ages[found.used])


REFUSED = {
    "no such column": ({}, {"label": "type"}, "--label type: the input has no such column"),
    "one class": ({"kind": "a"}, {}, "1 labels with 5 cells or more, at least 2 are needed"),
    "only missing": ({"kind": np.nan}, {}, "--label kind: no cell has a value"),
    "few groups": ({}, {"n_folds": 7}, "donor has 6 groups; give --folds 6"),
    "two groups": (
        {"donor": np.repeat(["u", "v"], N // 2)}, {}, "2 groups; at least 3 groups are needed",
    ),
    "numbers as labels": (
        {"age": np.linspace(0, 1, N)}, {"label": "age"}, "60 different numbers are no labels",
    ),
    "labels as numbers": ({}, {"regress": True}, "'a' is no finite number"),
    "one number": ({"age": 3.0}, {"label": "age", "regress": True}, "the same number"),
    "label decides the group": (
        {"kind": np.repeat(list("abcdef"), N // 6)}, {}, "share no kind with the others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused_in_one_line(case):
    columns, how, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        choose(made(**columns), **how)
    assert "\n" not in str(caught.value)


def test_the_same_cell_in_two_groups_is_refused_and_in_one_group_is_used_once():
    cells = made(donor_age=np.linspace(20, 80, N))
    matrix = next(cells.blocks()).counts.tolil()
    matrix[11] = matrix[10]
    block = CountBlock(counts=matrix.tocsr(), n_input_counts=0)
    inside = Cells(**{**fields_of(cells), "blocks": lambda: iter([block])})
    found = choose(inside)
    assert np.flatnonzero(~found.used).tolist() == [11]
    assert found.left_out == {"copies of another cell": 1}
    assert not choose(inside, label="donor_age", regress=True).used[11]
    matrix[25] = matrix[10]
    block = CountBlock(counts=matrix.tocsr(), n_input_counts=0)
    across = Cells(**{**fields_of(cells), "blocks": lambda: iter([block])})
    with pytest.raises(ValueError, match=r"rows 10 of v and 25 of w"):
        choose(across)


def fields_of(cells: Cells) -> dict[str, object]:
    return {name: getattr(cells, name) for name in Cells.__slots__}
