"""`status`: how a run is doing, at a glance, from its files alone.

    python -m sclong_ds status RUN_DIR [--json]

Reads `run.json`, `config.yaml`, `metrics.jsonl`, `events.jsonl`, `checkpoints/`, `heartbeat/` and,
of a Slurm job, `restarts.json`, `preflight.json` and `failure.json` of a run folder, of a run that
trains or of one that is over, from any machine that sees the folder.
Writes nothing. Needs neither torch nor a GPU. Exit status: 0, or 1 when the folder is no run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sclong_ds.command_line import local_path
from sclong_ds.config.strict_yaml import read_yaml
from sclong_ds.job.failures import read_failure
from sclong_ds.job.restarts import Start, read_starts, read_verdict
from sclong_ds.page.words import counted
from sclong_ds.run_folder.files import METRICS_FILE, RUN_FILE, read_events, read_run_json
from sclong_ds.run_folder.heartbeats import (
    ENDED,
    HANG_FILE,
    SLOW_FILE,
    STARTING,
    read_heartbeats,
    read_json,
)
from sclong_ds.run_folder.metric_names import (
    HEADLINE,
    LOSS,
    MSE,
    N_CELLS,
    SKIPPED_METRIC,
    SPIKE_METRIC,
)
from sclong_ds.run_folder.rows import read_metrics, sentence, unlisted
from sclong_ds.run_folder.seal import say_changes

log = logging.getLogger(__name__)

State = Literal["starting", "running", "finished", "interrupted", "failed", "hung", "lost"]
"""starting: its ranks do not train yet. lost: on record as running, but no rank has written for a
while: killed without notice."""

Rows = Sequence[Mapping[str, float]]

_STATES: dict[str, State] = {"FINISHED": "finished", "KILLED": "interrupted", "FAILED": "failed"}
# Steps that the figures are means of: enough to even out batches, few enough to be of now.
_RECENT_STEPS, _LOSS_STEPS = 100, 10
# File systems shared over a network show another machine's writing up to a minute late.
_LEAST_SILENCE_S = 60.0
_SHOWN_NODES, _SHOWN_RANKS = 16, 8


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank by its heartbeat."""

    rank: int
    """The rank."""
    node: str
    """Its node."""
    state: Literal["alive", "silent", "ended"]
    """silent: it should have written by now."""
    step: int
    """Step it is in."""
    phase: str
    """What it does there."""
    phase_s: float
    """Seconds it had been doing that when it wrote."""
    waits_for: str | None
    """File that it reads, or what its start waits for."""
    age_s: float
    """Seconds since it wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What the files of a run record about it; None for what they do not."""

    run_dir: str
    """Run folder."""
    run_id: str | None
    """Id of run.json."""
    state: State
    """How the run is."""
    step: int
    """Optimizer steps done."""
    max_steps: int | None
    """Optimizer steps to do."""
    loss: float | None
    """Mean training loss of the last steps: `loss_steps`, 10 at most."""
    loss_steps: int
    """Steps of which it is the mean: of this start, and finite."""
    cells_per_s: float | None
    """Cells a second over the last 100 steps, pauses for validation and checkpoints included."""
    step_time_s: float | None
    """Seconds per step, over the same steps."""
    eta_s: float | None
    """Seconds left at this rate."""
    last_row_age_s: float | None
    """Seconds since metrics.jsonl grew."""
    checkpoint: str | None
    """Newest checkpoint that is still there."""
    checkpoint_age_s: float | None
    """Seconds since it was saved."""
    restarts: int
    """How often the run was resumed."""
    job: str | None
    """Slurm job, or chain of jobs, of the last start."""
    starts: int
    """Starts of that job so far."""
    nodes: str | None
    """Slurm's list of its nodes at the last one."""
    skipped_steps: int
    """Steps that were not applied because they were not finite."""
    spikes: int
    """Steps whose loss was a spike."""
    validation_step: int | None
    """Step of the last validation."""
    validation: dict[str, float]
    """Its figures."""
    validation_words: str | None
    """The same as a sentence."""
    world_size: int | None
    """Ranks of the run."""
    ranks: tuple[RankStatus, ...]
    """Ranks that have a heartbeat."""
    warning: str | None
    """Who holds up the others, while they wait."""
    error: str | None
    """Why the last start ended, as reported by the watchdog, the training or the preflight."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds status`."""
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR", help="run folder (run.dir)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the status and return the exit status."""
    status = read_status(args.run_dir)
    text = json.dumps(asdict(status), indent=2, allow_nan=False) if args.json else describe(status)
    sys.stdout.write(f"{text}\n")
    return 0


def read_status(run_dir: Path) -> RunStatus:
    """Read the status of a run.

    Args:
        run_dir: Run folder.

    Raises:
        FileNotFoundError: The folder is no run.
        ValueError: A file of the run is damaged.
    """
    starts = read_starts(run_dir)
    now = time.time()
    ranks = _ranks(run_dir / "heartbeat", now)
    if not (run_dir / RUN_FILE).is_file() and not _starting(ranks):
        why = _no_run_yet(run_dir, starts, ranks)
        raise FileNotFoundError(f"{run_dir}: no {RUN_FILE} in it, {why}")
    say_changes(run_dir)
    record, events = read_run_json(run_dir), read_events(run_dir)
    rows = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    openings = [e for e in events if e.get("event") in ("start", "resume")]
    opening: dict[str, Any] = openings[-1] if openings else {"time": 0.0, "step": 0}
    # A resumed run repeats steps: earlier starts' rows do not tell where it is now.
    steps = [r for r in rows if LOSS in r and r["time"] >= opening["time"]]
    step = int((steps[-1] if steps else opening)["step"])
    passed = [r for r in rows if r["step"] <= step]
    validation = next((r for r in reversed(passed) if MSE in r), None)
    _say_missing(run_dir / "heartbeat", ranks, opening.get("world_size"))
    hang = read_json(run_dir / "heartbeat" / HANG_FILE).get("error")
    state, max_steps = _state(record, ranks, hang), _max_steps(run_dir)
    last = starts[-1] if starts else None
    cells_per_s, step_time_s = _speed(steps)
    left = None if state != "running" or max_steps is None else max_steps - step
    saved = _last_checkpoint(run_dir, events)
    return RunStatus(
        run_dir=str(run_dir),
        run_id=record.get("run_id"),
        state=state,
        step=step,
        max_steps=max_steps,
        **_recent_loss(steps),
        cells_per_s=cells_per_s,
        step_time_s=step_time_s,
        eta_s=None if left is None or step_time_s is None else left * step_time_s,
        last_row_age_s=now - rows[-1]["time"] if rows else None,
        checkpoint=saved["path"] if saved else None,
        checkpoint_age_s=now - saved["time"] if saved else None,
        restarts=int(record.get("restarts", 0)),
        job=last.job if last else None,
        starts=sum(start.job == last.job for start in starts) if last else 0,
        nodes=last.nodes if last else None,
        skipped_steps=int(steps[-1].get(SKIPPED_METRIC, 0)) if steps else 0,
        spikes=sum(int(r.get(SPIKE_METRIC, 0)) for r in passed),
        validation_step=int(validation["step"]) if validation else None,
        validation=_validation_figures(validation or {}),
        validation_words=sentence(validation) if validation else None,
        world_size=opening.get("world_size"),
        ranks=ranks,
        warning=read_json(run_dir / "heartbeat" / SLOW_FILE).get("text"),
        error=hang or (_ended_by(run_dir, last) if state not in ("running", "finished") else None),
    )


def _no_run_yet(run_dir: Path, starts: list[Start], ranks: Sequence[RankStatus]) -> str:
    """Say why a folder is no run, or not yet one."""
    if ranks:
        newest = min(ranks, key=lambda rank: rank.age_s)
        return (
            f"so no training has begun: rank {newest.rank} on {newest.node} was last heard of "
            f"{_duration(newest.age_s)} ago, waiting for {newest.waits_for} "
            f"({newest.phase.removeprefix(STARTING)}); it was killed or hangs with its node"
        )
    if not starts:
        return "so this is no run; give the folder that training writes to (run.dir)"
    last = starts[-1]
    why = _ended_by(run_dir, last) or "see the log of the job"
    return f"so the training of job {last.job} ({last.nodes}) has not begun: {why}"


def _ended_by(run_dir: Path, start: Start | None) -> str | None:
    """Return what a Slurm job's training or preflight reported as the error of a start."""
    if start is None:
        return None
    verdict = read_verdict(run_dir, start=start.id) or {"problems": []}
    found = [f"preflight: {', '.join(p['nodes'])}: {p['text']}" for p in verdict["problems"]]
    return read_failure(run_dir, start=start.id) or "; ".join(found) or None


