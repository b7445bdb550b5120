"""The last layer at some positions alone, and compiled layers: exactly the plain model.

Covers also `sclong_ds/model/random_features.py`.
"""

import dataclasses

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from small_model import G, cells, close, gradients, small_model
from torch._dynamo.utils import counters

from kernels.linear_products import Linear
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import PerformerConfig
from sclong_ds.model.performer import PerformerLayer
from sclong_ds.planning import devices
from sclong_ds.training import run
from sclong_ds.training.build import set_options

PRECISION = [(torch.float32, 2e-6), (torch.float64, 1e-12)]


def decoder(depth, attention=None):
    return PerformerConfig(
        depth=depth, heads=2, dim_head=8, nb_features=None, ff_mult=2, attention=attention
    )


def chosen(x):
    """Different genes per cell, the first and the last one, and the last cell's twice."""
    gen = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(G, generator=gen)[:9] for _ in x])
    positions[0, :2] = torch.tensor([0, G - 1])
    positions[-1] = 4
    return positions


CHANGES = {
    "plain": {},
    "one layer": {"decoder": decoder(1)},
    "pad token, bias per gene": {"pad_token": True, "gene_bias": True},
    "bias of the projections": {"qkv_bias": True, "head": "linear"},
    "softmax": {"attention": "softmax"},
    "softmax in the decoder, packed": {
        "decoder": decoder(2, "softmax"),
        "routing": "expressed",
        "zero_genes": 9,
    },
    "another eps": {"favor_eps": 1e-7},
    "mini only, maximum per head": {"contextual_encoder": "mini", "stabiliser_scope": "head"},
    "packed": {"routing": "expressed"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_chosen_genes_have_the_predictions_and_gradients_of_all(
    changes, dtype, tolerance, recompute
):
    model = small_model(**changes).to(dtype).train()
    for performer in model.performers().values():
        performer.recompute = recompute
    x, mask = cells(3, dtype)
    positions = chosen(x)
    whole = model(x, mask).gather(1, positions)
    whole.square().sum().backward()
    wanted = gradients(model)
    out = model(x, mask, positions=positions)
    assert out.shape == positions.shape
    assert close(out, whole, tolerance)
    out.square().sum().backward()
    for name, got in gradients(model).items():
        assert close(got, wanted[name], 20 * tolerance), name


def test_the_end_of_the_model_runs_on_the_chosen_genes_alone():
    model, rows = small_model(), {}
    layer = model.decoder.layers[-1]
    parts = {"feed forward": layer.feed_forward, "out": layer.attention.to_out, "norm": model.norm}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, i, o, name=name: rows.update({name: o.shape[1]}))
    x, mask = cells(3)
    model(x, mask, positions=chosen(x))
    assert rows == dict.fromkeys(parts, 9)
    rows.clear()
    every = model.encode(x, mask, genes="all")
    assert every.shape == (3, G, 16)
    assert rows == dict.fromkeys(parts, G)
    assert close(model.encode(x, mask, genes=[4, 0]), every[:, [4, 0]], 1e-5)
    assert rows["norm"] == 2
    own = torch.tensor([[4, 0], [1, 2], [3, 3]], dtype=torch.int32)  # by cell, of any integers
    expected = every[torch.arange(3)[:, None], own.long()]
    assert close(model.encode(x, mask, genes=own), expected, 1e-5)
    for wrong in (own[:2], own[None], own[0, 0], torch.ones(G, dtype=torch.bool), own.float()):
        with pytest.raises(ValueError, match=r"give integers \(P,\) or \(B, P\)"):
            model.encode(x, genes=wrong)
    with pytest.raises(ValueError, match="columns must be from 0 to"):
        model.encode(x, genes=[G])
    with pytest.raises(ValueError, match="a model that was not loaded has columns"):
        model.encode(x, genes=["CD3E"])
    with pytest.raises(ValueError, match='give a list of genes, or "all"'):
        model.encode(x, genes="CD3E")


@pytest.fixture(scope="module")
def compiled():
    """Return a model with compiled layers of both kinds; its graphs are made once."""
    model = small_model(
        gene_bias=True,
        large_encoder=dataclasses.replace(decoder(2), heads=3),
        mini_encoder=decoder(1, "softmax"),
        routing="expressed",
    ).train()
    for performer in model.performers().values():
        performer.compile_layers = True
    return model


# torch.compile itself reads .grad of the tensors that it traces with.
@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("wanted", ["all", "some"])
def test_compiled_layers_equal_the_plain_ones(compiled, recompute, wanted):
    """Batches whose cells have other lengths too, without a graph break or a graph per batch."""
    results = {}
    for compile_layers in (False, True):
        for performer in compiled.performers().values():
            performer.compile_layers, performer.recompute = compile_layers, recompute
        results[compile_layers] = []
        for seed in (1, 2, 3):
            graphs = counters["stats"]["unique_graphs"]
            x, mask = cells(3, seed=seed, expressed=0.05 * seed)
            positions = chosen(x) if wanted == "some" else None
            out = compiled(x, mask, positions=positions)
            out.square().sum().backward()
            results[compile_layers].append((out.detach(), gradients(compiled)))
            # The second length makes the graphs for all lengths.
            assert seed < 3 or counters["stats"]["unique_graphs"] == graphs
    for (got, of_got), (want, of_want) in zip(results[True], results[False], strict=True):
        assert close(got, want, 1e-6)
        for name in of_want:
            assert close(of_got[name], of_want[name], 1e-5), name


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_are_compiled_and_gathered_at_once(stage):
    config = load_config("sclong_tiny", ["engine.compile_layers=true"])
    model = small_model()
    set_options(model, config.engine, {"zero_optimization": {"stage": stage}})
    assert all(performer.compile_layers for performer in model.performers().values())
    together = {type(m) for m in model.modules() if z3_leaf_module(m)}
    assert together == ({PerformerLayer} if stage == 3 else set())


@pytest.mark.parametrize("products", ["precision", "bf16", "fp8"])
def test_linear_layers_multiply_as_configured(products):
    """In bf16 those of all stacks, in 8 bits those of the large encoder."""
    config = load_config("sclong_tiny", [f"engine.linear_products={products}"])
    model = small_model()
    set_options(model, config.engine, {"zero_optimization": {"stage": 1}})
    for name, stack in model.performers().items():
        found = {m.products for m in stack.modules() if isinstance(m, Linear)}
        here = products != "fp8" or name == "large_encoder"
        assert found == {products if here else "precision"}


@pytest.mark.parametrize("products", ["bf16", "fp8"])
def test_products_in_fewer_bits_change_a_model_little(products):
    x, mask = cells()
    found = []
    for how in ("precision", products):
        model = small_model()
        model.large_encoder.set_products(how)
        out = model(x, mask)
        out.square().mean().backward()
        found.append((out.detach(), gradients(model)))
    (out, of_out), (want, of_want) = found[::-1]
    least, most = {"bf16": (1e-6, 2e-2), "fp8": (1e-4, 0.2)}[products]
    assert least < (out - want).norm() / want.norm() < most
    changed = sum((of_out[n] - g).square().sum() for n, g in of_want.items()).sqrt()
    assert changed < most * sum(g.square().sum() for g in of_want.values()).sqrt()


@pytest.mark.parametrize(
    ("products", "device", "capability", "said"),
    [
        ("precision", "cpu", None, ""),
        ("precision", "cuda", None, ""),  # not asked for
        ("bf16", "cpu", None, "linear layers: products in bf16"),
        ("fp8", "cpu", None, "the large encoder: products in fp8 (emulated on a CPU, slower)"),
        ("fp8", "cuda", (8, 9), "the large encoder: products in fp8"),
        ("fp8", "cuda", (12, 0), "the large encoder: products in fp8"),
    ],
)
def test_a_run_says_how_it_multiplies(products, device, capability, said, monkeypatch, caplog):
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    engine = load_config("sclong_tiny", [f"engine.linear_products={products}"]).engine
    model = small_model()
    large = dataclasses.replace(model.config.large_encoder, heads=2, dim_head=16)
    model.config = dataclasses.replace(model.config, large_dim=32, large_encoder=large)
    with caplog.at_level("INFO"):
        run.describe_products(engine, model, device=torch.device(device))
    assert caplog.text.rstrip().endswith(said)
    assert bool(caplog.records) == bool(said)


def test_a_run_is_refused_8_bit_products_that_its_gpu_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    engine = load_config("sclong_tiny", ["engine.linear_products=fp8"]).engine
    with pytest.raises(ValueError, match=r"capability 8\.9 or newer: this is NVIDIA A100"):
        run.describe_products(engine, small_model(), device=torch.device("cuda"))


def test_bf16_products_of_a_bf16_model_are_refused():
    with pytest.raises(ValueError, match="has no effect"):
        load_config("sclong_tiny", ["engine.linear_products=bf16", "engine.precision=bf16"])
