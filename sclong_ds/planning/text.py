"""The plan as text: what a person decides by, and all tables behind `--verbose`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sclong_ds.page.words import counted
from sclong_ds.planning.devices import GIB
from sclong_ds.planning.loading import loading_lines
from sclong_ds.planning.verdict import advice_of, verdict_of


def format_plan(plan: Mapping[str, Any], *, verbose: bool) -> str:
    """Return the plan as text: the verdict, the fastest setting that fits, a line per figure.

    Args:
        plan: What `make_plan` returns.
        verbose: Also the tables of parts and of ZeRO stages.
    """
    batch, edges = plan["batch"], plan["n_edges"]
    lines = [
        verdict_of(plan),
        *([advice] if (advice := advice_of(plan)) else []),
        "",
        f"{counted(plan['nodes'], 'node')} x {plan['gpus_per_node']} {plan['device']['name']} = "
        f"{counted(plan['world_size'], 'rank')}, {plan['precision']}; {plan['n_genes']:,} genes, "
        + (f"{edges:,} graph edges" if edges else "no gene graph given"),
        f"{counted(batch['train_batch_size'], 'cell')} per step = "
        f"{batch['train_micro_batch_size_per_gpu']} "
        f"per rank x {counted(plan['world_size'], 'rank')} x "
        f"{batch['gradient_accumulation_steps']} accumulated",
        f"{plan['parameters']['total']:,} parameters, "
        f"{plan['time']['training_flops_per_cell'] / 1e9:,.1f} GFLOP to train a cell",
        "",
        *(_cost_lines(plan) if verbose else []),
        *_memory_lines(plan, verbose=verbose),
        "",
        *_time_lines(plan),
        *(["", *loading_lines(plan)] if "loading" in plan else []),
    ]
    if not verbose:
        lines += ["", "Tables of parts, of memory and of all ZeRO stages: --verbose"]
    return "\n".join(lines)


def _cost_lines(plan: Mapping[str, Any]) -> list[str]:
    flops, training = plan["flops_per_cell"], plan["time"]["training_flops_per_cell"]
    lines = [f"{'Exact':20}{'parameters':>16}{'forward':>14}{'backward':>14}  GFLOP per cell"]
    for part, count in plan["parameters"].items():
        both = [f"{flops[way].get(part, 0) / 1e9:14,.3f}" for way in ("forward", "backward")]
        lines.append(f"  {part:18}{count:>16,}{''.join(both)}")
    lines.append("  gene_encoder runs once per micro-batch")
    if flops["recompute"]:
        lines.append(
            f"  activation checkpointing repeats {flops['recompute'] / 1e9:,.1f} GFLOP per cell "
            f"({flops['recompute'] / training:.0%} more)"
        )
    return [*lines, ""]


def _memory_lines(plan: Mapping[str, Any], *, verbose: bool) -> list[str]:
    memory, switch = plan["memory"], {True: "on", False: "off"}
    lines = [
        f"Memory per rank, predicted, GiB (ZeRO-{memory['stage']}, activation checkpointing "
        f"{switch[memory['activation_checkpointing']]}, micro-batch {memory['micro_batch']})"
    ]
    notes = {"offloaded": "  in the host's memory, not on the device"}
    lines += [
        f"  {name:18}{_gib(size):>10}{notes.get(name, '')}"
        for name, size in memory["parts_bytes"].items()
        if size and verbose
    ]
    lines.append(
        f"  {'peak':18}{_gib(memory['peak_bytes']):>10}  "
        f"{'fits' if memory['fits'] else 'DOES NOT FIT'}: {_gib(memory['usable_bytes'])} usable of "
        f"{plan['device']['memory_gib']:.1f}"
    )
    if not verbose:
        return lines
    lines += [
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
    micro = time["micro_batch"]
    beside = "side by side" if micro["overlapped"] else "the links after the others"
    rough = ""
    if plan["device"]["name"] == "cpu":
        beside, rough = (
            "one after the other",
            "; of a CPU a rough estimate (a factor of 2), on idle cores",
        )
    lines = [
        f"Time, predicted, validation and checkpoints not included: {plan['mfu']:.0%} of the peak "
        f"while a rank computes, {time['reached_mfu']:.0%} MFU in all{rough}",
        f"  a micro-batch: {1e3 * micro['compute_s']:,.3g} ms of arithmetic, "
        f"{1e3 * micro['host_s']:,.3g} ms of Python, {1e3 * micro['links_s']:,.3g} ms on the links "
        f"({beside}; {plan['network_gbit']:,.4g} Gbit/s to other nodes); "
        f"{1e3 * time['update_s']:,.3g} ms a step on top",
        f"  {time['cells_per_s']:,.4g} cells/s, {time['cells_per_s_per_rank']:,.4g} per rank, "
        f"{time['step_time_s']:,.4g} s per step",
        f"  epoch of {counted(plan['cells'], 'cell')}: {counted(time['steps_per_epoch'], 'step')}, "
        f"{time['epoch_hours']:,.4g} h, {time['gpu_hours_per_epoch']:,.4g} {hours}",
        f"  run.max_steps {time['run_steps']:,}: {time['run_epochs']:.3g} epochs, "
        f"{time['run_hours']:,.4g} h, {time['run_gpu_hours']:,.4g} {hours}; the learning rate of "
        f"the last step is {time['last_learning_rate_share']:.0%} of optim.lr",
        *([f"  WARNING: {warning}"] if warning else []),
        *_products_lines(plan),
        f"  the loader of every rank must read and decode "
        f"{time['decoded_cells_per_s_per_rank']:,.4g} cells/s",
        "",
        f"Checkpoint {_gib(saved['bytes'])} GiB every "
        f"{counted(saved['every_n_steps'], 'step')}; disk for "
        f"those kept and the next {_gib(saved['disk_bytes'])} GiB, to continue with other ranks "
        f"{_gib(saved['conversion_bytes'])} GiB more; exported model "
        f"{_gib(saved['exported_bytes'])} GiB",
    ]
    if saved["host_copy_bytes"]:
        copied = _gib(saved["host_copy_bytes"])
        lines.append(f"  checkpoint.asynchronous: a copy of {copied} GiB in a rank's host memory")
    return lines


def _products_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return what products in fewer bits would save, as far as the device has them."""
    products = plan["linear_products"]
    gains = [f"{what} {ratio:.2f}" for what, ratio in products["times_as_fast"].items()]
    if not gains:
        return []
    beside = "not timed on a GPU"
    if plan["device"]["name"] == "cpu":
        emulated = any("fp8" in what for what in products["times_as_fast"])
        beside = "8 bits are emulated here" if emulated else "estimated"
    now = "counted above" if products["configured"] != "precision" else "not counted above"
    return [
        "  products in fewer bits than engine.precision, times as fast as without, predicted "
        f"({beside}; {now}; they change what is trained a little): {', '.join(gains)}"
    ]


def _gib(size: float) -> str:
    value = size / GIB
    return f"{value:,.2f}" if value >= 1 else f"{value:.4f}"
