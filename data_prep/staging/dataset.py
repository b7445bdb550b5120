"""One dataset into its staging folder: read, prove, harmonise, filter, write.

Reads the files of the dataset. Writes `cells.zarr` (a cell store of `sclong_ds.corpus.corpus` with
the row table `source_row`, the row of each cell in its source), `obs.parquet` (`annotations.py`)
and `measured_genes.npy` ((genes / 8,) uint8, `np.packbits(bitorder="little")` over the vocabulary
genes that the file names: what it does not name was not measured, and is not zero). Cells are
streamed in blocks, so that memory does not grow with the dataset. Everything is read back and
compared before the folder gets its name.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.genes.gene_names import GeneResolver
from data_prep.genes.harmonize import MIN_GENES_MAPPED, MIN_SHARE_MAPPED, harmonize
from data_prep.ledger.ledger import (
    LedgerEntry,
    dataset_lock,
    ledger_path,
    shared_corpus,
    staged_files,
)
from data_prep.ledger.pending import forget_in_manifests, known_names
from data_prep.manifest.manifest import Dataset
from data_prep.readers.open import open_source
from data_prep.source.source import UnusableError
from data_prep.staging.annotations import annotation_table, read_annotations
from data_prep.staging.outcome import Outcome
from data_prep.staging.quality import CellLimits, default_min_genes
from data_prep.staging.read_back import CellDigest, check_cells, check_obs
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import sync_folder, sync_tree
from sclong_ds.files.obs_table import write_obs

STAGING_VERSION = 2
"""Raised when the same input would be staged differently, so that old staging is not taken over."""
MIN_COUNTS_KEPT = 0.1
"""The bundled cells keep 0.92; a small vocabulary of one's own keeps less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for all datasets of a corpus folder."""

    genes_hash: str
    """Hash of the gene vocabulary."""
    min_genes: int | None = None
    """Cells with counts for fewer vocabulary genes are dropped; 1 drops only empty cells, None is
    `quality.default_min_genes`."""
    min_counts: int = 1
    """Cells with a smaller sum of counts over the vocabulary are dropped."""
    max_counts: int | None = None
    """Cells with a larger sum of counts over the vocabulary are dropped; None for no limit."""
    max_mito_fraction: float | None = None
    """Cells with a larger mitochondrial share of all counts of the file are dropped; None for no
    limit."""
    min_genes_mapped: int = MIN_GENES_MAPPED
    """Datasets that reach fewer genes of the vocabulary are excluded."""
    min_share_mapped: float = MIN_SHARE_MAPPED
    """Datasets of whose genes a smaller share (0 to 1) is in the vocabulary are excluded."""
    min_counts_kept: float = MIN_COUNTS_KEPT
    """Datasets of whose counts a smaller share (0 to 1) falls on genes of the vocabulary are
    excluded."""
    codec: Literal["zstd", "none"] = "zstd"
    """Compression of the staged cells."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("min_genes", "min_counts", "min_genes_mapped"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be 1 or more")
        if self.max_counts is not None and self.max_counts < self.min_counts:
            raise ValueError(
                f"max_counts {self.max_counts}: must be min_counts {self.min_counts} or more"
            )
        for name in ("min_share_mapped", "min_counts_kept", "max_mito_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} {value}: must lie between 0 and 1")


def stage(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    folder: Path,
    settings: Settings,
    resolver: GeneResolver,
    unchanged: Callable[[], None],
) -> None:
    """Read a dataset and write its staging folder, atomically.

    Args:
        dataset: The dataset.
        entry: Its ledger entry; everything that is learnt is filled in, also when staging fails.
        folder: CORPUS/staging/DATASET; neither it nor `part_folder` of it may exist.
        unchanged: Called when all is read; raises where the source is no longer what it was.
        settings: Those of the corpus folder.
        resolver: Of its vocabulary.

    Raises:
        UnusableError: The dataset is not one for the corpus.
        ValueError: It is damaged.
    """
    if not dataset.is_of(resolver.species):
        raise UnusableError(
            f"the manifest says organism {dataset.organism}; the vocabulary is {resolver.species}"
        )
    entry["organism"] = resolver.species
    part = part_folder(folder)
    try:
        for name in ("scratch", "staged"):
            (part / name).mkdir(parents=True)
        _write(dataset, entry, part=part, settings=settings, resolver=resolver)
        unchanged()
        entry["files"] = staged_files(part / "staged")
        sync_tree(part / "staged")
        os.rename(part / "staged", folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    part: Path,
    settings: Settings,
    resolver: GeneResolver,
) -> None:
    """Write the files of a dataset to PART/staged and read them back."""
    source = open_source(
        dataset.path,
        format=dataset.format,
        genome=dataset.genome,
        gene_list=dataset.gene_list,
        gene_share=resolver.share,
        scratch=part / "scratch",
    )
    entry["format"] = source.format
    entry["n_cells_input"] = len(source.barcodes)
    annotations, columns, unread = read_annotations(source.obs, dataset)
    entry["notes"] = {**source.notes, **unread}
    opened = harmonize(
        source,
        resolver=resolver,
        counts=dataset.counts,
        gene_column=dataset.gene_column,
        id_type=dataset.id_type,
        min_genes=settings.min_genes_mapped,
        min_share=settings.min_share_mapped,
        findings=entry["matrices"],
    )
    staged = part / "staged"
    limits = cell_limits(dataset, settings, n_mapped=opened.gene_map.n_mapped)
    outcome = Outcome.begin(opened, limits)
    written = _write_cells(outcome, staged / "cells.zarr", entry, settings, resolver.genes)
    kept = outcome.kept
    obs, entry["texts_repaired"] = annotation_table(
        source.barcodes[kept], annotations[kept], columns
    )
    write_obs(staged / "obs.parquet", obs)
    entry["obs_columns"] = list(obs.columns[1:])
    with (staged / "measured_genes.npy").open("wb") as file:
        np.save(file, np.packbits(opened.gene_map.measured, bitorder="little"))
    check_cells(staged / "cells.zarr", written, n_genes=opened.gene_map.n_genes)
    check_obs(staged / "obs.parquet", obs)


def part_folder(folder: Path) -> Path:
    """Return where a dataset is staged before it gets its name, with its scratch files.

    Args:
        folder: CORPUS/staging/DATASET. "~" cannot be part of a dataset's name.
    """
    return folder.with_name(f".{folder.name}~")


def clear(corpus: Path, dataset_id: str) -> None:
    """Remove what earlier runs left of a dataset; the entry first, so that none is without data.

    A kill in between leaves files without an entry, which nobody reads and the next `convert`
    removes.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset; its `dataset_lock` is held.
    """
    entry, staged = ledger_path(corpus, dataset_id), corpus / "staging" / dataset_id
    partials = entry.parent.glob(f".{glob.escape(entry.name)}.*.partial")
    for path in (entry, *partials, staged, part_folder(staged)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def forget(corpus: str | Path, dataset_ids: Sequence[str]) -> None:
    """Remove datasets from a corpus folder: staging, ledger entry and place in the manifests.

    A finished corpus keeps their cells until the next `finalize`.

    Args:
        corpus: The corpus folder.
        dataset_ids: Names of its datasets.

    Raises:
        FileNotFoundError: No corpus folder.
        ValueError: A name that it does not have (nothing is removed then), a dataset that a
            `convert` is at, or a `finalize` is at work.
    """
    corpus = Path(corpus)
    if not (corpus / "ledger").is_dir():
        raise FileNotFoundError(f"{corpus}: no corpus here; give the --out folder of convert")
    with shared_corpus(corpus):
        unknown = sorted(set(dataset_ids) - known_names(corpus))
        if unknown:
            raise ValueError(
                f"{corpus}: no dataset '{unknown[0]}'; see: python -m data_prep status {corpus}"
            )
        for name in dataset_ids:
            with dataset_lock(corpus, name, wait=False) as held:
                if not held:
                    raise ValueError(f"{corpus}: a convert is at dataset '{name}'; wait for it")
                # Off the manifests first: killed in between, the dataset is as it was, not pending.
                forget_in_manifests(corpus, [name])
                clear(corpus, name)


def cell_limits(dataset: Dataset, settings: Settings, *, n_mapped: int) -> CellLimits:
    """Return the thresholds on the cells of a dataset; those of the manifest come first.

    Args:
        dataset: The dataset.
        settings: Those of the corpus folder.
        n_mapped: Genes of the vocabulary that it names.
    """
    min_genes = settings.min_genes if dataset.min_genes is None else dataset.min_genes
    min_counts = settings.min_counts if dataset.min_counts is None else dataset.min_counts
    return CellLimits(
        min_genes=default_min_genes(n_mapped) if min_genes is None else min_genes,
        min_counts=min_counts,
        max_counts=settings.max_counts,
        max_mito_fraction=settings.max_mito_fraction,
        given=min_genes is not None or min_counts > 1,
    )


def _write_cells(
    outcome: Outcome,
    path: Path,
    entry: LedgerEntry,
    settings: Settings,
    genes: GeneVocabulary,
) -> CellDigest:
    """Write the cells that pass, fill in the entry and the outcome."""
    written = CellDigest()
    with CellWriter(path, n_genes=len(genes), codec=settings.codec) as writer:
        for first, cells, passed in outcome.read(entry, genes):
            rows = np.flatnonzero(passed)
            chosen = cells if len(rows) == len(passed) else cells[rows]
            source_row = (first + rows).astype(np.int64)
            writer.append(chosen, source={"source_row": source_row})
            written.add(chosen, source_row)
        outcome.fill(entry)
        outcome.check(entry, min_counts_kept=settings.min_counts_kept)
    entry["n_cells"] = int(outcome.kept.sum())
    return written
