"""One dataset into its staging folder: read, prove, harmonise, filter, write.

Reads the files of the dataset. Writes `cells.zarr` (a cell store of `sclong_ds.store` with the row
table `source_row`, the row of each cell in its source) and `obs.tsv.gz` (first column `barcode`).
Cells are streamed in blocks, so that memory does not grow with the dataset.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import sparse

from data_prep.counts import exact_counts
from data_prep.harmonize import (
    MIN_GENES_MAPPED,
    MIN_SHARE_MAPPED,
    GeneResolver,
    HarmonizedSource,
    harmonize,
    largest_losses,
)
from data_prep.ledger import LedgerEntry
from data_prep.manifest import Dataset
from data_prep.readers import open_source
from data_prep.source import UnusableError
from sclong_ds.files import sync_tree
from sclong_ds.store import CellWriter

STAGING_VERSION = 1
"""Raised when the same input would be staged differently, so that old staging is not taken over."""
USUAL_OBS_COLUMNS = (
    "donor_id",
    "donor",
    "sample",
    "batch",
    "assay",
    "cell_type",
    "tissue",
    "disease",
    "sex",
    "development_stage",
)
"""Cell annotations kept where the manifest names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for all datasets of a corpus folder."""

    genes_hash: str
    """Hash of the gene vocabulary."""
    min_genes: int = 1
    """Cells with counts for fewer vocabulary genes are dropped; 1 drops only empty cells."""
    min_counts: int = 1
    """Cells with a smaller sum of counts over the vocabulary are dropped."""
    min_genes_mapped: int = MIN_GENES_MAPPED
    """Datasets that reach fewer genes of the vocabulary are excluded."""
    min_share_mapped: float = MIN_SHARE_MAPPED
    """Datasets of whose genes a smaller share (0 to 1) is in the vocabulary are excluded."""
    codec: Literal["zstd", "none"] = "zstd"
    """Compression of the staged cells."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("min_genes", "min_counts", "min_genes_mapped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be 1 or more")
        if not 0 <= self.min_share_mapped <= 1:
            raise ValueError(f"min_share_mapped {self.min_share_mapped}: must lie between 0 and 1")


def stage(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    folder: Path,
    settings: Settings,
    resolver: GeneResolver,
) -> None:
    """Read a dataset and write its staging folder, whole or not at all.

    Args:
        dataset: The dataset.
        entry: Its ledger entry; everything that is learnt is filled in, also when staging fails.
        folder: CORPUS/staging/DATASET; must not exist.
        settings: Those of the corpus folder.
        resolver: Of its vocabulary.

    Raises:
        UnusableError: The dataset is not one for the corpus.
        ValueError: It is damaged.
    """
    if not dataset.is_human:
        raise UnusableError(
            f"the manifest says organism {dataset.organism}; the vocabulary is human"
        )
    source = open_source(
        dataset.path,
        format=dataset.format,
        genome=dataset.genome,
        gene_share=resolver.share,
    )
    entry["format"] = source.format
    entry["n_cells_input"] = len(source.barcodes)
    obs = _kept_obs(source.obs, dataset)
    opened = harmonize(
        source,
        resolver=resolver,
        counts=dataset.counts,
        gene_column=dataset.gene_column,
        min_genes=settings.min_genes_mapped,
        min_share=settings.min_share_mapped,
    )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}~", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        kept = _write_cells(opened, temporary / "cells.zarr", entry, settings)
        obs.insert(0, "barcode", source.barcodes)
        _write_obs(obs[kept], temporary / "obs.tsv.gz")
        sync_tree(temporary)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    entry["obs_columns"] = [str(name) for name in obs.columns[1:]]


