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
from dataclasses import asdict, replace
from typing import Any

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    RunConfig,
)
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.datasheet.health import health_of
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.schedule import learning_rate, unfinished_schedule
from sclong_ds.planning.arguments import SCLONG_CELLS
from sclong_ds.planning.choice import Chooser, Workload
from sclong_ds.planning.costs import (
    backward_flops_per_cell,
    flops_per_cell,
    parameter_counts,
    recompute_flops_per_cell,
)
from sclong_ds.planning.devices import find_device
from sclong_ds.planning.loading import as_plan, loading, read_rate, sampling
from sclong_ds.planning.memory import (
    Zero,
    activation_bytes,
    largest_micro_batch,
    memory_per_rank,
    zero_settings,
)
from sclong_ds.planning.step_time import Site, StepTime
from sclong_ds.planning.text import format_plan

SCLONG_EXPRESSED = 1_800
"""Expressed genes of a typical cell, when there is no data.corpus."""


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
        ValueError: Unknown device or ZeRO stage, more top genes than genes, or products that the
            device lacks.
    """
    model, genes = config.model, work.n_genes
    if model.contextual_encoder != "mini" and model.top_seq_len >= genes:
        raise ValueError(
            f"model.top_seq_len: got {model.top_seq_len}, must be below the number of genes {genes}"
        )
    device = find_device(site.device, ranks_per_node=site.gpus_per_node)
    zero, engine = zero_settings(ds_config), config.engine
    chooser = Chooser(model, engine, config.objective, site, device, work)
    chooser.check_products(engine.linear_products)
    cell = work.wanted(config.objective)
    parameters, steps = _with_total(parameter_counts(model, genes)), config.run.max_steps
    batch = [key for key in ds_config if "batch_size" in key or "accumulation" in key]
    recompute, micro = engine.activation_checkpointing, engine.train_micro_batch_size_per_gpu
    repeated = recompute_flops_per_cell(model, genes, **cell) if recompute else 0
    return {
        **asdict(site),
        **asdict(work),
        "world_size": site.world_size,
        "device": {"name": site.device, **asdict(device)},
        "precision": engine.precision,
        "parameters": parameters,
        "flops_per_cell": {
            "forward": _with_total(flops_per_cell(model, genes, work.n_edges, **cell)),
            "backward": _with_total(backward_flops_per_cell(model, genes, work.n_edges, **cell)),
            "recompute": repeated,
        },
        "batch": {key: ds_config[key] for key in batch},
        "memory": _memory_plan(chooser, zero),
        "time": _time_plan(
            chooser.time(zero, recompute=recompute, micro_batch=micro), chooser, max_steps=steps
        )
        | _schedule_plan(config.optim, max_steps=steps),
        "fastest": _fastest_plan(chooser, max_steps=steps),
        "linear_products": _products_plan(chooser, zero),
        "checkpoint": _checkpoint_plan(
            config.checkpoint,
            parameters["total"],
            model_weight_bytes=0 if zero.stage == 3 else chooser.element_bytes,
            world_size=site.world_size,
            max_steps=steps,
        ),
    }


def _products_plan(chooser: Chooser, zero: Zero) -> dict[str, Any]:
    """Return `engine.linear_products`, and how many times as fast products in fewer bits are."""
    configured = chooser.engine.linear_products
    return {"configured": configured, "times_as_fast": chooser.of_fewer_bits(zero)}


def _fastest_plan(chooser: Chooser, *, max_steps: int) -> dict[str, Any] | None:
    """Return the fastest setting that fits, and what to add to the command line to have it."""
    choice = chooser.fastest()
    if choice is None:
        return None
    return {
        "overrides": choice.overrides(chooser.engine),
        "peak_bytes": choice.peak_bytes,
        "run_hours": max_steps * choice.time.step_s / 3600,
        "bound_by": choice.time.bound_by,
    }


def _with_total(parts: dict[str, int]) -> dict[str, int]:
    return parts | {"total": sum(parts.values())}


def _memory_plan(chooser: Chooser, zero: Zero) -> dict[str, Any]:
    """Predict memory as configured, and in all stages, offloaded, recomputed or not."""
    model, engine, setup, e = chooser.model, chooser.engine, chooser.setup, chooser.element_bytes
    micro, usable = engine.train_micro_batch_size_per_gpu, chooser.device.usable_bytes()

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
            products=setup.products,
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


def _time_plan(step: StepTime, chooser: Chooser, *, max_steps: int) -> dict[str, Any]:
    """Predict rates and times.

    Args:
        step: Predicted time of a step as configured.
        chooser: Model, site and cells.
        max_steps: Length of the run.
    """
    site, cells, batch = chooser.site, chooser.work.cells, chooser.engine.train_batch_size
    all_ranks = batch / step.step_s
    per_rank, flops = all_ranks / site.world_size, step.training_flops
    peak, run_cells = chooser.device.flops_per_s(chooser.engine.precision), max_steps * batch
    return {
        "training_flops_per_cell": flops,
        "cells_per_s_per_rank": per_rank,
        "cells_per_s": all_ranks,
        "reached_mfu": per_rank * flops / peak,
        "step_time_s": step.step_s,
        "micro_batch": {
            "compute_s": step.compute_s,
            "host_s": step.host_s,
            "links_s": step.links_s,
            "overlapped": step.overlapped,
            "bound_by": step.bound_by,
        },
        "update_s": step.update_s,
        "steps_per_epoch": math.ceil(cells / batch),
        "epoch_hours": cells / all_ranks / 3600,
        "gpu_hours_per_epoch": cells / per_rank / 3600,
        "run_steps": max_steps,
        "run_epochs": run_cells / cells,
        "run_hours": run_cells / all_ranks / 3600,
        "run_gpu_hours": run_cells / per_rank / 3600,
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


def run(args: argparse.Namespace) -> int:
    """Print the plan; return the exit status.

    Raises:
        ValueError: Wrong configuration, unknown device, or batch sizes that do not divide.
        FileNotFoundError: A named file or folder does not exist.
    """
    config = load_config(args.config, args.overrides)
    site = Site(
        nodes=args.nodes, gpus_per_node=args.gpus_per_node, device=args.device, mfu=args.mfu,
        network_gbit=args.network_gbit,
    )  # fmt: skip
    find_device(site.device, ranks_per_node=site.gpus_per_node)
    corpus = _corpus(config.data)
    work = _workload(corpus, config.model.gene_graph, args.cells)
    sampled = sampling(config.data, corpus, work.cells)
    rate = None if args.loader is None else read_rate(args.loader)
    # DeepSpeed, imported for keys that no shipped JSON has, prints which accelerator it found.
    with contextlib.redirect_stdout(sys.stderr):
        ds_config = resolve_ds_config(config.engine, world_size=site.nodes * site.gpus_per_node)
    plan = {"config": args.config} | make_plan(config, ds_config, site=site, work=work)
    plan["loading"] = as_plan(
        loading(
            config.data, sampled=sampled, cells=work.cells, n_expressed=work.n_expressed,
            batch=config.engine.train_batch_size, cells_per_s=plan["time"]["cells_per_s"],
            nodes=site.nodes, world_size=site.world_size, rate=rate,
        )
    )  # fmt: skip
    health = None if corpus is None else health_of(corpus.catalogue)
    if health is not None:
        plan["health"] = health.as_json()
    text = format_plan(plan, verbose=args.verbose) + (f"\n{health.text()}" if health else "")
    print(json.dumps(plan, indent=2) if args.json else text)
    return 0


def _corpus(data: DataConfig) -> Corpus | None:
    """Open the corpus, if the configuration names one."""
    return Corpus(data.corpus, cache_dir=data.cache_dir) if data.corpus else None


def _workload(corpus: Corpus | None, graph: str | None, cells: int | None) -> Workload:
    """Count genes, edges and training cells of the files that the configuration names."""
    genes = corpus.genes if corpus else GeneVocabulary.bundled()
    n_edges = len(read_gene_graph(graph, genes_hash=genes.hash)[1]) if graph else 0
    known = len(corpus.splits["train"]) if corpus else SCLONG_CELLS
    expressed = round(corpus.cells.n_values / len(corpus)) if corpus else SCLONG_EXPRESSED
    return Workload(
        n_genes=len(genes), n_edges=n_edges, cells=cells or known, n_expressed=expressed
    )
