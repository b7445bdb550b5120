"""Check the nodes of a job before it trains, and name those that are not fit for it.

    python -m sclong_ds.job.preflight --timeout-s 120 --config FILE|PRESET [key=value ...]

slurm/pretrain.sh runs it with one process per rank and the training's own arguments. Each looks at
its node and GPU; the first one of a node also writes a file into the run folder. The reports go to
rank 0 through torch's key-value store, which needs no collective, so a node that does not answer is
known by name, that of rank 0 too. If all agree, one all-reduce goes through all ranks.

Rank 0 writes RUN_DIR/preflight.json and a table into the log; each bad node is one line there. When
rank 0 gives no answer, the first rank of another node writes that.
Exit status: 0 fit, 1 not. Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT, SCLONG_NODES (names of the nodes, in the order of the ranks) and SCLONG_GPUS_ON_NODE
(how many GPUs Slurm gave each).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sclong_ds.command_line import parse_arguments
from sclong_ds.config.arguments import add_training_arguments
from sclong_ds.job.restarts import PREFLIGHT_FILE, read_verdict
from sclong_ds.page.words import counted


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.job.preflight",
        description="Check the nodes of a job before it trains, for slurm/pretrain.sh.",
    )
    parser.add_argument(
        "--timeout-s", type=float, default=120.0, metavar="SECONDS", help="wait for the nodes"
    )
    add_training_arguments(parser)
    return parser


if __name__ == "__main__":
    # --help and a wrong command line need not wait for the imports below, which take seconds.
    parse_arguments(parser(), None)

import torch
import torch.distributed as dist

from sclong_ds.config.load import load_config
from sclong_ds.engine.rendezvous import LOOPBACK, loopback_store, stay_on_this_machine
from sclong_ds.files.sealed_json import write_sealed
from sclong_ds.job.failures import run_to_end, start_id
from sclong_ds.job.node_report import GIB, Place, Report, examine, on_gpus
from sclong_ds.run_folder.files import now
from sclong_ds.run_folder.seal import seal_again

SKEW_LIMIT_S = 30.0
"""Largest difference of a node's clock from the others' median, s."""
REDUCED_BYTES = 256 * 2**20
"""Size of the tensor of the all-reduce."""
_SHOWN_NODES = 32
_STAND_INS, _TURN_S = 3, 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with one node."""

    node: str
    text: str


