"""Which cells convert left out for their annotations, found out a second time from the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_FRONT = "not where "
_SAME = ({"true", "t", "1"}, {"false", "f", "0"})


def where_reasons(dropped: Iterable[str], where: str) -> list[str]:
    """Return all reasons by which cells may be left out, those that left out none among them.

    Args:
        dropped: Reasons in the ledger's `dropped_cells`.
        where: Conditions that the manifest asked for.
    """
    asked = [f"{_FRONT}{part.strip()}" for part in where.split(";") if part.strip()]
    return list(dict.fromkeys([*dropped, *asked]))


def where_columns(reasons: Iterable[str]) -> list[str]:
    """Return the annotations that the reasons of the ledger's `dropped_cells` speak of.

    Args:
        reasons: All reasons of one dataset.
    """
    return [_split(reason)[0] for reason in reasons if reason.startswith(_FRONT)]


def failed_where(reasons: Iterable[str], annotations: Mapping[str, str]) -> str:
    """Return the first of the reasons that a cell gives by its annotations; empty for none.

    Args:
        reasons: All reasons of one dataset.
        annotations: Of one cell, by column of the file.
    """
    for reason in reasons:
        if reason.startswith(_FRONT):
            column, differs, values = _split(reason)
            if _is_one_of(annotations[column], values) == differs:
                return reason
    return ""


def _split(reason: str) -> tuple[str, bool, list[str]]:
    column, _, values = reason.removeprefix(_FRONT).partition("=")
    differs = column.endswith("!")
    return column.removesuffix("!").strip(), differs, [v.strip() for v in values.split("|")]


def _is_one_of(value: str, values: list[str]) -> bool:
    return any(_is_alike(value, wanted) for wanted in values)


def _is_alike(value: str, wanted: str) -> bool:
    one, other = _trimmed(value), _trimmed(wanted)
    if one == other:
        return True
    low = {_trimmed(value.strip()).lower(), other.lower()}
    return any(low <= same and not low.isdisjoint(("true", "false")) for same in _SAME)


def _trimmed(text: str) -> str:
    """Return a number without zeros behind the point."""
    whole, point, part = text.partition(".")
    if not point or not (whole.lstrip("+-") + part).isdecimal() or not whole.lstrip("+-"):
        return text
    return f"{whole}.{part.rstrip('0')}".rstrip(".")
