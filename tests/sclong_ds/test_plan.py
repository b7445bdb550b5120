"""The plan's exact figures equal what torch counts; its predictions follow the stated rules."""

import argparse
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sclong_ds.config import PerformerConfig, load_config
from sclong_ds.costs import peak_activation_bytes, training_flops_per_cell
from sclong_ds.memory import Setup, Zero, largest_micro_batch, memory_per_rank, zero_settings
from sclong_ds.model.sclong import ScLong
from sclong_ds.plan import (
    SCLONG_CELLS,
    Site,
    Workload,
    activation_bytes,
    add_arguments,
    backward_flops_per_cell,
    flops_per_cell,
    format_plan,
    make_plan,
    parameter_counts,
    recompute_flops_per_cell,
    run,
)

GENES = 27_874
ZERO3 = zero_settings({"zero_optimization": {"stage": 3}})


def stack(depth, heads, dim_head, nb_features, ff_mult):
    return PerformerConfig(
        depth=depth, heads=heads, dim_head=dim_head, nb_features=nb_features, ff_mult=ff_mult
    )


def small(**changes):
    """Return a model section in which no two sizes are equal."""
    sizes = {
        "base_dim": 10,
        "large_dim": 24,
        "top_seq_len": 11,
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


def inputs(cells, n_genes):
    gen = torch.Generator().manual_seed(cells)
    x = torch.rand(cells, n_genes, generator=gen)
    return x, torch.rand(cells, n_genes, generator=gen) < 0.3


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


@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters_of_variants(changes):
    model = small(**changes)
    parts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in built(model, 37).named_children()
    }
    assert list(parameter_counts(model, 37).items()) == list(parts.items())


def counted_flops(net, x, mask, *, backward):
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
        y = net(x, mask)
        if backward:
            y.square().sum().backward()
    parts = {
        name.split(".")[1]: sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name.count(".") == 1
    }
    return counter.get_total_flops(), parts


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