def all_reduce(place: Place, store: dist.Store, *, n_bytes: int, timeout_s: float) -> float:
    """Sum a tensor over all ranks and return the seconds that took.

    Args:
        place: This rank.
        store: The key-value store.
        n_bytes: Size of the tensor.
        timeout_s: Longest wait for the other ranks.

    Raises:
        ValueError: The sum is wrong.
        RuntimeError: torch gave up.
    """
    device = torch.device("cpu")
    if on_gpus():
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("preflight", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    x = torch.ones(n_bytes // 4, device=device)
    dist.all_reduce(torch.ones(1, device=device))  # opens the connections
    _synchronize(device)
    started = time.perf_counter()
    dist.all_reduce(x)
    _synchronize(device)
    seconds = time.perf_counter() - started
    if not bool((x == place.world_size).all()):
        raise ValueError("the all-reduce gave a wrong sum: replace the GPU or network card")
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trial(place: Place, store: dist.Store, *, timeout_s: float) -> None:
    """Take part in the all-reduce and put what came of it into the store.

    It runs in a thread: nothing can interrupt a collective that hangs.
    """

    def body() -> None:
        store.set(f"entered/{place.rank}", json.dumps({"clock": time.time()}))
        try:
            outcome: dict[str, Any] = {
                "seconds": all_reduce(place, store, n_bytes=REDUCED_BYTES, timeout_s=timeout_s)
            }
        except (RuntimeError, ValueError) as error:
            outcome = {"problem": f"all-reduce failed: {str(error).splitlines()[0]}"}
        store.set(f"reduced/{place.rank}", json.dumps(outcome))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(timeout_s)


def collect(store: dist.Store, key: str, place: Place, *, timeout_s: float) -> dict[int, Any]:
    """Return what the ranks have put into the store; those that are late are missing.

    Args:
        store: The key-value store.
        key: Prefix of the ranks' keys.
        place: This rank.
        timeout_s: How long to wait for all of them.
    """
    deadline = time.monotonic() + timeout_s
    found: dict[int, Any] = {}
    waiting = list(range(place.world_size))
    while waiting and time.monotonic() < deadline:
        here = [rank for rank in waiting if store.check([f"{key}/{rank}"])]
        found |= {rank: json.loads(store.get(f"{key}/{rank}")) for rank in here}
        waiting = [rank for rank in waiting if rank not in found]
        time.sleep(0.02)
    return found


def judge(reports: Mapping[int, Report], place: Place, *, timeout_s: float) -> list[Problem]:
    """Return what is wrong with the nodes, by their reports alone.

    What most ranks have is right; a node with something wrong of its own has no vote in that.

    Args:
        reports: Reports by rank; a missing one is a problem.
        place: This rank.
        timeout_s: How long they were waited for.
    """
    problems = []
    for rank in range(place.world_size):
        node = place.node_of(rank)
        if rank not in reports:
            problems.append(Problem(node, f"did not answer within {timeout_s:.0f} s: its file "
                                          f"system or network hangs, or python does not start "
                                          f"there"))  # fmt: skip
            continue
        problems += [Problem(node, text) for text in reports[rank].problems]
    unfit = {place.node_of(rank) for rank, report in reports.items() if report.problems}
    names = dict.fromkeys(name for report in reports.values() for name in report.compared)
    for name in names:
        values = {
            r: report.compared[name] for r, report in reports.items() if name in report.compared
        }
        voters = [rank for rank in sorted(values) if place.node_of(rank) not in unfit]
        # Of equally many, the value of the lowest rank.
        votes = Counter(values[rank] for rank in voters or sorted(values))
        usual = votes.most_common(1)[0][0]
        problems += [
            Problem(place.node_of(rank), f"{name} is {value}, elsewhere {usual}: all nodes must "
                                         f"see the same files and software")
            for rank, value in sorted(values.items())
            if value != usual
        ]  # fmt: skip
    return list(dict.fromkeys(problems))


def judge_trial(
    entered: Mapping[int, Any], reduced: Mapping[int, Any], place: Place, *, timeout_s: float
) -> list[Problem]:
    """Return what the all-reduce showed.

    Args:
        entered: Clock of each rank when all began it, by rank.
        reduced: Its outcome by rank.
        place: This rank.
        timeout_s: How long it was waited for.
    """
    absent = [rank for rank in range(place.world_size) if rank not in entered]
    clocks = sorted(mark["clock"] for mark in entered.values())
    median = clocks[len(clocks) // 2] if clocks else 0.0
    problems = [
        Problem(place.node_of(rank), f"answered, then froze before the all-reduce ({timeout_s:.0f} "
                                     f"s): look at the node")
        for rank in absent
    ]  # fmt: skip
    for rank, mark in entered.items():
        skew = mark["clock"] - median
        if abs(skew) > SKEW_LIMIT_S:
            text = f"its clock is {skew:+.0f} s off the other nodes': see its time service"
            problems.append(Problem(place.node_of(rank), text))
    if absent:
        return list(dict.fromkeys(problems))  # the others wait for them
    for rank in range(place.world_size):
        outcome = reduced.get(rank, {"problem": f"all-reduce not done within {timeout_s:.0f} s"})
        if "problem" in outcome:
            advice = "check the network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME in slurm/env.sh)"
            problems.append(Problem(place.node_of(rank), f"{outcome['problem']}: {advice}"))
    return list(dict.fromkeys(problems))


def by_text(problems: Sequence[Problem]) -> dict[str, list[str]]:
    """Return the nodes of each different problem."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        found.setdefault(problem.text, []).append(problem.node)
    return found


def table(reports: Mapping[int, Report], place: Place) -> list[str]:
    """Return lines about the nodes that have reported, as readable text."""
    rows = [("node", "GPUs", "free GPU GiB", "free disk GiB", "write MB/s")]
    for rank in range(0, place.world_size, place.local_size):
        ranks = [reports[r] for r in range(rank, rank + place.local_size) if r in reports]
        if not ranks:
            continue
        gpu = min((r.gpu_free_bytes for r in ranks if r.gpu_free_bytes is not None), default=None)
        first = ranks[0]
        rows.append(
            (
                place.node_of(rank),
                first.compared.get("GPUs", "-"),
                _scaled(gpu, GIB),
                _scaled(first.free_bytes, GIB),
                _scaled(first.write_bytes_per_s, 1e6),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    more = len(lines) - 1 - _SHOWN_NODES
    return lines if more <= 0 else [*lines[: _SHOWN_NODES + 1], f"and {more} more nodes"]


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"


def open_store(place: Place, address: str, port: int, *, timeout_s: float) -> dist.Store:
    """Return the key-value store of the ranks, which rank 0 holds.

    Args:
        place: This rank.
        address: Host of rank 0.
        port: Its port.
        timeout_s: Longest wait for rank 0; for what is in the store it is twice as long.

    Raises:
        OSError: Nobody listens there.
        torch.distributed.DistError: torch gave up.
    """
    alone = place.local_size == place.world_size
    address = LOOPBACK if alone else address
    deadline = time.monotonic() + timeout_s
    while place.rank != 0:  # where torch itself finds nobody, it prints pages of its own stack
        try:
            socket.create_connection((address, port), timeout=timeout_s).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)
    timeout = timedelta(seconds=timeout_s)
    if alone:
        stay_on_this_machine()
        store = loopback_store(port, rank=place.rank, world_size=None, timeout=timeout)
    else:
        store = dist.TCPStore(
            address, port, is_master=place.rank == 0, wait_for_workers=False, timeout=timeout
        )
    store.set_timeout(timedelta(seconds=2 * timeout_s))
    return store


def hand_in(place: Place, store: dist.Store, source: str, overrides: Sequence[str]) -> None:
    """Examine this rank's node and put the report into the store.

    On rank 0 in a thread: it must be able to say that its own node hangs. It never waits within the
    store, which serves one thread at a time.
    """

    def body() -> None:
        report = examine(place, source, overrides)
        store.set(f"report/{place.rank}", json.dumps(asdict(report)))

    if place.rank == 0:
        threading.Thread(target=body, daemon=True).start()
    else:
        body()


def check(place: Place, store: dist.Store, *, timeout_s: float) -> dict[str, Any]:
    """Bring the reports together on rank 0, try the all-reduce, and return the verdict.

    Args:
        place: This rank.
        store: The key-value store.
        timeout_s: Longest wait for the others, once for the reports and once for the all-reduce.

    Returns:
        On rank 0 the content of preflight.json, on the others `ok` alone.
    """
    if place.rank != 0:
        if store.get("go") == b"yes":
            trial(place, store, timeout_s=timeout_s)
        verdict = {"ok": store.get("verdict") == b"fit"}
        store.set(f"left/{place.rank}", "{}")
        return verdict
    found = collect(store, "report", place, timeout_s=timeout_s)
    reports = {rank: Report(**fields) for rank, fields in found.items()}
    problems = judge(reports, place, timeout_s=timeout_s)
    store.set("go", "no" if problems else "yes")
    seconds = None
    if not problems:
        trial(place, store, timeout_s=timeout_s)
        entered = collect(store, "entered", place, timeout_s=1)
        reduced = collect(store, "reduced", place, timeout_s=1)
        problems = judge_trial(entered, reduced, place, timeout_s=timeout_s)
        seconds = max((r.get("seconds", 0.0) for r in reduced.values()), default=None)
    log.info("\n".join(["preflight:", *table(reports, place)]))
    store.set("verdict", "unfit" if problems else "fit")
    store.set("left/0", "{}")
    # The store goes with this process: the others must have read the verdict.
    collect(store, "left", place, timeout_s=5)
    return verdict_of(problems, place, reports=reports, seconds=seconds)


def verdict_of(
    problems: Sequence[Problem], place: Place, *, reports: Mapping[int, Report],
    seconds: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the content of preflight.json.

    Args:
        problems: What is wrong, none if nothing is.
        place: This rank.
        reports: Reports by rank.
        seconds: Time of the all-reduce, if it was tried.
    """
    # Each rank sends and receives 2 (n - 1) / n of the tensor in a ring.
    moved = 2 * (place.world_size - 1) / place.world_size * REDUCED_BYTES
    bad = sorted({problem.node for problem in problems})
    return {
        "ok": not problems,
        "time": now(),
        "life": start_id(),
        "problems": [{"nodes": n, "text": text} for text, n in by_text(problems).items()],
        "bad_nodes": bad if len(bad) < len(set(place.nodes)) else [],
        "all_reduce": {
            "bytes": REDUCED_BYTES,
            "seconds": seconds,
            "bytes_per_s": moved / seconds if seconds else None,
        },
        "ranks": [
            asdict(reports[rank]) | {"node": place.node_of(rank)} for rank in sorted(reports)
        ],
    }


def stand_in(place: Place, run_dir: Path | None, text: str) -> None:
    """Publish the verdict of a rank 0 that gives no answer.

    The first ranks of the next nodes do it, or the next ranks of the only node; each waits for the
    ones before it, and all of them leave it to a rank 0 that has judged without them.

    Args:
        place: This rank.
        run_dir: Run folder.
        text: What is wrong with the node of rank 0.
    """
    step = place.local_size if place.local_size < place.world_size else 1
    turns = range(0, place.world_size, step)[: 1 + _STAND_INS]
    if place.rank not in turns:
        return
    time.sleep(_TURN_S * turns.index(place.rank))
    if run_dir is None or read_verdict(run_dir, start=start_id()) is None:
        problem = Problem(place.node_of(0), text)
        publish(verdict_of([problem], place, reports={}, seconds=None), place, run_dir)


def publish(verdict: Mapping[str, Any], place: Place, run_dir: Path | None) -> None:
    """Log the verdict and write it into the run folder."""
    for problem in verdict["problems"]:
        nodes = problem["nodes"]
        who = "all nodes" if len(nodes) == len(place.nodes) > 1 else ", ".join(nodes)
        log.error("error: %s: %s", who, problem["text"])
    if verdict["ok"] and place.world_size == 1:
        log.info("preflight: the only rank is fit")
    elif verdict["ok"]:
        reduced = verdict["all_reduce"]
        log.info(
            "preflight: %s %s fit; all-reduce of %.0f MiB in %.2f s (%.2f GB/s a rank)",
            counted(place.world_size, "rank"), "is" if place.world_size == 1 else "are",
            reduced["bytes"] / 2**20, reduced["seconds"], reduced["bytes_per_s"] / 1e9,
        )  # fmt: skip
    if run_dir is not None and run_dir.is_dir():
        write_sealed(run_dir / PREFLIGHT_FILE, verdict)
        seal_again(run_dir, PREFLIGHT_FILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Check this rank's node and return the exit status."""
    args = parse_arguments(parser(), argv)
    place = Place.from_environment()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    run_dir = _run_dir(args.config, args.overrides)
    try:
        store = open_store(place, address, port, timeout_s=args.timeout_s)
        hand_in(place, store, args.config, args.overrides)
        verdict = check(place, store, timeout_s=args.timeout_s)
    except (dist.DistError, OSError) as error:
        stand_in(
            place, run_dir,
            f"no answer from rank 0 at {address}:{port} ({str(error).splitlines()[0]}): see its "
            f"messages, the node and its network",
        )  # fmt: skip
        return 1
    if place.rank == 0:
        publish(verdict, place, run_dir)
    return 0 if verdict["ok"] else 1


def _run_dir(source: str, overrides: Sequence[str]) -> Path | None:
    """Return the run folder; none if the configuration cannot be read, which has been reported."""
    try:
        run_dir = load_config(source, overrides).run.dir
    except (ValueError, OSError):
        return None
    return None if run_dir is None else Path(run_dir)


if __name__ == "__main__":
    run_to_end(main)
