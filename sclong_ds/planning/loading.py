"""What feeding a run takes on each node: cells, bytes, requests, cores; and whether it is enough.

Cells are read as they are stored, about a byte a non-zero value. By lanes a chunk is read once an
epoch, by one rank, or by two beyond as many ranks as lanes; by groups every rank reads all of them,
once for each pass of weighted sampling (`sclong_ds.loader`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sclong_ds.config.sections import DataConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.location import Location
from sclong_ds.files.atomic import read_file
from sclong_ds.loader.bench import FORMAT
from sclong_ds.loader.lanes import lanes_for
from sclong_ds.loader.loader import open_stream
from sclong_ds.loader.weights import weights_of

BYTES_A_VALUE = 0.96
"""On disk, zstd: `benchmarks.rank_reads`, 1,900 genes a cell."""
CPU_US, REMOTE_CPU_US = 8.0, 25.0
"""Of a cell of VALUES genes: `bench-loader` on a 2-core Xeon, from a disk, and over HTTP."""
VALUES = 1_900
CHUNK_VALUES = 2**19
_REQUESTS = 2.1
"""For a chunk: two streams, and their indices of 32 chunks each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What the loaders of a node do."""

    passes: int
    """Of an epoch; 1 without weights."""
    visits_per_epoch: int
    read_times: float
    """How often all ranks together read each chunk in an epoch."""
    cells_per_s: float
    """That a node trains on."""
    decoded_per_s: float
    """Cells that it reads for them: more by groups, fewer with weights."""
    bytes_per_s: float
    requests_per_s: float
    """To the server of a remote corpus; 0 for a folder."""
    cores: float
    measured_cells_per_s: float | None
    """That the ranks of a node were measured to deliver; None: not measured."""

    @property
    def too_slow(self) -> bool:
        """Whether the measured rate is below what the devices take."""
        measured = self.measured_cells_per_s
        return measured is not None and measured < self.cells_per_s


def sampling(data: DataConfig, corpus: Corpus | None, cells: int) -> tuple[int, int]:
    """Return passes and visits of an epoch.

    Args:
        data: The configuration.
        corpus: The corpus; None: unknown, then the most that `max_repeats` allows.
        cells: Training cells.
    """
    if corpus is None:
        return (1, cells) if data.balance_by == "none" else (data.max_repeats, cells)
    weights = weights_of(data, corpus)
    if weights is None:
        return 1, cells
    stream = open_stream(corpus, seed=0, lanes=1, batch=1, weights=weights)
    return stream.passes, stream.epoch_visits


def loading(
    data: DataConfig, *, sampled: tuple[int, int], cells: int, n_expressed: int, batch: int,
    cells_per_s: float, nodes: int, world_size: int, rate: Mapping[str, Any] | None,
) -> Loading:  # fmt: skip
    """Work out what feeding a node takes.

    Args:
        data: The configuration.
        sampled: Passes and visits of an epoch.
        cells: Training cells.
        n_expressed: Genes with a count in a cell, on average.
        batch: Cells of a step.
        cells_per_s: Of the whole run.
        nodes: Nodes.
        world_size: Ranks.
        rate: What `read_rate` returns.
    """
    passes, visits = sampled
    lanes = lanes_for(batch, most=data.shuffle_group_chunks)
    by_lanes = data.order == "lanes"
    read_times = float(math.ceil(world_size / lanes)) if by_lanes else float(world_size * passes)
    on_node = cells_per_s / nodes
    decoded = on_node * read_times * cells / visits
    remote = data.corpus is not None and not Location(data.corpus).is_local
    cpu_us = REMOTE_CPU_US if remote else CPU_US
    cpu_us = rate["cpu_us_per_cell"] if rate else cpu_us * n_expressed / VALUES
    chunks = decoded * n_expressed / CHUNK_VALUES
    return Loading(
        passes=passes, visits_per_epoch=visits, read_times=read_times, cells_per_s=on_node,
        decoded_per_s=decoded, bytes_per_s=decoded * n_expressed * BYTES_A_VALUE,
        requests_per_s=_REQUESTS * chunks if remote else 0.0,
        cores=max(decoded, on_node) * cpu_us / 1e6,
        measured_cells_per_s=None if rate is None else float(rate["cells_per_s"]),
    )  # fmt: skip


def read_rate(path: Path) -> dict[str, Any]:
    """Return what `bench-loader --json` wrote.

    Args:
        path: The file.

    Raises:
        ValueError: It is no such file.
    """
    try:
        found = json.loads(read_file(path))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: not written by python -m sclong_ds bench-loader --json")
    return found


def as_plan(found: Loading) -> dict[str, Any]:
    """Return the figures as `plan --json` prints them."""
    return asdict(found) | {"too_slow": found.too_slow}


def loading_lines(plan: Mapping[str, Any]) -> list[str]:
    """Return the lines of a plan about reading.

    Args:
        plan: The whole plan.
    """
    found = plan["loading"]
    measured = found["measured_cells_per_s"]
    passes = f"{found['passes']} passes, " if found["passes"] > 1 else ""
    requests = found["requests_per_s"]
    lines = [
        "Reading, on each node, predicted",
        f"  {found['cells_per_s']:,.4g} cells/s, {found['bytes_per_s'] / 1e6:,.3g} MB/s, "
        + (f"{requests:,.3g} requests/s, " if requests else "")
        + f"{found['cores']:,.2g} cores; {passes}all ranks together read a chunk "
        f"{found['read_times']:,.3g} times an epoch",
    ]
    if found["read_times"] > 2:
        lines.append("  data.order=lanes reads it once")
    if measured is None:
        lines.append("  measure it on a node: python -m sclong_ds bench-loader; plan --loader")
    elif found["too_slow"]:
        lines.append(
            f"  TOO SLOW: measured were {measured:,.0f} cells/s, the devices take "
            f"{found['cells_per_s']:,.0f}: they wait for cells "
            f"{1 - measured / found['cells_per_s']:.0%} of the time"
        )
    else:
        lines.append(
            f"  measured were {measured:,.0f} cells/s: "
            f"{measured / found['cells_per_s']:,.3g} times what the devices take"
        )
    return lines