def describe(status: RunStatus) -> str:
    """Return the status as a few lines of text."""
    of = "" if status.max_steps is None else f" of {status.max_steps:,}"
    share = f" ({status.step / status.max_steps:.1%})" if status.max_steps else ""
    lines = [f"{status.run_dir}: {status.state}, step {status.step:,}{of}{share}"]
    starting = _starting(status.ranks)
    if starting:
        first = starting[0]
        since = _duration(first.phase_s + first.age_s)
        where = f"rank {first.rank} on {first.node}, {first.phase.removeprefix(STARTING)}"
        lines.append(_line("starting", f"waits for {first.waits_for} since {since} ({where})"))
    if status.error:
        lines.append(_line("error", status.error))
    elif status.warning:
        lines.append(_line("warning", status.warning))
    if status.loss is not None:
        of_steps = counted(status.loss_steps, "step")
        lines.append(_line("loss", f"{status.loss:.4f}, mean of the last {of_steps}"))
    if status.cells_per_s is not None and status.step_time_s is not None:
        speed = f"{status.cells_per_s:,.1f} cells/s, {status.step_time_s:.2f} s a step"
        left = "" if status.eta_s is None else f", {_duration(status.eta_s)} left"
        lines.append(_line("speed", speed + left))
    if status.last_row_age_s is not None:
        lines.append(_line("last figures", f"{_duration(status.last_row_age_s)} ago"))
    saved = "none yet"
    if status.checkpoint is not None and status.checkpoint_age_s is not None:
        saved = f"{status.checkpoint}, {_duration(status.checkpoint_age_s)} ago"
    lines.append(_line("checkpoint", saved))
    if status.validation_words:
        lines.append(
            _line("validation", f"step {status.validation_step:,}: {status.validation_words}")
        )
    if status.job is not None:
        lines.append(_line("job", f"{status.job}, start {status.starts}, on {status.nodes}"))
    trouble = {
        "restart": status.restarts, "skipped step": status.skipped_steps,
        "loss spike": status.spikes,
    }  # fmt: skip
    lines.append(_line("trouble", ", ".join(counted(n, one) for one, n in trouble.items())))
    return "\n".join(lines + _describe_ranks(status))


