"""The sentences that a plan begins with: whether it fits, how long it takes, what is faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sclong_ds.page.words import counted
from sclong_ds.planning.devices import GIB

IDLE = 0.5
"""Share of the usable memory above which it is said to stay unused."""


def verdict_of(plan: Mapping[str, Any]) -> str:
    """Return the verdict of a plan, as one sentence.

    Args:
        plan: What `make_plan` returns.
    """
    memory, time, ranks = plan["memory"], plan["time"], plan["world_size"]
    on_cpu = plan["device"]["name"] == "cpu"
    place = f"{ranks:,} {'CPU process' if on_cpu else plan['device']['name'] + ' GPU'}"
    place += ("es" if on_cpu else "s") * (ranks != 1)
    peak, usable = memory["peak_bytes"] / GIB, memory["usable_bytes"] / GIB
    if not memory["fits"]:
        return (
            f"It DOES NOT FIT on {place}: {peak:,.1f} GiB a rank with a micro-batch of "
            f"{memory['micro_batch']}, {usable:,.1f} GiB usable."
        )
    bound = time["micro_batch"]["bound_by"]
    if plan.get("loading", {}).get("too_slow"):
        bound = f"{bound} if cells came fast enough: reading them is TOO SLOW (see below)"
    return (
        f"It fits on {place} ({peak:,.1f} of {usable:,.1f} GiB usable) and takes "
        f"{span(time['run_hours'])} for {counted(time['run_steps'], 'step')}, "
        f"{time['run_epochs']:,.3g} epochs of {counted(plan['cells'], 'cell')}, bound by {bound}."
    )


def advice_of(plan: Mapping[str, Any]) -> str | None:
    """Return the setting to take instead of the configured one; None where that is as good.

    Args:
        plan: What `make_plan` returns.
    """
    memory, time, fastest = plan["memory"], plan["time"], plan["fastest"]
    if fastest is None and plan["device"]["name"] == "cpu":
        return (
            "No shipped setting fits here: the ranks of a node share its memory, so use fewer of "
            "them on a node, or nodes with more memory."
        )
    if fastest is None:
        return "No shipped setting fits here: use more ranks, or devices with more memory."
    if not fastest["overrides"]:
        return None
    usable, idle = memory["usable_bytes"], 1 - memory["peak_bytes"] / memory["usable_bytes"]
    begins, times = "", ""
    if memory["fits"]:
        begins = f"{idle:.0%} of the memory stays unused. " if idle > IDLE else ""
        times = f", {time['run_hours'] / fastest['run_hours']:.2f} times as fast"
    return (
        f"{begins}The fastest setting that fits{times} ({span(fastest['run_hours'])}, "
        f"{fastest['peak_bytes'] / GIB:,.1f} of {usable / GIB:,.1f} GiB, bound by "
        f"{fastest['bound_by']}): add {' '.join(fastest['overrides'])}"
    )


def span(hours: float) -> str:
    """Return hours in the unit that people use for so many.

    Args:
        hours: A duration.
    """
    for size, unit in ((24.0, "day"), (1.0, "hour"), (1 / 60, "minute")):
        if hours >= 2 * size:
            return f"{hours / size:,.0f} {unit}s"
    return "about a minute" if hours > 0.5 / 60 else "less than a minute"
