"""Masks depend on (seed, epoch, cell) alone; loss and validation figures are what they say."""

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from sclong_ds.config import load_config
from sclong_ds.data import CellBatch
from sclong_ds.objective import (
    MaskedMetrics,
    draw_masks,
    mask_batch,
    masked_squared_error,
    target_count,
)

OBJECTIVE = load_config("sclong_tiny").objective
RELEASED = load_config("sclong_reference").objective


def cells(n=6, genes=50, seed=0):
    counts = sparse.csr_matrix(
        np.random.default_rng(seed).poisson(0.8, (n, genes)).astype(np.uint32)
    )
    return CellBatch(counts, np.arange(100, 100 + n), np.zeros(n, dtype=np.int64))


def test_target_count_is_the_exact_ceiling():
    for n in range(1, 3000):
        assert target_count(n, OBJECTIVE) == math.ceil(n * 15 / 100)


def test_released_target_count_is_one_more_at_some_numbers():
    more = [n for n in range(30_001) if target_count(n, RELEASED) != target_count(n, OBJECTIVE)]
    assert all(target_count(n, RELEASED) == target_count(n, OBJECTIVE) + 1 for n in more)
    assert len(more) == 677
    assert set(more) >= {100, 180, 200, 340}


def test_masks_are_a_pure_function_of_seed_epoch_and_cell():
    first = draw_masks(200, OBJECTIVE, seed=3, epoch=2, cell_id=7)
    again = draw_masks(200, OBJECTIVE, seed=3, epoch=2, cell_id=7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    others = [
        draw_masks(200, OBJECTIVE, seed=s, epoch=e, cell_id=i)
        for e, i, s in ((3, 7, 3), (2, 8, 3), (2, 7, 4))
    ]
    assert all(not np.array_equal(first[0], other[0]) for other in others)


def test_batch_and_single_cells_agree():
    batch = cells()
    masked = mask_batch(batch, OBJECTIVE, target_sum=1e4, seed=3)
    for b in range(6):
        alone = CellBatch(batch.counts[b], batch.cell_ids[b : b + 1], batch.epochs[b : b + 1])
        single = mask_batch(alone, OBJECTIVE, target_sum=1e4, seed=3)
        assert torch.equal(single.targets[0], masked.targets[b])
        assert torch.equal(single.hidden[0], masked.hidden[b])
        assert torch.equal(single.x[0], masked.x[b])


def test_targets_are_expressed_and_hidden_ones_are_targets():
    batch = cells(n=40, genes=400)
    masked = mask_batch(batch, OBJECTIVE, target_sum=1e4, seed=3)
    assert not (masked.targets & (masked.x == 0)).any()
    assert not (masked.hidden & ~masked.targets).any()
    wanted = [target_count(int(n), OBJECTIVE) for n in batch.counts.getnnz(axis=1)]
    assert masked.targets.sum(1).tolist() == wanted
    assert 0.87 < masked.hidden.sum() / masked.targets.sum() < 0.93


def test_loss_counts_targets_only():
    x, predicted = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 9.0, 5.0]])
    loss = masked_squared_error(predicted, x, torch.tensor([[True, False, True]]))
    assert loss.item() == 1 + 4


def test_metrics_equal_numpy_and_add_up_over_ranks():
    rng = np.random.default_rng(1)
    x, predicted = (
        torch.tensor(rng.gamma(2.0, 1.0, (8, 30)), dtype=torch.float32) for _ in range(2)
    )
    targets = torch.tensor(rng.random((8, 30)) < 0.4)
    mean = rng.random(30)
    whole, half = MaskedMetrics(mean, torch.device("cpu")), MaskedMetrics(mean, torch.device("cpu"))
    whole.add(predicted, x, targets)
    half.add(predicted[:3], x[:3], targets[:3])
    half.add(predicted[3:], x[3:], targets[3:])
    torch.testing.assert_close(whole.sums, half.sums, rtol=1e-12, atol=1e-9)
    figures = whole.compute()
    p, t = predicted[targets].numpy().astype(float), x[targets].numpy().astype(float)
    b = np.broadcast_to(mean.astype(np.float32), (8, 30))[targets.numpy()].astype(float)
    assert figures["val/mse"] == pytest.approx(((p - t) ** 2).mean())
    assert figures["val/baseline_mse"] == pytest.approx(((b - t) ** 2).mean())
    assert figures["val/pearson"] == pytest.approx(np.corrcoef(p, t)[0, 1])
    assert figures["val/baseline_pearson"] == pytest.approx(np.corrcoef(b, t)[0, 1])
    assert figures["val/target_variance"] == pytest.approx(t.var())
    low = t < 1.0
    assert figures["val/mse/bin_0"] == pytest.approx(((p - t) ** 2)[low].mean())
