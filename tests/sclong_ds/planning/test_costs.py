"""What follows from the shapes of the model: equal to what torch counts.

Also the bytes of activations, of `sclong_ds/planning/memory.py`.
"""

import functools
import weakref
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kernels.linear_products import Linear
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import PerformerConfig
from sclong_ds.model.sclong import ScLong
from sclong_ds.planning.costs import (
    backward_flops_per_cell,
    flops_per_cell,
    parameter_counts,
    recompute_flops_per_cell,
    rounded_sizes,
    training_flops_per_cell,
)
from sclong_ds.planning.memory import activation_bytes, peak_activation_bytes

GENES = 27_874


def stack(depth, heads, dim_head, nb_features, ff_mult, attention=None):
    return PerformerConfig(
        depth=depth,
        heads=heads,
        dim_head=dim_head,
        nb_features=nb_features,
        ff_mult=ff_mult,
        attention=attention,
    )


def small(**changes):
    """Return a model section in which no two sizes are equal."""
    sizes = {
        "base_dim": 10,
        "large_dim": 24,
        "top_seq_len": 11,
        "routing": "top",
        "zero_genes": None,
        "expression_hidden": 5,
        "gene_encoder": "embedding",
        "large_encoder": stack(3, 3, 8, 13, 4),
        "mini_encoder": stack(2, 2, 4, 5, 3),
        "decoder": stack(1, 2, 6, 7, 2),
    }
    return replace(load_config("sclong_tiny").model, **(sizes | changes))


def built(model, n_genes, graph=None):
    torch.manual_seed(0)
    return ScLong(model, n_genes=n_genes, graph=graph)


def inputs(cells, n_genes, n_expressed=None):
    """Return values, n_expressed of a cell not zero (None: all), and which are hidden."""
    gen = torch.Generator().manual_seed(cells)
    x = torch.rand(cells, n_genes, generator=gen) + 0.1
    mask = torch.rand(cells, n_genes, generator=gen) < 0.3
    if n_expressed is not None:
        x[:, n_expressed:], mask[:, n_expressed:] = 0, False
    return x, mask


VARIANTS = [
    {},
    {"head": "linear", "gene_bias": False},
    {"qkv_bias": True, "gene_encoder_layers": 2},
    {"pad_token": True, "mask_vector_max_norm": 0.5, "gene_bias": True},
    {"contextual_encoder": "large"},
    {"contextual_encoder": "mini", "gene_encoder": "none"},
    {"attention": "softmax", "use_gene_vectors": False},
    {
        "pad_token": True,
        "head": "linear",
        "contextual_encoder": "large",
        "attention": "softmax",
        "use_gene_vectors": False,
        "gene_encoder_layers": 2,
    },
    {
        "pad_token": True,
        "contextual_encoder": "mini",
        "attention": "softmax",
        "gene_encoder": "none",
        "mask_vector_max_norm": 1.0,
    },
    {"large_encoder": stack(3, 3, 8, 13, 4, "softmax")},
    {"attention": "softmax", "mini_encoder": stack(2, 2, 4, 5, 3, "favor")},
    {"cell_vector": "random", "gene_bias": True},
    {"stabiliser_scope": "head", "decoder": stack(2, 1, 4, None, 4)},
]


@pytest.mark.parametrize("preset", ["sclong_tiny", "sclong_100m", "sclong_1gpu", "sclong_1b"])
def test_parameters_equal_the_model_on_the_meta_device(preset):
    model = replace(load_config(preset).model, gene_encoder="embedding")
    with torch.device("meta"):
        parameters = ScLong(model, n_genes=GENES, graph=None).named_parameters()
    counts = dict.fromkeys(parameter_counts(model, GENES), 0)
    for name, parameter in parameters:
        counts[name.split(".")[0]] += parameter.numel()
    assert parameter_counts(model, GENES) == counts


ZERO_HEAD = {
    "zero_genes": 9,
    "zero_head": True,
    "cell_vector": "random",
    "cell_offset": "negative_binomial",
    "gene_bias": True,
}


@pytest.mark.parametrize("changes", [*VARIANTS, {**ZERO_HEAD, "routing": "expressed"}])
def test_parameters_of_variants(changes):
    model = small(**changes)
    parts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in built(model, 37).named_children()
    }
    assert list(parameter_counts(model, 37).items()) == list(parts.items())


