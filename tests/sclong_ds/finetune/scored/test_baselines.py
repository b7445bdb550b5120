"""Linear baselines: outputs of cells that lie far from all training cells."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from sclong_ds.finetune.examples import Examples
from sclong_ds.finetune.scored.baselines import (
    constant_outputs,
    linear_outputs,
    principal_components,
)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_outputs_of_sure_cells_are_finite_so_that_a_temperature_can_soften_them(n_classes):
    rng, n = np.random.default_rng(0), 90
    target = np.arange(n) % n_classes
    features = np.eye(n_classes)[target] + 0.05 * rng.normal(size=(n, n_classes))
    features[(np.arange(n) // 6) % 3 == 0] *= 1e4  # the cells of fold 0
    examples = Examples(
        counts=csr_matrix((n, 1)), measured=None, classes=tuple("abc"[:n_classes]),
        target=target.astype(float), groups=np.full(n, "g"), fold=(np.arange(n) // 6) % 3,
        left_out={},
    )  # fmt: skip
    found = linear_outputs(examples, lambda _: features, fold=0, balanced=True)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0)
    assert (found.argmax(axis=1) == target).mean() > 0.9
    assert found.min() < -800  # probabilities would be 0, their logarithms -inf


def test_components_that_the_training_cells_do_not_span_are_left_out():
    rng = np.random.default_rng(0)
    rows = rng.poisson(3.0, (40, 120)).astype(float)
    few = csr_matrix(np.concatenate([rows[:12], rows[:12], rows[12:]]))
    found = principal_components(few)(np.arange(24))
    assert found.shape == (52, 11)
    spread = found[:24].std(axis=0)
    assert np.abs(found[24:] / spread).max() < 10
    assert principal_components(few)(np.arange(12, 52)).shape == (52, 39)


def test_of_skewed_numbers_the_median_errs_less_than_the_mean():
    target = np.exp(2 * np.random.default_rng(0).normal(size=300))
    examples = Examples(
        counts=csr_matrix((300, 1)), measured=None, classes=(), target=target,
        groups=np.full(300, "g"), fold=np.arange(300) % 3, left_out={},
    )  # fmt: skip
    mean, median = (
        np.abs(constant_outputs(examples, fold=0, centre=centre)[:, 0] - target).mean()
        for centre in (np.mean, np.median)
    )
    assert median < 0.9 * mean
