"""Whether a Slurm job may start, or be started again: the guard against one that crashes for ever.

    python -m sclong_ds.job.restarts check --config FILE|PRESET [key=value ...]
    python -m sclong_ds.job.restarts nodes --most N --ranks-per-node N --config FILE|PRESET ...
    python -m sclong_ds.job.restarts begin --config FILE|PRESET [key=value ...]
    python -m sclong_ds.job.restarts seconds-to-save --config FILE|PRESET [key=value ...]
    python -m sclong_ds.job.restarts end --status STATUS --config FILE|PRESET [key=value ...]
    python -m sclong_ds.job.restarts bad-nodes --config FILE|PRESET [key=value ...]

slurm/pretrain.sh runs it with the training's own arguments, once for all ranks. `check` reads them,
before slurm/pipeline.sh submits a chain of jobs that ends with them; `nodes` prints on how many of
the job's nodes the training can run; `begin` records the start in
RUN_DIR/restarts.json; `seconds-to-save` prints how long before the time limit the run must be asked
to save; `end` tells what STATUS of a training means; `bad-nodes` prints the nodes that
this start's preflight named. Exit status: 0 continue (start, start again), 1 do not, with the
reason.

Progress is a newer checkpoint: what is trained after the last one is lost with a crash. What asks
for another start: 75 (saved after a signal); a hang that the watchdog ended; 71, a device, network
or file system that failed; a rank that was killed (137: SIGKILL, as by the kernel when memory runs
out); and 69, an error of srun itself, as when Slurm's controller does not answer, unless it refuses
the step (`--refused` gives the reason). A run that reported its own error would fail the same way
again, whatever its peers exit with; and a run whose ranks crashed before its first step ever is set
up wrongly.
All starts of one Slurm job, or of a chain submitted by resubmit.sh, count together.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sclong_ds.checkpoint.on_disk import complete_checkpoints, step_of
from sclong_ds.command_line import parse_arguments
from sclong_ds.config.arguments import add_training_arguments
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import EngineConfig
from sclong_ds.files.atomic import read_file, write_atomic
from sclong_ds.files.sealed_json import CHECKSUM, checksum_of, read_sound
from sclong_ds.job.exit_status import OWN_STATUS, PASSING_STATUS, SRUN_STATUS, STOP_STATUS
from sclong_ds.job.failures import FAILURE_FILE, read_failure, record, start_id
from sclong_ds.run_folder.files import METRICS_FILE, now, read_events
from sclong_ds.run_folder.rows import read_every_row
from sclong_ds.run_folder.seal import say_change, seal_again

RESTARTS_FILE = "restarts.json"
PREFLIGHT_FILE = "preflight.json"
_OWN_STATUSES = (OWN_STATUS, 2)
_KEPT_STARTS = 200
# Until every rank has the signal (10 s), has ended its micro-batch, and Slurm has seen the job end.
_BEYOND_SAVING_S = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a job."""

    job: str
    """Slurm's job id, the same in all starts of a job; of resubmitted jobs the chain's name."""
    id: str | None
    """Slurm's job id and restart count."""
    started: str
    """Time, UTC."""
    nodes: str
    """Slurm's list of its nodes."""
    step: int
    """Step of the newest checkpoint when it started."""


