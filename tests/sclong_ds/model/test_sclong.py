"""The model: published sizes, stated order of genes, batch invariance, and that it uses what it is
given.

Covers also `sclong_ds/model/values/expression_encoder.py`, `sclong_ds/model/gene_encoder.py`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from small_model import G, cells, close, small_graph, small_model
from torch_geometric.nn import SGConv

from sclong_ds.config.load import load_config
from sclong_ds.model.gene_encoder import GeneEncoder, normalised_adjacency
from sclong_ds.model.routing import expression_order
from sclong_ds.model.sclong import ScLong


def on_meta(preset):
    config = load_config(preset).model
    graph = (np.zeros((2, 1), dtype=np.int64), np.ones(1, dtype=np.float32))
    with torch.device("meta"):
        return ScLong(config, n_genes=27_874, graph=graph)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_configuration_has_the_published_parameters():
    model = on_meta("sclong_1b")
    assert count(model.large_encoder) == 991_441_920
    assert count(model.mini_encoder) == count(model.decoder) == 1_463_200
    assert (
        count(model.to_large) + count(model.large_encoder) + count(model.from_large)
        == 991_441_920 + 257_280 + 2_560 + 256_200 + 400
    )
    genes = 2 * 27_874 * 200 + 200 * 200 + 200
    assert count(model.gene_encoder) == genes
    assert count(model) == 1_006_126_261
    assert all(p.is_meta for p in model.parameters())


def test_100m_preset_is_named_after_its_size():
    """Without the cell's vector: one vector per gene to read it, one to predict from it."""
    model = on_meta("sclong_100m")
    vectors = count(model.cell_vector) + model.head.cell_weight.numel()
    assert 95e6 < count(model) - vectors < 105e6
    assert count(model) < 115e6


