"""What texts of annotations say: numbers and truths, however a program wrote them.

Standard library only.
"""

from __future__ import annotations

import re

_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_WITH_ZEROS = re.compile(r"([+-]?[0-9]+)(?:\.0*|(\.[0-9]*[1-9])0+)")


def truth(value: str) -> bool | None:
    """Return which of True and False an annotation is, or None.

    Args:
        value: As text.
    """
    return _TRUTH.get(plain_number(value.strip()).lower())


def fits(wanted: str, value: str) -> bool:
    """Tell whether an annotation is what was asked for.

    Args:
        wanted: Value of a condition.
        value: The annotation as text.
    """
    if value == wanted or plain_number(value) == plain_number(wanted):
        return True
    # 1 and T are no truths by themselves: of two such ones, neither says that it is meant.
    said = {value.strip().lower(), wanted.lower()} & {"true", "false"}
    return bool(said) and truth(value) is not None and truth(value) == truth(wanted)


def plain_number(text: str) -> str:
    """Return a number without zeros behind the point, any other text as it is.

    Args:
        text: An annotation: 1 is 1.0 where another cell of its column has no value.
    """
    found = _WITH_ZEROS.fullmatch(text)
    return f"{found[1]}{found[2] or ''}" if found else text
