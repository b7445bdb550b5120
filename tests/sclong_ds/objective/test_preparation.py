from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sclong_ds.config.load import load_config
from sclong_ds.corpus.byte_code import encode
from sclong_ds.loader.batches import CellBatch
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.objective.targets import Prepared, hidden_zeros, prepare

GENES, TOP = 40, 25


def prepared(
    counts: np.ndarray,
    *,
    routing: str = "expressed",
    ids: Any = None,
    measured: MeasuredGenes | None = None,
) -> Prepared:
    config = load_config("sclong_tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, routing=routing, top_seq_len=TOP),
        objective=dataclasses.replace(config.objective, zero_mask_prob=0.2, mask_prob=0.5),
    )
    rows = np.arange(len(counts)) if ids is None else np.asarray(ids)
    cells = encode(sparse.csr_matrix(counts.astype(np.uint32)))
    batch = CellBatch(cells, rows, np.zeros_like(rows), np.zeros_like(rows))
    return prepare(
        batch,
        objective=config.objective,
        model=config.model,
        seed=config.run.seed,
        n_genes=GENES,
        measured=measured,
    )


cell_counts = st.lists(
    st.lists(st.sampled_from([0, 0, 0, 1, 7, 300]), min_size=GENES, max_size=GENES),
    min_size=1,
    max_size=5,
).map(np.array)


@given(cell_counts)
@settings(max_examples=60, deadline=None)
def test_lengths_are_the_expressed_and_the_hidden_genes(counts: np.ndarray):
    found = prepared(counts)
    expressed = [set(np.flatnonzero(cell).tolist()) for cell in counts]
    hidden = [
        set(places[hide].tolist())
        for places, hide in zip(found.targets.positions, found.targets.hidden, strict=True)
    ]
    both = [min(TOP, len(e | h)) for e, h in zip(expressed, hidden, strict=True)]
    assert found.lengths == both
    indptr = np.concatenate(([0], np.cumsum([len(e) for e in expressed])))
    indices = np.nonzero(counts)[1]
    more = hidden_zeros(indptr, indices, found.targets)
    assert more.tolist() == [len(h - e) for e, h in zip(expressed, hidden, strict=True)]


def test_lengths_are_counted_only_where_routing_needs_them():
    assert prepared(np.ones((2, GENES)), routing="top").lengths is None


def test_a_cell_gets_the_same_targets_in_any_company():
    counts = np.random.default_rng(0).poisson(0.7, (6, GENES))
    together, alone = prepared(counts), prepared(counts[3:4], ids=[3])
    n = alone.targets.n_targets[0]
    assert n == together.targets.n_targets[3]
    for name in ("positions", "hidden"):
        whole, one = getattr(together.targets, name), getattr(alone.targets, name)
        assert np.array_equal(whole[3, :n], one[0, :n])


def test_a_damaged_cell_without_values_has_no_targets_and_no_length():
    found = prepared(np.zeros((2, GENES)))
    assert found.targets.n_targets.tolist() == [0, 0]
    assert found.lengths == [0, 0]
    assert not found.targets.valid.any()


def test_genes_that_are_not_measured_are_no_targets():
    counts = np.random.default_rng(1).poisson(0.7, (6, GENES))
    table = np.ones((2, GENES), dtype=bool)
    table[1, counts[1::2].sum(axis=0) == 0] = table[1, :4] = False
    counts[1::2, :4] = 0
    measured = MeasuredGenes(table, np.array([0, 1] * 3))
    found, plain = prepared(counts, measured=measured), prepared(counts)
    assert np.array_equal(found.unmeasured, ~table[[0, 1] * 3])
    for b, (places, valid) in enumerate(
        zip(found.targets.positions, found.targets.valid, strict=True)
    ):
        assert not found.unmeasured[b, places[valid]].any()
        unexpressed = (~found.unmeasured[b] & (counts[b] == 0)).sum()
        zeros = (counts[b, places[valid]] == 0).sum()
        assert zeros == -(-unexpressed // 5)  # a fifth, rounded up
    # Cells that measure everything are as without it, bit for bit.
    for b in (0, 2, 4):
        n = plain.targets.n_targets[b]
        assert np.array_equal(found.targets.positions[b, :n], plain.targets.positions[b, :n])
        assert np.array_equal(found.targets.hidden[b, :n], plain.targets.hidden[b, :n])
    assert plain.unmeasured is None


def test_counts_of_a_gene_that_is_not_measured_are_refused():
    table = np.ones((1, GENES), dtype=bool)
    table[0, 3] = False
    measured = MeasuredGenes(table, np.zeros(8, dtype=int))
    with pytest.raises(ValueError, match="cell 7 has counts of gene 3, which its dataset does not"):
        prepared(np.ones((1, GENES)), ids=[7], measured=measured)
