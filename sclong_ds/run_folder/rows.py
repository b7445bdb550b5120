"""Rows of `metrics.jsonl`: read once, 8 bytes a number, the latest value of every step."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.json_lines import each_row
from sclong_ds.run_folder.files import METRICS_FILE

_WHOLE = frozenset({"step", "cells_seen"})  # columns of integers, exact in a float up to 2**53


class Row(Mapping[str, float]):
    """A row of numbers that takes 8 bytes a number: runs have millions of rows.

    Args:
        names: Names of the numbers; rows with the same names share them.
        numbers: As many numbers.
    """

    __slots__ = ("_at", "_numbers")

    def __init__(self, names: tuple[str, ...], numbers: Iterable[float]) -> None:
        self._at, self._numbers = _positions(names), array("d", numbers)

    def __getitem__(self, name: str) -> float:
        """Return a number."""
        number = self._numbers[self._at[name]]
        return int(number) if name in _WHOLE else number

    def __setitem__(self, name: str, number: float) -> None:
        """Add a number."""
        assert name not in self._at, name
        self._at = _positions((*self._at, name))
        self._numbers.append(number)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a number of a name."""
        return name in self._at

    def __iter__(self) -> Iterator[str]:
        """Go over the names."""
        return iter(self._at)

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return len(self._at)


@functools.cache
def _positions(names: tuple[str, ...]) -> dict[str, int]:
    return {name: position for position, name in enumerate(names)}


def read_metrics(run_dir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl that lead to the last one, by step.

    A row that goes back to an earlier step ends what was written of that step and later ones.

    Args:
        run_dir: Run folder.

    Returns:
        Rows sorted by step, a training row before the validation row of its step. A validation
        row is one with a `val/` metric; null values are NaN. Damaged lines are left out.

    Raises:
        FileNotFoundError: No metrics.jsonl in the folder.
    """
    return latest(read_every_row(run_dir))


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return those of all rows ever written that lead to the last one."""
    kept: list[Row] = []
    for row in rows:
        while kept and _place(kept[-1]) >= _place(row):
            kept.pop()
        kept.append(row)
    return kept


def _place(row: Mapping[str, float]) -> tuple[float, bool]:
    """Return where a row belongs: by step, the training row of a step first."""
    return row["step"], "val/mse" in row or any(name.startswith("val/") for name in row)


def read_every_row(run_dir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl as written, repeated steps too; raises as `read_metrics`."""
    return [
        Row(tuple(row), (math.nan if v is None else v for v in row.values()))
        for row in each_row(run_dir / METRICS_FILE, numbers=True)
    ]


def series(
    rows: Sequence[Row], name: str, against: str = "step"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps, or another column, and the finite values of one metric, each (N,)."""
    pairs = [(row[against], row[name]) for row in rows if name in row and against in row]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return array[:, 0], array[:, 1]


def running_mean(values: NDArray[np.float64], *, window: int) -> NDArray[np.float64]:
    """Return the centred mean over `window` values (odd), over fewer at both ends; (N,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start = np.maximum(at - window // 2, 0)
    end = np.minimum(at + window // 2 + 1, len(values))
    return (total[end] - total[start]) / (end - start)
