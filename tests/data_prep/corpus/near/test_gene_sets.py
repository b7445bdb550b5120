"""Each pair of gene lists is compared on genes that both have, or counted."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus.near.gene_sets import FEWEST_GENES, MOST_SETS, gene_sets


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 14))
def test_every_pair_that_shares_enough_is_compared_on_shared_genes(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    measured = rng.random((n, 400)) < rng.choice([0.05, 0.2, 0.5, 0.9, 1.0], (n, 1))
    measured[rng.random(n) < 0.3] = measured[0]
    sets = gene_sets(measured)
    np.testing.assert_array_equal(sets.lists[sets.of_dataset], measured)
    assert len(np.unique(sets.lists, axis=0)) == len(sets.lists)
    for first in range(len(sets.lists)):
        for second in range(len(sets.lists)):
            number, shared = sets.set_of[first, second], sets.shared(first, second)
            enough = first != second and shared.sum() >= FEWEST_GENES
            assert (number >= 0) == enough
            if enough:
                assert not (sets.genes[number] & ~shared).any()
                assert sets.genes[number].sum() >= FEWEST_GENES
                assert sets.takes[number, [first, second]].all()
    assert sets.n_left_out == 0


def test_a_thousand_lists_that_lack_some_genes_each_need_few_sets() -> None:
    """As public datasets are: genes without counts left out. A digest a set and cell."""
    rng = np.random.default_rng(0)
    common = rng.random(3000) < 0.6
    measured = common | (rng.random((300, 3000)) < 0.7)
    sets = gene_sets(measured)
    assert 1 <= len(sets.genes) <= 4
    assert sets.n_left_out == 0


def test_lists_of_one_kind_need_no_set() -> None:
    sets = gene_sets(np.ones((5, 90), bool))
    assert len(sets.genes) == 0
    assert sets.of_dataset.tolist() == [0] * 5


def test_the_number_of_sets_is_bounded() -> None:
    """Of lists that share nothing but a few genes each two by two."""
    n = 20
    measured = np.zeros((n, n * n * 40), bool)
    for first in range(n):
        for second in range(first):
            at = 40 * (first * n + second)
            measured[[[first], [second]], np.arange(at, at + 40)] = True
    sets = gene_sets(measured)
    assert len(sets.genes) == MOST_SETS
    assert sets.n_left_out == n * (n - 1) // 2 - MOST_SETS
