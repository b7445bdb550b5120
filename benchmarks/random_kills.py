"""Kill ranks of a training run at random moments, and compare it with a run that was left alone.

    python -m benchmarks.random_kills [--kills 10] [--ranks 2] [--steps 60] [--seed 0] [--work DIR]
        [--json OUT]

Makes a small corpus below DIR (the system's folder for temporary files unless told otherwise),
trains once without interruption, then again with SIGKILL to a random rank at a random moment: while
it starts, in the middle of a step, or while it saves. The same command is started again until the
run is done. Prints a table of the kills, and whether every step of every start has the loss and the
cells of the uninterrupted run, and the last checkpoint the same bytes, weights and optimizer
moments. Exit status 1: they differ.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.environment import environment, write_result
from sclong_ds.run_folder.rows import read_every_row, read_metrics
from tests.small_runs import (
    N_GENES,
    Start,
    end_ranks,
    last_step,
    make_corpus,
    openings,
    settings,
    start_ranks,
    train,
    wait_until,
)

COMPARED = ("train/loss", "train/grad_norm", "train/lr", "data/cells_crc32")
"""What a step must have in common with the same step of the uninterrupted run."""
Moment = Literal["starting", "training", "saving"]
MOMENTS: tuple[Moment, ...] = ("starting", "training", "saving")
START_S = 12.0
"""Longest wait before a kill during the start, seconds."""
AHEAD_STEPS = 14
"""A start is killed at most so many steps after it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One start of a run that was killed."""

    moment: Moment
    """What the run was doing."""
    rank: int
    """The rank that was killed."""
    after_s: float
    """Seconds after the start of the command."""
    resumed_from: int | None
    """Step that this start continued from; None: it was killed before that."""
    last_step: int
    """Last step in metrics.jsonl at the kill."""


def kill_at_random(
    command: Sequence[str], run_dir: Path, *, n_ranks: int, moment: Moment,
    rng: random.Random, log: Path, ahead_steps: int = AHEAD_STEPS, start: Start = start_ranks,
) -> Kill | None:  # fmt: skip
    """Start a run and kill one of its ranks at a moment; None: it was done before.

    Args:
        command: Arguments of Python.
        run_dir: Its run folder.
        n_ranks: Number of ranks.
        moment: What the run must be doing.
        rng: Decides when, and which rank.
        log: File for the output of the ranks.
        ahead_steps: "training" is at most as many steps after the start's first.
        start: Starts the ranks; tests have a quicker way.
    """
    victim, starts = rng.randrange(n_ranks), len(openings(run_dir))
    after_s, steps = rng.uniform(0, START_S), rng.randint(1, ahead_steps)
    within_step_s = rng.uniform(0, 0.3)
    started = time.monotonic()
    ranks = start(n_ranks, command, log=log)

    def opened() -> list[int]:
        return openings(run_dir)[starts:]

    def reached() -> bool:
        if moment == "starting":
            return time.monotonic() - started > after_s
        new = opened()
        if not new:
            return False
        if moment == "saving":
            partial = next((run_dir / "checkpoints").glob("step_*.partial"), None)
            return partial is not None and last_step(run_dir) > new[0]
        return last_step(run_dir) >= new[0] + steps

    try:
        if not wait_until(reached, while_all=ranks):
            if any(rank.wait() for rank in ranks):
                raise RuntimeError(f"the run failed by itself, see {log}")
            return None
        time.sleep(within_step_s if moment == "training" else within_step_s / 4)
        ranks[victim].kill()
        ranks[victim].wait()
        killed_s = time.monotonic() - started
    finally:
        end_ranks(ranks)
    new = opened()
    return Kill(
        moment=moment, rank=victim, after_s=round(killed_s, 1), last_step=last_step(run_dir),
        resumed_from=new[0] if new else None,
    )  # fmt: skip


def wrong_steps(run_dir: Path, straight: Path) -> list[str]:
    """Say in which steps a run differs from an uninterrupted one.

    Every row of every start counts, those too that were written again after a kill.

    Args:
        run_dir: The run that was killed.
        straight: The other run, of at least as many steps.
    """
    expected = {int(r["step"]): r for r in read_metrics(straight) if "train/loss" in r}
    rows = read_every_row(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    steps = [(int(r["step"]), r) for r in rows if "train/loss" in r]
    found = [
        f"step {step}: {name} is {row[name]!r}, not {expected[step][name]!r}"
        for step, row in steps
        for name in COMPARED
        if row[name] != expected[step][name]
    ]
    missing = set(range(1, last_step(run_dir) + 1)) - {step for step, _ in steps}
    return found + [f"no row of step {step}" for step in sorted(missing)]


def differences(run_dir: Path, straight: Path) -> list[str]:
    """Say in what a finished run differs from an uninterrupted one; nothing: in no bit.

    Args:
        run_dir: The run that was killed.
        straight: The other run, of as many steps.
    """
    ours, theirs = (_newest_tensors(folder) for folder in (run_dir, straight))
    names = [f"{n} differs" for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
    return wrong_steps(run_dir, straight) + names


def _newest_tensors(run_dir: Path) -> dict[str, Any]:
    """Return the manifest's size and CRC-32 of what the ranks wrote into the newest checkpoint."""
    newest = (run_dir / "checkpoints" / "latest").read_text().strip()
    manifest = json.loads((run_dir / "checkpoints" / newest / "manifest.json").read_text())
    return {f"{newest}/{name}": value for name, value in manifest.items() if name.endswith(".pt")}


def main() -> int:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="default 10")
    parser.add_argument("--ranks", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=60, help="default 60")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default 0")
    parser.add_argument("--work", type=Path, help="folder to make and keep (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    kills: list[Kill] = []
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        corpus, log = make_corpus(work / "corpus"), work / "ranks.log"
        commands = {
            name: ["-m", "sclong_ds.pretrain",
                   *settings(work / name, corpus, **{"run.max_steps": args.steps})]
            for name in ("straight", "killed")
        }  # fmt: skip
        train(commands["straight"], n_ranks=args.ranks, log=log)
        titles = "kill", "rank", "while", "after, s", "resumed from", "last step", "equal so far"
        print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
        for number in range(1, args.kills + 1):
            kill = kill_at_random(
                commands["killed"], work / "killed", n_ranks=args.ranks, log=log, rng=rng,
                moment=MOMENTS[number % len(MOMENTS)],
            )  # fmt: skip
            if kill is None:
                print(f"the run was done after {number - 1} kills")
                break
            kills.append(kill)
            start = "-" if kill.resumed_from is None else kill.resumed_from
            equal = "no" if wrong_steps(work / "killed", work / "straight") else "yes"
            print(
                f"| {number} | {kill.rank} | {kill.moment} | {kill.after_s} | {start} | "
                f"{kill.last_step} | {equal} |",
                flush=True,
            )
        train(commands["killed"], n_ranks=args.ranks, log=log)
        found = differences(work / "killed", work / "straight")
        rows = len(read_every_row(work / "killed"))
    print(f"seed {args.seed}, {args.ranks} ranks, {args.steps} steps, {rows} rows written")
    print(environment())
    if args.json:
        moments = Counter(kill.moment for kill in kills)
        result = {
            "steps": args.steps, "ranks": args.ranks, "genes": N_GENES, "kills": len(kills),
            **{moment: moments[moment] for moment in MOMENTS}, "rows": rows, "differences": found,
            "all_kills": [asdict(kill) for kill in kills],
        }  # fmt: skip
        write_result(args.json, "random_kills", result)
    print("\n".join(found) or "equal: every loss, gradient norm, cell, weight and optimizer moment")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