def begin(run_dir: Path, *, job: str, nodes: str, max_stalled: int) -> None:
    """Record a start.

    Args:
        run_dir: Run folder; made if absent.
        job: Slurm's job id, or the chain's name.
        nodes: Slurm's list of the job's nodes.
        max_stalled: Starts in a row of one job without a new checkpoint, after which it stops.

    Raises:
        ValueError: The job has started too often without getting on.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    refuse_stalled(run_dir, job=job, max_stalled=max_stalled)
    start = Start(job=job, id=start_id(), started=now(), nodes=nodes, step=newest_step(run_dir))
    starts = [*read_starts(run_dir), start][-_KEPT_STARTS:]
    rows = [asdict(start) for start in starts]
    text = json.dumps([row | {CHECKSUM: checksum_of(row)} for row in rows], indent=2)
    write_atomic(run_dir / RESTARTS_FILE, f"{text}\n".encode())
    seal_again(run_dir, RESTARTS_FILE, forget=[PREFLIGHT_FILE, FAILURE_FILE])


def refuse_stalled(run_dir: Path, *, job: str, max_stalled: int) -> None:
    """Refuse another start to a job whose last ones brought no new checkpoint; args as `begin`.

    Raises:
        ValueError: There were too many of them.
    """
    step = newest_step(run_dir)
    stalled = takewhile(
        lambda start: start.job == job and start.step == step, read_starts(run_dir)[::-1]
    )
    n_stalled = len(list(stalled))
    if n_stalled >= max_stalled:
        raise ValueError(
            f"job {job} made no new checkpoint in {n_stalled} starts in a row (it is still at step "
            f"{step}) and is not started again: see above what ended it, or lower "
            f"checkpoint.every_n_steps, then submit the same command again"
        )


def end(
    run_dir: Path, status: int, *, job: str, max_stalled: int, refused: str | None = None
) -> str:
    """Return why a training that has ended is to be started again.

    Args:
        run_dir: Run folder.
        status: Exit status of the training, the highest of its ranks.
        job: As for `begin`.
        max_stalled: As for `begin`.
        refused: What srun says of a step that it does not start; None: it started it, or may.

    Raises:
        ValueError: It is not to be, and why.
    """
    if status == SRUN_STATUS and refused:
        text = (
            f"Slurm refuses the job's step ({refused}), and would again: see the options of sbatch "
            f"and the SLURM_ and SRUN_ variables of the shell that submitted; nothing is lost, "
            f"submit the corrected command"
        )
        record(run_dir, text)
        _seal_failure(run_dir)
        raise ValueError(text)
    _seal_failure(run_dir)
    reason = "saved after a signal"
    if status != STOP_STATUS:
        reason = _reason(run_dir, status)
        if status != SRUN_STATUS and not _made_a_step(run_dir):
            raise ValueError(
                f"{reason} before the run's first step; it is not started again: see above and the "
                f"nodes' logs (137 is often too little memory), then submit the same command again"
            )
    refuse_stalled(run_dir, job=job, max_stalled=max_stalled)
    return reason


def _seal_failure(run_dir: Path) -> None:
    """Seal what a rank reported: the rank itself cannot, while others write run.json."""
    if (run_dir / FAILURE_FILE).is_file():
        seal_again(run_dir, FAILURE_FILE)


def _reason(run_dir: Path, status: int) -> str:
    """Return what ended a training that did not save; raises as `end`."""
    if _hung(run_dir):
        return "a rank hung"
    said = read_failure(run_dir, start=start_id())
    if said is not None or status in _OWN_STATUSES:
        raise ValueError(
            f"the training ended by itself with status {status} and is not started again: "
            f"{said or 'see above what is wrong'}"
        )
    if status == SRUN_STATUS:
        return f"srun failed (status {status}, see above)"
    if status == PASSING_STATUS:
        return f"a device, network or disk failed a rank (status {status}, see above)"
    return f"a rank died (status {status})"


def usable_nodes(engine: EngineConfig, *, most: int, ranks_per_node: int) -> int:
    """Return the largest number of nodes whose ranks share out the batch evenly.

    Args:
        engine: Gives batch and micro-batch.
        most: Nodes of the job.
        ranks_per_node: Ranks on each.

    Raises:
        ValueError: Not even one node's do.
    """
    cells = engine.train_micro_batch_size_per_gpu * ranks_per_node
    for nodes in range(most, 0, -1):
        if engine.train_batch_size % (cells * nodes) == 0:
            return nodes
    raise ValueError(
        f"engine.train_batch_size: got {engine.train_batch_size}, must be a multiple of "
        f"engine.train_micro_batch_size_per_gpu {engine.train_micro_batch_size_per_gpu} x "
        f"{ranks_per_node} ranks per node"
    )


def seconds_to_save(run_dir: Path) -> int:
    """Return how long before the time limit the run must be asked to save, s.

    Twice the slowest of the last checkpoints, and some time until all ranks have heard of it; for a
    run without checkpoints the latter alone.
    """
    saved = [e.get("seconds", 0) for e in read_events(run_dir) if e["event"] == "checkpoint"]
    return math.ceil(2 * max(saved[-20:], default=0) + _BEYOND_SAVING_S)


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint of a run, or 0."""
    return max((step_of(p.name) for p in complete_checkpoints(run_dir / "checkpoints")), default=0)


