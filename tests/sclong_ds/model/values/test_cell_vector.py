"""The cell's vector: what it sees, where it starts, its gradients."""

import copy

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from small_model import G, cells, small_graph, small_model

from sclong_ds.config.load import load_config
from sclong_ds.engine.gradient_norms import PARTS
from sclong_ds.exported.choose_recipe import candidates, without_context
from sclong_ds.model.pooling import OF_CELLS, Part, Recipe
from sclong_ds.model.sclong import ScLong
from sclong_ds.model.values.cell_vector import (
    CellStart,
    CellVector,
    above_centre,
    above_depth,
    principal_directions,
)
from sclong_ds.model.values.depth import expected_value, one_count

RESIDUALS = {"cell_vector": "residuals", "cell_offset": "poisson", "gene_bias": True}


def moved(seed=0, **changes):
    """Return a model whose weights that start at zero were moved, as training moves them."""
    model = small_model(**({"cell_vector": "random"} | changes))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.head.cell_weight, model.cell_vector.down):
            parameter.normal_()
        model.cell_vector.centre.uniform_(0, 2)
    return model


@pytest.mark.parametrize(
    "changes", [{}, RESIDUALS, {"routing": "expressed", "zero_genes": 5, **RESIDUALS}]
)
def test_it_reads_visible_values_alone(changes):
    model = moved(**changes)
    x, mask = cells()
    unmeasured = torch.zeros_like(mask)
    unmeasured[:, 3:9] = True
    found = model(x, mask, unmeasured=unmeasured)
    other = torch.where(mask | unmeasured, x + 1.7, x)
    assert torch.equal(found, model(other, mask, unmeasured=unmeasured))
    seen = int((x[0] * ~mask[0] * ~unmeasured[0]).argmax())
    vector = model.cell_vector(x, (x > 0) & ~mask)
    x[0, seen] += 1
    moved_vector = model.cell_vector(x, (x > 0) & ~mask)
    assert not torch.allclose(vector[0], moved_vector[0], atol=1e-3)
    assert torch.equal(vector[1:], moved_vector[1:])


@pytest.mark.parametrize("changes", [{}, RESIDUALS])
def test_every_prediction_has_its_own_weights(changes):
    model = moved(**changes)
    x, mask = cells()
    positions = torch.tensor([[3, 11, 59]]).repeat(len(x), 1)
    before = model(x, mask)
    assert torch.allclose(model(x, mask, positions=positions), before[:, [3, 11, 59]], atol=1e-5)
    with torch.no_grad():
        model.head.cell_weight[11] = 0
    after = model(x, mask)
    changed = (before != after).any(0)
    assert changed.nonzero().flatten().tolist() == [11]


@pytest.mark.parametrize("changes", [{"cell_offset": "none"}, RESIDUALS])
def test_a_cell_does_not_depend_on_its_batch_and_may_be_empty(changes):
    model = moved(**changes)
    x, mask = cells(6)
    x[4] = 0
    whole = model(x, mask & (x > 0))
    assert torch.isfinite(whole).all()
    for b in range(6):
        alone = model(x[b : b + 1], (mask & (x > 0))[b : b + 1])[0]
        assert (whole[b] - alone).norm() <= 1e-6 * alone.norm()