def _describe_ranks(status: RunStatus) -> list[str]:
    """Return a line on all ranks and, while it trains or hangs, one per node."""
    if not status.ranks:
        return [_line("ranks", "no heartbeat")]
    nodes: dict[str, list[RankStatus]] = {}
    for rank in status.ranks:
        nodes.setdefault(rank.node, []).append(rank)
    alive = sum(rank.state == "alive" for rank in status.ranks)
    total = status.world_size or len(status.ranks)
    where = f"on {counted(len(nodes), 'node')}"
    lines = [_line("ranks", f"{alive} of {total} alive, {where}")]
    if all(rank.state == "ended" for rank in status.ranks):
        return [_line("ranks", f"{len(status.ranks)} of {total} ended, {where}")]
    # Nodes in trouble first: of a thousand, only some are shown.
    by_trouble = sorted(nodes, key=lambda n: (all(r.state == "alive" for r in nodes[n]), n))
    lines += [_line("", f"{n}: {_describe_node(nodes[n])}") for n in by_trouble[:_SHOWN_NODES]]
    if len(nodes) > _SHOWN_NODES:
        lines.append(_line("", f"and {counted(len(nodes) - _SHOWN_NODES, 'more node')}"))
    return lines


def _describe_node(ranks: list[RankStatus]) -> str:
    alive = [rank for rank in ranks if rank.state == "alive"]
    text = f"{len(alive)} of {counted(len(ranks), 'rank')} alive"
    if alive:
        last = min(alive, key=lambda r: (r.step, -r.phase_s))
        text += f"; rank {last.rank} in '{last.phase}' of step {last.step}"
        text += f", reading {last.waits_for}," if last.waits_for else ""
        text += f" for {last.phase_s + last.age_s:.0f} s"
    for state in ("silent", "ended"):
        gone = [rank for rank in ranks if rank.state == state]
        if gone:
            named = ", ".join(str(rank.rank) for rank in gone[:_SHOWN_RANKS])
            more = ", ..." if len(gone) > _SHOWN_RANKS else ""
            age = _duration(min(rank.age_s for rank in gone))
            text += f"; {state} for {age}: {named}{more} ('{gone[0].phase}' of step {gone[0].step})"
    return text


