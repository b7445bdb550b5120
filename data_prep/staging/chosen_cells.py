"""Cells that the conditions of a dataset (`data_prep.manifest.where`) leave out, by condition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_prep.manifest.where import PRIMARY_CELLS, REASON, conditions_of
from data_prep.source.source import Annotations
from data_prep.staging.annotations import as_text

Unwanted = dict[str, npt.NDArray[np.bool_]]
"""By the reason in the ledger, (cells,) True where the condition does not hold."""


def unwanted_cells(obs: Annotations, where: str) -> Unwanted:
    """Return which cells of a file are not wanted.

    Args:
        obs: Annotations of its cells.
        where: Conditions, as in the manifest.

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
    return {
        f"{REASON}{condition.text}": ~_of_each(frame[condition.column], condition.holds)
        for condition in conditions
    }


def _of_each(values: pd.Series, holds: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
    """Ask for each different text once."""
    texts, places = np.unique(as_text(values)[0].astype(object), return_inverse=True)
    return np.array([holds(text) for text in texts], dtype=bool)[places]


def primary_warning(dropped: dict[str, int], n_cells: int) -> list[str]:
    """Return what to say of cells that were left out though nobody asked for it.

    Args:
        dropped: Cells by reason.
        n_cells: Cells of the file.
    """
    number = dropped.get(f"{REASON}{PRIMARY_CELLS.text}", 0)
    if not number:
        return []
    return [
        f"{number} of {n_cells} cells are not primary data (is_primary_data is False: they are in "
        "another dataset, too) and were left out; where is_primary_data=True|False keeps them"
    ]