def test_order_puts_hidden_values_last_and_breaks_ties_by_gene():
    x = torch.tensor([[0.0, 5.0, 0.0, 2.0, 5.0, 0.0]])
    mask = torch.tensor([[False, True, False, False, False, True]])
    assert expression_order(x, mask).tolist() == [[4, 3, 0, 2, 1, 5]]
    assert expression_order(x, None).tolist() == [[1, 4, 3, 0, 2, 5]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_cell_does_not_depend_on_its_batch(dtype, tolerance):
    model = small_model().to(dtype)
    x, mask = cells(6, dtype=dtype)
    whole = model(x, mask)
    for b in range(6):
        alone = model(x[b : b + 1], mask[b : b + 1])[0]
        assert (whole[b] - alone).norm() <= tolerance * alone.norm()
    shuffled = model(x.flip(0), mask.flip(0)).flip(0)
    assert (whole - shuffled).norm() <= tolerance * whole.norm()


def test_hidden_values_are_not_seen():
    model = small_model()
    x, mask = cells()
    assert mask.any()
    other = torch.where(mask, x + 1.7, x)
    assert torch.equal(model(x, mask), model(other, mask))
    assert not torch.equal(model(x), model(other))


def test_every_part_has_a_gradient():
    model = small_model(gene_encoder_layers=2).train()
    x, mask = cells()
    model(x, mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = small_model().train()
        for performer in model.performers().values():
            performer.recompute = recompute
        x, mask = cells()
        model(x, mask).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_gene_encoder_is_the_published_convolution():
    """SGConv without self loops on the gene table, plus the gene vectors."""
    edges, weights = small_graph()
    encoder = GeneEncoder(G, 16, layers=1, graph=(edges, weights), vectors=None)
    reference = SGConv(16, 16, K=1, add_self_loops=False)
    reference.lin.weight.data.copy_(encoder.linears[0].weight)
    reference.lin.bias.data.copy_(encoder.linears[0].bias)
    convolved = reference(encoder.table, torch.from_numpy(edges), torch.from_numpy(weights))
    torch.testing.assert_close(encoder(), convolved + encoder.vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_product_is_the_dense_one_both_ways_and_has_the_same_bits_twice(dtype):
    encoder = GeneEncoder(G, 16, layers=1, graph=small_graph())
    dense = torch.zeros(G, G, dtype=torch.float64)
    matrix = normalised_adjacency(small_graph(), G)[0]
    for row in range(G):
        at = slice(int(matrix.ends[row]), int(matrix.ends[row + 1]))
        dense[row].index_add_(0, matrix.columns[at].long(), matrix.weights[at])
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(G, 16, generator=gen, dtype=dtype, requires_grad=True)
    grad = torch.randn(G, 16, generator=gen, dtype=dtype)
    runs = []
    for _ in range(2):
        out = encoder._convolve(h)
        runs.append((out, *torch.autograd.grad(out, h, grad)))
    wanted = dense @ h.double(), dense.T @ grad.double()
    for first, second, want in zip(*runs, wanted, strict=True):
        assert torch.equal(first, second)
        assert close(first.double(), want, 1e-6 if dtype == torch.float32 else 1e-14)


def test_gene_without_neighbours_gets_the_bias():
    graph = (np.array([[1], [0]]), np.ones(1, dtype=np.float32))
    encoder = GeneEncoder(3, 4, layers=1, graph=graph, vectors=np.zeros((3, 4)))
    torch.testing.assert_close(encoder()[2], encoder.linears[0].bias)


def test_graph_and_values_matter():
    model = small_model()
    x, mask = cells()
    before = model(x, mask)
    model.gene_encoder._graph = small_graph(seed=9)
    model.gene_encoder._adjacency = None
    assert not torch.allclose(before, model(x, mask))


def test_redraw_changes_the_features_and_comes_back():
    model = small_model()
    x, mask = cells()
    first = model(x, mask)
    model.redraw_features(1)
    assert not torch.equal(first, model(x, mask))
    model.redraw_features(0)
    assert torch.equal(first, model(x, mask))


def test_features_stay_float32_under_bf16():
    model = small_model().bfloat16()
    x, mask = cells()
    assert model(x, mask).dtype == torch.bfloat16
    assert model.decoder.features(x.device)[0].dtype == torch.float32


def test_starts_at_the_mean_it_is_given():
    config = dataclasses.replace(small_model().config, gene_bias=True)
    mean = np.linspace(0.5, 3, G)
    model = ScLong(config, n_genes=G, graph=small_graph(), output_mean=mean)
    x, mask = cells()
    torch.testing.assert_close(model(x, mask), torch.tensor(mean, dtype=torch.float32).expand(4, G))


def test_random_head_starts_as_a_linear_layer():
    config = dataclasses.replace(small_model().config, head_init="random")
    head = ScLong(config, n_genes=G, graph=small_graph(), output_mean=9.0).head
    for values in (head.weight, head.bias):
        assert 0 < values.abs().max() <= 16**-0.5


def test_wrong_inputs_are_named():
    config = small_model().config
    with pytest.raises(ValueError, match="gene-graph"):
        ScLong(config, n_genes=G, graph=None)
    with pytest.raises(ValueError, match="would ignore it"):
        ScLong(
            dataclasses.replace(config, gene_encoder="embedding"), n_genes=G, graph=small_graph()
        )
    with pytest.raises(ValueError, match="top_seq_len"):
        ScLong(dataclasses.replace(config, top_seq_len=G), n_genes=G, graph=small_graph())
    with pytest.raises(ValueError, match="gene_vectors"):
        ScLong(config, n_genes=G, graph=small_graph(), gene_vectors=np.zeros((G, 3)))


ABLATIONS = {
    "no graph": {"gene_encoder": "embedding"},
    "no gene encoder": {"gene_encoder": "none"},
    "no gene vectors": {"use_gene_vectors": False},
    "large only": {"contextual_encoder": "large"},
    "mini only": {"contextual_encoder": "mini"},
    "softmax attention": {"attention": "softmax"},
    "another eps": {"favor_eps": 0.1},
    "Gaussian features": {"random_features": "gaussian"},
    "features as QR leaves them": {"random_features": "orthogonal_qr"},
}


def test_a_stack_with_its_own_attention_computes_that_one():
    """The others compute what they do in a model without; eps is that of the configuration."""
    plain = small_model()
    exact = dataclasses.replace(plain.config.large_encoder, attention="softmax")
    mixed, softmax = small_model(large_encoder=exact), small_model(attention="softmax")
    other_eps = small_model(favor_eps=1e-7)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed.large_encoder(x), softmax.large_encoder(x))
    assert not torch.allclose(mixed.large_encoder(x), plain.large_encoder(x))
    x = x[..., :16]
    for name in ("mini_encoder", "decoder"):
        stacks = [model.performers()[name] for model in (mixed, plain, softmax, other_eps)]
        found, wanted, exact_one, eps_one = (stack(x) for stack in stacks)
        assert torch.equal(found, wanted)
        assert not torch.allclose(found, exact_one)
        assert 1e-6 < (eps_one - wanted).norm() / wanted.norm() < 1e-1
    back = dataclasses.replace(plain.config.decoder, attention="favor")
    decoder = small_model(attention="softmax", decoder=back).decoder
    assert torch.equal(decoder(x), plain.decoder(x))


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_every_ablation_is_another_model_that_trains_whole(changes):
    model = small_model(graph="gene_encoder" not in changes, **changes)
    x, mask = cells()
    out = model(x, mask)
    assert not torch.allclose(out, small_model()(x, mask), atol=1e-3)
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    alone = model(x[2:3], mask[2:3])[0]
    assert (out[2] - alone).norm() <= 1e-6 * alone.norm()


def test_ablations_leave_out_what_they_say():
    large, mini = (
        dict(small_model(contextual_encoder=e).named_children()) for e in ("large", "mini")
    )
    assert "mini_encoder" not in large
    assert not {"large_encoder", "to_large", "from_large"} & set(mini)
    vectors_alone = small_model(graph=False, gene_encoder="none").gene_encoder
    assert set(dict(vectors_alone.named_parameters())) == {"vectors"}
    assert small_model(use_gene_vectors=False).gene_encoder.vectors is None


def test_softmax_attention_is_exact():
    model = small_model(attention="softmax")
    attention = model.decoder.layers[0].attention
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = (t.unflatten(-1, (2, 8)) for t in attention.to_qkv(x).chunk(3, dim=-1))
    weights = torch.einsum("bihk,bjhk->bhij", q, k).div(8**0.5).softmax(-1)
    expected = torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2)
    torch.testing.assert_close(attention(x, None), attention.to_out(expected))


def test_in_the_large_only_model_the_other_genes_keep_their_vectors():
    model = small_model(contextual_encoder="large")
    seen = {}
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.update(merged=inputs[0]))
    x, mask = cells()
    model(x, mask)
    genes = model.gene_encoder()
    tokens = model.expression_encoder(x, mask) + genes
    rest = expression_order(x, mask)[:, model.config.top_seq_len :]
    for b in range(len(x)):
        torch.testing.assert_close((seen["merged"] - genes)[b, rest[b]], tokens[b, rest[b]])


