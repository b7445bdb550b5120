"""Which staged cells nearly repeat others, and what the user should know of them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.annotations.words import truth
from data_prep.corpus.near.near_duplicates import (
    PRIMARY,
    SECONDARY,
    UNKNOWN,
    NearRule,
    NearSearch,
    lacks_near_records,
)
from data_prep.passes.crew import Crew, Made, forget_damaged
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.files.atomic import listed, write_atomic
from sclong_ds.files.npz import npz_bytes, read_npz
from sclong_ds.files.obs_table import obs_length, obs_names, read_coded
from sclong_ds.page.words import counted

_log = logging.getLogger(__name__)

NEAR_STAGES = ("near-digests", "near-pairs", "near-shared", "near")
"""In their order; the last one is one unit."""
NEAR_FOLDER = "near"
"""Scratch folder of the search, inside the work folder."""
IS_PRIMARY = "is_primary_data"
"""CELLxGENE's column: False where the cell stands in another dataset, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearCounts:
    """What was found, dataset by dataset."""

    near_dropped: tuple[int, ...]
    """Cells left out as near duplicates."""
    near_kept: tuple[int, ...]
    """Cells that enter the corpus beside a near duplicate that enters, too."""
    n_left_out: int
    """Pairs of gene lists that were not compared."""

    def warnings(self) -> list[str]:
        """Return what the user should know."""
        found = []
        if dropped := sum(self.near_dropped):
            found.append(
                f"{counted(dropped, 'cell')} left out as near duplicates: the same counts "
                "as a cell of "
                "another gene list on the genes of both"
            )
        if kept := sum(self.near_kept):
            found.append(
                f"{counted(kept, 'cell')} kept as near duplicates of each other (the same "
                "counts on the "
                "genes of both): is_primary_data does not tell which is the copy; "
                "--near-duplicates drop keeps one of each"
            )
        if self.n_left_out:
            found.append(
                f"{self.n_left_out} pairs of gene lists were not searched for near duplicates: "
                "the lists are too many and too different"
            )
        return found


def run_near(
    crew: Crew,
    path: Path,
    tables: Sequence[Path],
    stores: Sequence[CellStore],
    search: NearSearch,
    rule: NearRule,
) -> None:
    """Run the stages that find near duplicates, NEAR_STAGES.

    Args:
        crew: Of the work.
        path: The file to write, which `read_near` reads.
        tables: Annotations of the cells of each dataset.
        stores: Its cells.
        search: Of these cells.
        rule: Which near duplicates are left out.
    """
    buckets = [0] * search.n_buckets
    cells = [search.n_cells(run) for run in range(len(search.runs))]
    digests, pairs, shared, last = NEAR_STAGES
    # What was found needs nothing of the other stages, which a process that continues may find
    # damaged and without their records.
    if not crew.is_done(last, 1):
        crew.run(digests, cells, lambda run: crew.made_files(search.compare(run)))
        crew.run(pairs, buckets, lambda bucket: crew.made_files(search.ask(bucket)))
        crew.run(shared, buckets, lambda bucket: crew.made_files(search.answer(bucket)))
    crew.run(last, [0], lambda _: _write_near(crew, path, tables, stores, search, rule))
    search.forget_records()


def forget_lost(work: Path) -> None:
    """Let units be done again that have not left what they say; no process is at work.

    If what the search has found is lost and its records are removed, all its units are done again.

    Args:
        work: Folder of the work.
    """
    forget_damaged(work)
    markers, last = listed(work / "done"), f"{NEAR_STAGES[-1]}."
    folder = work / NEAR_FOLDER
    if any(path.name.startswith(last) for path in markers) or not lacks_near_records(folder):
        return
    _log.warning("%s: its records were removed; near duplicates are searched again", folder)
    for marker in markers:
        if marker.name.split(".")[0] in NEAR_STAGES:
            marker.unlink()
    # Killed before this, the next call does the same.
    shutil.rmtree(folder)


def _write_near(
    crew: Crew,
    path: Path,
    tables: Sequence[Path],
    stores: Sequence[CellStore],
    search: NearSearch,
    rule: NearRule,
) -> Made:
    """Write which cells are left out as near duplicates; return their numbers."""
    primary = [read_primary(table) for table in tables]
    near = search.found(np.concatenate(primary), rule)
    write_atomic(path, npz_bytes(dropped=near.dropped))
    ends = np.cumsum([len(store) for store in stores])[:-1]
    counts = NearCounts(
        near_dropped=tuple(int(lost.sum()) for lost in np.split(near.dropped, ends)),
        near_kept=tuple(int(still.sum()) for still in np.split(near.kept, ends)),
        n_left_out=near.n_left_out,
    )
    return crew.made_files(path, result=asdict(counts))


def near_counts(crew: Crew) -> NearCounts:
    """Return the numbers of near duplicates; after the stages of `run_near`.

    Args:
        crew: Of the work.
    """
    (found,) = crew.results(NEAR_STAGES[-1])
    return NearCounts(
        near_dropped=tuple(found["near_dropped"]),
        near_kept=tuple(found["near_kept"]),
        n_left_out=found["n_left_out"],
    )


def read_near(path: Path) -> NDArray[np.bool_]:
    """Return (cells,) True for the cells of all datasets that are left out.

    Args:
        path: Of `run_near`.

    Raises:
        ValueError: A damaged file.
    """
    return np.asarray(read_npz(path, cure="run finalize again")["dropped"], bool)


def read_primary(path: Path) -> NDArray[np.uint8]:
    """Return (cells,) what a dataset says of `is_primary_data`: PRIMARY, SECONDARY, UNKNOWN.

    Args:
        path: Annotations of its staged cells (`sclong_ds.files.obs_table`); `write_coded` has
            compared their number with that of the cells.

    Raises:
        ValueError: The annotations are damaged.
    """
    try:
        n_rows, present = obs_length(path), IS_PRIMARY in obs_names(path)
        found, texts = (
            read_coded(path, IS_PRIMARY) if present else (np.zeros(n_rows, np.intp), [""])
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or convert the dataset again") from None
    codes = {True: PRIMARY, False: SECONDARY, None: UNKNOWN}
    return np.array([codes[truth(text)] for text in texts], np.uint8)[found]
