"""The device sees the drawn targets and their true values; the loss counts targets only."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoHostSync
from scipy import sparse

from sclong_ds.config.load import load_config
from sclong_ds.corpus.byte_code import encode
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.objective.batch import MaskedBatch, masked_batch, masked_squared_error
from sclong_ds.objective.targets import Targets, draw_targets

CPU = torch.device("cpu")
OBJECTIVE = load_config("sclong_tiny").objective


def random_counts(n_cells=6, n_genes=300, *, density=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(density, (n_cells, n_genes)).astype(np.uint32))


def draw(counts, *, zero_mask_prob=0.0):
    n = counts.shape[0]
    return draw_targets(
        counts.indptr,
        counts.indices,
        cell_ids=np.arange(n),
        epochs=np.zeros(n, np.int64),
        passes=np.zeros(n, np.int64),
        objective=dataclasses.replace(OBJECTIVE, zero_mask_prob=zero_mask_prob),
        seed=3,
        n_genes=counts.shape[1],
    )


def on(device, counts, targets):
    return masked_batch(
        encode(counts), targets, n_genes=counts.shape[1], target_sum=1e4, device=device
    )


@settings(max_examples=40, deadline=None)
@given(
    n_cells=st.integers(1, 6),
    density=st.sampled_from([0.0, 0.05, 1.0]),
    zero_mask_prob=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 99),
)
def test_input_and_targets_are_the_drawn_ones(n_cells, density, zero_mask_prob, seed):
    counts = random_counts(n_cells, 90, density=density, seed=seed)
    targets = draw(counts, zero_mask_prob=zero_mask_prob)
    batch = on(CPU, counts, targets)
    x = log1p_normalise(counts, target_sum=1e4)
    np.testing.assert_array_equal(batch.x.numpy(), x)
    for b in range(n_cells):
        genes = targets.positions[b, targets.valid[b]]
        np.testing.assert_array_equal(batch.true[b, targets.valid[b]].numpy(), x[b, genes])
        hidden = targets.positions[b, targets.hidden[b]]
        np.testing.assert_array_equal(np.flatnonzero(batch.hidden[b].numpy()), np.sort(hidden))


def test_padding_does_not_uncover_gene_0():
    counts = sparse.csr_matrix(np.ones((2, 5), np.uint32))
    positions, hidden = np.zeros((2, 64), np.int64), np.zeros((2, 64), bool)
    hidden[0, 0] = True
    targets = Targets(
        positions, hidden, np.arange(64) < np.ones((2, 1)), *2 * [np.ones(2, np.int64)]
    )
    batch = on(CPU, counts, targets)
    assert batch.hidden.dtype == torch.bool
    assert batch.hidden.tolist() == [[True, False, False, False, False], [False] * 5]


def test_loss_counts_targets_only():
    true, predicted = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 9.0, 5.0]])
    predicted.requires_grad_()
    loss = masked_squared_error(predicted, true, torch.tensor([[True, False, True]]))
    assert loss.item() == 1 + 4
    loss.backward()
    assert predicted.grad.tolist() == [[-2.0, 0.0, 4.0]]


def test_loss_is_that_over_all_genes():
    """The targets alone give what a sum over all genes with a mask gives."""
    counts = random_counts()
    batch = on(CPU, counts, draw(counts))
    everywhere = torch.randn(batch.x.shape)
    wanted = torch.zeros(batch.x.shape, dtype=torch.bool)
    for b in range(len(wanted)):
        wanted[b, batch.positions[b, batch.valid[b]]] = True
    whole = ((everywhere - batch.x) ** 2)[wanted].sum()
    loss = masked_squared_error(everywhere.gather(1, batch.positions), batch.true, batch.valid)
    torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_loss_is_at_least_float32(dtype, expected):
    predicted = torch.full((1, 4096), 1.0, dtype=dtype)
    valid = torch.ones(1, 4096, dtype=torch.bool)
    loss = masked_squared_error(predicted, torch.zeros(1, 4096), valid)
    assert loss.dtype == expected
    # A sum in bfloat16 stops growing at 256.
    assert loss.item() == 4096


def test_nothing_waits_for_the_device():
    counts = random_counts()
    targets, cells = draw(counts), encode(counts)
    with NoHostSync():
        batch = masked_batch(cells, targets, n_genes=300, target_sum=1e4, device=CPU)
        masked_squared_error(batch.true + 1, batch.true, batch.valid)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_same_without_waiting():
    counts = random_counts(8, 2000)
    targets, cells = draw(counts, zero_mask_prob=0.1), encode(counts)
    # The first call may wait: it starts CUDA and loads kernels.
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            batch = masked_batch(
                cells, targets, n_genes=2000, target_sum=1e4, device=torch.device("cuda")
            )
            loss = masked_squared_error(batch.true + 1, batch.true, batch.valid)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = on(CPU, counts, targets)
    for field in dataclasses.fields(MaskedBatch):
        got = getattr(batch, field.name).cpu()
        # log1p in float64 may differ in its last bit, which rounding to float32 rarely shows.
        torch.testing.assert_close(got, getattr(expected, field.name), rtol=2e-7, atol=0)
    assert loss.item() == pytest.approx(targets.n_targets.sum(), rel=1e-5)