def test_pad_token_takes_part_and_is_not_returned():
    model, plain = small_model(pad_token=True), small_model()
    x, mask = cells()
    assert model(x, mask).shape == x.shape
    assert model.gene_encoder().shape[0] == G + 1
    before = model(x, mask)
    model.gene_encoder.vectors.data[G] += torch.arange(16)
    assert not torch.allclose(before, model(x, mask))
    assert plain.gene_encoder().shape[0] == G


def test_gene_vectors_start_both_tables():
    config = dataclasses.replace(small_model().config, pad_token=True)
    vectors = np.random.default_rng(0).standard_normal((G, 16))
    encoder = ScLong(config, n_genes=G, graph=small_graph(), gene_vectors=vectors).gene_encoder
    for table in (encoder.vectors, encoder.table):
        np.testing.assert_array_equal(table.detach()[:G], vectors.astype(np.float32))
        assert not table[G].any()


def test_cut_mask_vector_keeps_its_gradient():
    model = small_model(mask_vector_max_norm=1.0)
    encoder = model.expression_encoder
    torch.testing.assert_close(encoder.mask_vector.norm().detach(), torch.tensor(1.0))
    encoder.mask_vector.data *= 3
    cut = encoder._mask_vector()
    torch.testing.assert_close(cut.norm(), torch.tensor(1.0))
    cut.sum().backward()
    assert torch.equal(encoder.mask_vector.grad, torch.ones(16))
    encoder.mask_vector.data *= 0.2
    assert torch.equal(encoder._mask_vector(), encoder.mask_vector)


