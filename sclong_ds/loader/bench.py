"""`python -m sclong_ds bench-loader CORPUS`: how many cells a second the loader gives on a machine.

One process for each rank of the machine reads its own share, all at the same time, as in training,
but nothing else computes. The figures, also those of `--json` that `plan --loader` takes, are those
of all of them together after each one's first batch. A corpus that was read before comes from the
memory of the system; to measure the disk, take more cells than that holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclong_ds.command_line import new_file, positive, whole
from sclong_ds.files.atomic import write_atomic
from sclong_ds.files.cores import usable_cores
from sclong_ds.page.words import counted

if TYPE_CHECKING:
    from sclong_ds.loader.threads import Output

# The loader's libraries take seconds to import, which --help does not wait for.
OUTPUTS = ("packed", "csr", "dense", "dense_norm")
FORMAT = "sclong_ds-loader-rate"
_TARGET_SUM = 1e4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds bench-loader`."""
    add = parser.add_argument
    add("corpus", metavar="CORPUS", help="folder of a finalized corpus, or an fsspec URL of one")
    add("--ranks", type=whole(1), default=1, metavar="N", help="ranks of this machine (default: 1)")
    add(
        "--world-size", type=whole(1), metavar="N",
        help="ranks of the whole run, of which these are the first (default: N)",
    )  # fmt: skip
    add("--batch", type=whole(1), default=1024, metavar="N", help="cells of a step, all ranks")
    add("--output", choices=OUTPUTS, default="packed", help="training takes packed (default)")
    add("--seconds", type=positive, default=10.0, metavar="SECONDS", help="how long (default: 10)")
    add("--memory", type=whole(1), default=512, metavar="MB",
        help="data.loader_memory (default: %(default)s)")  # fmt: skip
    add("--cache-dir", metavar="DIR", type=Path, help="data.cache_dir, for a URL")
    add("--cells-cache", type=whole(0), default=0, metavar="MB", help="data.cells_cache, for a URL")
    add(
        "--json",
        type=new_file,
        metavar="FILE",
        help="write the figures to a file, for plan --loader",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What every rank measures."""

    corpus: str
    world_size: int
    batch: int
    output: Output
    seconds: float
    memory_bytes: int
    cache_dir: str | None
    cells_cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRate:
    """What one rank found."""

    cells: int
    wall_s: float
    cpu_s: float
    read_bytes: int
    requests: int
    first_batch_s: float
    """From the opening of the corpus on."""
    peak_bytes: int
    """Of the process, resident."""


def measure_rank(asked: Asked, rank: int) -> RankRate:
    """Read as one rank for a while.

    Args:
        asked: What to measure.
        rank: Its number.
    """
    from sclong_ds.corpus.corpus import Corpus
    from sclong_ds.loader.loader import MOST_LANES, CellLoader, most_lanes, open_stream

    began = time.perf_counter()
    corpus = Corpus(asked.corpus, asked.cache_dir, cells_cache=asked.cells_cache_bytes)
    lanes = most_lanes(corpus, asked.batch, most=MOST_LANES, memory_bytes=asked.memory_bytes)
    with CellLoader(
        corpus, stream=open_stream(corpus, seed=0, lanes=lanes, batch=asked.batch),
        train_batch_size=asked.batch, rank=rank, world_size=asked.world_size, output=asked.output,
        target_sum=_TARGET_SUM if asked.output == "dense_norm" else None,
        memory_bytes=asked.memory_bytes,
    ) as loader:  # fmt: skip
        next(loader)
        first = time.perf_counter()
        cpu, (read, requests), cells = time.process_time(), corpus.cells.has_read(), 0
        while (now := time.perf_counter()) < first + asked.seconds:
            cells += sum(len(batch.cell_ids) for batch in next(loader).micro_batches)
        after = corpus.cells.has_read()
        return RankRate(
            cells=cells, wall_s=now - first, cpu_s=time.process_time() - cpu,
            read_bytes=after[0] - read, requests=after[1] - requests, first_batch_s=first - began,
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )  # fmt: skip


def measure(asked: Asked, ranks: int) -> dict[str, Any]:
    """Measure ranks of one machine at the same time.

    Args:
        asked: What each measures.
        ranks: How many of them, from rank 0 on.

    Returns:
        What `--json` writes.
    """
    from sclong_ds.corpus.location import Location

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ranks, mp_context=spawn) as pool:
        found = list(pool.map(measure_rank, [asked] * ranks, range(ranks)))
    cells = sum(rank.cells for rank in found)
    rate = sum(rank.cells / rank.wall_s for rank in found)
    return {
        "format": FORMAT,
        **asdict(asked),
        "ranks": ranks,
        "remote": not Location(asked.corpus).is_local,
        "cells_per_s": rate,
        "bytes_per_s": sum(rank.read_bytes / rank.wall_s for rank in found),
        "requests_per_s": sum(rank.requests / rank.wall_s for rank in found),
        "cores": sum(rank.cpu_s / rank.wall_s for rank in found),
        "cores_of_machine": usable_cores(),
        "cpu_us_per_cell": 1e6 * sum(rank.cpu_s for rank in found) / max(1, cells),
        "first_batch_s": max(rank.first_batch_s for rank in found),
        "peak_bytes": max(rank.peak_bytes for rank in found),
    }


def run(args: argparse.Namespace) -> int:
    """Measure and print; return the exit status.

    Raises:
        ValueError: Ranks that do not divide the batch, too little memory, or no cells.
        OSError: The corpus cannot be read.
    """
    world_size = args.world_size or args.ranks
    if not args.ranks <= world_size or args.batch % world_size:
        raise ValueError(
            f"--ranks {args.ranks} --world-size {world_size} --batch {args.batch}: the ranks of "
            "this machine are some of the run's, whose number divides the batch"
        )
    asked = Asked(
        corpus=args.corpus, world_size=world_size, batch=args.batch, output=args.output,
        seconds=args.seconds, memory_bytes=args.memory * 10**6,
        cache_dir=None if args.cache_dir is None else str(args.cache_dir),
        cells_cache_bytes=args.cells_cache * 10**6,
    )  # fmt: skip
    found = measure(asked, args.ranks)
    print(
        f"{found['cells_per_s']:,.0f} cells/s, {found['bytes_per_s'] / 1e6:,.1f} MB/s"
        + (f", {found['requests_per_s']:,.0f} requests/s" if found["remote"] else "")
        + f", {found['cores']:.2f} of {found['cores_of_machine']} cores "
        f"({found['cpu_us_per_cell']:.1f} us a cell), first batch after "
        f"{found['first_batch_s']:.1f} s, at most {found['peak_bytes'] / 1e6:,.0f} MB a rank: "
        f"{args.ranks} of {counted(world_size, 'rank')}, {args.output}, {asked.corpus}"
    )
    if args.json:
        write_atomic(args.json, (json.dumps(found, indent=1) + "\n").encode())
    return 0
