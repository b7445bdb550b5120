"""Scores in words and tables: what the model is better than, the strongest representation first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from sclong_ds.evaluation.scores import Scores
from sclong_ds.objective.scores import Interval, interval


def verdict(scores: Mapping[str, Scores], *, name: str, no_context: Sequence[str]) -> str:
    """Return a sentence: which rows the model's score is better than.

    Args:
        scores: Of the model, `sclong`, and of the other representations.
        name: The score, one with intervals.
        no_context: Rows that a trained context must be better than.
    """
    own = scores["sclong"]
    gap = {
        row: (
            _value(own, name) - _value(other, name),
            _difference(own, other, name),
        )
        for row, other in scores.items()
        if row != "sclong"
    }
    strongest = sorted(gap, key=lambda row: gap[row][0])
    plain = [row for row in strongest if row in no_context]
    above = [row for row in strongest if row not in no_context]
    not_better = [row for row, (_, bounds) in gap.items() if bounds is None or bounds.low <= 0]
    not_better.sort(key=strongest.index)
    parts = []
    if not_better:
        parts.append("not better than " + ", ".join(f"{r} ({_gap(*gap[r])})" for r in not_better))
    if not set(plain) & set(not_better):
        parts.append(f"better than every row without context by {_gap(*gap[plain[0]])}")
    if above and not set(above) & set(not_better):
        parts.append(f"better than {above[0]} by {_gap(*gap[above[0]])}")
    return f"{name} {_value(own, name):.3f} {_bounds(own.interval(name))}: {'; '.join(parts)}"


def _value(scores: Scores, name: str) -> float:
    value = scores.values[name]
    assert value is not None
    return value


def _difference(own: Scores, other: Scores, name: str) -> Interval | None:
    draws, gap = own.draws[name] - other.draws[name], _value(own, name) - _value(other, name)
    return interval(draws, gap, n_units=own.units[name])


def _gap(difference: float, bounds: Interval | None) -> str:
    if bounds is None:
        return f"{difference:+z.3f}"
    return f"{difference:+z.3f} [{bounds.low:+z.3f}, {bounds.high:+z.3f}]"


def _bounds(bounds: Interval | None) -> str:
    return "" if bounds is None else f"[{bounds.low:.3f}, {bounds.high:.3f}]"


def score_table(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """Return scores as a table, a row per representation, the best of the first score first.

    Undefined scores are NaN.
    """
    table = pd.DataFrame.from_dict({row: s.values for row, s in scores.items()}, orient="index")
    table = table.astype(float).rename_axis("representation")
    return table.sort_values(table.columns[0], ascending=False, kind="stable")


def interval_table(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """Return the bounds of the scores that have intervals: columns NAME_low and NAME_high."""
    rows = {row: intervals_of(s) for row, s in scores.items()}
    flat = {
        row: {
            f"{name}_{end}": v[end == "high"]
            for name, v in found.items()
            for end in ("low", "high")
        }
        for row, found in rows.items()
    }
    return pd.DataFrame.from_dict(flat, orient="index").rename_axis("representation")


def shown_table(scores: Mapping[str, Scores], table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as it is printed: the interval behind each number that has one.

    Args:
        scores: By representation.
        table: From `score_table`.
    """
    shown = table.map(lambda value: f"{value:.3f}").replace("nan", None)
    for row, found in scores.items():
        for name, (low, high) in intervals_of(found).items():
            shown.loc[row, name] += f" [{low:.3f}, {high:.3f}]"
    return shown


def intervals_of(scores: Scores) -> dict[str, list[float]]:
    """Return the bounds of each score that has an interval."""
    found = {name: scores.interval(name) for name in scores.draws}
    return {name: list(bounds) for name, bounds in found.items() if bounds is not None}
