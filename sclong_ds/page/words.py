"""Numbers, durations and texts as the reports print them."""

from __future__ import annotations

import datetime
import math


def text(value: object) -> str:
    """Return any value as readable text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return number(value) if is_number else str(value)  # type: ignore[arg-type]


def number(value: float) -> str:
    """Return a count with separators, any other number with four significant digits."""
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if math.isnan(value):
        return "not recorded"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def recorded(value: float) -> str:
    """Return a figure that is there: one that was not finite is told from one that is absent."""
    return "not a number" if math.isnan(value) else number(value)


def counted(count: int, one: str) -> str:
    """Return a count with its noun, for instance `1 start`, `2 starts`.

    Args:
        count: How many.
        one: The noun of one of them; more get an s.
    """
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def cell(value: float, key: str) -> str:
    """Return a validation number: errors and correlations with as many digits down a column."""
    scored = key.endswith(("mse", "pearson"))
    return f"{value:.4f}" if scored and math.isfinite(value) else number(value)


def duration(seconds: float) -> str:
    """Return a time span as readable text."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def clock(timestamp: float) -> str:
    """Return a point in time, in the local time zone."""
    return datetime.datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
