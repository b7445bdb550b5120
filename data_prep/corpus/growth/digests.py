"""The digests of all staged cells of a part, kept so that later parts are compared with them.

    CORPUS/parts/NUMBER.digests.npy    (cells, 2) uint64, dataset after dataset, as staged

Cells that were left out of the part have theirs, too: what repeats one of them is a repetition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.passes.buckets import plan_runs
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.files.atomic import listed, whole_file, write_atomic
from sclong_ds.files.npz import npz_bytes, read_npz

CELLS_OF_UNIT = 2**22
"""Kept digests that are sorted at once."""
_CURE = "run finalize again"


@dataclass(frozen=True, kw_only=True)
class DigestUnit:
    """Digests that one process takes, or reads: those of cells that follow each other."""

    first: int
    """Number of the first cell."""
    n_cells: int
    """Number of cells."""
    chunks: tuple[tuple[int, int], ...] = ()
    """Place of a dataset and chunk: where to take them."""
    kept: Path | None = None
    """File that holds them."""
    start: int = 0
    """Where they begin in it."""
    n_kept: int = 0
    """Digests that it must hold."""


def plan_units(
    parts: Sequence[tuple[int, int, Path | None]],
    stores: Sequence[CellStore],
    firsts: NDArray[np.int64],
    *,
    run_bytes: int,
) -> list[DigestUnit]:
    """Return the units in which the digests of all staged cells are taken, or read.

    Args:
        parts: Place of the first dataset, place after the last one, and the file with the digests;
            None where they are to be taken.
        stores: The staged cells of each dataset.
        firsts: (datasets + 1,) number of the first cell of each.
        run_bytes: Encoded cells of a unit.
    """
    units: list[DigestUnit] = []
    for first, stop, kept in parts:
        if kept is not None:
            n_cells = int(firsts[stop] - firsts[first])
            units += _units_of_kept(kept, first=int(firsts[first]), n_cells=n_cells)
            continue
        for run in plan_runs(stores[first:stop], run_bytes=run_bytes):
            chunks = tuple((first + place, chunk) for place, chunk in run)
            rows = [stores[place].chunk_rows[chunk : chunk + 2] for place, chunk in chunks]
            n_cells = sum(int(end - begin) for begin, end in rows)
            begin = int(firsts[chunks[0][0]] + rows[0][0])
            units.append(DigestUnit(first=begin, n_cells=n_cells, chunks=chunks))
    return units


def _units_of_kept(path: Path, *, first: int, n_cells: int) -> Iterator[DigestUnit]:
    for start in range(0, n_cells, CELLS_OF_UNIT):
        n_here = min(CELLS_OF_UNIT, n_cells - start)
        yield DigestUnit(
            first=first + start, n_cells=n_here, kept=path, start=start, n_kept=n_cells
        )


def read_kept(unit: DigestUnit) -> NDArray[np.uint64]:
    """Return (cells, 2) the digests of a unit that has them kept.

    Raises:
        ValueError: The file is not of as many cells as are staged.
    """
    assert unit.kept is not None
    found = np.load(unit.kept, mmap_mode="r")
    if found.shape != (unit.n_kept, 2) or found.dtype != np.uint64:
        raise ValueError(
            f"{unit.kept}: digests of shape {found.shape} and type {found.dtype}, its part has "
            f"{unit.n_kept} staged cells; run: python -m data_prep compact CORPUS"
        )
    return np.array(found[unit.start : unit.start + unit.n_cells])


def keep_piece(folder: Path, unit: DigestUnit, digests: NDArray[np.uint64]) -> Path:
    """Keep the digests that a unit has taken; return the file.

    Args:
        folder: Of all pieces.
        unit: The unit.
        digests: (cells, 2).
    """
    path = folder / f"{unit.first:015d}.npz"
    write_atomic(path, npz_bytes(digests=digests))
    return path


def join_pieces(folder: Path, path: Path, *, first: int, stop: int) -> None:
    """Write the digests of a part from the pieces that were kept.

    Args:
        folder: Of all pieces.
        path: The file to write, whole or not at all.
        first: Number of the first cell of the part.
        stop: Number after the last one.

    Raises:
        ValueError: Pieces are missing.
    """
    pieces = [p for p in listed(folder) if p.suffix == ".npz" and first <= int(p.stem) < stop]
    with whole_file(path) as partial:
        with partial.open("wb") as file:
            shape = {"shape": (stop - first, 2), "descr": "<u8", "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, shape)
            done = 0
            for piece in pieces:
                digests = read_npz(piece, cure=_CURE)["digests"]
                file.write(np.ascontiguousarray(digests, "<u8").data)
                done += len(digests)
        if done != stop - first:
            raise ValueError(f"{folder}: {done} digests of {stop - first} cells; {_CURE}")