def _say_missing(folder: Path, ranks: tuple[RankStatus, ...], world_size: object) -> None:
    """Log which ranks of a run that has heartbeats have none."""
    known = {rank.rank for rank in ranks}
    for rank in range(world_size if known and isinstance(world_size, int) else 0):
        path = folder / f"rank_{rank:05d}.json"
        if rank not in known and not path.exists():
            log.warning("%s: missing; what this rank does is not known", path)


def _ranks(folder: Path, now: float) -> tuple[RankStatus, ...]:
    found = []
    for rank, heartbeat in sorted(read_heartbeats(folder).items()):
        try:
            # The time is the file server's: the nodes' clocks are not asked.
            age_s = max(0.0, now - (folder / f"rank_{rank:05d}.json").stat().st_mtime)
        except FileNotFoundError:
            continue
        silent = age_s > max(_LEAST_SILENCE_S, 3 * heartbeat.interval_s)
        state: Literal["alive", "silent", "ended"] = "silent" if silent else "alive"
        found.append(
            RankStatus(
                rank=rank,
                node=heartbeat.node,
                state="ended" if heartbeat.phase == ENDED else state,
                step=heartbeat.step,
                phase=heartbeat.phase,
                phase_s=heartbeat.phase_s,
                waits_for=heartbeat.reading,
                age_s=age_s,
            )
        )
    return tuple(found)


def _state(record: dict[str, Any], ranks: tuple[RankStatus, ...], error: str | None) -> State:
    if _starting(ranks):
        return "starting"
    if error:
        return "hung"
    state = _STATES.get(str(record.get("status")), "running")
    if state == "running" and ranks and all(rank.state == "silent" for rank in ranks):
        return "lost"
    return state


def _starting(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """Return the ranks that live and do not train yet, the one that has waited longest first."""
    found = [r for r in ranks if r.state == "alive" and r.phase.startswith(STARTING)]
    return sorted(found, key=lambda r: -r.phase_s)


def _speed(steps: Rows) -> tuple[float | None, float | None]:
    """Return cells per second and seconds per step, by the time stamps of the last rows."""
    recent = steps[-_RECENT_STEPS - 1 :]
    if not recent:
        return None, None
    first, last = recent[0], recent[-1]
    seconds, n_steps = last["time"] - first["time"], last["step"] - first["step"]
    if n_steps > 0 and seconds > 0:
        return (last["cells_seen"] - first["cells_seen"]) / seconds, seconds / n_steps
    return last.get("perf/cells_per_s"), last.get("perf/step_time_s")


def _recent_loss(steps: Rows) -> dict[str, Any]:
    """Return the mean loss of the last steps, and of how many: of those that are finite."""
    losses = [r[LOSS] for r in steps[-_LOSS_STEPS:] if math.isfinite(r[LOSS])]
    return {"loss": sum(losses) / len(losses) if losses else None, "loss_steps": len(losses)}


def _last_checkpoint(run_dir: Path, events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the event of the newest checkpoint that was not pruned since."""
    folder = run_dir / "checkpoints"
    saved = (e for e in reversed(events) if e["event"] == "checkpoint" and "path" in e)
    return next((e for e in saved if (folder / e["path"]).is_dir()), None)


def _max_steps(run_dir: Path) -> int | None:
    path = run_dir / "config.yaml"
    try:
        section = read_yaml(path).get("run") if path.is_file() else None
    except ValueError as error:
        log.warning("%s; the length of the run is unknown", error)
        return None
    value = section.get("max_steps") if isinstance(section, dict) else None
    return value if isinstance(value, int) else None


def _validation_figures(row: Mapping[str, float]) -> dict[str, float]:
    names = (*HEADLINE, N_CELLS, *unlisted(row))
    found = {name.removeprefix("val/"): row.get(name, math.nan) for name in names}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _line(name: str, text: str) -> str:
    return f"  {name:<13}{text}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
