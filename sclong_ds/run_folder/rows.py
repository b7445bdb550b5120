"""Rows of `metrics.jsonl`: read once, 8 bytes a number, the latest value of every step.

Versions before `val/n_hidden` scored targets that the model is shown among the hidden ones; their
errors are another quantity. No curve, lowest value or choice of a checkpoint mixes both: see
`like_the_last` and `judged`.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sclong_ds.files.json_lines import each_row
from sclong_ds.page import words
from sclong_ds.run_folder.files import METRICS_FILE
from sclong_ds.run_folder.metric_names import (
    BASELINES,
    HEADLINE,
    MEAN_MSE,
    MSE,
    N_CELLS,
    N_HIDDEN,
    PEARSON,
    PER_GENE,
    RELATIVE_MSE,
    SHOWN_MSE,
    STRONGEST_MSE,
    VS_STRONGEST_HIGH,
    VS_STRONGEST_LOW,
    of_baseline,
)  # fmt: skip

AnyRow = TypeVar("AnyRow", bound=Mapping[str, float])

_LISTED = frozenset({
    *HEADLINE, SHOWN_MSE, N_HIDDEN, N_CELLS, "val/spearman", "val/baseline_spearman",
    "val/n_values", "val/target_variance", VS_STRONGEST_LOW, VS_STRONGEST_HIGH,
})  # fmt: skip
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
    return row["step"], MSE in row or any(name.startswith("val/") for name in row)


def read_every_row(run_dir: Path) -> list[Row]:
    """Return the rows of metrics.jsonl as written, repeated steps too; raises as `read_metrics`."""
    return [
        Row(tuple(row), (math.nan if v is None else v for v in row.values()))
        for row in each_row(run_dir / METRICS_FILE, numbers=True)
    ]


def series(
    rows: Sequence[Mapping[str, float]], name: str, against: str = "step"
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


@dataclass(frozen=True, slots=True)
class Judged:
    """What a checkpoint is judged by, the lower the better."""

    figure: str
    """What the value is and, if relative, to which baselines; different ones do not compare."""
    value: float


def strongest(row: Mapping[str, float]) -> str | None:
    """Return the baseline with the smallest finite error; None for a row without one."""
    errors = {name: row.get(of_baseline(name, MSE), math.nan) for name in BASELINES}
    finite = [name for name in BASELINES if math.isfinite(errors[name])]
    return min(finite, key=errors.__getitem__, default=None)


def verdict(row: Mapping[str, float]) -> str:
    """Return where the model's error stands to that of the strongest baseline, in words.

    A difference that other cells could turn round is none, in rows that have its bounds.
    """
    words = compared(row[MSE], row[STRONGEST_MSE])
    bounds = _bounds(row)
    if words in ("below", "above") and bounds and bounds[0] <= 0 <= bounds[1]:
        return "not told apart from"
    return words


def _bounds(row: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the bounds of the difference from the strongest baseline; None without them."""
    low, high = (row.get(name, math.nan) for name in (VS_STRONGEST_LOW, VS_STRONGEST_HIGH))
    return None if math.isnan(low) or math.isnan(high) else (low, high)


def compared(error: float, other: float) -> str:
    """Return where an error stands to another, in words that the other's name may follow.

    Four decimals are shown: errors that differ beyond them are neither below nor above.
    """
    if math.isnan(error):
        return "not a number, against"
    if math.isnan(other):
        return "not comparable with"
    if error != other and f"{error:.4f}" == f"{other:.4f}":
        return "equal at four decimals to"
    return "below" if error < other else "above" if error > other else "equal to"


def standing(row: Mapping[str, float]) -> str:
    """Return `above the strongest baseline (linear, 0.1928)`; nothing for a row without one."""
    if STRONGEST_MSE not in row:
        return ""
    name, value = strongest(row), f"{row[STRONGEST_MSE]:.4f}"
    named = value if name is None else f"{name.replace('_', ' ')}, {value}"
    bounds = _bounds(row)
    if bounds is not None:
        gap = row[MSE] - row[STRONGEST_MSE]
        named += f"; difference {gap:+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"
    return f"{verdict(row)} the strongest baseline ({named})"


def sentence(row: Mapping[str, float]) -> str:
    """Return the figures of a validation on one line, the strongest baseline first."""
    scored = "hidden values" if is_hidden_only(row) else "targets, shown ones among them,"
    if N_CELLS in row:
        scored += f" of {cells_scored(row)}"
    parts = [" ".join(filter(None, (f"MSE of {scored} {row[MSE]:.4f},", standing(row))))]
    parts[0] = parts[0].rstrip(",")
    for name, metric in (
        ("per-gene mean", MEAN_MSE), ("Pearson", PEARSON), ("per gene across cells", PER_GENE),
    ):  # fmt: skip
        if metric in row:
            parts.append(f"{name} {row[metric]:.4f}")
    parts += [f"{name.removeprefix('val/')} {words.number(v)}" for name, v in unlisted(row).items()]
    return "; ".join(parts)


def cells_scored(row: Mapping[str, float]) -> str:
    """Return on how many cells the figures of a validation stand, in words."""
    return words.counted(int(row[N_CELLS]), "held-out cell") if N_CELLS in row else "held-out cells"


def unlisted(row: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a validation that no list names, as a new metric's, by name.

    Those of baselines, of parts of the values and of datasets are left out.
    """
    found = {}
    for name, value in row.items():
        kind, *path = name.split("/")
        part = path[-1] if path else ""
        is_part = part.startswith("bin_") or part in ("large", "mini", "zeros") or "dataset" in path
        if kind == "val" and name not in _LISTED and path[0] not in BASELINES and not is_part:
            found[name] = value
    return found


def is_hidden_only(row: Mapping[str, float]) -> bool:
    """Tell whether `val/mse` of a row is that of hidden values alone."""
    return N_HIDDEN in row


def like_the_last(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Return those validations that scored the same kind of targets as the last one."""
    return [row for row in rows if is_hidden_only(row) == is_hidden_only(rows[-1])]


def judged(row: Mapping[str, float]) -> Judged | None:
    """Return what chooses the best checkpoint; None for a row without an error.

    It is the error relative to the strongest baseline where there is one, else the error.
    """
    if RELATIVE_MSE in row:
        known = [name for name in BASELINES if of_baseline(name, MSE) in row]
        return Judged(f"{RELATIVE_MSE} ({', '.join(known)})", row[RELATIVE_MSE])
    if MSE in row:
        kind = "hidden" if is_hidden_only(row) else "hidden and shown"
        return Judged(f"{MSE} ({kind})", row[MSE])
    return None
