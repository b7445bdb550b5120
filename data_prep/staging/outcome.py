"""Sums over the cells of a dataset while they are streamed, and the verdict on it.

Numbers for the ledger, reasons to exclude the dataset, and warnings for what looks wrong and is
kept all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.counts.invert import MOST_UNPROVEN, Restored
from data_prep.genes.harmonize import HarmonizedSource, counts_lost, excel_dates, largest_losses
from data_prep.genes.markers import lost_markers_warning
from data_prep.ledger.ledger import LedgerEntry, RoundingRecord
from data_prep.source.source import RowRange, UnusableError
from data_prep.staging.quality import (
    CellLimits,
    default_min_genes,
    droplet_counts,
    failing_cells,
    mitochondrial_genes,
    mitochondrial_share,
)
from sclong_ds.corpus.byte_code import MAX_COUNT
from sclong_ds.corpus.genes import GeneVocabulary

UNPROVEN = "counts not proven"
"""Why a cell is dropped whose counts cannot be restored."""
FEWEST_BARCODES = 100
"""Of fewer columns it is not said that they are unfiltered, unless their name does."""
MOST_EMPTY = 0.5
"""Largest share of columns with next to no counts; cells of a filtered matrix have hundreds."""
_RAW_NAME = re.compile(r"(?i)raw_(feature|gene)_bc_matri|unfiltered|solo\.out/.*/raw(/|$)")
_FEWEST_NAMED = 20
_MOST_EMPTY_NAMED = 0.2
FEW_VOCABULARY = 0.2
"""Datasets that name a smaller share of the vocabulary are reported."""
MOST_CHANGED = 0.05
"""Rounding that changes the total by more is reported."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Sums over the blocks of a dataset."""

    opened: HarmonizedSource
    limits: CellLimits
    totals: npt.NDArray[np.int64]
    """(n_input,) counts of each gene of the file."""
    kept: npt.NDArray[np.bool_]
    """(cells,) which were kept."""
    unwanted: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    """By reason, (cells,) True for cells that nobody wants, whatever they count."""
    n_empty: int = 0
    """Columns with fewer counts than a droplet without a cell has."""
    largest_residual: float = 0.0
    genes_of_kept: list[npt.NDArray[np.int32]] = field(default_factory=list)
    """Genes of the kept cells of each block."""
    n_values: int = 0
    n_rounded: int = 0
    totals_before: list[float] = field(default_factory=list)
    """Sum of the values of each block before they were rounded."""
    largest_distance: float = 0.0

    @classmethod
    def begin(
        cls,
        opened: HarmonizedSource,
        limits: CellLimits,
        unwanted: Mapping[str, npt.NDArray[np.bool_]] = MappingProxyType({}),
    ) -> Outcome:
        """Return the outcome before the first block.

        Args:
            opened: The dataset.
            limits: Thresholds of its cells.
            unwanted: By reason, (cells,) True for cells to leave out whatever they count.
        """
        n_cells, n_genes = opened.matrix.shape
        totals, kept = np.zeros(n_genes, dtype=np.int64), np.zeros(n_cells, dtype=bool)
        return cls(opened=opened, limits=limits, totals=totals, kept=kept, unwanted=unwanted)

    @property
    def total_before(self) -> float:
        """Sum of all values before they were rounded, added up block by block."""
        total = 0.0
        for of_block in self.totals_before:
            total += of_block
        return total

    def read(
        self, entry: LedgerEntry, genes: GeneVocabulary, rows: RowRange | None = None
    ) -> Iterator[tuple[int, sparse.csr_matrix, npt.NDArray[np.bool_]]]:
        """Read the dataset, block by block.

        Args:
            entry: Its ledger entry; what is known of its genes is filled in at once, the cells that
                fail are counted on the way.
            genes: The vocabulary.
            rows: A range of its cells; None: all.

        Yields:
            Number of the first cell; (cells, genes of the vocabulary) counts; (cells,) which pass.

        Raises:
            UnusableError: Values that are not counts.
            ValueError: Damaged values, or another number of cells than was announced.
        """
        matrix, gene_map = self.opened.matrix, self.opened.gene_map
        mitochondrial = mitochondrial_genes(gene_map, genes)
        _describe_genes(self.opened, entry, int(mitochondrial.sum()))
        first, last, blocks = (0, matrix.shape[0], None) if rows is None else rows
        for block in self.opened.proven_blocks(blocks, first=first):
            cells = gene_map.apply(block.counts)
            self._require_storable(cells, genes)
            here = slice(first, first + cells.shape[0])
            unwanted = {reason: mask[here] for reason, mask in self.unwanted.items()}
            passed = _passing(block, cells, mitochondrial, entry, self.limits, unwanted)
            self._add(block, cells, passed, first=first)
            yield first, cells, passed
            first += block.counts.shape[0]
        if first != last:
            raise ValueError(f"{matrix.name} has {first} cells, {last} were announced")

    def _require_storable(self, cells: sparse.csr_matrix, genes: GeneVocabulary) -> None:
        """Refuse counts of one gene that are more than a cell can hold once they are added."""
        if cells.nnz and cells.data.max() > MAX_COUNT:
            place = int(cells.data.argmax())
            gene = int(cells.indices[place])
            columns = np.flatnonzero(self.opened.gene_map.target == gene)
            where = f"{self.opened.source.path.name}: {self.opened.matrix.name}"
            raise ValueError(
                f"{where}: the count of {genes.ids[gene]} ({genes.symbols[gene]}) is "
                f"{int(cells.data[place])} in one cell, the sum of {len(columns)} columns; at most "
                f"{MAX_COUNT} can be stored: correct these values"
            )

    def sums(self, first: int, last: int) -> dict[str, npt.ArrayLike]:
        """Return what `take` needs of a range of cells that was read.

        Args:
            first: The first cell.
            last: The cell behind the last.
        """
        return {
            "rows": np.array([first, last]),
            "kept": self.kept[first:last],
            "totals": self.totals,
            "genes_of_kept": np.concatenate([np.zeros(0, np.int32), *self.genes_of_kept]),
            "whole": np.array([self.n_empty, self.n_values, self.n_rounded], dtype=np.int64),
            "largest": np.array([self.largest_residual, self.largest_distance]),
            "totals_before": np.array(self.totals_before, dtype=np.float64),
        }

    def take(self, sums: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Add a range of cells that was read elsewhere; ranges come in their order.

        Args:
            sums: Of `sums`.
        """
        first, last = sums["rows"].tolist()
        self.kept[first:last] = sums["kept"]
        self.totals += sums["totals"].astype(np.int64)
        self.genes_of_kept.append(sums["genes_of_kept"].astype(np.int32))
        n_empty, n_values, n_rounded = sums["whole"].tolist()
        self.n_empty, self.n_values = self.n_empty + n_empty, self.n_values + n_values
        self.n_rounded += n_rounded
        residual, distance = sums["largest"].tolist()
        self.largest_residual = max(self.largest_residual, residual)
        self.largest_distance = max(self.largest_distance, distance)
        self.totals_before += sums["totals_before"].tolist()

    def describe(self, entry: LedgerEntry, genes: GeneVocabulary) -> None:
        """Write what is known of the genes to the ledger entry, as `read` does.

        Args:
            entry: The entry.
            genes: The vocabulary.
        """
        mitochondrial = mitochondrial_genes(self.opened.gene_map, genes)
        _describe_genes(self.opened, entry, int(mitochondrial.sum()))

    def _add(
        self,
        block: Restored,
        cells: sparse.csr_matrix,
        passed: npt.NDArray[np.bool_],
        *,
        first: int,
    ) -> None:
        """Add a block, whose first cell has the number `first`."""
        self.totals += np.asarray(block.counts.sum(axis=0)).ravel()
        fewest = droplet_counts(self.opened.gene_map.n_mapped)
        self.n_empty += int(np.count_nonzero(np.asarray(block.counts.sum(axis=1)) < fewest))
        self.largest_residual = max(self.largest_residual, block.largest_residual)
        self.kept[first : first + len(passed)] = passed
        self.genes_of_kept.append(np.diff(cells.indptr)[passed].astype(np.int32))
        if block.rounded is not None:
            self.n_values += block.rounded.n_values
            self.n_rounded += block.rounded.n_rounded
            self.totals_before.append(float(block.rounded.total))
            self.largest_distance = max(self.largest_distance, block.rounded.largest_distance)

    def fill(self, entry: LedgerEntry) -> None:
        """Write what was found to the ledger entry of the dataset.

        Args:
            entry: The entry; `dropped_cells` and the genes are in it already.
        """
        entry["counts_input"] = int(self.totals.sum())
        if self.totals.any():
            known = self.opened.gene_map.target >= 0
            entry["counts_kept"] = float(self.totals[known].sum() / self.totals.sum())
            entry["largest_losses"] = largest_losses(self.opened.gene_map, self.totals)
            entry["counts_lost"] = counts_lost(self.opened.gene_map, self.totals)
            entry["excel_dates"] = excel_dates(self.opened.gene_map, self.totals)
        if self.opened.target is not None:
            entry["restored"] = (
                f"log1p of cells scaled to {self.opened.target:g}, undone; largest distance from "
                f"a whole number {self.largest_residual:.1e}"
            )
        if self.opened.choice.option.how == "round":
            entry["rounded"] = RoundingRecord(
                share_rounded=self.n_rounded / max(1, self.n_values),
                total_before=self.total_before,
                total_after=entry["counts_input"],
                largest_distance=self.largest_distance,
            )
        entry["min_genes"] = self.limits.min_genes
        genes = np.concatenate([np.zeros(0, dtype=np.int32), *self.genes_of_kept])
        entry["median_genes"] = float(np.median(genes)) if len(genes) else None
        entry["warnings"] += self._warnings(entry)

    def check(self, entry: LedgerEntry, *, min_counts_kept: float, any_cell: bool = False) -> None:
        """Refuse a dataset that turned out empty, unfiltered, not provable or of unknown genes.

        Args:
            entry: Its ledger entry, filled in.
            min_counts_kept: Smallest share of its counts on genes of the vocabulary.
            any_cell: Whether it may be without a cell that passes.

        Raises:
            UnusableError: It is not one for the corpus.
            ValueError: It has no counts at all.
        """
        name, dropped = self.opened.matrix.name, entry["dropped_cells"]
        n_cells = entry["n_cells_input"]
        n_unproven = dropped.get(UNPROVEN, 0)
        if n_unproven > MOST_UNPROVEN * n_cells:
            raise UnusableError(
                f"the counts of {n_unproven} of {n_cells} cells of {name} cannot be restored (not "
                f"log1p of whole counts scaled to {self.opened.target:g}); at most "
                f"{MOST_UNPROVEN:.0%} are dropped"
            )
        if not entry["counts_input"]:
            raise ValueError(f"{name} holds no counts: all {n_cells} cells are empty")
        share = entry["counts_kept"] or 0.0
        if share < min_counts_kept:
            lost = ", ".join(list(entry["largest_losses"])[:5])
            raise UnusableError(
                f"only {share:.0%} of the counts fall on genes of the vocabulary (most are lost "
                f"with {lost}); at least {min_counts_kept:.0%} are needed (--min-counts-kept)"
            )
        if self._unfiltered(Path(entry["path"])) and not self.limits.given:
            raise UnusableError(
                f"{self._barcodes()}: take the filtered matrix (filtered_feature_bc_matrix, or "
                "what a cell caller kept), or say what a cell is with --min-counts or --min-genes, "
                "or for this dataset alone in the manifest columns min_counts and min_genes"
            )
        if not (any_cell or self.kept.any()):
            reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
            raise UnusableError(
                f"no cell is left: {reasons} (min_genes {self.limits.min_genes}, min_counts "
                f"{self.limits.min_counts})"
            )

    def _warnings(self, entry: LedgerEntry) -> list[str]:
        gene_map, found = self.opened.gene_map, []
        if self.limits.given and self._unfiltered(Path(entry["path"])):
            found.append(f"{self._barcodes()}; {int(self.kept.sum())} were kept")
        usual = default_min_genes(gene_map.n_genes)
        if entry["median_genes"] is not None and entry["median_genes"] < usual:
            found.append(
                f"the median cell has {entry['median_genes']:.0f} genes of the vocabulary, fewer "
                f"than {usual}"
            )
        if gene_map.n_mapped < FEW_VOCABULARY * gene_map.n_genes:
            share = gene_map.n_mapped / gene_map.n_genes
            found.append(
                f"the file names {gene_map.n_mapped} of {gene_map.n_genes} genes of the "
                f"vocabulary ({share:.0%}); the others were not measured"
            )
        dates = entry["excel_dates"]
        if dates:
            examples = ", ".join(list(dates)[:3])
            found.append(
                f"{len(dates)} gene names are dates that Excel made of MARCH1, SEPT2 or the like "
                f"({examples}): their {sum(dates.values())} counts are lost; repair the names at "
                "their source"
            )
        if (lost := lost_markers_warning(gene_map, self.totals)) is not None:
            found.append(lost)
        change = entry["counts_input"] - self.total_before
        if entry["rounded"] is not None and abs(change) > MOST_CHANGED * self.total_before:
            found.append(
                f"rounding changed the total from {self.total_before:.6g} to "
                f"{entry['counts_input']}; corrected counts should change by less"
            )
        return found

    def _unfiltered(self, path: Path) -> bool:
        n_columns = len(self.kept)
        if _RAW_NAME.search(path.as_posix()):
            return n_columns >= _FEWEST_NAMED and self.n_empty > _MOST_EMPTY_NAMED * n_columns
        return n_columns >= FEWEST_BARCODES and self.n_empty > MOST_EMPTY * n_columns

    def _barcodes(self) -> str:
        fewest = droplet_counts(self.opened.gene_map.n_mapped)
        return (
            f"{self.n_empty} of {len(self.kept)} columns have fewer than {fewest} counts: most "
            "are barcodes without a cell (an unfiltered matrix)"
        )


def _runs(places: np.ndarray | None) -> list[int]:
    """Return start and stop of each run of consecutive places, in turn."""
    if places is None:
        return []
    borders = np.flatnonzero(np.diff(places) != 1) + 1
    runs = np.split(places, borders)
    return [int(end) for run in runs for end in (run[0], run[-1] + 1)]


def _describe_genes(opened: HarmonizedSource, entry: LedgerEntry, n_mitochondrial: int) -> None:
    gene_map, matrix = opened.gene_map, opened.matrix
    known = gene_map.target[gene_map.target >= 0]
    entry["matrix"], entry["gene_column"] = matrix.name, gene_map.column
    entry["features_left_out"] = dict(matrix.left_out)
    entry["matrix_reason"] = opened.choice.reason
    entry["warnings"] = [*opened.choice.warnings, *gene_map.warnings]
    entry["features_read"] = _runs(matrix.features)
    entry["n_genes_input"], entry["n_genes_mapped"] = matrix.shape[1], gene_map.n_mapped
    entry["n_genes_known"] = len(known)
    entry["gene_names"], entry["name_repairs"] = gene_map.kinds, dict(gene_map.repairs)
    columns_of = np.bincount(known, minlength=gene_map.n_genes)
    entry["n_genes_summed"] = int(columns_of[columns_of > 1].sum())
    entry["n_genes_mito"] = n_mitochondrial


def _passing(
    block: Restored,
    cells: sparse.csr_matrix,
    mitochondrial: np.ndarray,
    entry: LedgerEntry,
    limits: CellLimits,
    unwanted: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return (cells,) which pass; the others are counted by the first reason that holds."""
    reasons = {**unwanted, UNPROVEN: ~block.proven} | failing_cells(cells, limits)
    if limits.max_mito_fraction is not None:
        share = mitochondrial_share(block.counts, mitochondrial)
        reasons["above max_mito_fraction"] = share > limits.max_mito_fraction
    passed = np.ones(cells.shape[0], dtype=bool)
    for name, fails in reasons.items():
        number = int(np.count_nonzero(fails & passed))
        if number:
            entry["dropped_cells"][name] = entry["dropped_cells"].get(name, 0) + number
        passed &= ~fails
    return passed
