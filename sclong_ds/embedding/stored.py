"""Which genes were measured, kept in the files that `embed` writes.

Such a file has all genes of the model as columns. Read again without this, a gene that its source
never named would be a true zero.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from anndata.io import read_elem
from pandas import DataFrame

from data_prep.readers.open import h5ad_beside_counts
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.objective.measured import MeasuredGenes

UNS_KEY = "sclong"
"""Place of the record in `uns`."""
INPUT_COLUMN = "sclong_input"
"""Column of obs where a file has cells of several inputs."""
_log = logging.getLogger(__name__)


def measured_record(measured: MeasuredGenes | None) -> dict[str, Any]:
    """Return which genes the cells' inputs named; the written matrix has all genes of the model.

    Args:
        measured: Of the embedded cells, a row of its table for each input; None: not known.

    Returns:
        `measured`: (inputs, ceil(G / 8)) uint8, `np.packbits(bitorder="little")`.
    """
    if measured is None:
        return {}
    return {"measured": np.packbits(measured.table, axis=1, bitorder="little")}


def measured_column(measured: MeasuredGenes | None) -> dict[str, Any]:
    """Return the column of obs that says which of several inputs a cell is of.

    Args:
        measured: As in `measured_record`.
    """
    if measured is None or len(measured.table) == 1:
        return {}
    return {INPUT_COLUMN: np.asarray(measured.dataset, dtype=np.int64)}


def measured_again(path: Path, obs: DataFrame, genes: GeneVocabulary) -> MeasuredGenes | None:
    """Return which genes the cells of a file that `embed` wrote were measured for.

    Args:
        path: The file.
        obs: (B,) its annotations; cells may have been taken out since.
        genes: Genes of the model that reads it.

    Returns:
        None: not such a file, or one that does not record it.

    Raises:
        ValueError: The record does not fit the file, or was made for other genes.
        OSError: The disk or server failed.
    """
    with h5ad_beside_counts(path) as file:
        if file is None or f"uns/{UNS_KEY}" not in file:
            return None
        if f"uns/{UNS_KEY}/measured" not in file:
            _log.warning(
                "%s was written by an earlier version of embed, which did not record which genes "
                "were measured: all that it names are taken for measured", path,
            )  # fmt: skip
            return None
        record = read_elem(file[f"uns/{UNS_KEY}"])
    packed = np.asarray(record["measured"])
    cure = f"take uns['{UNS_KEY}'] out of the file if all its genes were measured"
    if str(record.get("genes_hash")) != genes.hash:
        raise ValueError(
            f"uns/{UNS_KEY} says which of another model's genes were measured; embed the source "
            f"file instead, or {cure}"
        )
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != -(-len(genes) // 8):
        raise ValueError(f"uns/{UNS_KEY}/measured is of shape {packed.shape}; {cure}")
    table = np.unpackbits(packed, axis=1, bitorder="little")[:, : len(genes)].astype(bool)
    if len(table) == 1:
        return MeasuredGenes(table, np.zeros(len(obs), dtype=np.int64))
    column = obs.get(INPUT_COLUMN)
    numbers = None if column is None else column.astype(str)
    if numbers is None or not numbers.isin([str(i) for i in range(len(table))]).all():
        raise ValueError(
            f"obs/{INPUT_COLUMN} must say which of {len(table)} inputs a cell is of; {cure}"
        )
    return MeasuredGenes(table, numbers.to_numpy().astype(np.int64))
