"""Disturb a command at one system call after the other and judge what it leaves."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.damage import fresh_copy
from benchmarks.failing_calls import CHANGING, ERRORS, KINDS, Calls, Ended, in_child
from benchmarks.fault_commands import Command
from benchmarks.fault_products import contents

KILL = "kill"
"""Instead of a kind of calls: the process is killed at any call that changes the disk."""
FAULTS = (*KINDS, KILL)
STATES = ("new", "old", "part", "failed", "killed", "third")
"""new, old; part: some units are new, the others old; failed: a dataset whose ledger entry says so
and why, which is what convert makes of one that it cannot stage; killed: no corpus until the
command is run again, after a kill only; third: none of these."""
HANG_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbed:
    """A command whose n-th call failed."""

    command: str
    """Its name."""
    fault: str
    """Kind of the calls, or kill."""
    calls: int
    """Calls of that kind in an undisturbed run."""
    at: int
    """Number of the call that failed."""
    path: str
    """What that call was for, inside the command's folder."""
    state: str
    """One of `STATES`."""
    wrong: str
    """What is not as it must be; empty if all is."""


def disturb(
    command: Command, products: Path, work: Path, *, faults: Sequence[str], every: int,
    seconds: float, limit: int | None, rng: random.Random,
) -> list[Disturbed]:  # fmt: skip
    """Disturb a command at every call, or at a sample of them.

    Args:
        command: The command.
        products: Folder of the products that it needs.
        work: A folder for its places.
        faults: Which calls, of `FAULTS`.
        every: Every so many calls.
        seconds: Time for it; what does not fit is left out.
        limit: Most calls; None for no limit.
        rng: Chooses where to begin, and what is left out.
    """
    place, log = work / "place", work / "log"
    shutil.rmtree(work, ignore_errors=True)
    place.mkdir(parents=True)
    calls = Calls(place)
    command.build(products, place)
    before = fresh_copy(place, work / "before")
    trees = [contents(place)]
    for _ in range(2):
        fresh_copy(before, place)
        ended = _run(command, place, calls, KINDS, 0, log)
        if ended.result != 0:
            raise RuntimeError(f"{command.name} fails undisturbed: {ended.describe()}\n"
                               f"{ended.trace}{ended.output[-3000:]}")  # fmt: skip
        trees.append(contents(place))
    if different := unlike(trees[1], trees[2]):
        raise RuntimeError(f"{command.name}: two undisturbed runs differ in {sorted(different)}")
    old, new, seen = command.units(before), command.units(place), calls.seen
    seen[KILL] = sum(seen[kind] for kind in CHANGING)
    counts = {fault: seen[fault] for fault in faults}
    found, end = [], time.monotonic() + seconds
    for fault, at in itertools.islice(_in_turn(counts, every, rng), limit):
        if time.monotonic() > end:
            break
        fresh_copy(before, place)
        kinds = CHANGING if fault == KILL else (fault,)
        ended = _run(command, place, calls, kinds, at, log, error=ERRORS.get(fault, 0))
        path = calls.path.removeprefix(f"{place}/")
        if not path:
            # Fewer calls than in the undisturbed run: threads and time play a part.
            continue
        state = _state(command, old, new, command.units(place))
        wrong = [_ending(command, ended, fault, state, place)]
        tree = contents(place)
        if unlike(tree, trees[0]) and unlike(tree, trees[1]):
            wrong.append(_again(command, place, log, trees[1], calls, state))
        found.append(
            Disturbed(command=command.name, fault=fault, calls=counts[fault], at=at, path=path,
                      state=state, wrong="; ".join(filter(None, wrong)))
        )  # fmt: skip
        print(*asdict(found[-1]).values(), flush=True)
    return found


def _in_turn(counts: dict[str, int], every: int, rng: random.Random) -> Iterable[tuple[str, int]]:
    """Yield which call of which kind fails, the kinds in turn."""
    chosen = {}
    for fault, count in counts.items():
        chosen[fault] = list(range(rng.randint(1, every), count + 1, every))
        rng.shuffle(chosen[fault])
    while any(chosen.values()):
        for fault, numbers in chosen.items():
            if numbers:
                yield fault, numbers.pop()


def _run(
    command: Command, place: Path, calls: Calls, kinds: Sequence[str], at: int, log: Path,
    *, error: int = 0,
) -> Ended:  # fmt: skip
    """Run a command while one call of some kinds fails, or none."""

    def work() -> int:
        calls.arm(kinds, at, error=error)
        return command.run(place)

    ended = in_child(work, log=log, timeout_s=HANG_S)
    calls.disarm()
    return ended


def _state(
    command: Command, old: dict[str, Any], new: dict[str, Any], found: dict[str, Any]
) -> str:
    """Return which state the units are in, the worst where they differ."""
    states = set()
    for name in old.keys() | new.keys() | found.keys():
        content = found.get(name)
        if content not in (old.get(name), new.get(name)):
            states.add(command.between(content))
        elif old.get(name) != new.get(name):
            states.add("new" if content == new.get(name) else "old")
    if {"old", "new"} <= states:
        states.add("part")
    return next(state for state in reversed(STATES) if state in states)


def _ending(command: Command, ended: Ended, fault: str, state: str, place: Path) -> str:
    """Return what is wrong with the state and the way a command ended, or nothing."""
    if state == "third":
        return f"leaves a third state ({ended.describe()})"
    if ended.hung:
        return "hangs"
    if fault == KILL:
        return ""
    if state == "killed":
        return f"a failed call leaves no corpus ({ended.describe()})"
    if ended.signal or ended.error is not None:
        return f"ends by {ended.describe()}"
    if "Traceback" in ended.output:
        return f"prints a traceback: {ended.output.strip().splitlines()[-1]}"
    lines = ended.output.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.result == 0 and state != "new":
        # What is beside the product, or staged of a source that cannot be read, may stay behind
        # where a line says so.
        said = any(
            str(place) in line and (state == "part" or "kept as staged" in line) for line in lines
        )
        return "" if said else f"exit status 0 with the {state} state"
    if ended.result == 0:
        return ""
    if len(errors) != 1:
        return f"{len(errors)} lines of error"
    return "" if str(place) in errors[0] else f"names no file: {errors[0]}"


def _again(
    command: Command, place: Path, log: Path, tree: dict[str, Any], calls: Calls, state: str
) -> str:
    """Run the command again, undisturbed; return how the result differs from a new one's."""
    ended = in_child(lambda: command.run(place), log=log, timeout_s=HANG_S)
    if ended.result != 0 and state != "new":
        return f"fails when run again: {ended.output.strip().splitlines()[-1:]}"
    different = unlike(contents(place), tree)
    return f"other files when run again: {sorted(different)[:4]}" if different else ""


def unlike(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Return the names of the files that two trees do not share; those of the moment left out."""
    names = one.keys() | other.keys()
    return {n for n in names if one.get(n) != other.get(n) and not _of_the_moment(n)}


def _of_the_moment(name: str) -> bool:
    """Return whether a file is a lock, or what was remembered of the times of sources.

    The latter is written where a source has not just changed: how soon after its copy a command
    came to it decides.
    """
    return ".locks/" in name or ".seen/" in name or name.endswith(".lock")
