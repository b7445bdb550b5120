"""The plan's predictions follow the stated rules (its exact figures: `test_costs.py`).

Covers also `sclong_ds/planning/arguments.py` and `sclong_ds/planning/text.py`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sclong_ds.config.load import load_config
from sclong_ds.planning import devices
from sclong_ds.planning.arguments import add_arguments
from sclong_ds.planning.choice import Workload
from sclong_ds.planning.costs import flops_per_cell, parameter_counts
from sclong_ds.planning.memory import (
    Setup,
    Zero,
    largest_micro_batch,
    memory_per_rank,
    zero_settings,
)
from sclong_ds.planning.plan import SCLONG_CELLS, make_plan, run
from sclong_ds.planning.step_time import Site
from sclong_ds.planning.text import format_plan

GENES = 27_874
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ZERO3 = zero_settings({"zero_optimization": {"stage": 3}})


def setup_of(world_size, **changes):
    return replace(Setup(world_size, False, GENES, 0), **changes)


def predicted(stage, world_size, **changes):
    model = load_config("sclong_1b").model
    zero = replace(ZERO3, stage=stage, **changes)
    return memory_per_rank(
        model, zero, setup_of(world_size), micro_batch=1, element_bytes=2, recompute=True
    )


def test_states_by_stage_are_those_of_the_zero_paper():
    """Except for the gradients, which add up in fp32 in stages 2 and 3: 4 bytes and not 2."""
    total = sum(parameter_counts(load_config("sclong_1b").model, GENES).values())
    for stage, per_rank in {1: 4 + 12 / 64, 2: 2 + 16 / 64, 3: 18 / 64}.items():
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


def plan_of(preset="sclong_1b", *overrides, cells=1_000_000, expressed=20, edges=0, **site):
    config = load_config(preset, overrides)
    engine = config.engine
    usual = {"nodes": 2, "gpus_per_node": 8, "device": "h100", "mfu": 0.4, "network_gbit": 400.0}
    site = Site(**(usual | site))
    world = site.world_size
    ds_config = {
        "train_batch_size": engine.train_batch_size,
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": engine.train_batch_size
        // (engine.train_micro_batch_size_per_gpu * world),
        "zero_optimization": {"stage": 3},
    }
    work = Workload(n_genes=GENES, n_edges=edges, cells=cells, n_expressed=expressed)
    return make_plan(config, ds_config, site=site, work=work)


def test_time_follows_from_flops_and_utilisation():
    plan = plan_of()
    time, batch = plan["time"], plan["batch"]
    reached = 0.4 * 989e12 * 16
    assert time["micro_batch"]["bound_by"] == "arithmetic"
    assert time["reached_mfu"] == pytest.approx(0.4)
    assert time["decoded_cells_per_s_per_rank"] * 16 == pytest.approx(time["cells_per_s"])
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
    switches = (False, True)
    assert [(r["stage"], r["offload"], r["activation_checkpointing"]) for r in rows] == [
        (stage, off, on) for stage in (1, 2, 3) for off in switches for on in switches
    ]
    assert [r["parts_bytes"]["offloaded"] > 0 for r in rows] == [r["offload"] for r in rows]
    for on_device, offloaded in zip(rows[::4], rows[2::4], strict=True):
        assert on_device["states_bytes"] > offloaded["states_bytes"]
    configured = rows[8]
    assert {k: memory[k] for k in configured} == configured
    assert all(64 % r["largest_dividing_micro_batch"] == 0 for r in rows)
    for without, with_recompute in zip(rows[::2], rows[1::2], strict=True):
        assert without["peak_bytes"] > with_recompute["peak_bytes"]
        assert without["largest_micro_batch"] < with_recompute["largest_micro_batch"]


def test_plan_has_the_parts_that_the_model_has():
    plan = plan_of("sclong_1b", "model.contextual_encoder=mini", "model.gene_encoder=none")
    parts = ["gene_encoder", "expression_encoder", "mini_encoder", "decoder", "norm", "head"]
    assert list(plan["parameters"]) == [*parts, "total"]
    assert "large" not in format_plan(plan, verbose=True).partition("Memory")[0]
    only_large = plan_of("sclong_1b", "model.contextual_encoder=large")
    assert "mini_encoder" not in only_large["flops_per_cell"]["forward"]
    dual = plan_of()
    for name in ("batch_constants", "gathered_layers"):
        sizes = [p["memory"]["parts_bytes"][name] for p in (plan, only_large, dual)]
        assert sizes == sorted(sizes), name


def test_the_recommended_1b_is_planned_at_less_than_half_the_published_cost():
    published, recommended = (plan_of(name) for name in ("sclong_1b", "sclong_1b_recommended"))
    for way in ("forward", "backward"):
        costs = [plan["flops_per_cell"][way]["total"] for plan in (recommended, published)]
        assert costs[0] < 0.5 * costs[1]
    assert recommended["memory"]["fits"]


def test_exact_attention_is_quadratic_in_the_genes():
    favor, softmax = plan_of(), plan_of("sclong_1b", "model.attention=softmax")
    assert favor["parameters"] == softmax["parameters"]
    assert softmax["time"]["training_flops_per_cell"] > favor["time"]["training_flops_per_cell"]
    times = []
    for attention in ("favor", "softmax"):
        model = replace(load_config("sclong_tiny").model, attention=attention)
        times.append([flops_per_cell(model, n)["decoder"] for n in (10_000, 20_000)])
    assert times[0][1] == 2 * times[0][0]
    assert times[1][1] > 3.9 * times[1][0]
    saved = [p["memory"]["parts_bytes"]["batch_constants"] for p in (favor, softmax)]
    assert saved[1] < saved[0]  # no random features


def test_exact_attention_of_the_large_encoder_alone():
    """Less work than FAVOR+ where few genes are read, more where many are; others unchanged."""
    favor = load_config("sclong_1b", ["model.routing=expressed"]).model
    large = replace(favor.large_encoder, attention="softmax")
    exact = replace(favor, large_encoder=large)
    for n_expressed, less in ((200, True), (1_500, False), (4_000, False)):
        work = [flops_per_cell(m, 27_874, n_expressed=n_expressed) for m in (favor, exact)]
        assert (work[1]["large_encoder"] < work[0]["large_encoder"]) == less, n_expressed
        assert work[0]["decoder"] == work[1]["decoder"]
    plans = [
        plan_of("sclong_1b", "model.routing=expressed", f"model.large_encoder.attention={kind}")
        for kind in ("favor", "softmax")
    ]
    saved = [p["memory"]["parts_bytes"]["batch_constants"] for p in plans]
    sizes = favor.large_encoder
    assert saved[0] - saved[1] == 4 * sizes.depth * sizes.features() * sizes.dim_head


def test_products_in_8_bits_are_counted_for_gpus_that_have_them():
    """What they save of arithmetic, less what their rounding takes; said beside where not set."""
    plans = {
        how: plan_of("sclong_1b", "engine.compile_layers=true", f"engine.linear_products={how}")
        for how in ("precision", "fp8")
    }
    times = [plan["time"]["micro_batch"]["compute_s"] for plan in plans.values()]
    assert 1.05 < times[0] / times[1] < 1.5
    ratio = plans["precision"]["linear_products"]["times_as_fast"]
    assert ratio == plans["fp8"]["linear_products"]["times_as_fast"]
    best = "engine.linear_products=fp8 engine.compile_layers=true"
    steps = [plan["time"]["step_time_s"] for plan in plans.values()]
    assert ratio[best] == pytest.approx(steps[0] / steps[1])
    assert ratio["engine.linear_products=fp8"] < 1  # operator by operator
    for how, counted in (("precision", "not counted above"), ("fp8", "; counted above")):
        text = format_plan(plans[how], verbose=False)
        assert "not timed on a GPU" in text
        assert counted in text
        assert f"{best} {ratio[best]:.2f}" in text
    peaks = [plan["memory"]["peak_bytes"] for plan in plans.values()]
    assert 1 <= peaks[1] / peaks[0] < 1.02
    none = plan_of("sclong_1b", device="a100")
    assert none["linear_products"]["times_as_fast"] == {}
    assert "fewer bits" not in format_plan(none, verbose=False)


@pytest.mark.parametrize(("bf16", "faster"), [(True, True), (False, False)])
def test_products_on_a_cpu(bf16, faster, monkeypatch):
    sets = {"avx512f", "avx512_bf16"} if bf16 else {"avx512f"}
    monkeypatch.setattr(devices, "_instruction_sets", lambda: frozenset(sets))
    site = {"nodes": 1, "gpus_per_node": 1, "device": "cpu"}
    fp32 = ("sclong_1b", "engine.precision=fp32")
    plain = plan_of(*fp32, **site)
    emulated = plan_of(*fp32, "engine.linear_products=fp8", **site)
    assert emulated["time"]["step_time_s"] > plain["time"]["step_time_s"]
    assert "8 bits are emulated here" in format_plan(emulated, verbose=False)
    if not faster:
        with pytest.raises(ValueError, match="AVX512_BF16 or AMX: this is cpu"):
            plan_of(*fp32, "engine.linear_products=bf16", **site)
        assert plain["linear_products"]["times_as_fast"] == {}
        return
    rounded = plan_of(*fp32, "engine.linear_products=bf16", **site)
    ratio = plain["time"]["step_time_s"] / rounded["time"]["step_time_s"]
    assert 1.1 < ratio < 2
    assert plain["linear_products"]["times_as_fast"]["engine.linear_products=bf16"] == ratio
    assert rounded["memory"]["peak_bytes"] < 0.95 * plain["memory"]["peak_bytes"]


PUBLISHED_WIDTHS = (
    "model.gene_encoder=embedding", "model.large_encoder.depth=2", "model.mini_encoder.depth=1",
    "model.decoder.depth=1", "engine.precision=fp32", "engine.train_batch_size=1",
    "engine.train_micro_batch_size_per_gpu=1", "engine.activation_checkpointing=false",
)  # fmt: skip


@pytest.mark.parametrize("routing", ["top", "expressed"])
def test_a_step_on_one_core_takes_what_was_measured(routing, monkeypatch):
    """At the published widths, which matrix products fill."""
    monkeypatch.setattr(devices, "_instruction_sets", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(devices, "usable_cores", lambda: 1)
    names = {"top": "as trained", "expressed": "expressed"}
    measured = json.loads((RESULTS / "cpu_step.json").read_bytes())["result"]["median"]
    given = (*PUBLISHED_WIDTHS, f"model.routing={routing}")
    site = {"nodes": 1, "gpus_per_node": 1, "device": "cpu"}
    plan = plan_of("sclong_1b", *given, expressed=1500, **site)
    ratio = plan["time"]["step_time_s"] / measured[names[routing]]["total_s"]
    assert 1 / 2 < ratio < 2


def test_the_demo_takes_what_was_measured(monkeypatch):
    """At a width of 32, where matrix products are the least of it."""
    monkeypatch.setattr(devices, "_instruction_sets", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    demo = json.loads((RESULTS / "demo.json").read_bytes())["result"]
    given = ("engine.train_batch_size=8", "engine.train_micro_batch_size_per_gpu=4")
    site = {"nodes": 1, "gpus_per_node": 2, "device": "cpu"}
    plan = plan_of("sclong_tiny", *given, expressed=1200, edges=414_085, **site)
    step_s = plan["time"]["step_time_s"]
    # CPU seconds of a rank, over 60 steps of the demo's configuration.
    assert 1 / 2 < step_s / 0.46 < 2
    # Besides its steps the demo prepares, starts twice, validates, draws and embeds.
    assert 1 / 3 < demo["steps"] * step_s / (60 * demo["minutes"]) < 1
    assert "of a CPU a rough estimate" in format_plan(plan, verbose=False)


def test_says_when_it_does_not_fit():
    plan = plan_of("sclong_1b", device="rtx4090")
    assert plan["memory"]["fits"] is False
    assert "DOES NOT FIT" in format_plan(plan, verbose=False)
    assert "DOES NOT FIT" not in format_plan(plan_of(), verbose=False)


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
    assert plan["time"]["last_learning_rate_share"] == pytest.approx(0.1, rel=1e-3)
    assert plan["checkpoint"]["host_copy_bytes"] * 16 == pytest.approx(plan["checkpoint"]["bytes"])


def test_a_run_that_ends_before_its_schedule_is_warned_of(capsys):
    """5,000 steps of the schedule of 45,000; alone, their number changes the schedule too."""
    fixed = ("run.max_steps=5000", "optim.warmup_steps=2000", "optim.decay_steps=45000")
    assert command("--config", "sclong_1b", *SITE, *fixed) == 0
    assert "WARNING: the learning rate of the last step is 99%" in capsys.readouterr().out
    assert command("--config", "sclong_1b", *SITE, fixed[0]) == 0
    text = capsys.readouterr().out
    assert "the last step is 10% of optim.lr" in text
    assert "WARNING" not in text


def test_disk_is_for_all_checkpoints_that_stay(capsys):
    """The newest 3, the next one, the best, and those of every 500 of 45,000 steps."""
    disk = []
    for every in ("null", "500"):
        keep = ("checkpoint.keep_every_n_steps=" + every, "checkpoint.keep_last=3")
        assert command("--config", "sclong_1b", *SITE, "--json", *keep, "run.max_steps=45000") == 0
        saved = json.loads(capsys.readouterr().out)["checkpoint"]
        disk.append(saved["disk_bytes"] / saved["bytes"])
    assert disk == [5, 95]


def test_text_shows_parameters_and_overrides(capsys):
    assert command("--config", "sclong_tiny", "engine.ds_config=zero1", "--verbose",
                   "--nodes", "1", "--gpus-per-node", "2", "--device", "cpu") == 0  # fmt: skip
    text = capsys.readouterr().out
    counts = parameter_counts(load_config("sclong_tiny").model, GENES)
    assert f"{sum(counts.values()):,}" in text
    assert "ZeRO-1, activation checkpointing off" in text
    assert "predicted" in text


def test_graph_of_the_configuration_is_counted(tmp_path, capsys):
    from sclong_ds.corpus.genes import GeneVocabulary

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
        (
            ("--device", "a100", "engine.linear_products=fp8"),
            r"linear_products=fp8 needs a GPU of compute capability 8.9 or newer: this is a100",
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