def _write_cells(
    opened: HarmonizedSource, path: Path, entry: LedgerEntry, settings: Settings
) -> np.ndarray:
    """Write the cells that pass, fill in the entry, return (cells,) which were kept."""
    gene_map, matrix = opened.gene_map, opened.matrix
    entry["matrix"], entry["gene_column"] = matrix.name, gene_map.column
    entry["n_genes_input"], entry["n_genes_mapped"] = matrix.shape[1], gene_map.n_mapped
    entry["n_genes_known"] = int(np.count_nonzero(gene_map.target >= 0))
    totals = np.zeros(matrix.shape[1], dtype=np.int64)
    kept = np.zeros(matrix.shape[0], dtype=bool)
    with CellWriter(path, n_genes=gene_map.n_genes, codec=settings.codec) as writer:
        for first, counts in _numbered(opened):
            totals += np.asarray(counts.sum(axis=0)).ravel()
            cells = gene_map.apply(counts)
            passed = _passing(cells, entry, settings)
            rows = np.flatnonzero(passed)
            writer.append(cells[rows], source={"source_row": (first + rows).astype(np.int64)})
            kept[first : first + len(passed)] = passed
        if not totals.any():
            raise ValueError(
                f"{matrix.name} holds no counts: all {matrix.shape[0]} cells are empty"
            )
        if not kept.any():
            dropped = ", ".join(
                f"{number} {name}" for name, number in entry["dropped_cells"].items()
            )
            raise UnusableError(f"no cell is left: {dropped}")
    entry["n_cells"] = int(kept.sum())
    entry["counts_input"] = int(totals.sum())
    entry["counts_kept"] = float(totals[gene_map.target >= 0].sum() / totals.sum())
    entry["largest_losses"] = largest_losses(gene_map, totals)
    return kept


def _numbered(opened: HarmonizedSource) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield the proven counts of each block and the number of its first cell."""
    first, n_cells = 0, opened.matrix.shape[0]
    for block in opened.matrix.blocks():
        yield first, exact_counts(block, where=opened.matrix.name)
        first += block.shape[0]
    if first != n_cells:
        raise ValueError(f"{opened.matrix.name} has {first} cells, {n_cells} were announced")


def _passing(cells: sparse.csr_matrix, entry: LedgerEntry, settings: Settings) -> np.ndarray:
    """Return (cells,) which pass; the others are counted by the first reason that holds."""
    n_genes = np.diff(cells.indptr)
    n_counts = np.asarray(cells.sum(axis=1)).ravel()
    reasons = {
        "without counts": n_genes == 0,
        "below min_genes": n_genes < settings.min_genes,
        "below min_counts": n_counts < settings.min_counts,
    }
    passed = np.ones(cells.shape[0], dtype=bool)
    for name, fails in reasons.items():
        number = int(np.count_nonzero(fails & passed))
        if number:
            entry["dropped_cells"][name] = entry["dropped_cells"].get(name, 0) + number
        passed &= ~fails
    return passed


def _kept_obs(obs: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """Return the annotation to keep, with the donors in the column `donor`."""
    wanted = [name.strip() for name in dataset.obs_columns.split(",") if name.strip()]
    if wanted == ["*"]:
        wanted = [str(name) for name in obs.columns]
    elif wanted == ["none"]:
        wanted = []
    elif not wanted:
        wanted = [name for name in USUAL_OBS_COLUMNS if name in obs.columns]
    required = [*wanted, dataset.donor_column] if dataset.donor_column else wanted
    missing = [name for name in required if name not in obs.columns]
    if missing:
        raise ValueError(
            f"there is no cell annotation '{missing[0]}'; "
            f"the file has {', '.join(map(str, obs.columns)) or 'none'}"
        )
    kept = obs[[name for name in wanted if name not in ("barcode", "donor")]].copy()
    if dataset.donor_column:
        kept["donor"] = obs[dataset.donor_column]
    elif "donor" in wanted:
        kept["donor"] = obs["donor"]
    return kept


def _write_obs(obs: pd.DataFrame, path: Path) -> None:
    """Write a table with the same bytes for the same content (no time stamp in the gzip header)."""
    text = io.StringIO()
    obs.astype(object).to_csv(text, sep="\t", index=False, na_rep="", lineterminator="\n")
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