def counted_flops(net, x, mask, *, backward, **options):
    def matrix_vector(a, _, *args, out_shape=None, **kwargs):
        return 2 * a[0] * a[1]

    def exact_attention(q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(q, k, v)

    def exact_attention_backward(grad, q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, q, k, v)

    # The counter does not know these two operators, nor the name of the CPU's exact attention.
    aten = torch.ops.aten
    mapping = {
        aten.mv: matrix_vector,
        aten._scaled_dot_product_flash_attention_for_cpu: exact_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: exact_attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        y = net(x, mask, **options)
        if backward:
            y.square().sum().backward()
    parts = {
        name.split(".")[1]: sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name.count(".") == 1
    }
    return counter.get_total_flops(), parts


@pytest.mark.thorough
@pytest.mark.parametrize("changes", VARIANTS)
def test_flops_equal_those_torch_counts(changes):
    model, cells = small(**changes), 3
    net, batch = built(model, 37), inputs(cells, 37)
    forward = flops_per_cell(model, 37)
    times = {part: 1 if part == "gene_encoder" else cells for part in forward}
    total, parts = counted_flops(net, *batch, backward=False)
    for part in forward:
        assert parts.get(part, 0) == forward[part] * times[part], part
    assert total == sum(forward[part] * times[part] for part in forward)
    both, _ = counted_flops(net, *batch, backward=True)
    backward = backward_flops_per_cell(model, 37)
    assert both - total == sum(backward[part] * times[part] for part in backward)
    assert training_flops_per_cell(model, 37, micro_batch=cells) == pytest.approx(both / cells)


@pytest.mark.thorough
@pytest.mark.parametrize(("n_expressed", "n_wanted"), [(7, None), (30, None), (None, 5), (7, 5)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "softmax", "decoder": stack(2, 2, 6, 7, 2)},
        {"large_encoder": stack(3, 3, 8, 13, 4, "softmax")},
        {"qkv_bias": True, "contextual_encoder": "mini", "head": "linear"},
        {"zero_genes": 9},
        {"zero_genes": 9, "attention": "softmax", "decoder": stack(2, 2, 6, 7, 2)},
        {"zero_genes": 60, "contextual_encoder": "mini"},
        {"zero_genes": 9, "cell_vector": "svd", "cell_offset": "poisson"},
        ZERO_HEAD,
    ],
)
def test_flops_of_fewer_tokens_and_predictions(changes, n_expressed, n_wanted):
    """Cells with their own number of genes in the large encoder; predictions of some genes."""
    routing = "expressed" if n_expressed or "zero_genes" in changes else "top"
    model, cells = small(routing=routing, **changes), 3
    net, batch = built(model, 37), inputs(cells, 37, n_expressed)
    positions = None if n_wanted is None else torch.arange(n_wanted).expand(cells, -1)
    numbers = {"n_expressed": n_expressed, "n_wanted": n_wanted}
    if model.zero_head:
        # Both outputs are in the loss; of a likelihood the level is, and not the value.
        net.forward = functools.partial(net.forward, outputs=("log_level", "eta"))
    forward, backward = (
        count(model, 37, **numbers) for count in (flops_per_cell, backward_flops_per_cell)
    )
    times = {part: 1 if part == "gene_encoder" else cells for part in forward}
    total, parts = counted_flops(net, *batch, backward=False, positions=positions)
    for part in forward:
        assert parts.get(part, 0) == forward[part] * times[part], part
    both, _ = counted_flops(net, *batch, backward=True, positions=positions)
    assert both - total == sum(backward[part] * times[part] for part in backward)
    trained = training_flops_per_cell(model, 37, micro_batch=cells, **numbers)
    assert trained == pytest.approx(both / cells)
    for performer in net.performers().values():
        performer.recompute = True
    again, _ = counted_flops(net, *batch, backward=True, positions=positions)
    assert again - both == cells * recompute_flops_per_cell(model, 37, **numbers)


def test_fewer_zeros_cost_less_and_never_more_than_all():
    per_cell = [
        sum(flops_per_cell(small(routing="expressed", zero_genes=z), 37, n_expressed=20).values())
        for z in (1, 5, 17, 99, None)
    ]
    assert per_cell[0] < per_cell[1] < per_cell[2]
    assert per_cell[2] == per_cell[3] == per_cell[4]


def test_expressed_genes_count_with_their_routing_alone():
    for n_expressed, same in ((7, False), (11, True), (99, True), (None, True)):
        model = small(routing="expressed")
        costs = [flops_per_cell(m, 37, n_expressed=n_expressed) for m in (model, small())]
        assert (costs[0] == costs[1]) == same
        assert costs[1] == flops_per_cell(small(), 37)


@pytest.mark.thorough
@pytest.mark.parametrize("changes", VARIANTS)
def test_activation_checkpointing_repeats_the_performer_layers(changes):
    model = small(**changes)
    net, batch = built(model, 37), inputs(1, 37)
    plain, _ = counted_flops(net, *batch, backward=True)
    for performer in net.performers().values():
        performer.recompute = True
    again, _ = counted_flops(net, *batch, backward=True)
    assert again - plain == recompute_flops_per_cell(model, 37)


def test_graph_edges_add_one_sparse_product_each_way():
    model = small(gene_encoder="graph", gene_encoder_layers=2)
    extra = 2 * 2 * 100 * model.base_dim
    for count in (flops_per_cell, backward_flops_per_cell):
        without, with_edges = count(model, 37), count(model, 37, 100)
        assert with_edges["gene_encoder"] - without["gene_encoder"] == extra
        assert {k: v for k, v in with_edges.items() if k != "gene_encoder"} == {
            k: v for k, v in without.items() if k != "gene_encoder"
        }


def kept_bytes(net, cells, n_genes, n_expressed=None, n_wanted=None):
    """Return the bytes of all storages that autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    x, mask = inputs(cells, n_genes, n_expressed)
    positions = None
    if n_wanted is not None:
        positions = torch.arange(n_wanted).repeat(cells, 1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x, mask, positions=positions)
        mask = mask if positions is None else mask[:, :n_wanted].clone()
        x = x if positions is None else x.gather(1, positions)
        loss = ((y - x).square() * torch.ones_like(mask)).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", VARIANTS[:-1])
def test_kept_activations_equal_what_autograd_saves(changes, recompute):
    model = small(**changes)
    net = built(model, 37)
    for performer in net.performers().values():
        performer.recompute = recompute
    # The difference of two micro-batches leaves out what is kept once, whatever their size.
    per_cell = (kept_bytes(net, 6, 37) - kept_bytes(net, 2, 37)) / 4
    parts = activation_bytes(model, 37, element_bytes=4, recompute=recompute)
    assert sum(parts.values()) == per_cell


FEWER = [
    *((products, {}) for products in ("bf16", "fp8")),
    *((products, {"attention": "softmax"}) for products in ("bf16", "fp8")),
    ("bf16", {"routing": "expressed", "zero_genes": 9}),
    ("fp8", {"routing": "expressed", "zero_genes": 9, "attention": "softmax"}),
]


def multiplying(net, products):
    """Let a model multiply as `engine.linear_products` tells."""
    for name, performer in net.performers().items():
        here = products != "fp8" or name == "large_encoder"
        performer.set_products(products if here else "precision")
    return net


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("products", "changes"), FEWER)
def test_kept_activations_with_products_in_fewer_bits(products, changes, recompute):
    model = small(**changes)
    n_expressed = 7 if model.zero_genes else None
    net = multiplying(built(model, 37), products)
    for performer in net.performers().values():
        performer.recompute = recompute
    per_cell = (kept_bytes(net, 6, 37, n_expressed) - kept_bytes(net, 2, 37, n_expressed)) / 4
    cell = {"n_expressed": n_expressed, "products": products}
    parts = activation_bytes(model, 37, element_bytes=4, recompute=recompute, **cell)
    assert 0 <= per_cell - sum(parts.values()) <= 12


@pytest.mark.parametrize(("products", "changes"), [*FEWER, ("precision", {})])
@pytest.mark.parametrize("n_wanted", [None, 5])
def test_sizes_of_what_is_rounded(products, changes, n_wanted):
    """As the linear layers are called, forward, of three cells."""
    model, cells = small(**changes), 3
    net, seen = multiplying(built(model, 37), products), []

    def note(layer, given, out):
        if layer.products != "precision":
            outs = out if isinstance(out, tuple) else (out,)
            inputs = (given[1], given[0]) if len(outs) == 2 else given[:1]
            for x, y in zip(inputs, outs, strict=True):
                seen.append((x[..., 0].numel(), x.shape[-1], y.shape[-1]))

    for layer in (m for m in net.modules() if isinstance(m, Linear)):
        layer.register_forward_hook(note)
    n_expressed = 7 if model.zero_genes else None
    x, mask = inputs(cells, 37, n_expressed)
    positions = None if n_wanted is None else torch.arange(n_wanted).expand(cells, -1)
    net(x, mask, positions=positions)
    found = rounded_sizes(model, 37, products, n_expressed=n_expressed, n_wanted=n_wanted)
    assert cells * found.flops == sum(2 * tokens * i * o for tokens, i, o in seen)
    assert found.weights == sum(i * o for _, i, o in seen)
    # Queries count apart from keys and values, though they are mostly projected together.
    counted = sum(tokens * (i + o) for tokens, i, o in seen)
    assert counted <= cells * found.elements <= 1.3 * counted


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pad_token": True},
        {"attention": "softmax"},
        {"contextual_encoder": "large"},
        {"cell_offset": "visible", "gene_bias": True, "cell_vector": "none"},
        {"cell_offset": "poisson", "gene_bias": True, "cell_vector": "svd"},
        {"zero_genes": 9},
        {"zero_genes": 60},
        {"zero_genes": 9, "attention": "softmax"},
        {"zero_genes": 9, "large_encoder": stack(3, 3, 8, 13, 4, "softmax")},
        {"zero_genes": 9, "contextual_encoder": "large"},
        {"zero_genes": 9, "contextual_encoder": "mini"},
        {"zero_genes": 9, "cell_vector": "random"},
        {"cell_offset": "visible", "gene_bias": True, "cell_vector": "random"},
    ],
)
def test_kept_activations_of_packed_cells(changes, recompute):
    """Except for the ends of the cells: 4 bytes per stack that keeps them."""
    model = small(routing="expressed", **changes)
    net = built(model, 37)
    for performer in net.performers().values():
        performer.recompute = recompute
    per_cell = (kept_bytes(net, 6, 37, 7) - kept_bytes(net, 2, 37, 7)) / 4
    parts = activation_bytes(model, 37, element_bytes=4, recompute=recompute, n_expressed=7)
    assert 0 <= per_cell - sum(parts.values()) <= 12


@pytest.mark.parametrize("n_wanted", [3, 20])
@pytest.mark.parametrize(
    ("offset", "cell"),
    [("none", "none"), ("poisson", "none"), ("none", "random"), ("poisson", "residuals")],
)
def test_kept_activations_of_some_predictions(offset, cell, n_wanted):
    """All except the ends of the cells, the positions and the genes' bias there."""
    model = small(
        routing="expressed", zero_genes=9, gene_bias=True, cell_offset=offset, cell_vector=cell
    )
    net = built(model, 37)
    per_cell = (kept_bytes(net, 6, 37, 7, n_wanted) - kept_bytes(net, 2, 37, 7, n_wanted)) / 4
    parts = activation_bytes(
        model, 37, element_bytes=4, recompute=False, n_expressed=7, n_wanted=n_wanted
    )
    assert 0 <= per_cell - sum(parts.values()) <= 12 + 16 * n_wanted


@pytest.mark.parametrize("n_wanted", [3, 20])
def test_kept_activations_of_the_zero_head(n_wanted):
    model = small(routing="expressed", **ZERO_HEAD)
    cells = [built(model, 37) for _ in range(2)]
    for one, outputs in zip(cells, (("value",), ("value", "eta")), strict=True):
        one.forward = functools.partial(one.forward, outputs=outputs)
    both = [
        kept_bytes(one, 6, 37, 7, n_wanted) - kept_bytes(one, 2, 37, 7, n_wanted) for one in cells
    ]
    parts = activation_bytes(
        model, 37, element_bytes=4, recompute=False, n_expressed=7, n_wanted=n_wanted
    )
    assert (both[1] - both[0]) / 4 == parts["zero_head"]


class PeakBytes(TorchDispatchMode):
    """Tracks the bytes of the tensors that operators make while it is active."""

    def __init__(self, known):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.alive.discard(key)
        self.now -= size


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cells", [2, 10])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "softmax"},
        {"contextual_encoder": "large", "pad_token": True},
        {"contextual_encoder": "mini", "gene_encoder": "none"},
        {"routing": "expressed", "zero_genes": 60},
        {"routing": "expressed", "zero_genes": 60, "attention": "softmax"},
        {"routing": "expressed", "zero_genes": 60, "contextual_encoder": "mini"},
        {"cell_offset": "poisson", "gene_bias": True},
        {"cell_offset": "poisson", "gene_bias": True, "routing": "expressed", "zero_genes": 60},
        {"cell_vector": "random", "routing": "expressed", "zero_genes": 60},
        {"products": "bf16"},
        {"products": "fp8"},
    ],
)
def test_predicted_peak_is_near_the_counted_one(changes, cells, recompute):
    products = changes.get("products", "precision")
    model = small(
        base_dim=48,
        large_dim=96,
        top_seq_len=128,
        large_encoder=stack(3, 4, 32, 70, 4),
        mini_encoder=stack(1, 4, 16, 44, 4),
        decoder=stack(2, 4, 16, 160, 4),
        **{key: value for key, value in changes.items() if key != "products"},
    )
    n_expressed = None if model.zero_genes is None else 200
    net, (x, mask) = multiplying(built(model, 400), products), inputs(cells, 400, n_expressed)
    for performer in net.performers().values():
        performer.recompute = recompute
    net(x, mask).sum().backward()  # allocates gradients and draws the random features
    features = [w for performer in net.performers().values() for w in performer.features(x.device)]
    known = [*net.parameters(), *(p.grad for p in net.parameters()), *features]
    with PeakBytes(known) as counted:
        (net(x, mask) - x).square().sum().backward()
    predicted_peak = peak_activation_bytes(
        model, 400, micro_batch=cells, element_bytes=4, recompute=recompute,
        n_expressed=n_expressed, products=products,
    )  # fmt: skip
    assert predicted_peak == pytest.approx(counted.peak, rel=0.045)
