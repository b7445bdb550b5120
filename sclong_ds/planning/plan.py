"""What a run will need: memory, cells/s, GPU-hours, checkpoint size, loader speed.

    python -m sclong_ds plan --config sclong_1b --nodes 8 --gpus-per-node 8 --device h100

Parameters and FLOPs are exact (`sclong_ds.planning.costs`); memory (`sclong_ds.planning.memory`),
time and cells/s are predictions. Reads the configuration, the DeepSpeed JSON, and the corpus and
the gene graph that the configuration names; writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.datasheet.health import Health, health_of
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.schedule import learning_rate, unfinished_schedule
from sclong_ds.objective.targets import target_count
from sclong_ds.planning.arguments import SCLONG_CELLS
from sclong_ds.planning.costs import (
    activation_bytes,
    backward_flops_per_cell,
    flops_per_cell,
    parameter_counts,
    recompute_flops_per_cell,
    training_flops_per_cell,
)
from sclong_ds.planning.devices import GIB, Device, find_device
from sclong_ds.planning.memory import (
    Setup,
    Zero,
    largest_micro_batch,
    memory_per_rank,
    zero_settings,
)
from sclong_ds.planning.verdict import verdict_of

SCLONG_EXPRESSED = 1_800
"""Expressed genes of a typical cell, when there is no data.corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run is planned."""

    nodes: int
    gpus_per_node: int
    device: str
    """Key of `DEVICES` or `cpu`."""
    mfu: float
    """Model FLOP/s utilisation: share of the peak that forward and backward reach; what activation
    checkpointing recomputes does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run is planned for."""

    n_genes: int
    n_edges: int
    """Edges of the gene graph; 0 without one."""
    cells: int
    """Training cells of one epoch."""
    n_expressed: int
    """Expressed genes of a cell, on average."""


def make_plan(
    config: RunConfig, ds_config: Mapping[str, Any], *, site: Site, work: Workload
) -> dict[str, Any]:
    """Compute the whole plan.

    Args:
        config: The run's configuration.
        ds_config: What `engine.resolve_ds_config` returns.
        site: Nodes, ranks, device and utilisation.
        work: Genes, edges and cells.

    Returns:
        What `--json` prints: sizes in bytes, times in seconds or hours.

    Raises:
        ValueError: Unknown device or ZeRO stage, or more top genes than genes.
    """
    model, genes = config.model, work.n_genes
    if model.contextual_encoder != "mini" and model.top_seq_len >= genes:
        raise ValueError(
            f"model.top_seq_len: got {model.top_seq_len}, must be below the number of genes {genes}"
        )
    device = find_device(site.device, ranks_per_node=site.gpus_per_node)
    setup = Setup(
        site.nodes * site.gpus_per_node, site.device == "cpu", genes, work.n_edges,
        **_cell(config.objective, work),
    )  # fmt: skip
    zero = zero_settings(ds_config)
    parameters, steps = _with_total(parameter_counts(model, genes)), config.run.max_steps
    flops = _flops_plan(model, config.engine, config.objective, work)
    batch = [key for key in ds_config if "batch_size" in key or "accumulation" in key]
    return {
        **asdict(site),
        **asdict(work),
        "world_size": setup.world_size,
        "device": {"name": site.device, **asdict(device)},
        "precision": config.engine.precision,
        "parameters": parameters,
        "flops_per_cell": {key: flops[key] for key in ("forward", "backward", "recompute")},
        "batch": {key: ds_config[key] for key in batch},
        "memory": _memory_plan(model, config.engine, zero, setup, device),
        "time": _time_plan(
            site,
            work,
            training_flops=flops["training"],
            peak_flops_per_s=device.flops_per_s(config.engine.precision),
            step_cells=config.engine.train_batch_size,
            max_steps=steps,
        )
        | _schedule_plan(config.optim, max_steps=steps),
        "checkpoint": _checkpoint_plan(
            config.checkpoint,
            parameters["total"],
            model_weight_bytes=0 if zero.stage == 3 else _element_bytes(config.engine),
            world_size=setup.world_size,
            max_steps=steps,
        ),
    }


def _flops_plan(
    model: ModelConfig, engine: EngineConfig, objective: ObjectiveConfig, work: Workload
) -> dict[str, Any]:
    """Count the FLOPs of a cell by part, and those of training one."""
    genes, edges, cell = work.n_genes, work.n_edges, _cell(objective, work)
    recomputes, micro = engine.activation_checkpointing, engine.train_micro_batch_size_per_gpu
    return {
        "forward": _with_total(flops_per_cell(model, genes, edges, **cell)),
        "backward": _with_total(backward_flops_per_cell(model, genes, edges, **cell)),
        "recompute": recompute_flops_per_cell(model, genes, **cell) if recomputes else 0,
        "training": training_flops_per_cell(model, genes, edges, micro_batch=micro, **cell),
    }


def _element_bytes(engine: EngineConfig) -> int:
    return 2 if engine.precision == "bf16" else 4


def _cell(objective: ObjectiveConfig, work: Workload) -> dict[str, int]:
    """Return expressed and predicted genes of an average cell."""
    wanted = target_count(work.n_expressed, objective)
    return {"n_expressed": work.n_expressed, "n_wanted": wanted}


def _with_total(parts: dict[str, int]) -> dict[str, int]:
    return parts | {"total": sum(parts.values())}


def _memory_plan(
    model: ModelConfig, engine: EngineConfig, zero: Zero, setup: Setup, device: Device
) -> dict[str, Any]:
    """Predict memory as configured, and in all stages, offloaded, recomputed or not."""
    e = _element_bytes(engine)
    micro, usable = engine.train_micro_batch_size_per_gpu, device.usable_bytes()

    def row(other: Zero, recompute: bool) -> dict[str, Any]:
        memory = memory_per_rank(
            model, other, setup, micro_batch=micro, element_bytes=e, recompute=recompute
        )
        fits = largest_micro_batch(
            model, other, setup, usable_bytes=usable, element_bytes=e, recompute=recompute
        )
        kept = activation_bytes(
            model,
            setup.n_genes,
            element_bytes=e,
            recompute=recompute,
            n_expressed=setup.n_expressed,
            n_wanted=setup.n_wanted,
        )
        cells = engine.train_batch_size // setup.world_size
        return {
            "stage": other.stage,
            "offload": other.offload_optimizer,
            "activation_checkpointing": recompute,
            "parts_bytes": asdict(memory),
            "states_bytes": memory.states(),
            "kept_per_cell_bytes": sum(kept.values()),
            "peak_bytes": memory.peak(),
            "largest_micro_batch": fits,
            "largest_dividing_micro_batch": max(
                (m for m in range(1, min(fits, cells) + 1) if cells % m == 0), default=0
            ),
        }

    # Parameters can be offloaded in stage 3 only; overlap and bucket sizes stay as configured.
    others = [
        replace(zero, stage=stage, offload_optimizer=off, offload_param=off and stage == 3)
        for stage in (1, 2, 3)
        for off in (False, True)
    ]
    table = [row(other, recompute) for other in others for recompute in (False, True)]
    configured = row(zero, engine.activation_checkpointing)
    return configured | {
        "predicted": True,
        "micro_batch": micro,
        "usable_bytes": usable,
        "fits": micro <= configured["largest_micro_batch"],
        "stages": table,
    }


def _time_plan(
    site: Site,
    work: Workload,
    *,
    training_flops: float,
    peak_flops_per_s: float,
    step_cells: int,
    max_steps: int,
) -> dict[str, Any]:
    """Predict rates and times at the stated utilisation.

    Args:
        site: Nodes, ranks and utilisation.
        work: Genes, edges and cells.
        training_flops: Of forward and backward, per cell.
        peak_flops_per_s: Of a rank's device.
        step_cells: Cells per optimizer step.
        max_steps: Length of the run.
    """
    per_rank = peak_flops_per_s * site.mfu / training_flops
    all_ranks = per_rank * site.nodes * site.gpus_per_node
    cells, run_cells = work.cells, max_steps * step_cells
    return {
        "training_flops_per_cell": training_flops,
        "cells_per_s_per_rank": per_rank,
        "cells_per_s": all_ranks,
        "step_time_s": step_cells / all_ranks,
        "steps_per_epoch": math.ceil(cells / step_cells),
        "epoch_hours": cells / all_ranks / 3600,
        "gpu_hours_per_epoch": cells / per_rank / 3600,
        "run_steps": max_steps,
        "run_epochs": run_cells / cells,
        "run_hours": run_cells / all_ranks / 3600,
        "run_gpu_hours": run_cells / per_rank / 3600,
        # Every rank reads and decompresses the cells of all, and decodes its own.
        "read_cells_per_s_per_rank": all_ranks,
        "decoded_cells_per_s_per_rank": per_rank,
    }


def _schedule_plan(optim: OptimConfig, *, max_steps: int) -> dict[str, Any]:
    """Return how far the learning rate comes down in the run."""
    last_rate = learning_rate(optim.in_steps(max_steps), max_steps - 1)
    return {
        "last_learning_rate_share": last_rate / optim.lr,
        "unfinished_schedule": unfinished_schedule(optim, max_steps=max_steps),
    }


def _checkpoint_plan(
    rules: CheckpointConfig,
    parameters: int,
    *,
    model_weight_bytes: int,
    world_size: int,
    max_steps: int,
) -> dict[str, int]:
    """Size the files: fp32 weights and two moments; stages 1 and 2 add the model's own weights.

    Args:
        rules: When to save and what to keep.
        parameters: Number of parameters.
        model_weight_bytes: Of a parameter among the model's own weights; 0 where there are none.
        world_size: Number of ranks.
        max_steps: Length of the run.
    """
    size = (12 + model_weight_bytes) * parameters
    # The model's own weights are those of rank 0.
    copied = math.ceil(12 * parameters / world_size) + model_weight_bytes * parameters
    for_good = max_steps // rules.keep_every_n_steps if rules.keep_every_n_steps else 0
    return {
        "bytes": size,
        # The next one is complete before the oldest goes; the best may be an older one.
        "disk_bytes": size * (rules.keep_last + 1 + rules.keep_best + for_good),
        # Beside them, at a start on another number of ranks.
        "conversion_bytes": 3 * size,
        "host_copy_bytes": copied if rules.asynchronous else 0,
        "every_n_steps": rules.every_n_steps,
        "exported_bytes": 4 * parameters,
    }


def format_plan(plan: Mapping[str, Any]) -> str:
    """Return the plan as text: the verdict, a line per figure, tables of parts and ZeRO stages.

    Args:
        plan: What `make_plan` returns.
    """
    batch, edges = plan["batch"], plan["n_edges"]
    lines = [
        verdict_of(plan),
        "",
        f"{_counted(plan['nodes'], 'node')} x {plan['gpus_per_node']} {plan['device']['name']} = "
        f"{_counted(plan['world_size'], 'rank')}, {plan['precision']}; {plan['n_genes']:,} genes, "
        + (f"{edges:,} graph edges" if edges else "no gene graph given"),
        f"{batch['train_batch_size']} cells per step = {batch['train_micro_batch_size_per_gpu']} "
        f"per rank x {_counted(plan['world_size'], 'rank')} x "
        f"{batch['gradient_accumulation_steps']} accumulated",
        "",
        *_cost_lines(plan),
        "",
        *_memory_lines(plan),
        "",
        *_time_lines(plan),
    ]
    return "\n".join(lines)


def _counted(number: int, one: str) -> str:
    return f"{number:,} {one}{'s' * (number != 1)}"


def _cost_lines(plan: Mapping[str, Any]) -> list[str]:
    flops, training = plan["flops_per_cell"], plan["time"]["training_flops_per_cell"]
    lines = [f"{'Exact':20}{'parameters':>16}{'forward':>14}{'backward':>14}  GFLOP per cell"]
    for part, count in plan["parameters"].items():
        both = [f"{flops[way].get(part, 0) / 1e9:14,.3f}" for way in ("forward", "backward")]
        lines.append(f"  {part:18}{count:>16,}{''.join(both)}")
    lines.append(
        f"  {training / 1e9:,.1f} GFLOP to train a cell; gene_encoder runs once per micro-batch"
    )
    if flops["recompute"]:
        lines.append(
            f"  activation checkpointing repeats {flops['recompute'] / 1e9:,.1f} GFLOP per cell "
            f"({flops['recompute'] / training:.0%} more)"
        )
    return lines


def _memory_lines(plan: Mapping[str, Any]) -> list[str]:
    memory, switch = plan["memory"], {True: "on", False: "off"}
    lines = [
        f"Memory per rank, predicted, GiB (ZeRO-{memory['stage']}, activation checkpointing "
        f"{switch[memory['activation_checkpointing']]}, micro-batch {memory['micro_batch']})"
    ]
    notes = {"offloaded": "  in the host's memory, not on the device"}
    lines += [
        f"  {name:18}{_gib(size):>10}{notes.get(name, '')}"
        for name, size in memory["parts_bytes"].items()
        if size
    ]
    lines += [
        f"  {'peak':18}{_gib(memory['peak_bytes']):>10}  "
        f"{'fits' if memory['fits'] else 'DOES NOT FIT'}: {_gib(memory['usable_bytes'])} usable of "
        f"{plan['device']['memory_gib']:.1f}",
        "",
        f"  {'ZeRO':6}{'offload':9}{'checkpointing':15}{'weights':>9}{'gradients':>11}"
        f"{'optimizer':>11}{'buffers':>9}{'activations':>13}{'peak':>9}{'host':>9}   "
        "largest micro-batch (one that divides the batch)",
    ]
    lines += [_memory_row(row, switch) for row in memory["stages"]]
    return lines


def _memory_row(row: Mapping[str, Any], switch: Mapping[bool, str]) -> str:
    """Return one line of the table; what is not there at the same time is not in the peak."""
    part = row["parts_bytes"]
    optimizer = part["master_weights"] + part["adam_moments"]
    buffers = part["reduce_buckets"] + part["gathered_layers"] + part["batch_constants"]
    return (
        f"  {row['stage']:<6}{switch[row['offload']]:9}{switch[row['activation_checkpointing']]:15}"
        f"{_gib(part['weights']):>9}{_gib(part['gradients']):>11}{_gib(optimizer):>11}"
        f"{_gib(buffers):>9}{_gib(part['activations']):>13}{_gib(row['peak_bytes']):>9}"
        f"{_gib(part['offloaded']):>9}   "
        f"{row['largest_micro_batch']} ({row['largest_dividing_micro_batch']})"
    )


def _time_lines(plan: Mapping[str, Any]) -> list[str]:
    time, saved = plan["time"], plan["checkpoint"]
    warning = time["unfinished_schedule"]
    hours = "rank-hours" if plan["device"]["name"] == "cpu" else "GPU-hours"
    lines = [
        f"Time, predicted at {plan['mfu']:.0%} of peak, validation and checkpoints not included",
        f"  {time['cells_per_s']:,.4g} cells/s, {time['cells_per_s_per_rank']:,.4g} per rank, "
        f"{time['step_time_s']:,.4g} s per step",
        f"  epoch of {plan['cells']:,} cells: {time['steps_per_epoch']:,} steps, "
        f"{time['epoch_hours']:,.4g} h, {time['gpu_hours_per_epoch']:,.4g} {hours}",
        f"  run.max_steps {time['run_steps']:,}: {time['run_epochs']:.3g} epochs, "
        f"{time['run_hours']:,.4g} h, {time['run_gpu_hours']:,.4g} {hours}; the learning rate of "
        f"the last step is {time['last_learning_rate_share']:.0%} of optim.lr",
        *([f"  WARNING: {warning}"] if warning else []),
        f"  the loader of every rank must read {time['read_cells_per_s_per_rank']:,.4g} cells/s, "
        f"those of all ranks, and decode {time['decoded_cells_per_s_per_rank']:,.4g} of them",
        "",
        f"Checkpoint {_gib(saved['bytes'])} GiB every {saved['every_n_steps']} steps; disk for "
        f"those kept and the next {_gib(saved['disk_bytes'])} GiB, to continue with other ranks "
        f"{_gib(saved['conversion_bytes'])} GiB more; exported model "
        f"{_gib(saved['exported_bytes'])} GiB",
    ]
    if saved["host_copy_bytes"]:
        copied = _gib(saved["host_copy_bytes"])
        lines.append(f"  checkpoint.asynchronous: a copy of {copied} GiB in a rank's host memory")
    return lines


def _gib(size: float) -> str:
    value = size / GIB
    return f"{value:,.2f}" if value >= 1 else f"{value:.4f}"


def run(args: argparse.Namespace) -> int:
    """Print the plan; return the exit status.

    Raises:
        ValueError: Wrong configuration, unknown device, or batch sizes that do not divide.
        FileNotFoundError: A named file or folder does not exist.
    """
    config = load_config(args.config, args.overrides)
    site = Site(
        nodes=args.nodes, gpus_per_node=args.gpus_per_node, device=args.device, mfu=args.mfu
    )
    find_device(site.device, ranks_per_node=site.gpus_per_node)
    work = _workload(config.data, config.model.gene_graph, args.cells)
    # DeepSpeed, imported for keys that no shipped JSON has, prints which accelerator it found.
    with contextlib.redirect_stdout(sys.stderr):
        ds_config = resolve_ds_config(config.engine, world_size=site.nodes * site.gpus_per_node)
    plan = {"config": args.config} | make_plan(config, ds_config, site=site, work=work)
    health = _health(config.data)
    if health is not None:
        plan["health"] = health.as_json()
    text = format_plan(plan) + (f"\n{health.text()}" if health else "")
    print(json.dumps(plan, indent=2) if args.json else text)
    return 0


def _health(data: DataConfig) -> Health | None:
    """Return the verdict on the corpus, if the configuration names one."""
    if not data.corpus:
        return None
    return health_of(Corpus(data.corpus, cache_dir=data.cache_dir).catalogue)


def _workload(data: DataConfig, graph: str | None, cells: int | None) -> Workload:
    """Count genes, edges and training cells of the files that the configuration names."""
    corpus = Corpus(data.corpus, cache_dir=data.cache_dir) if data.corpus else None
    genes = corpus.genes if corpus else GeneVocabulary.bundled()
    n_edges = len(read_gene_graph(graph, genes_hash=genes.hash)[1]) if graph else 0
    known = len(corpus.splits["train"]) if corpus else SCLONG_CELLS
    expressed = round(corpus.cells.n_values / len(corpus)) if corpus else SCLONG_EXPRESSED
    return Workload(
        n_genes=len(genes), n_edges=n_edges, cells=cells or known, n_expressed=expressed
    )
