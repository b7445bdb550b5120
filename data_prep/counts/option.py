"""What a user can write for `counts`: which matrix holds the raw counts, and how to take them.

| entry                             | what is taken                                            |
| --------------------------------- | -------------------------------------------------------- |
| auto                              | the matrix that is proven to hold counts                 |
| X, raw.X, layers/NAME             | this one                                                 |
| MATRIX+MATRIX                     | the sum of two or more of the same cells and genes       |
| round:MATRIX, round:MATRIX+MATRIX | the nearest whole numbers of corrected counts            |
| invert_log1p, invert_log1p:MATRIX | counts restored, with proof, from log1p of scaled cells  |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ROUND = "round"
INVERT_LOG1P = "invert_log1p"
COUNTS_HELP = (
    "auto (default), X, raw.X or layers/NAME; MATRIX+MATRIX adds matrices of the same cells and "
    f"genes (layers/spliced+layers/unspliced); {ROUND}:MATRIX takes the nearest whole numbers of "
    f"corrected counts (SoupX, alevin); {INVERT_LOG1P}[:MATRIX] restores counts, with proof, from "
    "log1p of scaled counts"
)
_MATRIX = re.compile(r"X|raw\.X|layers/.+")
_NEXT = re.compile(r"\+(?=X(?:\+|$)|raw\.X(?:\+|$)|layers/)")
"""A plus sign between two matrices; one inside the name of a layer is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountsOption:
    """A parsed `counts` entry."""

    how: Literal["auto", "named", "round", "invert"]
    matrices: tuple[str, ...] = ()
    """Names of the matrices to add up; empty where the program is to find one."""
    text: str = "auto"
    """As it was written."""


def parse_counts(text: str) -> CountsOption:
    """Return what a `counts` entry asks for.

    Args:
        text: The entry; whether the file has such matrices is seen later.

    Raises:
        ValueError: Not one of the forms above, or a matrix that is named twice in a sum.
    """
    if text in ("auto", INVERT_LOG1P):
        return CountsOption(how="auto" if text == "auto" else "invert", text=text)
    prefix, colon, rest = text.partition(":")
    how: Literal["named", "round", "invert"] = "named"
    if colon and prefix == ROUND:
        how = "round"
    elif colon and prefix == INVERT_LOG1P:
        how = "invert"
    names = tuple(_NEXT.split(text if how == "named" else rest))
    if not all(_MATRIX.fullmatch(name) for name in names) or (how == "invert" and len(names) > 1):
        raise ValueError(
            f"counts '{text}', allowed: auto, X, raw.X, layers/NAME, MATRIX+MATRIX, "
            f"{ROUND}:MATRIX, {INVERT_LOG1P}, {INVERT_LOG1P}:MATRIX"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"counts '{text}' adds the same matrix twice; name each one once")
    return CountsOption(how=how, matrices=names, text=text)
