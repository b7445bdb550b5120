"""Counts of one cell from its log1p values, and whether they are proven: plain loops.

What `data_prep.counts.invert` does for whole blocks, written a second time to compare with it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_TARGET = re.compile(r"scaled to ([0-9.e+]+)")
_FEWEST_VALUES = 10
_ROUNDINGS = 4 * 2.0**-23
"""Four float32 roundings at 1."""
_WIDEST = 0.25
_EQUAL_SUMS = 1e-4
_SURE = 0.5
"""Cells within this share of every bound are proven by any order of adding up."""


def scaled_values(stored: Sequence[tuple[int, Any]]) -> dict[int, float]:
    """Return the values above 0 of one cell by feature, their logarithm undone.

    Args:
        stored: Features and log1p values.
    """
    values: Counter[int] = Counter()
    for feature, value in stored:
        values[feature] += float(value)  # type: ignore[assignment]
    return {feature: math.expm1(value) for feature, value in values.items() if value}


def one_count(scaled: Sequence[float]) -> float:
    """Return what one count was scaled to: the values are multiples of the smallest.

    Args:
        scaled: Values above 0, at least one.
    """
    # All values together tell more precisely than the smallest what one count became.
    return sum(scaled) / sum(round(value / min(scaled)) for value in scaled)


def restored(stored: Sequence[tuple[int, Any]]) -> dict[int, int]:
    """Return the counts of one cell by feature.

    Args:
        stored: Features and log1p values.
    """
    scaled = scaled_values(stored)
    if not scaled:
        return {}
    one = one_count(list(scaled.values()))
    return {feature: round(value / one) for feature, value in scaled.items()}


def is_proven(stored: Sequence[tuple[int, Any]], how: str) -> bool:
    """Tell whether the values of one cell are surely multiples of one count.

    Args:
        stored: Features and log1p values.
        how: What the ledger says of the restoring; the total of a cell is in it.
    """
    scaled = list(scaled_values(stored).values())
    if len(scaled) < _FEWEST_VALUES:
        return not scaled
    one = one_count(scaled)
    for value in scaled:
        whole = round(value / one)
        margin = whole * (_relative_error(value) + _relative_error(one))
        if margin > _SURE * _WIDEST or abs(value / one - whole) > _SURE * margin:
            return False
    found = _TARGET.search(how)
    if found is None:
        return True
    target = float(found[1].rstrip("."))
    if abs(sum(scaled) - target) <= _SURE * _EQUAL_SUMS * target:
        return True
    total = target / one
    margin = total * _relative_error(one)
    n_counts = sum(round(value / one) for value in scaled)
    near = abs(total - round(total)) <= _SURE * margin and margin <= _SURE * _WIDEST
    return near and total >= n_counts


def _relative_error(scaled: float) -> float:
    """Return how far expm1 of a rounded logarithm can be off, as a share of it."""
    return _ROUNDINGS * (2 + (1 + scaled) * math.log1p(scaled) / scaled)
