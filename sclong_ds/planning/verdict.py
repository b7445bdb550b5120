"""The one sentence that a plan begins with: whether it fits, how long it takes, what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sclong_ds.planning.devices import GIB


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
        most = memory["largest_dividing_micro_batch"]
        cure = (
            f"a micro-batch of {most} fits"
            if most
            else "no micro-batch fits: see the table for ZeRO stages and offloading that do"
        )
        return (
            f"It DOES NOT FIT on {place}: {peak:,.1f} GiB a rank with a micro-batch of "
            f"{memory['micro_batch']}, {usable:,.1f} GiB usable; {cure}."
        )
    return (
        f"It fits on {place} ({peak:,.1f} of {usable:,.1f} GiB usable) and takes "
        f"{span(time['run_hours'])} for {time['run_steps']:,} steps, "
        f"{time['run_epochs']:,.3g} epochs of {plan['cells']:,} cells, at {plan['mfu']:.0%} of the "
        f"peak."
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