def test_given_features_are_used_before_the_first_redraw():
    drawn = small_model()
    given = {
        f"{name}.{i}": torch.randn(f.shape, generator=torch.Generator().manual_seed(i))
        for name, stack in drawn.performers().items()
        for i, f in enumerate(stack.features(torch.device("cpu")))
    }
    torch.manual_seed(0)
    model = ScLong(drawn.config, n_genes=G, graph=small_graph(), features=given)
    model.load_state_dict(drawn.state_dict())
    x, mask = cells()
    assert not torch.allclose(model(x, mask), drawn(x, mask))
    assert model.decoder.features(x.device)[1] is given["decoder.1"]
    for one in (model, drawn):
        one.redraw_features(1)
    assert torch.equal(model(x, mask), drawn(x, mask))
    given["mini_encoder.1"] = given["mini_encoder.1"][:3]
    with pytest.raises(ValueError, match=r"mini_encoder.1 has the shape \(3, 8\), must be"):
        ScLong(drawn.config, n_genes=G, graph=small_graph(), features=given)


@pytest.mark.parametrize("routing", ["top", "expressed"])
@pytest.mark.parametrize("pad_token", [False, True])
def test_what_is_not_measured_is_unknown_and_not_zero(routing, pad_token):
    model = small_model(routing=routing, pad_token=pad_token)
    x, mask = cells(3)
    unmeasured = torch.zeros(3, G, dtype=torch.bool)
    unmeasured[1, ::3] = unmeasured[2, 40:] = True
    x, mask = x.masked_fill(unmeasured, 0.0), mask & ~unmeasured
    zero, unknown = model(x, mask), model(x, mask, unmeasured=unmeasured)
    close_to = [close(unknown[b], zero[b], 1e-5) for b in range(3)]
    assert close_to == [True, False, False]
    assert not close(
        model.encode(x, unmeasured=unmeasured, genes="all")[1],
        model.encode(x, genes="all")[1],
        1e-3,
    )
    # Whatever stands there cannot be seen.
    other = torch.where(unmeasured, torch.rand(3, G) * 9, x)
    assert torch.equal(model(other, mask, unmeasured=unmeasured), unknown)
    assert torch.equal(
        model.encode(other, unmeasured=unmeasured, genes="all"),
        model.encode(x, unmeasured=unmeasured, genes="all"),
    )
    none = torch.zeros_like(unmeasured)
    assert torch.equal(model(x, mask, unmeasured=none), zero)


def test_genes_that_are_not_measured_get_the_mask_vector():
    model = small_model()
    x, _ = cells(2)
    unmeasured = torch.zeros(2, G, dtype=torch.bool)
    unmeasured[:, 5:9] = True
    seen = []
    model.expression_encoder.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    model(x, None, unmeasured=unmeasured)
    (_, hidden), encoded = seen[0]
    assert torch.equal(hidden, unmeasured)
    vector = model.expression_encoder.norm(model.expression_encoder.mask_vector)
    assert torch.allclose(encoded[:, 5:9], vector.expand(2, 4, -1))
