"""Cells to embed or to score: any file that `data_prep` reads, or a finalized corpus.

Files are read under the rules of `data_prep convert`, by the same code: the same choice of the
matrix, the same proof of counts, the same refusals and warnings. All of an input is read once
before the first cell is embedded, so that what is wrong with its last block does not show after
hours. Every cell keeps its row unless the caller sets a threshold.

Shapes: B cells, G genes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from data_prep.genes.harmonize import (
    MIN_GENES_MAPPED,
    MIN_SHARE_MAPPED,
    HarmonizedSource,
    read_harmonized,
)
from data_prep.ledger.ledger import LedgerEntry, empty_entry
from data_prep.manifest.input_options import given_options, input_dataset
from data_prep.manifest.manifest import Dataset
from data_prep.source.source import BLOCK_CELLS, UnusableError
from data_prep.staging.annotations import valid_annotations
from data_prep.staging.outcome import UNPROVEN, Outcome
from data_prep.staging.quality import CellLimits
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.embedding.stored import measured_again
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.page.words import counted

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CountBlock:
    """Consecutive cells of an input."""

    counts: csr_matrix
    """(B, G) raw counts in the model's gene order."""
    n_input_counts: int
    """Sum of their counts over all genes of the input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """An opened input: who the cells are, and their counts in blocks."""

    obs: pd.DataFrame
    """Annotation, one row a cell in input order; the index holds the barcodes."""
    blocks: Callable[[], Iterator[CountBlock]]
    """Starts a new pass over all cells, in order."""
    n_genes_input: int
    """Genes of the input."""
    n_genes_mapped: int
    """Genes of the model that the input has."""
    rows: np.ndarray
    """(B,) positions of the cells in the input."""
    measured: MeasuredGenes | None
    """Genes of the model that the input of each cell names; None where a corpus records none."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How the input was read, for the record: texts, numbers and mappings of them."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Cells of the input below the thresholds of the caller, by reason."""
    warnings: tuple[str, ...] = ()
    """What looks wrong with the input."""

    def placed_blocks(self) -> Iterator[tuple[slice, CountBlock, MeasuredGenes | None]]:
        """Yield all cells in order: the place of a block, the block, and what its cells measure."""
        done = 0
        for block in self.blocks():
            place = slice(done, done + block.counts.shape[0])
            yield place, block, None if self.measured is None else self.measured.of(place)
            done = place.stop


def open_cells(
    path: Path,
    *,
    genes: GeneVocabulary,
    split: str | None = None,
    min_genes: int = MIN_GENES_MAPPED,
    min_share: float = MIN_SHARE_MAPPED,
    dataset: Dataset | None = None,
) -> Cells:
    """Open an input in the gene order of a model, and read it through once to prove its counts.

    Args:
        path: Anything that `data_prep` reads, or a corpus folder.
        genes: Genes of the model.
        split: Split of a corpus; None takes all cells.
        min_genes: Fewest genes of the model that an input must have.
        min_share: Smallest share (0 to 1) of the input's genes that the model must know.
        dataset: How to read it, from `input_dataset`; None takes the defaults.

    Raises:
        FileNotFoundError: No such input, or a corpus that is not finalized.
        ValueError: Not raw counts of known human genes, a corpus of other genes, no such split, or
            options that a corpus has no use for.
    """
    dataset = dataset or input_dataset(path)
    if (path / "corpus.json").is_file() or (path / "ledger").is_dir():
        given = given_options(dataset)
        if given:
            raise ValueError(
                f"{next(iter(given))}: {path} is a corpus, whose cells were chosen by convert; "
                "leave it out"
            )
        return _open_corpus(path, genes=genes, split=split)
    if split is not None:
        raise ValueError(
            f"--split {split}: {path} is no corpus and has no splits; leave --split out"
        )
    return _open_source(dataset, genes=genes, min_genes=min_genes, min_share=min_share)


def _open_source(
    dataset: Dataset, *, genes: GeneVocabulary, min_genes: int, min_share: float
) -> Cells:
    path = dataset.path
    with _named(path):
        opened = read_harmonized(
            path,
            genes=genes,
            format=dataset.format,
            counts=dataset.counts,
            gene_column=dataset.gene_column,
            id_type=dataset.id_type,
            gene_list=dataset.gene_list,
            genome=dataset.genome,
            min_genes=min_genes,
            min_share=min_share,
        )
        kept, entry = _survey(opened, dataset, genes)
    obs, notes = valid_annotations(opened.source)
    for part, note in notes.items():
        _log.warning("%s, %s: %s", path.name, part, note)
    for warning in entry["warnings"]:
        _log.warning("%s: %s", path.name, warning)
    measured = MeasuredGenes(opened.gene_map.measured[None], np.zeros(len(kept), dtype=np.int64))
    with _named(path):
        stored = measured_again(path, obs, genes)
    if stored is not None:
        measured = MeasuredGenes(stored.table & measured.table, stored.dataset)
    every = bool(kept.all())
    left_out = {} if every else {name: n for name, n in entry["dropped_cells"].items() if n}
    if left_out:
        _log.warning("%s: cells left out: %s", path.name, _list(left_out))
    return Cells(
        obs=obs if every else obs[kept],
        blocks=lambda: _blocks(opened, kept),
        n_genes_input=opened.matrix.shape[1],
        n_genes_mapped=opened.gene_map.n_mapped,
        rows=np.flatnonzero(kept),
        measured=measured.of(np.flatnonzero(kept)),
        facts=_facts_of_input(entry, dataset),
        left_out=left_out,
        warnings=tuple(entry["warnings"]),
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the name of the input in front of what is wrong with it, if it is not there."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{path.name}:"):
            raise
        # Not every kind of ValueError is made from a text alone.
        kind = UnusableError if isinstance(error, UnusableError) else ValueError
        raise kind(f"{path.name}: {error}") from error


def _survey(
    opened: HarmonizedSource, dataset: Dataset, genes: GeneVocabulary
) -> tuple[np.ndarray, LedgerEntry]:
    """Read all of an input; return (cells,) which to embed, and what a ledger would say of it."""
    given = dataset.min_genes is not None or dataset.min_counts is not None
    limits = CellLimits(
        min_genes=dataset.min_genes or 1, min_counts=dataset.min_counts or 1, given=given
    )
    entry = empty_entry("input", dataset.path, organism="", tissue="", settings_hash="")
    entry["n_cells_input"], entry["format"] = opened.matrix.shape[0], opened.source.format
    outcome = Outcome.begin(opened, limits)
    for _ in outcome.read(entry, genes):
        pass
    outcome.fill(entry)
    # Without a threshold, cells without counts and unproven ones keep a row of zeros.
    outcome.check(entry, min_counts_kept=0, any_cell=not given)
    unproven = entry["dropped_cells"].get(UNPROVEN, 0)
    if unproven and not given:
        entry["warnings"].append(
            f"{counted(unproven, 'cell')}: {UNPROVEN}; their counts are taken as zero"
        )
    return outcome.kept if given else np.ones(len(outcome.kept), dtype=bool), entry


def _blocks(opened: HarmonizedSource, kept: np.ndarray) -> Iterator[CountBlock]:
    first = 0
    for block in opened.proven_blocks():
        here = kept[first : first + block.counts.shape[0]]
        first += block.counts.shape[0]
        counts = block.counts if here.all() else block.counts[np.flatnonzero(here)]
        yield CountBlock(counts=opened.gene_map.apply(counts), n_input_counts=int(counts.sum()))


def _facts_of_input(entry: LedgerEntry, dataset: Dataset) -> dict[str, Any]:
    """Return the facts about the input for an output's record."""
    names = ("format", "matrix", "matrix_reason", "gene_column", "restored")
    facts: dict[str, Any] = {name: entry[name] or "" for name in names}  # type: ignore[literal-required]
    facts["options"] = {name: str(value) for name, value in given_options(dataset).items()}
    if entry["rounded"] is not None:
        facts["rounded"] = dict(entry["rounded"])
    return facts


def _list(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items())


def _open_corpus(path: Path, *, genes: GeneVocabulary, split: str | None) -> Cells:
    corpus = Corpus(path)
    if corpus.genes.hash != genes.hash:
        raise ValueError(
            f"{path} is a corpus of other genes ({len(corpus.genes)}) than the model's "
            f"({len(genes)}); embed the source files instead, which maps their genes"
        )
    rows = np.arange(len(corpus)) if split is None else corpus.split(split)
    if not len(rows):
        raise ValueError(f"{path}: split '{split}' has no cells")
    measured = None if corpus.measured_genes is None else MeasuredGenes.of_corpus(corpus)
    parts = [rows[start : start + BLOCK_CELLS] for start in range(0, len(rows), BLOCK_CELLS)]

    def blocks() -> Iterator[CountBlock]:
        for part in parts:
            counts = corpus.rows(part)
            yield CountBlock(counts=counts, n_input_counts=int(counts.sum(dtype=np.int64)))

    return Cells(
        obs=corpus.obs(rows),
        blocks=blocks,
        n_genes_input=len(genes),
        n_genes_mapped=len(genes),
        rows=rows,
        measured=None if measured is None else measured.of(rows),
    )
