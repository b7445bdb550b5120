"""Features of one gene table found in another of the same file, which knows what they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from data_prep.source.source import StringArray

_Keep = npt.NDArray[np.bool_]


def found_by_name(
    own: Mapping[str, StringArray], other: Mapping[str, StringArray], keep: _Keep
) -> tuple[_Keep, _Keep, str]:
    """Look features up in another table, where `keep` tells which are genes.

    A name that only genes have says more than one that a gene shares with its antibody. Names that
    repeat in a table may have been made unique in the other, CD4-1 beside CD4.

    Args:
        own: Columns of names, (features,) each.
        other: Those of the other table, (others,) each.
        keep: (others,) which of them are genes.

    Returns:
        (features,) which are genes, (features,) which are something else, both where it cannot be
        told; and a feature of the other table that is no gene and was not met, or ''.
    """
    exact: dict[str, set[bool]] = {}
    loose: dict[str, set[bool]] = {}
    for values in other.values():
        for value, is_gene in zip(values, keep, strict=True):
            exact.setdefault(value, set()).add(bool(is_gene))
            loose.setdefault(stem(value), set()).add(bool(is_gene))
    found = np.zeros((3, len(next(iter(own.values())))), dtype=bool)  # gene, other, either
    met: set[str] = set()
    for values in own.values():
        times = Counter(values)
        for place, value in enumerate(values):
            if not value:
                continue
            met |= {value, stem(value)}
            kinds = exact.get(value) if times[value] == 1 else loose.get(stem(value))
            if kinds:
                found[2 if len(kinds) > 1 else 0 if True in kinds else 1, place] = True
    either = found[2] & ~found[0] & ~found[1]
    missed = [
        rows[0] for rows, is_gene in zip(zip(*other.values(), strict=True), keep, strict=True)
        if not is_gene and not met & {name for row in rows for name in (row, stem(row))}
    ]  # fmt: skip
    return found[0] | either, found[1] | either, missed[0] if missed else ""


def stem(name: str) -> str:
    """Return a name without the number that made it unique: CD4 of CD4-1 and CD4.1.

    Args:
        name: Of a feature.
    """
    return re.sub(r"[-.]\d+$", "", name)