def kept_bytes(net, cells, n_genes):
    """Return the bytes of all storages that autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    x, mask = inputs(cells, n_genes)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x, mask)
        loss = ((y - x).square() * torch.ones_like(mask)).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cells", [2, 10])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "softmax"},
        {"contextual_encoder": "large", "pad_token": True},
        {"contextual_encoder": "mini", "gene_encoder": "none"},
    ],
)
def test_predicted_peak_is_near_the_counted_one(changes, cells, recompute):
    model = small(
        base_dim=48,
        large_dim=96,
        top_seq_len=128,
        large_encoder=stack(3, 4, 32, 70, 4),
        mini_encoder=stack(1, 4, 16, 44, 4),
        decoder=stack(2, 4, 16, 160, 4),
        **changes,
    )
    net, (x, mask) = built(model, 400), inputs(cells, 400)
    for performer in net.performers().values():
        performer.recompute = recompute
    net(x, mask).sum().backward()  # allocates gradients and draws the random features
    features = [w for performer in net.performers().values() for w in performer.features(x.device)]
    known = [*net.parameters(), *(p.grad for p in net.parameters()), *features]
    with PeakBytes(known) as counted:
        (net(x, mask) - x).square().sum().backward()
    predicted_peak = peak_activation_bytes(
        model, 400, micro_batch=cells, element_bytes=4, recompute=recompute
    )
    assert predicted_peak == pytest.approx(counted.peak, rel=0.045)


def setup_of(world_size, **changes):
    return replace(Setup(world_size, False, GENES, 0), **changes)


def predicted(stage, world_size, **changes):
    model = load_config("sclong_1b").model
    zero = replace(ZERO3, stage=stage, **changes)
    return memory_per_rank(
        model, zero, setup_of(world_size), micro_batch=1, element_bytes=2, recompute=True
    )


def test_states_by_stage_are_those_of_the_zero_paper():
    total = sum(parameter_counts(load_config("sclong_1b").model, GENES).values())
    for stage, per_rank in {1: 4 + 12 / 64, 2: 2 + 14 / 64, 3: 16 / 64}.items():
        memory = predicted(stage, 64, persistence_threshold=0)
        assert memory.states() == pytest.approx(per_rank * total, rel=1e-6)


def test_offload_moves_states_to_the_host():
    on_device = predicted(3, 8, persistence_threshold=0)
    off = predicted(3, 8, persistence_threshold=0, offload_optimizer=True, offload_param=True)
    assert on_device.offloaded == 0
    assert off.states() == 0
    assert off.offloaded >= on_device.states()
    assert off.gathered_layers == on_device.gathered_layers > 0


def test_zero3_gathers_at_most_the_model_and_follows_the_reuse_distance():
    tight = predicted(3, 8, reuse_distance=0)
    loose = predicted(3, 8, reuse_distance=10**12)
    assert tight.gathered_layers < loose.gathered_layers
    assert loose.gathered_layers <= 2 * sum(
        parameter_counts(load_config("sclong_1b").model, GENES).values()
    )
    assert predicted(3, 1).gathered_layers == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_largest_micro_batch_is_the_last_that_fits(recompute):
    model, kinds = load_config("sclong_1b").model, {"element_bytes": 2, "recompute": recompute}
    usable = 70 * 2**30
    most = largest_micro_batch(model, ZERO3, setup_of(8), usable_bytes=usable, **kinds)
    peaks = [
        memory_per_rank(model, ZERO3, setup_of(8), micro_batch=m, **kinds).peak()
        for m in (most, most + 1)
    ]
    assert peaks[0] <= usable < peaks[1]
    assert largest_micro_batch(model, ZERO3, setup_of(8), usable_bytes=2**30, **kinds) == 0


def test_zero_settings_reads_the_json_and_knows_the_defaults():
    defaults = zero_settings({"zero_optimization": {"stage": 2}})
    assert defaults == Zero(
        stage=2,
        offload_optimizer=False,
        offload_param=False,
        reduce_bucket=500_000_000,
        overlap=False,
        contiguous=True,
        persistence_threshold=100_000,
        prefetch_bucket=50_000_000,
        reuse_distance=1_000_000_000,
        sub_group=1_000_000_000,
    )
    given = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e7}
    zero = zero_settings({"zero_optimization": given})
    assert (zero.offload_optimizer, zero.overlap, zero.reduce_bucket) == (True, True, 50_000_000)
    with pytest.raises(ValueError, match=r"stage: got 0, allowed here: 1, 2, 3"):
        zero_settings({})


def plan_of(preset="sclong_1b", *overrides, cells=1_000_000, **site):
    config = load_config(preset, overrides)
    engine = config.engine
    site = Site(**({"nodes": 2, "gpus_per_node": 8, "device": "h100", "mfu": 0.4} | site))
    world = site.nodes * site.gpus_per_node
    ds_config = {
        "train_batch_size": engine.train_batch_size,
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": engine.train_batch_size
        // (engine.train_micro_batch_size_per_gpu * world),
        "zero_optimization": {"stage": 3},
    }
    work = Workload(n_genes=GENES, n_edges=0, cells=cells)
    return make_plan(config, ds_config, site=site, work=work)


def test_time_follows_from_flops_and_utilisation():
    plan = plan_of()
    time, batch = plan["time"], plan["batch"]
    reached = 0.4 * 989e12 * 16
    assert time["cells_per_s"] * time["training_flops_per_cell"] == pytest.approx(reached)
    assert time["gpu_hours_per_epoch"] == pytest.approx(16 * time["epoch_hours"])
    assert time["steps_per_epoch"] == -(-1_000_000 // batch["train_batch_size"])
    assert plan_of(mfu=0.2)["time"]["cells_per_s"] == pytest.approx(time["cells_per_s"] / 2)
    assert plan_of(nodes=4)["time"]["gpu_hours_per_epoch"] == pytest.approx(
        time["gpu_hours_per_epoch"]
    )


def test_memory_table_has_every_stage_and_the_configured_one():
    memory = plan_of()["memory"]
    rows = memory["stages"]
    assert [(r["stage"], r["activation_checkpointing"]) for r in rows] == [
        (stage, on) for stage in (1, 2, 3) for on in (False, True)
    ]
    configured = rows[5]
    assert {k: memory[k] for k in configured} == configured
    assert all(64 % r["largest_dividing_micro_batch"] == 0 for r in rows)
    for without, with_recompute in zip(rows[::2], rows[1::2], strict=True):
        assert without["peak_bytes"] > with_recompute["peak_bytes"]
        assert without["largest_micro_batch"] < with_recompute["largest_micro_batch"]


def test_plan_has_the_parts_that_the_model_has():
    plan = plan_of("sclong_1b", "model.contextual_encoder=mini", "model.gene_encoder=none")
    parts = ["gene_encoder", "expression_encoder", "mini_encoder", "decoder", "norm", "head"]
    assert list(plan["parameters"]) == [*parts, "total"]
    assert "large" not in format_plan(plan).partition("Memory")[0]
    only_large = plan_of("sclong_1b", "model.contextual_encoder=large")
    assert "mini_encoder" not in only_large["flops_per_cell"]["forward"]
    dual = plan_of()
    for name in ("batch_constants", "gathered_layers"):
        sizes = [p["memory"]["parts_bytes"][name] for p in (plan, only_large, dual)]
        assert sizes == sorted(sizes), name


def test_exact_attention_is_quadratic_in_the_genes():
    favor, softmax = plan_of(), plan_of("sclong_1b", "model.attention=softmax")
    assert favor["parameters"] == softmax["parameters"]
    assert softmax["time"]["training_flops_per_cell"] > favor["time"]["training_flops_per_cell"]
    times = []
    for attention in ("favor", "softmax"):
        model = small(attention=attention)
        times.append([flops_per_cell(model, n)["decoder"] for n in (1000, 2000)])
    assert times[0][1] == 2 * times[0][0]
    assert times[1][1] > 3.9 * times[1][0]
    saved = [p["memory"]["parts_bytes"]["batch_constants"] for p in (favor, softmax)]
    assert saved[1] < saved[0]  # no random features


def test_says_when_it_does_not_fit():
    plan = plan_of("sclong_1b", "engine.activation_checkpointing=false", device="rtx4090")
    assert plan["memory"]["fits"] is False
    assert "DOES NOT FIT" in format_plan(plan)
    assert "DOES NOT FIT" not in format_plan(plan_of())


def command(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


SITE = ("--nodes", "2", "--gpus-per-node", "8")


def test_json_is_one_document_on_stdout(capsys):
    assert command("--config", "sclong_1b", *SITE, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"] == "sclong_1b"
    assert plan["n_genes"] == GENES
    assert plan["cells"] == SCLONG_CELLS
    assert plan["batch"]["gradient_accumulation_steps"] == 1024 // (4 * 16)
    assert plan["checkpoint"]["bytes"] == 12 * plan["parameters"]["total"]


def test_text_shows_parameters_and_overrides(capsys):
    assert command("--config", "sclong_tiny", "engine.ds_config=zero1",
                   "--nodes", "1", "--gpus-per-node", "2", "--device", "cpu") == 0  # fmt: skip
    text = capsys.readouterr().out
    counts = parameter_counts(load_config("sclong_tiny").model, GENES)
    assert f"{sum(counts.values()):,}" in text
    assert "ZeRO-1, activation checkpointing off" in text
    assert "predicted" in text


def test_graph_of_the_configuration_is_counted(tmp_path, capsys):
    from sclong_ds.genes import GeneVocabulary

    path = tmp_path / "graph.npz"
    np.savez(
        path,
        format="sclong_ds-gene-graph 1",
        edge_index=np.array([[0, 1, 2], [1, 2, 3]], dtype=np.int32),
        edge_weight=np.ones(3, dtype=np.float32),
        n_genes=GENES,
        genes_hash=GeneVocabulary.bundled().hash,
    )
    words = ("--config", "sclong_1b", *SITE, "--json", f"model.gene_graph={path}")
    assert command(*words) == 0
    assert json.loads(capsys.readouterr().out)["n_edges"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "v100"), r"--device v100: unknown; known devices are a100, .*, h100, .*cpu"),
        (("engine.train_batch_size=100",), r"train_batch_size: got 100, must be a multiple of .*4"),
        (
            ("engine.train_batch_size=96",),
            r"got 96, must be a multiple of .*_per_gpu 4 x 16 ranks",
        ),
        (("model.top_seq_len=27874",), r"model.top_seq_len: got 27874, must be below .* 27874"),
    ],
)
def test_errors_name_what_is_allowed(words, message):
    with pytest.raises(ValueError, match=message):
        command("--config", "sclong_1b", *SITE, *words)


@pytest.mark.parametrize("words", [("--nodes", "0"), ("--mfu", "1.5")])
def test_senseless_numbers_are_bad_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--config", "sclong_1b", *SITE, *words)
    assert stop.value.code == 2
    assert f"got {words[1]}" in capsys.readouterr().err
