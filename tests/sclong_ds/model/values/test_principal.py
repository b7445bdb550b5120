"""Principal directions of all values: those of a singular value decomposition, in blocks."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from sclong_ds.model.values.principal import direction_counts, principal_blocks, random_blocks


def test_directions_are_the_principal_components_zeros_included() -> None:
    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(rng.gamma(1.0, 1.0, (30, 1)) * rng.gamma(0.5, 2.0, 50)))
    found = principal_blocks(csr_matrix(values), 12, 4)
    assert found.shape == (3, 50, 4)
    columns = found.permute(1, 0, 2).reshape(50, 12).double().numpy()
    np.testing.assert_allclose(columns.T @ columns, np.eye(12), atol=2e-3)
    _, sizes, rows = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(columns * rows[:12].T, axis=0)), 1, atol=2e-3)
    assert (np.diff(sizes[:12]) < 0).all()
    assert (columns.sum(axis=0) >= -1e-2).all()
    assert torch.equal(found, found.half().float()), "a folder keeps float16"
    cut = principal_blocks(csr_matrix(values), 10, 4)
    torch.testing.assert_close(cut[:2], found[:2], atol=2e-3, rtol=0)
    torch.testing.assert_close(cut[2, :, :2], found[2, :, :2], atol=2e-3, rtol=0)
    assert not cut[2, :, 2:].any()


def test_cells_that_are_alike_have_fewer_directions() -> None:
    values = np.zeros((12, 9))
    values[:6, 2], values[6:, 3] = 1.0, 2.0
    found = principal_blocks(csr_matrix(values), 6, 3)
    assert torch.isfinite(found).all()
    assert int((found != 0).any(dim=1).sum()) == 1
    assert not principal_blocks(csr_matrix(np.ones((5, 4))), 3, 3).any()


def test_as_many_directions_are_offered_as_cells_and_genes_allow() -> None:
    assert direction_counts(n_cells=2048, n_genes=27_874) == [128, 256]
    assert direction_counts(n_cells=200, n_genes=27_874) == [128, 199]
    assert direction_counts(n_cells=60, n_genes=40) == [39]
    assert direction_counts(n_cells=1, n_genes=40) == direction_counts(n_cells=0, n_genes=40) == []
    assert direction_counts(n_cells=40, n_genes=60, wanted=17) == [17]
    with pytest.raises(ValueError, match=r"40 principal directions: 40 training .* have 39 that"):
        direction_counts(n_cells=40, n_genes=60, wanted=40)


def test_random_directions_are_orthonormal_and_of_the_seed() -> None:
    like = torch.zeros(2, 20, 3)
    found = random_blocks(like, 0)
    columns = found.permute(1, 0, 2).reshape(20, 6)
    torch.testing.assert_close(columns.T @ columns, torch.eye(6), atol=1e-5, rtol=0)
    assert torch.equal(found, random_blocks(like, 0))
    assert not torch.equal(found, random_blocks(like, 1))
