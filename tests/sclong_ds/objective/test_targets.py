"""Targets depend on (seed, epoch, pass, cell) alone, and are as many as the shares say."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sclong_ds.config.load import load_config
from sclong_ds.objective.targets import VALIDATION_EPOCH, WIDTH_STEP, draw_targets, target_count

OBJECTIVE = load_config("sclong_tiny").objective
RELEASED = load_config("sclong_reference").objective
RANGE = dataclasses.replace(OBJECTIVE, mask_prob_range=(0.1, 0.6))
ZEROS = dataclasses.replace(OBJECTIVE, zero_mask_prob=0.05)
SEED = 3


def random_counts(n_cells, n_genes=400, *, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(density, (n_cells, n_genes)).astype(np.uint32))


def draw(counts, objective=OBJECTIVE, *, cell_ids=None, epochs=None, passes=None, seed=SEED):
    n = counts.shape[0]
    return draw_targets(
        counts.indptr,
        counts.indices,
        cell_ids=np.arange(100, 100 + n) if cell_ids is None else cell_ids,
        epochs=np.zeros(n, np.int64) if epochs is None else epochs,
        passes=np.zeros(n, np.int64) if passes is None else passes,
        objective=objective,
        seed=seed,
        n_genes=counts.shape[1],
    )


def as_sets(targets):
    """The (gene, hidden) pairs of each cell."""
    rows = zip(targets.positions, targets.hidden, targets.valid, strict=True)
    return [set(zip(p[v].tolist(), h[v].tolist(), strict=True)) for p, h, v in rows]


def test_target_count_is_the_exact_ceiling():
    for n in range(1, 3000):
        assert target_count(n, OBJECTIVE) == math.ceil(n * 15 / 100)


def test_released_target_count_is_one_more_at_some_numbers():
    more = [n for n in range(30_001) if target_count(n, RELEASED) != target_count(n, OBJECTIVE)]
    assert all(target_count(n, RELEASED) == target_count(n, OBJECTIVE) + 1 for n in more)
    assert len(more) == 677
    assert set(more) >= {100, 180, 200, 340}


def test_the_draw_is_a_permutation_of_a_counter_based_generator():
    """Written out once more: a run resumed with another version must see the same targets."""
    counts = random_counts(5)
    epochs, passes = np.array([0, 1, 0, 7, VALIDATION_EPOCH]), np.array([0, 0, 2, 1, 0])
    targets = draw(counts, epochs=epochs, passes=passes)
    for b in range(5):
        genes = counts.indices[counts.indptr[b] : counts.indptr[b + 1]]
        counter = [0, passes[b], 100 + b, epochs[b]]
        rng = np.random.Generator(np.random.Philox(key=SEED + 2**63, counter=counter))
        wanted = genes[rng.permutation(len(genes))[: math.ceil(0.15 * len(genes) - 1e-9)]]
        n = targets.n_targets[b]
        np.testing.assert_array_equal(targets.positions[b, :n], wanted)
        np.testing.assert_array_equal(targets.hidden[b, :n], rng.random(n) < 0.9)


def test_another_seed_epoch_pass_or_cell_gives_other_targets():
    counts = random_counts(1)
    one = np.ones(1, np.int64)
    others = [
        draw(counts, seed=SEED + 1),
        draw(counts, epochs=one),
        draw(counts, passes=one),
        draw(counts, cell_ids=one),
    ]
    sets = [as_sets(targets)[0] for targets in (draw(counts), *others)]
    assert all(a != b for i, a in enumerate(sets) for b in sets[:i])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    n_cells=st.integers(1, 12),
    objective=st.sampled_from([OBJECTIVE, RELEASED, RANGE, ZEROS]),
)
def test_a_cell_draws_the_same_in_any_batch(data, n_cells, objective):
    counts = random_counts(n_cells, seed=n_cells)
    ids = np.array(data.draw(st.lists(st.integers(0, 2**40), min_size=n_cells, max_size=n_cells)))
    epochs = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n_cells, max_size=n_cells)))
    passes = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n_cells, max_size=n_cells)))
    whole = as_sets(draw(counts, objective, cell_ids=ids, epochs=epochs, passes=passes))
    # Any cells in any order, some left out, some more than once.
    some = np.array(data.draw(st.lists(st.integers(0, n_cells - 1), min_size=1, max_size=8)))
    part = draw(
        counts[some], objective, cell_ids=ids[some], epochs=epochs[some], passes=passes[some]
    )
    assert as_sets(part) == [whole[b] for b in some]


@settings(max_examples=60, deadline=None)
@given(
    n_cells=st.integers(0, 6),
    n_genes=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.05, 1.0, 9.0]),
    seed=st.integers(0, 99),
    share=st.floats(0.01, 1.0),
    zero_share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_targets_are_distinct_and_as_many_as_asked(
    n_cells, n_genes, density, seed, share, zero_share
):
    counts = random_counts(n_cells, n_genes, density=density, seed=seed)
    objective = dataclasses.replace(OBJECTIVE, mask_prob=share, zero_mask_prob=zero_share)
    targets = draw(counts, objective)
    width = targets.positions.shape[1]
    assert width % WIDTH_STEP == 0
    assert WIDTH_STEP <= width < max(targets.n_targets, default=0) + 2 * WIDTH_STEP
    np.testing.assert_array_equal(targets.valid.sum(axis=1), targets.n_targets)
    padding = ~targets.valid
    assert not targets.positions[padding].any()
    assert not targets.hidden[padding].any()
    for b in range(n_cells):
        genes = targets.positions[b, targets.valid[b]]
        assert len(set(genes.tolist())) == len(genes)
        expressed = counts[b].toarray()[0] > 0
        n_nonzero = int(expressed.sum())
        assert expressed[genes].sum() == target_count(n_nonzero, objective)
        n_zero = math.ceil(round((n_genes - n_nonzero) * zero_share, 9)) if n_nonzero else 0
        assert len(genes) == target_count(n_nonzero, objective) + n_zero


def test_zero_targets_leave_the_others_alone():
    counts = random_counts(6)
    without, with_zeros = draw(counts), draw(counts, ZEROS)
    for b, n in enumerate(without.n_targets):
        np.testing.assert_array_equal(with_zeros.positions[b, :n], without.positions[b, :n])
        np.testing.assert_array_equal(with_zeros.hidden[b, :n], without.hidden[b, :n])


def test_every_gene_is_a_target_as_often_as_the_shares_say():
    counts = random_counts(1, n_genes=60)
    visits = sparse.vstack([counts] * 4000, format="csr")
    objective = dataclasses.replace(OBJECTIVE, mask_prob=0.25, zero_mask_prob=0.25)
    targets = draw(visits, objective)
    often = np.bincount(targets.positions[targets.valid], minlength=60) / 4000
    expressed = counts.toarray()[0] > 0
    n = int(expressed.sum())
    wanted = np.where(expressed, math.ceil(n / 4) / n, math.ceil((60 - n) / 4) / (60 - n))
    # Four standard deviations of a share of 4,000 draws are 0.028.
    np.testing.assert_allclose(often, wanted, atol=0.035)
    for kind in (expressed, ~expressed):
        hidden = targets.hidden[targets.valid & kind[targets.positions]]
        assert hidden.mean() == pytest.approx(0.9, abs=0.01)


def test_a_range_gives_every_visit_its_own_share():
    counts = random_counts(1, n_genes=1000, density=5.0)
    n = counts.nnz
    visits = sparse.vstack([counts] * 500, format="csr")
    shares = draw(visits, RANGE, epochs=np.arange(500)).n_targets / n
    assert 0.1 <= shares.min() < 0.13
    assert 0.57 < shares.max() <= 0.6 + 1 / n
    assert shares.mean() == pytest.approx(0.35, abs=0.03)


def test_validation_keeps_mask_prob():
    counts, epochs = random_counts(6), np.full(6, VALIDATION_EPOCH)
    assert as_sets(draw(counts, RANGE, epochs=epochs)) == as_sets(draw(counts, epochs=epochs))