def read_starts(run_dir: Path) -> list[Start]:
    """Return the recorded starts of a run, oldest first; of a damaged record none."""
    path = run_dir / RESTARTS_FILE
    if not path.exists():
        return []
    try:
        rows = json.loads(read_file(path))
        # Earlier versions wrote no checksums.
        if any(CHECKSUM in row and row[CHECKSUM] != checksum_of(row) for row in rows):
            raise ValueError("a start does not have its checksum")
        return [Start(**{k: v for k, v in row.items() if k != CHECKSUM}) for row in rows]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        log.error(
            "%s: not a record of starts (%s); ignored, starts are counted from 0", path, error
        )
        return []


def bad_nodes(run_dir: Path) -> list[str]:
    """Return the nodes that this start's preflight named, or none when all of them are bad."""
    verdict = read_verdict(run_dir, start=start_id())
    return verdict["bad_nodes"] if verdict else []


def read_verdict(run_dir: Path, *, start: str | None) -> dict[str, Any] | None:
    """Return what the preflight of a start found (preflight.json), or None when it has not ended.

    Args:
        run_dir: Run folder.
        start: A `start_id`.
    """
    verdict = read_sound(run_dir / PREFLIGHT_FILE)
    if verdict and not {"life", "bad_nodes"} <= verdict.keys():
        log.warning("%s: not what a preflight writes; ignored", run_dir / PREFLIGHT_FILE)
        return None
    return verdict if start is not None and verdict.get("life") == start else None


def _hung(run_dir: Path) -> bool:
    """Tell whether the watchdog has ended this start; both times are the file server's."""
    hang, started = run_dir / "heartbeat" / "hang.json", run_dir / RESTARTS_FILE
    return hang.exists() and hang.stat().st_mtime >= started.stat().st_mtime


def _made_a_step(run_dir: Path) -> bool:
    rows = read_every_row(run_dir) if (run_dir / METRICS_FILE).exists() else []
    return newest_step(run_dir) > 0 or any(row["step"] > 0 for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.job.restarts",
        description="Record the starts of a training, for slurm/pretrain.sh.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "nodes", "begin", "seconds-to-save", "end", "bad-nodes"):
        command = commands.add_parser(name)
        command.add_argument("--max-stalled", type=int, default=3, metavar="N")
        if name == "end":
            command.add_argument("--status", type=int, required=True)
            command.add_argument("--refused", metavar="TEXT", help="why srun starts no step")
        if name == "nodes":
            command.add_argument("--most", type=int, required=True, metavar="N")
            command.add_argument("--ranks-per-node", type=int, required=True, metavar="N")
        add_training_arguments(command)  # only the configuration matters here
    args = parse_arguments(parser, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    job = os.environ.get("SCLONG_CHAIN") or os.environ.get("SLURM_JOB_ID", "none")
    try:
        config = load_config(args.config, args.overrides)
        if config.run.dir is None:
            raise ValueError("run.dir is not set: add run.dir=PATH, the run folder")
        run_dir = Path(config.run.dir)
        if args.command in ("begin", "end", "bad-nodes"):
            say_change(run_dir, RESTARTS_FILE, PREFLIGHT_FILE)
        if args.command == "nodes":
            most, ranks = args.most, args.ranks_per_node
            sys.stdout.write(f"{usable_nodes(config.engine, most=most, ranks_per_node=ranks)}\n")
        elif args.command == "begin":
            nodes = os.environ.get("SLURM_JOB_NODELIST", "")
            begin(run_dir, job=job, nodes=nodes, max_stalled=args.max_stalled)
        elif args.command == "seconds-to-save":
            sys.stdout.write(f"{seconds_to_save(run_dir)}\n")
        elif args.command == "end":
            stalled, refused = args.max_stalled, args.refused
            said = end(run_dir, args.status, job=job, max_stalled=stalled, refused=refused)
            log.info("%s", said)
        elif args.command == "bad-nodes":
            sys.stdout.write(f"{','.join(bad_nodes(run_dir))}\n")
        return 0
    except (ValueError, OSError) as error:
        log.error("error: %s", " ".join(str(error).split()))
        return 1


if __name__ == "__main__":
    sys.exit(main())
