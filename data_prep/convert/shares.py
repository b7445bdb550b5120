"""Who converts what: the longest first, and large files by row ranges.

    CORPUS/.shares/KEY.json   workers, and sizes of the datasets, as the first task found them

A dataset's size stands for the time that it takes: bytes on disk, or those of the manifest for what
lies behind an address. Units go, the largest first, to the task that has least so far (R. L.
Graham, Bounds on multiprocessing timing anomalies, 1969: at most 4/3 of the shortest time). All
tasks must see the same sizes, or a dataset could be nobody's: the first one writes them down. Where
files have other sizes by now the shares are less even, and nothing else.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from data_prep.manifest.manifest import Dataset
from sclong_ds.files.atomic import locked, read_json, remove_partials_of, write_atomic

LEAST_PIECE_BYTES = 2**29
"""A piece opens the file and reads its tables: 2 to 10 s, as much as 100 MB of counts take."""
MOST_PIECES = 64
ROUNDS = 4
"""Pieces are cut so that a task would do so many of them, were all datasets cut."""
_MOST_FILES = 10_000
"""Files of a folder that are looked at."""
_CUT = (".h5ad", ".h5")
"""Endings of files whose counts are usually stored by cells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One of the row ranges of a dataset."""

    number: int
    of: int
    taken_over: bool = False
    """It is the share of another task, which has not done it."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What a worker does at a time: a dataset, or a piece of one."""

    dataset: Dataset
    size: int
    piece: Piece | None = None

    def taken_over(self) -> Unit:
        """Return the unit as it is done by another task."""
        assert self.piece is not None
        return replace(self, piece=replace(self.piece, taken_over=True))


def shares_of(
    corpus: Path, datasets: Sequence[Dataset], *, tasks: int, jobs: int
) -> list[list[Unit]]:
    """Return the units of each task, the largest first; the same for all tasks.

    Args:
        corpus: The corpus folder.
        datasets: All of the manifest.
        tasks: Number of tasks.
        jobs: Workers of a task.
    """
    if tasks == 1:
        sizes = [size_of(dataset) for dataset in datasets]
        return [units_of(datasets, sizes, slots=jobs)]
    slots, *sizes = _recorded(corpus, datasets, tasks=tasks, jobs=jobs)
    return shared_out(units_of(datasets, sizes, slots=slots), tasks=tasks)


def _recorded(corpus: Path, datasets: Sequence[Dataset], *, tasks: int, jobs: int) -> list[int]:
    """Return the number of workers, and the size of each dataset in bytes."""
    names = [dataset.dataset_id for dataset in datasets]
    key = hashlib.sha256(json.dumps([tasks, names]).encode()).hexdigest()[:16]
    path = corpus / ".shares" / f"{key}.json"
    with locked(corpus / ".locks" / "~shares"):
        try:
            found = read_json(path, cure="")
        except (ValueError, OSError):
            found = None
        if isinstance(found, list) and len(found) == len(names) + 1:
            return [int(number) for number in found]
        numbers = [tasks * jobs, *map(size_of, datasets)]
        path.parent.mkdir(exist_ok=True)
        remove_partials_of(path)
        write_atomic(path, json.dumps(numbers).encode())
        return numbers


def size_of(dataset: Dataset) -> int:
    """Return how many bytes a dataset has; 0 where that is not known.

    Args:
        dataset: The dataset.
    """
    if dataset.remote:
        return dataset.bytes or 0
    try:
        if not dataset.path.is_dir():
            return dataset.path.stat().st_size
        files = (Path(parent, name) for parent, _, names in os.walk(dataset.path) for name in names)
        return sum(file.stat().st_size for file in islice(files, _MOST_FILES))
    except OSError:
        # Named when the dataset is converted.
        return 0


def units_of(datasets: Sequence[Dataset], sizes: Sequence[int], *, slots: int) -> list[Unit]:
    """Cut large datasets into pieces.

    Args:
        datasets: All of the manifest.
        sizes: Of each, in bytes.
        slots: Workers of all tasks.

    Returns:
        The largest first.
    """
    wanted = max(LEAST_PIECE_BYTES, sum(sizes) // (ROUNDS * max(1, slots)))
    units: list[Unit] = []
    for dataset, size in zip(datasets, sizes, strict=True):
        is_cut = not dataset.remote and dataset.path.suffix.lower() in _CUT and slots > 1
        n_pieces = min(size // wanted, MOST_PIECES) if is_cut else 1
        if n_pieces < 2:
            units.append(Unit(dataset, size))
            continue
        pieces = (Piece(number=number, of=n_pieces) for number in range(n_pieces))
        units += [Unit(dataset, size // n_pieces, piece) for piece in pieces]
    return sorted(units, key=lambda unit: -unit.size)


def shared_out(units: Sequence[Unit], *, tasks: int) -> list[list[Unit]]:
    """Return the units of each task, the largest first.

    Args:
        units: Of all tasks, the largest first.
        tasks: Number of tasks.
    """
    shares: list[list[Unit]] = [[] for _ in range(tasks)]
    # By size, then by number of units, so that datasets of unknown size are spread out, too.
    least = [(0, 0, task) for task in range(tasks)]
    for unit in units:
        size, n_units, task = heapq.heappop(least)
        shares[task].append(unit)
        heapq.heappush(least, (size + unit.size, n_units + 1, task))
    return shares


def in_places(shares: Sequence[Sequence[Unit]]) -> list[str | None]:
    """Return the datasets of all tasks so that the place of each, modulo tasks, is its task.

    A dataset in pieces is the task's that has the first of them.

    Args:
        shares: Of `shared_out`.
    """
    names = [
        [u.dataset.dataset_id for u in share if u.piece is None or u.piece.number == 0]
        for share in shares
    ]
    longest = max(map(len, names), default=0)
    rows = [[share[row] if row < len(share) else None for share in names] for row in range(longest)]
    return [name for row in rows for name in row]
