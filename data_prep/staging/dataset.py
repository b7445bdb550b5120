"""One dataset into its staging folder: read, prove, harmonise, filter, write.

Reads the files of the dataset. Writes `cells.zarr` (a cell store of `sclong_ds.corpus.corpus` with
the row table `source_row`, the row of each cell in its source), `obs.parquet` (`annotations.py`)
and `measured_genes.npy` (`data_prep.source.measured`). Cells are streamed in blocks, so that memory
does not grow with the dataset. Everything is read back and compared before the folder gets its
name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.genes.gene_names import GeneResolver
from data_prep.genes.harmonize import HarmonizedSource, harmonize
from data_prep.ledger.ledger import LedgerEntry, ledger_path, staged_files
from data_prep.manifest.address import without_secrets
from data_prep.manifest.manifest import Dataset
from data_prep.readers.open import open_source
from data_prep.source.measured import MEASURED, pack
from data_prep.source.source import Source, UnusableError
from data_prep.staging.annotations import annotation_table, read_annotations
from data_prep.staging.chosen_cells import primary_warning, unwanted_cells
from data_prep.staging.forget import part_folder
from data_prep.staging.outcome import Outcome
from data_prep.staging.pieces import NotToBeCutError, Pieces, write_cells
from data_prep.staging.quality import CellLimits, default_min_genes
from data_prep.staging.read_back import check_cells, check_obs
from data_prep.staging.settings import Settings
from sclong_ds.files.atomic import sync_folder, sync_tree
from sclong_ds.files.obs_table import write_obs


def stage(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    folder: Path,
    settings: Settings,
    resolver: GeneResolver,
    unchanged: Callable[[], None],
    record: Callable[[], None],
    pieces: Pieces | None = None,
) -> None:
    """Read a dataset and write its staging folder, atomically.

    What was staged before stays until the new files are complete and on disk.

    Args:
        dataset: The dataset.
        entry: Its ledger entry; everything that is learnt is filled in, also when staging fails.
        folder: CORPUS/staging/DATASET; `part_folder` of it may not exist.
        unchanged: Called when all is read; raises where the source is no longer what it was.
        record: Writes the entry, once the files have their place; where it raises, they lose it to
            what was staged before.
        settings: Those of the corpus folder.
        resolver: Of its vocabulary.
        pieces: Its cells, staged by row ranges; None: they are read from the source.

    Raises:
        UnusableError: The dataset is not one for the corpus.
        ValueError: It is damaged.
    """
    _require_species(dataset, resolver)
    entry["organism"] = resolver.species
    part = part_folder(folder)
    try:
        for name in ("scratch", "staged"):
            (part / name).mkdir(parents=True)
        _write(dataset, entry, part=part, settings=settings, resolver=resolver, pieces=pieces)
        unchanged()
        entry["files"] = staged_files(part / "staged")
        sync_tree(part / "staged")
        entry["status"] = "ok"
        _put_in_place(part, folder, record)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, folder: Path, record: Callable[[], None]) -> None:
    """Give PART/staged its name and record it, or leave what has that name, with its entry.

    The old entry goes first, so that a kill in between leaves none without its files.
    """
    entry = ledger_path(folder.parents[1], folder.name)
    moves = [(entry, part / entry.name), (folder, part / "before"), (part / "staged", folder)]
    done = []
    try:
        for source, target in moves:
            if source.exists():
                os.rename(source, target)
                done.append((source, target))
        sync_folder(folder.parent)
        record()
    except BaseException:
        for source, target in reversed(done):
            os.rename(target, source)
        raise


def stage_piece(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    pieces: Pieces,
    number: int,
    settings: Settings,
    resolver: GeneResolver,
) -> None:
    """Read a row range of a dataset and write it as a piece, atomically.

    Args:
        dataset: The dataset.
        entry: An entry that takes what is counted, not to be written.
        pieces: Where it goes.
        number: Which range.
        settings: Those of the corpus folder.
        resolver: Of its vocabulary.

    Raises:
        NotToBeCutError: The dataset is not stored by cells.
        ValueError: Something is wrong with it.
    """
    _require_species(dataset, resolver)
    scratch = pieces.folder / f".scratch-{number}"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        source = _opened(dataset, resolver, scratch)
        if any(matrix.by_gene or matrix.ranges is None for matrix in source.matrices):
            raise NotToBeCutError("a matrix of the file is not stored by cells")
        entry["n_cells_input"] = len(source.barcodes)
        unwanted, _ = unwanted_cells(source.obs, dataset.where)
        opened = _harmonized(source, dataset, entry, settings, resolver)
        limits = cell_limits(dataset, settings, n_mapped=opened.gene_map.n_mapped)
        outcome = Outcome.begin(opened, limits, unwanted)
        pieces.stage(number, outcome, entry, resolver.genes, settings.codec)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_species(dataset: Dataset, resolver: GeneResolver) -> None:
    if not dataset.is_of(resolver.species):
        raise UnusableError(
            f"the manifest states organism {dataset.organism}; the vocabulary is {resolver.species}"
        )


def _opened(dataset: Dataset, resolver: GeneResolver, scratch: Path) -> Source:
    return open_source(
        dataset.path,
        format=dataset.format,
        genome=dataset.genome,
        gene_list=dataset.gene_list,
        gene_share=resolver.share,
        scratch=scratch,
    )


def _harmonized(
    source: Source,
    dataset: Dataset,
    entry: LedgerEntry,
    settings: Settings,
    resolver: GeneResolver,
) -> HarmonizedSource:
    return harmonize(
        source,
        resolver=resolver,
        counts=dataset.counts,
        gene_column=dataset.gene_column,
        id_type=dataset.id_type,
        min_genes=settings.min_genes_mapped,
        min_share=settings.min_share_mapped,
        findings=entry["matrices"],
    )


def _write(
    dataset: Dataset,
    entry: LedgerEntry,
    *,
    part: Path,
    settings: Settings,
    resolver: GeneResolver,
    pieces: Pieces | None,
) -> None:
    """Write the files of a dataset to PART/staged and read them back."""
    source = _opened(dataset, resolver, part / "scratch")
    entry["format"] = source.format
    entry["about"] = {name: without_secrets(text) for name, text in source.about.items()}
    entry["n_cells_input"] = len(source.barcodes)
    unwanted, odd = unwanted_cells(source.obs, dataset.where)
    annotations, columns, unread = read_annotations(source.obs, dataset)
    entry["notes"] = {**source.notes, **unread, **odd}
    opened = _harmonized(source, dataset, entry, settings, resolver)
    staged = part / "staged"
    limits = cell_limits(dataset, settings, n_mapped=opened.gene_map.n_mapped)
    outcome = Outcome.begin(opened, limits, unwanted)
    path, genes, codec = staged / "cells.zarr", resolver.genes, settings.codec
    if pieces is None:
        written = write_cells(outcome.read(entry, genes), path, genes, codec)
    else:
        written = pieces.put_together(outcome, entry, path, genes, codec)
    outcome.fill(entry)
    entry["warnings"] += primary_warning(entry["dropped_cells"], entry["n_cells_input"], odd)
    outcome.check(entry, min_counts_kept=settings.min_counts_kept)
    kept = outcome.kept
    entry["n_cells"] = int(kept.sum())
    obs, entry["texts_repaired"] = annotation_table(
        source.barcodes[kept], annotations[kept], columns
    )
    write_obs(staged / "obs.parquet", obs)
    entry["obs_columns"] = list(obs.columns[1:])
    with (staged / MEASURED).open("wb") as file:
        np.save(file, pack(opened.gene_map.measured))
    check_cells(path, written, n_genes=opened.gene_map.n_genes)
    check_obs(staged / "obs.parquet", obs)


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
