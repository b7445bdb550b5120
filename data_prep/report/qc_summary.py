"""The figures of the quality report, from the ledger and the row tables of the cells.

    summary = summarize("CORPUS")        # then qc_report.page(summary)

Reads the finished corpus, else what is staged; no counts are decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.ledger.cell_counts import CellCounts, cell_counts
from data_prep.ledger.ledger import LedgerEntry, read_ledger
from data_prep.ledger.pending import Pending, read_pending
from sclong_ds.corpus.catalogue import DatasetInfo
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import Corpus

ANNOTATIONS = ("tissue", "assay", "cell_type", "disease", "suspension_type")
"""Annotations of cells that the report counts, by their names in the corpus."""
EDGES = np.logspace(0, 7, 7 * 30 + 1)
"""Bins of genes and counts a cell, thirty a factor of ten."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the report shows of one dataset."""

    entry: LedgerEntry
    """Its ledger entry."""
    info: DatasetInfo | None
    """Its entry in the finished corpus; None if it is not in there."""
    n_cells: int
    """Cells in the corpus, or staged where there is no finished corpus."""
    median_genes: float
    """Median genes a cell; NaN without cells."""
    median_counts: float
    """Median counts a cell; NaN without cells."""

    @property
    def ambiguous(self) -> float:
        """Share of the source's genes whose name means several genes; they are left out."""
        return self.entry["gene_names"].get("ambiguous", 0) / max(self.entry["n_genes_input"], 1)

    @property
    def lost(self) -> float:
        """Share of the source's cells that were dropped for quality; NaN if none were read."""
        total = self.entry["n_cells_input"]
        return sum(self.entry["dropped_cells"].values()) / total if total else float("nan")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that the page is made of."""

    corpus: Path
    """The corpus folder."""
    catalogue: Mapping[str, Any] | None
    """Of the finished corpus, if there is one."""
    datasets: tuple[Dataset, ...]
    """One of each ledger entry."""
    pending: tuple[Pending, ...]
    """Datasets that were to be converted and have no entry."""
    density: NDArray[np.int64]
    """(count bins, gene bins) cells."""
    median_genes: float
    """Over all cells."""
    median_counts: float
    """Over all cells."""
    annotations: Mapping[str, Mapping[str, int]]
    """By the name of an annotation of ANNOTATIONS, cells of the finished corpus by its value, most
    first; '' where it is not known."""

    @property
    def n_cells(self) -> int:
        """Cells in the corpus, or staged."""
        return sum(dataset.n_cells for dataset in self.datasets)

    @property
    def used(self) -> tuple[Dataset, ...]:
        """The datasets with cells."""
        return tuple(dataset for dataset in self.datasets if dataset.n_cells)


def summarize(corpus: str | Path) -> Summary:
    """Read the ledger and the row tables of a corpus.

    Args:
        corpus: Folder that convert has filled, finalized or not.

    Raises:
        FileNotFoundError: No such folder, or nothing was converted.
        ValueError: A damaged entry or store.
    """
    corpus = Path(corpus)
    ledger = read_ledger(corpus)
    finished = Corpus(corpus) if (corpus / "corpus.json").is_file() else None
    density = np.zeros((len(EDGES) - 1,) * 2, np.int64)
    medians: dict[str, tuple[int, float, float]] = {}
    all_genes, all_counts = [], []
    for name, genes, counts in _row_tables(corpus, ledger, finished):
        density += np.histogram2d(counts, genes, bins=(EDGES, EDGES))[0].astype(np.int64)
        medians[name] = (len(genes), float(np.median(genes)), float(np.median(counts)))
        all_genes.append(genes.astype(np.uint32))
        all_counts.append(counts.astype(np.float32))
    infos = {info.dataset_id: info for info in finished.datasets} if finished else {}
    nothing = (0, float("nan"), float("nan"))
    datasets = []
    for entry in ledger:
        n_cells, genes_median, counts_median = medians.get(entry["dataset_id"], nothing)
        datasets.append(
            Dataset(
                entry=entry,
                info=infos.get(entry["dataset_id"]),
                n_cells=n_cells,
                median_genes=genes_median,
                median_counts=counts_median,
            )
        )
    return Summary(
        corpus=corpus,
        catalogue=finished.catalogue if finished else None,
        datasets=tuple(datasets),
        pending=tuple(read_pending(corpus, ledger)),
        density=density,
        median_genes=float(np.median(np.concatenate(all_genes))) if all_genes else float("nan"),
        median_counts=float(np.median(np.concatenate(all_counts))) if all_counts else float("nan"),
        annotations=_annotations(finished) if finished else {},
    )


def _annotations(corpus: Corpus) -> dict[str, dict[str, int]]:
    """Return the cells of a corpus by the values of the annotations that it has as columns."""
    found = {}
    for name in ANNOTATIONS:
        labels = corpus.columns[name].values if name in corpus.columns else None
        if labels is None:
            continue
        n_cells = np.bincount(corpus.columns[name].codes(), minlength=len(labels))
        numbers: Counter[str] = Counter()
        # An ontology may know two values of one name.
        for label, number in zip(labels, n_cells.tolist(), strict=True):
            numbers[label] += number
        found[name] = {label: number for label, number in numbers.most_common() if number}
    return found


def _row_tables(
    corpus: Path, ledger: Sequence[LedgerEntry], finished: Corpus | None
) -> Iterator[tuple[str, NDArray[np.integer], NDArray[np.integer]]]:
    """Yield (dataset, genes of each cell, counts of each cell) of every dataset with cells."""
    if finished is None:
        for entry in ledger:
            if entry["status"] == "ok":
                cells = CellStore(corpus / "staging" / entry["dataset_id"] / "cells.zarr")
                yield entry["dataset_id"], cells.row_nnz, cells.row_total
        return
    order = np.argsort(finished.row_dataset, kind="stable")
    ends = np.cumsum([info.n_cells for info in finished.datasets])
    for info, stop in zip(finished.datasets, ends.tolist(), strict=True):
        rows = order[stop - info.n_cells : stop]
        if len(rows):
            yield info.dataset_id, finished.row_nnz[rows], finished.row_total[rows]


def counts_of(summary: Summary) -> CellCounts:
    """Return the cells of a corpus by what became of them.

    Args:
        summary: Of a corpus.
    """
    return cell_counts((dataset.entry for dataset in summary.datasets), summary.catalogue)
