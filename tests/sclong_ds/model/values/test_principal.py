"""Principal directions of all values: those of a singular value decomposition, in blocks."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from sclong_ds.model.values.principal import block_numbers, principal_blocks, random_blocks


def test_directions_are_the_principal_components_zeros_included() -> None:
    rng = np.random.default_rng(0)
    values = np.log1p(rng.poisson(rng.gamma(1.0, 1.0, (30, 1)) * rng.gamma(0.5, 2.0, 50)))
    found = principal_blocks(csr_matrix(values), 3, 4)
    assert found.shape == (3, 50, 4)
    columns = found.permute(1, 0, 2).reshape(50, 12).double().numpy()
    np.testing.assert_allclose(columns.T @ columns, np.eye(12), atol=2e-3)
    _, sizes, rows = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(columns * rows[:12].T, axis=0)), 1, atol=2e-3)
    assert (np.diff(sizes[:12]) < 0).all()
    assert (columns.sum(axis=0) >= -1e-2).all()
    assert torch.equal(found, found.half().float()), "a folder keeps float16"


def test_cells_that_are_alike_have_fewer_directions() -> None:
    values = np.zeros((12, 9))
    values[:6, 2], values[6:, 3] = 1.0, 2.0
    found = principal_blocks(csr_matrix(values), 2, 3)
    assert torch.isfinite(found).all()
    assert int((found != 0).any(dim=1).sum()) == 1
    assert not principal_blocks(csr_matrix(np.ones((5, 4))), 1, 3).any()


def test_as_many_blocks_are_offered_as_cells_and_genes_allow() -> None:
    assert block_numbers(32, n_cells=2048, n_genes=27_874) == [4, 8]
    assert block_numbers(200, n_cells=2048, n_genes=27_874) == [1, 2]
    assert block_numbers(32, n_cells=200, n_genes=27_874) == [4, 6]
    assert block_numbers(8, n_cells=40, n_genes=60) == [4]
    assert block_numbers(64, n_cells=40, n_genes=60) == []
    assert block_numbers(8, n_cells=40, n_genes=60, wanted=17) == [3]
    with pytest.raises(ValueError, match="40 principal directions in blocks of 8: 40 training"):
        block_numbers(8, n_cells=40, n_genes=60, wanted=40)


def test_random_directions_are_orthonormal_and_of_the_seed() -> None:
    like = torch.zeros(2, 20, 3)
    found = random_blocks(like, 0)
    columns = found.permute(1, 0, 2).reshape(20, 6)
    torch.testing.assert_close(columns.T @ columns, torch.eye(6), atol=1e-5, rtol=0)
    assert torch.equal(found, random_blocks(like, 0))
    assert not torch.equal(found, random_blocks(like, 1))
