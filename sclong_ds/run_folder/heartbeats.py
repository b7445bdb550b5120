"""Heartbeats of the ranks: written while they train, read to name the rank that others wait for."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from sclong_ds.files.sealed_json import CHECKSUM, checksum_of, read_object, read_sealed

log = logging.getLogger(__name__)

ENDED = "ended"
"""Phase of a rank whose training loop is over, in whichever way."""

STARTING = "start: "
"""What the phases of a rank begin with that does not train yet."""

SLOW_FILE, HANG_FILE = "slow.json", "hang.json"

_NAMED_RANKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a rank last wrote about itself."""

    rank: int
    """The rank."""
    node: str
    """Its node."""
    pid: int
    """Its process."""
    step: int
    """Optimizer step it is in."""
    phase: str
    """What it does in this step."""
    phase_s: float
    """Seconds since that began, by its own clock."""
    beats: int
    """Beats so far; the same on all ranks at the same place of the program."""
    reading: str | None
    """File it is reading, if it reported one."""
    written: int
    """How often the file was written: it changes as long as the process runs."""
    interval_s: float
    """Seconds from one writing to the next."""

    @property
    def place(self) -> str:
        """Where in the program the rank is, in words."""
        return f"'{self.phase}' of step {self.step}"


def write_heartbeat(path: Path, content: Mapping[str, object], *, rank: int) -> None:
    """Write a file of the heartbeat folder whole, but not to the disk, where nobody needs it.

    Args:
        path: Its place.
        content: What a JSON object holds.
        rank: The rank that writes it, and no other process of that rank at the same time.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.{rank}")
    whole = dict(content) | {CHECKSUM: checksum_of(content)}
    partial.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_heartbeats(folder: Path) -> dict[int, Heartbeat]:
    """Return the heartbeats of a run by rank; damaged files are left out, which is logged.

    Args:
        folder: The run's `heartbeat` folder.
    """
    found = {}
    for path in sorted(folder.glob("rank_*.json")):
        content, kinds = read_json(path), get_type_hints(Heartbeat)
        if content.keys() == kinds.keys() and all(
            isinstance(value, float | int if kinds[name] is float else kinds[name])
            for name, value in content.items()
        ):
            found[content["rank"]] = Heartbeat(**content)
        else:
            log.warning("%s: damaged; what this rank does is not known", path)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return a file of the heartbeat folder; an absent or unfinished one is an empty dict.

    So is a damaged one, which is logged. Earlier versions wrote no checksum.
    """
    try:
        # A rank claims what it is going to write with an empty file.
        if not path.stat().st_size:
            return {}
        content = read_object(path)
        if CHECKSUM in content:
            content = read_sealed(path)
            del content[CHECKSUM]
    except OSError:
        return {}
    except ValueError as error:
        log.warning("%s; ignored", error)
        return {}
    return content


def who_is_behind(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], *, world_size: int
) -> str:
    """Say in words which ranks hold up the others.

    A rank that has written nothing between the two looks is gone or frozen and is named first;
    else those with the fewest steps and beats.

    Args:
        before: Heartbeats by rank at a first look.
        after: Heartbeats at a second look, after every living rank has written again.
        world_size: Number of ranks.
    """
    alive = [after[r] for r in sorted(after) if r < world_size and after[r] != before.get(r)]
    silent = [after[r] for r in sorted(after) if r < world_size and after[r] == before.get(r)]
    absent = [str(r) for r in range(world_size) if r not in after]
    named: list[str] = []
    if absent:
        more = ", ..." if len(absent) > _NAMED_RANKS else ""
        noun = "rank" if len(absent) == 1 else f"{len(absent)} ranks"
        named.append(f"{noun} {', '.join(absent[:_NAMED_RANKS])}{more}: no heartbeat at all")
    named += [_sentence(part, alive=False) for part in _by_place(silent)]
    if not named and alive:
        last = min((h.step, h.beats) for h in alive)
        behind = [h for h in alive if (h.step, h.beats) == last]
        named = [_sentence(part, alive=True) for part in _by_place(behind)]
        if len(behind) == world_size > 1:
            named.append("all ranks are at the same place: a collective or a device hangs")
        alive = [h for h in alive if (h.step, h.beats) != last]
    waiting = Counter(h.place for h in alive).most_common(1)
    if waiting:
        named.append(f"{len(alive)} of {world_size} ranks wait, most in {waiting[0][0]}")
    return "; ".join(named)


def _by_place(group: Sequence[Heartbeat]) -> list[list[Heartbeat]]:
    """Return the ranks that are at the same place, together."""
    parts: dict[tuple[str, str | None], list[Heartbeat]] = {}
    for heartbeat in group:
        parts.setdefault((heartbeat.place, heartbeat.reading), []).append(heartbeat)
    return list(parts.values())


def _sentence(group: Sequence[Heartbeat], *, alive: bool) -> str:
    """Say what ranks at the same place do, and for how long the longest of them has."""
    first, nodes = group[0], sorted({h.node for h in group})
    if len(group) == 1:
        who = f"rank {first.rank} (node {first.node})"
    else:
        more = ", ..." if len(group) > _NAMED_RANKS else ""
        ranks = ", ".join(str(h.rank) for h in group[:_NAMED_RANKS])
        where = ", ".join(nodes[:_NAMED_RANKS]) + (", ..." if len(nodes) > _NAMED_RANKS else "")
        who = f"each of {len(group)} ranks {ranks}{more} (nodes {where})"
    if first.phase == ENDED:
        return f"{who} has ended, in step {first.step}"
    reading = f", reading {first.reading}," if first.reading else ""
    if not alive:
        return f"{who} is gone or frozen, last heard of in {first.place}{reading.rstrip(',')}"
    return f"{who} has been in {first.place}{reading} for {max(h.phase_s for h in group):.0f} s"
