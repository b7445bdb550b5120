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
from sclong_ds.model.values.cell_vector import CellStart, CellVector, principal_directions


def moved(seed=0, **changes):
    """Return a model whose weights that start at zero were moved, as training moves them."""
    model = small_model(cell_vector="random", **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in (model.head.cell_weight, model.cell_vector.down):
            parameter.normal_()
        model.cell_vector.centre.uniform_(0, 2)
    return model


@pytest.mark.parametrize("changes", [{}, {"routing": "expressed", "zero_genes": 5}])
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


def test_every_prediction_has_its_own_weights():
    model = moved()
    x, mask = cells()
    positions = torch.tensor([[3, 11, 59]]).repeat(len(x), 1)
    before = model(x, mask)
    assert torch.allclose(model(x, mask, positions=positions), before[:, [3, 11, 59]], atol=1e-5)
    with torch.no_grad():
        model.head.cell_weight[11] = 0
    after = model(x, mask)
    changed = (before != after).any(0)
    assert changed.nonzero().flatten().tolist() == [11]


def test_a_cell_does_not_depend_on_its_batch_and_may_be_empty():
    model = moved(cell_offset="none")
    x, mask = cells(6)
    x[4] = 0
    whole = model(x, mask & (x > 0))
    assert torch.isfinite(whole).all()
    for b in range(6):
        alone = model(x[b : b + 1], (mask & (x > 0))[b : b + 1])[0]
        assert (whole[b] - alone).norm() <= 1e-6 * alone.norm()


@pytest.mark.parametrize("offset", ["none", "poisson"])
def test_bf16_weights_are_the_only_rounding(offset):
    """The vector and what it adds are those of float32 arithmetic on the weights as they are."""
    model = moved(cell_offset=offset, gene_bias=True).bfloat16()
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


def test_gradients():
    torch.manual_seed(0)
    part = CellVector(7, 3).double()
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


def test_every_weight_is_trained():
    model = moved().train()
    x, mask = cells()
    model(x, mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_started_at_principal_directions_the_model_is_that_imputation():
    rng = np.random.default_rng(0)
    values = rng.random((30, G)).astype(np.float32) * (rng.random((30, G)) < 0.5)
    centre = rng.random(G).astype(np.float32)
    directions = principal_directions(csr_matrix(values), centre, 4)
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


def test_principal_directions_are_those_of_the_centred_values():
    rng = np.random.default_rng(1)
    values = rng.random((25, 12)) * (rng.random((25, 12)) < 0.7)
    centre = rng.random(12)
    found = principal_directions(csr_matrix(values), centre, 3)
    rows = np.linalg.svd(np.where(values > 0, values - centre, 0))[2][:3]
    assert np.allclose(np.abs((found.T * rows).sum(1)), 1, atol=1e-5)
    assert (found.sum(0) >= 0).all()
    again = principal_directions(csr_matrix(values), centre, 3)
    assert np.array_equal(found, again)


def test_few_cells_have_few_directions():
    values = csr_matrix(np.diag([3.0, 2.0, 1.0, 0.0, 0.0])[:3])
    assert principal_directions(values, np.zeros(5), 4).shape == (5, 2)
    assert principal_directions(values[:1], np.zeros(5), 4).shape == (5, 0)
    assert principal_directions(values[:0], np.zeros(5), 4).shape == (5, 0)
    assert principal_directions(csr_matrix((3, 5)), np.zeros(5), 4).shape == (5, 0)
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