@pytest.mark.parametrize(
    "changes", [{"gene_bias": True}, {"gene_bias": True, "cell_offset": "poisson"}, RESIDUALS]
)
def test_bf16_weights_are_the_only_rounding(changes):
    """The vector and what it adds are those of float32 arithmetic on the weights as they are."""
    model = moved(**changes).bfloat16()
    x, mask = cells(6)
    visible, vector = (x > 0) & ~mask, model.cell_vector
    found = vector(x, visible)
    assert found.dtype == torch.float32
    assert torch.equal(found, copy.deepcopy(vector).float()(x, visible))
    h = torch.randn(6, G, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    given = {"x": x, "visible": visible, "cell": found}
    wide = copy.deepcopy(model.head).float()
    with torch.no_grad():
        model.head.weight.zero_()
        wide.weight.zero_()
    assert torch.equal(model.head(h, **given), wide(h.float(), **given))
    positions = torch.tensor([[3, 11, 59]]).repeat(6, 1)
    some = model.head(h[:, :3], positions, **given)
    assert torch.allclose(some, wide(h.float(), **given)[:, [3, 11, 59]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["random", "residuals"])
def test_gradients(kind):
    torch.manual_seed(0)
    part = CellVector(7, 3, kind).double()
    with torch.no_grad():
        part.down.normal_()
        part.centre.uniform_(0, 1)
    x = torch.rand(4, 7, dtype=torch.float64)
    visible = torch.rand(4, 7) < 0.6
    names, weights = zip(*part.named_parameters(), strict=True)

    def vectors(*given):
        return torch.func.functional_call(part, dict(zip(names, given, strict=True)), (x, visible))

    assert torch.autograd.gradcheck(vectors, weights)


def test_the_gradients_norms_know_its_part():
    children = {name for name, _ in moved().named_children()}
    assert "cell_vector" in children
    assert children <= {child for own in PARTS.values() for child in own}


@pytest.mark.parametrize("changes", [{}, RESIDUALS])
def test_every_weight_is_trained(changes):
    model = moved(**changes).train()
    x, mask = cells()
    model(x, mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_started_at_principal_directions_the_model_is_that_imputation():
    rng = np.random.default_rng(0)
    values = rng.random((30, G)).astype(np.float32) * (rng.random((30, G)) < 0.5)
    centre = rng.random(G).astype(np.float32)
    directions = principal_directions(above_centre(csr_matrix(values), centre), 4)
    config = small_model(cell_vector="svd", gene_bias=True).config
    model = ScLong(
        config, n_genes=G, graph=small_graph(), output_mean=centre,
        cell_start=CellStart(centre, directions),
    )  # fmt: skip
    x = torch.from_numpy(values)
    mask = (torch.rand(30, G, generator=torch.Generator().manual_seed(0)) < 0.2) & (x > 0)
    above = np.where((values > 0) & ~mask.numpy(), values - centre, 0)
    wanted = centre + above @ directions @ directions.T
    # Beside the four directions there are columns that started at random, whose weights are 0.
    assert np.allclose(model(x, mask).detach().numpy(), wanted, atol=1e-5)


def counted_cells(n, seed):
    """Return values (n, G) of cells of two kinds and many depths, and the genes' log levels."""
    share = np.random.default_rng(9).dirichlet(np.full(G, 0.5), 2)[np.arange(n) % 2]
    rng = np.random.default_rng(seed)
    counts = rng.poisson(share * rng.integers(60, 3000, n)[:, None])
    values = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))
    return values.astype(np.float32), np.log(1e4 * np.maximum(share[:2].mean(0), 1e-9))


def test_started_at_residuals_what_depth_explains_is_left_out_and_added_once():
    values, level = counted_cells(40, seed=0)
    directions = principal_directions(above_depth(csr_matrix(values), level), 4)
    model = ScLong(
        small_model(**RESIDUALS).config, n_genes=G, graph=small_graph(), output_mean=level,
        cell_start=CellStart(level, directions, 1.5),
    )  # fmt: skip
    x = torch.from_numpy(counted_cells(30, seed=1)[0])
    mask = (torch.rand(30, G, generator=torch.Generator().manual_seed(0)) < 0.2) & (x > 0)
    visible = (x > 0) & ~mask
    one = one_count(x, visible).double()
    usual = expected_value(torch.from_numpy(level).expand(30, -1), one).numpy()
    above = np.where(visible, x.numpy() - usual, 0)
    found = model(x, mask).detach().double().numpy()
    assert np.allclose(found, usual + 1.5 * above @ directions @ directions.T, atol=2e-3)
    hidden = (mask & visible.any(1, keepdim=True)).numpy()
    errors = [np.square((said - x.numpy())[hidden]).mean() for said in (found, usual)]
    assert errors[0] < 0.9 * errors[1]


def test_what_is_said_of_representations_is_added_to_the_value_too():
    model = moved(**RESIDUALS)
    x, mask = cells()
    with torch.no_grad():
        model.head.cell_weight.zero_()
    h = torch.randn(len(x), G, 16, generator=torch.Generator().manual_seed(0))
    visible = (x > 0) & ~mask
    found = model.head(h, x=x, visible=visible, cell=model.cell_vector(x, visible))
    usual = expected_value(model.head.bias.expand(len(x), -1), one_count(x, visible))
    assert torch.allclose(found - usual, model.head.body(h) @ model.head.weight, atol=1e-5)


def test_the_residuals_of_cells_are_those_that_the_model_reads():
    values, level = counted_cells(150, seed=2)
    values[3] = 0
    found = above_depth(csr_matrix(values), level)
    x = torch.from_numpy(values).double()
    one = one_count(x, x > 0)
    usual = expected_value(torch.from_numpy(level).expand(150, -1), one)
    assert found.nnz == np.count_nonzero(values)
    wanted = np.where(values > 0, x - usual, 0)
    assert np.allclose(found.toarray(), wanted, atol=5e-4)


def test_principal_directions_are_those_of_the_centred_values():
    rng = np.random.default_rng(1)
    values = rng.random((25, 12)) * (rng.random((25, 12)) < 0.7)
    centre = rng.random(12)
    centred = above_centre(csr_matrix(values), centre)
    found = principal_directions(centred, 3)
    rows = np.linalg.svd(np.where(values > 0, values - centre, 0))[2][:3]
    assert np.allclose(np.abs((found.T * rows).sum(1)), 1, atol=1e-5)
    assert (found.sum(0) >= 0).all()
    again = principal_directions(centred, 3)
    assert np.array_equal(found, again)


def test_few_cells_have_few_directions():
    values = csr_matrix(np.diag([3.0, 2.0, 1.0, 0.0, 0.0])[:3])
    assert principal_directions(values, 4).shape == (5, 2)
    assert principal_directions(values[:1], 4).shape == (5, 0)
    assert principal_directions(values[:0], 4).shape == (5, 0)
    assert principal_directions(csr_matrix((3, 5)), 4).shape == (5, 0)
    part = CellVector(5, 4, start=CellStart(np.ones(5), np.eye(5)[:, :2]))
    assert torch.equal(part.vectors[:, :2], torch.eye(5)[:, :2])
    assert part.vectors[:, 2:].std() > 0.005


def test_the_published_presets_have_none():
    for preset in ("sclong_reference", "sclong_1b"):
        assert load_config(preset).model.cell_vector == "none"


def test_it_can_be_the_embedding_or_a_part_of_it():
    model, plain = moved(), small_model()
    x, _ = cells()
    own, mean = Part("cell_vector", "expressed"), Part("decoder", "value")
    vector, pooled = model.pooled(x, [own, mean])
    assert torch.equal(vector, model.cell_vector(x, x > 0))
    assert torch.equal(pooled, model.pooled(x, [mean])[0])
    unmeasured = torch.zeros_like(x, dtype=torch.bool)
    unmeasured[:, :9] = True
    without = x.masked_fill(unmeasured, 0.0)
    found = model.pooled(x, [own], unmeasured=unmeasured)[0]
    assert torch.equal(found, model.cell_vector(without, without > 0))
    model.recipe = Recipe((own, mean))
    assert model.embed(x).shape == (4, 32)
    for part in (own, Part("cell_values", "expressed")):
        with pytest.raises(ValueError, match="reads a cell vector; the model has none"):
            plain.pooled(x, [part])
    assert Recipe((own, mean)).text() == "the cell's vector; mean over genes, weighted by value"


def test_all_values_along_it_count_zeros_as_zeros_and_unmeasured_ones_too():
    model, (x, _) = moved(), cells()
    part = Part("cell_values", "expressed")
    (found,) = model.pooled(x, [part])
    summed = x.double() @ model.cell_vector.vectors.double()
    assert torch.allclose(found.double(), summed, atol=1e-5)
    assert not torch.allclose(found, model.cell_vector(x, x > 0), atol=1e-2)
    unmeasured = torch.zeros_like(x, dtype=torch.bool)
    unmeasured[:, :9] = True
    without = model.pooled(x.masked_fill(unmeasured, 0.0), [part])[0]
    assert torch.equal(model.pooled(x, [part], unmeasured=unmeasured)[0], without)
    assert model.cell_vector.bfloat16().of_all_values(x.bfloat16()).dtype == torch.float32
    assert part.text() == "all values, zeros too, along the cell's vector"


def test_only_models_that_have_one_are_offered_it_and_its_control_has_no_context():
    layers = {part.layer for recipe in candidates() for part in recipe.parts}
    assert not layers & set(OF_CELLS)
    tried = candidates(cell_vector=True)
    own = [r for r in tried if r.parts[0].layer in OF_CELLS]
    assert {r.parts[0].layer for r in own} == set(OF_CELLS)
    for recipe in own:
        assert {part.layer for part in without_context(recipe).parts} == {"gene_vectors"}
