"""Pooling of a cell's genes: which genes count, what scaling does, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported import named_genes, write_model
from small_model import cells, small_model

from sclong_ds.embedding.embed import embedding_width
from sclong_ds.exported.model_dir import load_model
from sclong_ds.model.pooling import (
    MEAN,
    TOGETHER,
    Layer,
    Part,
    Recipe,
    check_part,
    gene_weights,
    pool_parts,
    principal_recipe,
    scaling_map,
    scaling_maps,
)

X = torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0], [0.0] * 5])


def test_weights_are_of_expressed_genes_and_ties_go_to_the_lower_index() -> None:
    assert gene_weights(X, "expressed").tolist()[0] == [0, 1, 1, 1, 0]
    assert gene_weights(X, "value^3").tolist()[0] == [0, 8, 1, 8, 0]
    assert gene_weights(X, "top_1").tolist()[0] == [0, 1, 0, 0, 0]
    assert gene_weights(X, "top_4").tolist() == gene_weights(X, "expressed").tolist()
    assert gene_weights(X, "top_99").tolist() == gene_weights(X, "expressed").tolist()


def test_pooled_vectors_are_weighted_means_and_zero_for_an_empty_cell() -> None:
    vectors = torch.arange(30.0).reshape(3, 5, 2)
    found: dict[Layer, torch.Tensor] = {"decoder": vectors, "gene_vectors": vectors[0]}
    parts = [Part("decoder", "value"), Part("gene_vectors", "top_1")]
    mean, first = pool_parts(found, X, parts)
    expected = (2 * vectors[0, 1] + vectors[0, 2] + 2 * vectors[0, 3]) / 5
    torch.testing.assert_close(mean[0], expected)
    torch.testing.assert_close(first[:2], vectors[0, [1, 2]])
    assert not mean[2].any()
    assert not first[2].any()


def test_whitened_rows_have_the_same_variance_in_every_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 3, generator=generator) @ torch.tensor(
        [[5.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.2, 0.1]]
    )
    centre, to = scaling_map(rows, "whitened 0.0")
    torch.testing.assert_close(torch.cov(((rows - centre) @ to).T), torch.eye(3) / 3)
    centre, to = scaling_map(rows, "scaled")
    done = (rows - centre) @ to
    torch.testing.assert_close(done.var(dim=0).sum(), torch.tensor(1.0))
    torch.testing.assert_close(torch.corrcoef(done.T), torch.corrcoef(rows.T))
    # Cells that are all alike have no scale.
    assert torch.isfinite(scaling_map(torch.ones(4, 3), "whitened 0.1")[1]).all()


def test_parts_scaled_together_keep_the_variance_that_each_has() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 3, generator=generator) * size + 4 for size in (2.0, 1.0)]
    centres, maps = scaling_maps(parts, TOGETHER)
    done = [(p - c) @ m for p, c, m in zip(parts, centres, maps, strict=True)]
    torch.testing.assert_close(torch.cat(done, 1).var(dim=0).sum(), torch.tensor(1.0))
    ratio = done[0].var(dim=0).sum() / done[1].var(dim=0).sum()
    torch.testing.assert_close(ratio, parts[0].var(dim=0).sum() / parts[1].var(dim=0).sum())
    centres, maps = scaling_maps(parts, "whitened 0.1")
    torch.testing.assert_close((centres[1], maps[1]), scaling_map(parts[1], "whitened 0.1"))
    assert torch.isfinite(scaling_maps([torch.ones(4, 3)], TOGETHER)[1]).all()


def test_principal_parts_read_all_values_along_the_recipes_directions(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, named_genes(60), seed=0))
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((3, 60), 0.7), generator=generator)
    directions = torch.randn(2, 60, 8, generator=generator)
    model.recipe = replace(principal_recipe(16, 8), directions=directions)
    torch.testing.assert_close(model.embed(x), torch.cat([x @ directions[0], x @ directions[1]], 1))
    unmeasured = torch.zeros(3, 60, dtype=torch.bool)
    unmeasured[:, 7:] = True
    found = model.embed(x, unmeasured=unmeasured)
    torch.testing.assert_close(found[:, :8], x[:, :7] @ directions[0, :7])
    others = model.pooled(x, principal_recipe(8, 8).parts, directions=2 * directions)
    torch.testing.assert_close(others[0], 2 * x @ directions[0])
    whole = model.embed(x)
    model.recipe = replace(principal_recipe(11, 8), directions=directions)
    assert torch.equal(model.embed(x), whole[:, :11]), "the last block is cut"
    assert embedding_width(model) == 11
    assert model.recipe.text().endswith("principal directions of training cells, the first 11")
    model.recipe = principal_recipe(16, 8)
    with pytest.raises(ValueError, match="reads principal directions, and has none"):
        model.embed(x)


@pytest.mark.parametrize(
    "part",
    [Part("decoder", "block_1"), Part("principal", "value"), Part("principal", "block_0"),
     Part("decoder", "top_0"), Part("decoder", "top_x"), Part("decoder", "values"),
     Part("head", "value")],  # type: ignore[arg-type]
)  # fmt: skip
def test_unknown_parts_are_refused(part: Part) -> None:
    with pytest.raises(ValueError, match=r"unknown part of an embedding: .* weights expressed"):
        check_part(part)


def test_a_model_embeds_by_its_recipe_alone_or_in_a_batch(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, named_genes(60), seed=0))
    x = torch.poisson(torch.full((3, 60), 0.7), generator=torch.Generator().manual_seed(0))
    x[1] = 0
    with torch.inference_mode():
        encoded = model.encode(x, genes="all")
        mean = (encoded * (x > 0)[..., None]).sum(1) / (x > 0).sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(model.embed(x), mean)
        assert model.recipe is MEAN
        parts = (Part("encoders", "top_8"), Part("gene_vectors", "value"))
        model.recipe = Recipe(
            parts, "scaled", torch.ones(2, 8), torch.stack([torch.eye(8), 2 * torch.eye(8)])
        )
        found = model.embed(x)
        pooled = model.pooled(x, parts)
        vectors = model.gene_encoder()[:60]
        torch.testing.assert_close(pooled[1][0], x[0] @ vectors / x[0].sum())
        torch.testing.assert_close(found[0], torch.cat([pooled[0][0] - 1, 2 * (pooled[1][0] - 1)]))
        assert found.shape == (3, 16)
        assert not found[1].any(), "a cell without counts"
        torch.testing.assert_close(model.embed(x[2:]), found[2:], rtol=1e-5, atol=1e-6)
        # What is not measured counts for nothing, whatever x holds there.
        unmeasured = torch.zeros(3, 60, dtype=torch.bool)
        unmeasured[0] = True
        assert not model.embed(x, unmeasured=unmeasured)[0].any()
        # The decoder reads what stands behind the encoders.
        first, last = model.pooled(x, [Part("encoders", "expressed"), Part("decoder", "expressed")])
        torch.testing.assert_close(last, mean)
        assert not torch.allclose(first, last)


@pytest.mark.parametrize("changes", [{}, {"routing": "expressed"}, {"pad_token": True}])
def test_pooling_the_expressed_genes_alone_gives_the_means_over_all(
    changes: dict[str, object],
) -> None:
    model = small_model(**changes)
    x, _ = cells(b=5)
    x[2], x[3, 1:] = 0, 0
    unmeasured = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) < 0.2
    weights = ("expressed", "value", "value^3", "top_3")
    layers = ("decoder", "encoders", "gene_vectors")
    parts = [Part(layer, weight) for layer in layers for weight in weights]
    routes, _ = cells(b=5, seed=9)
    with torch.no_grad():
        for unknown, routed in ((None, None), (unmeasured, None), (None, routes)):
            every = model._represent(x, None, None, None, unknown, layers, routes=routed)
            known = x if unknown is None else x.masked_fill(unknown, 0.0)
            expected = pool_parts(every, known, parts)
            for found, wanted in zip(
                model.pooled(x, parts, unmeasured=unknown, routes=routed), expected, strict=True
            ):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"pad_token": True}])
def test_no_cells_have_no_rows(changes: dict[str, object]) -> None:
    model = small_model(**changes)
    x, _ = cells()
    with torch.no_grad():
        assert model.embed(x[:0]).shape == (0, embedding_width(model))


def test_gene_vectors_that_are_kept_are_those_of_the_weights_and_end_with_the_block() -> None:
    model = small_model()
    x, _ = cells()
    with torch.no_grad():
        before = model.embed(x)
        with model.gene_encoder.kept():
            assert torch.equal(model.embed(x), before)
            model.gene_encoder.table.data.add_(1.0)
            assert torch.equal(model.embed(x), before)
            with model.gene_encoder.kept():
                assert torch.equal(model.embed(x), before)
            assert torch.equal(model.embed(x), before)  # The inner block ends nothing.
        assert not torch.equal(model.embed(x), before)
