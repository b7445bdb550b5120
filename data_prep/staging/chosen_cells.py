"""Cells that the conditions of a dataset (`data_prep.manifest.where`) leave out, by condition."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_prep.annotations.words import fits, truth
from data_prep.manifest.where import (
    PRIMARY,
    PRIMARY_CELLS,
    REASON,
    Condition,
    conditions_of,
)
from data_prep.source.source import Annotations
from data_prep.staging.annotations import as_text

Unwanted = dict[str, npt.NDArray[np.bool_]]
"""By the reason in the ledger, (cells,) True where the condition does not hold."""
_MOST_SHOWN = 8


def unwanted_cells(obs: Annotations, where: str) -> tuple[Unwanted, dict[str, str]]:
    """Return which cells of a file are not wanted, and what is odd about the conditions.

    Args:
        obs: Annotations of its cells.
        where: Conditions, as in the manifest.

    Returns:
        The cells by reason, and notes for the ledger: conditions with values that do not occur.

    Raises:
        ValueError: A condition on an annotation that the file lacks, has twice or cannot give.
    """
    columns = [str(name) for name in obs.columns]
    conditions = conditions_of(where, columns)
    for condition in conditions:
        if columns.count(condition.column) != 1:
            raise ValueError(
                f"where '{condition.text}': there are {columns.count(condition.column)} cell "
                f"annotations '{condition.column}'; the file has {', '.join(columns) or 'none'}"
            )
    names = [condition.column for condition in conditions]
    frame, _ = obs.frame(names, required=names)
    unwanted, notes = Unwanted(), dict[str, str]()
    for condition in conditions:
        texts, places = np.unique(as_text(frame[condition.column])[0], return_inverse=True)
        fails = np.array([not condition.holds(text) for text in texts], dtype=bool)
        unwanted[f"{REASON}{condition.text}"] = fails[places]
        if found := _oddity(condition, texts.tolist()):
            notes[f"where {condition.text}"] = found
    return unwanted, notes


def _oddity(condition: Condition, texts: list[str]) -> str:
    """Return which values of a condition do not occur, or are no truths; '' if all is well."""
    shown = ", ".join(f"'{text}'" for text in texts[:_MOST_SHOWN])
    holds = f"{condition.column} holds {shown}{', ...' if len(texts) > _MOST_SHOWN else ''}"
    if condition.column == PRIMARY and any(truth(text) is None for text in texts):
        return f"{holds}: not all are True or False"
    absent = [v for v in condition.values if not any(fits(v, text) for text in texts)]
    if not absent or condition == PRIMARY_CELLS:
        return ""
    quoted = "' or '".join(absent)
    return f"no cell has '{quoted}'; {holds}"


def primary_warning(dropped: dict[str, int], n_cells: int, notes: dict[str, str]) -> list[str]:
    """Return what to say of cells left out though nobody asked for it, and of those that may stay.

    Args:
        dropped: Cells by reason.
        n_cells: Cells of the file.
        notes: Of `unwanted_cells`.
    """
    unknown = notes.get(f"where {PRIMARY_CELLS.text}", "")
    said = []
    if unknown:
        said = [
            f"{unknown}: cells that are neither were kept, though they may be in another dataset, "
            "too; write True or False, or say with where is_primary_data=VALUE which to keep"
        ]
    number = dropped.get(f"{REASON}{PRIMARY_CELLS.text}", 0)
    if not number:
        return said
    return [
        *said,
        f"{number} of {n_cells} cells are not primary data (is_primary_data is False: they are in "
        "another dataset, too) and were left out; where is_primary_data=True|False keeps them",
    ]
