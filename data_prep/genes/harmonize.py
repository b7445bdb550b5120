"""Genes of a dataset onto the columns of the vocabulary, and a report of what was lost on the way.

Names are resolved by `gene_names.py`. Several columns of a dataset that mean the same gene are
summed before anything else looks at the values.

    with_genes = read_harmonized("cells.h5ad", genes=GeneVocabulary.bundled())
    for block in with_genes.blocks(): ...        # CSR (cells, genes of the vocabulary), raw counts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.counts.candidates import Choice, choose_counts
from data_prep.counts.invert import Restored, restore_counts
from data_prep.counts.proof import exact_counts
from data_prep.counts.rounding import round_counts
from data_prep.counts.whole_numbers import describe_whole
from data_prep.genes.cover import MIN_GENES_MAPPED, MIN_SHARE_MAPPED, check_cover
from data_prep.genes.gene_names import GeneMap, GeneResolver
from data_prep.genes.settlement import DATE, KINDS
from data_prep.ledger.ledger import MatrixFinding
from data_prep.readers.open import open_source
from data_prep.source.source import Matrix, Source, UnusableError
from sclong_ds.corpus.genes import GeneVocabulary

N_LOSSES = 10


def largest_losses(gene_map: GeneMap, totals: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return the unmapped genes with most counts, by name.

    Args:
        gene_map: The mapping of the dataset.
        totals: (n_input,) counts of each gene of the dataset.

    Returns:
        At most N_LOSSES names and their counts, most first; genes without counts are left out.
    """
    lost = np.flatnonzero((gene_map.target < 0) & (totals > 0))
    order = lost[np.argsort(-totals[lost], kind="stable")][:N_LOSSES]
    return {str(gene_map.names[gene]): int(totals[gene]) for gene in order}


def counts_lost(gene_map: GeneMap, totals: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return the counts of unmapped genes by why their name was not resolved.

    Args:
        gene_map: The mapping of the dataset.
        totals: (n_input,) counts of each gene of the dataset.

    Returns:
        By kind of name (`gene_settlement.KINDS`), where there are any; with the counts of mapped
        genes they are all counts.
    """
    lost = gene_map.target < 0
    found = {
        kind: int(totals[lost & (gene_map.kind == code)].sum()) for code, kind in enumerate(KINDS)
    }
    return {kind: number for kind, number in found.items() if number}


def excel_dates(gene_map: GeneMap, totals: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return the gene names that Excel made dates, and the counts that are lost with each.

    Args:
        gene_map: The mapping of the dataset.
        totals: (n_input,) counts of each gene of the dataset.
    """
    found: dict[str, int] = {}
    for gene in np.flatnonzero(gene_map.kind == DATE):
        name = str(gene_map.names[gene])
        found[name] = found.get(name, 0) + int(totals[gene])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonizedSource:
    """A dataset opened in the gene order of a vocabulary."""

    source: Source
    """Barcodes, obs, format."""
    matrix: Matrix
    """The matrix that holds the counts."""
    gene_map: GeneMap
    """Where its genes went."""
    choice: Choice
    """Why that matrix, what the others hold, and how its values become counts."""

    @property
    def target(self) -> float | None:
        """Total that cells were scaled to, where counts are restored from log1p values."""
        return self.choice.target

    def proven_blocks(
        self, blocks: Iterator[sparse.csr_matrix] | None = None, *, first: int = 0
    ) -> Iterator[Restored]:
        """Yield consecutive blocks of raw counts in the genes of the file.

        Args:
            blocks: Those of a range of cells (`Matrix.ranges`); None: of all cells.
            first: Number of the first of these cells, for messages.

        Yields:
            Counts int64 (cells, genes of the file) and the proof; without `target` every cell is
            proven, since anything else is an error.

        Raises:
            UnusableError: A value that is not a count, wherever it stands; cells that are rounded
                or binarised where the matrix was not chosen by name.
            ValueError: A damaged value or file.
        """
        name, how = self.matrix.name, self.choice.option.how
        for block in self.matrix.blocks() if blocks is None else blocks:
            if self.target is not None:
                yield restore_counts(block, target=self.target, where=name)
                continue
            rounded = round_counts(block, where=name) if how == "round" else None
            counts = exact_counts(block if rounded is None else rounded.counts, where=name)
            if how == "auto" and (reason := describe_whole(counts, first=first)):
                raise UnusableError(
                    f"{name} {reason}; if they are raw counts, write counts = {name} in the "
                    "manifest (--counts)"
                )
            first += counts.shape[0]
            proven = np.ones(counts.shape[0], dtype=bool)
            yield Restored(counts=counts, proven=proven, largest_residual=0.0, rounded=rounded)

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        """Yield consecutive blocks of raw counts.

        Yields:
            CSR (cells, genes of the vocabulary), int64, sorted columns.

        Raises:
            UnusableError: A value that is not a count, or a cell whose counts cannot be restored.
            ValueError: A damaged value or file.
        """
        for block in self.proven_blocks():
            if not block.proven.all():
                raise UnusableError(
                    f"{np.count_nonzero(~block.proven)} of {len(block.proven)} cells of "
                    f"{self.matrix.name} are not log1p of counts scaled to {self.target:g}"
                )
            yield self.gene_map.apply(block.counts)


def read_harmonized(
    path: str | Path,
    *,
    genes: GeneVocabulary,
    format: str = "auto",
    counts: str = "auto",
    gene_column: str = "auto",
    id_type: str = "auto",
    gene_list: Path | None = None,
    genome: str = "auto",
    min_genes: int = MIN_GENES_MAPPED,
    min_share: float = MIN_SHARE_MAPPED,
) -> HarmonizedSource:
    """Open any supported file or folder in the gene order of a vocabulary.

    Args:
        path: File or folder.
        genes: The vocabulary (of a corpus or a model).
        format: One of `source.FORMATS`, or auto.
        counts: Which matrix holds the raw counts, as in `counts_option.py`.
        gene_column: auto, or the column that names the genes.
        id_type: One of `spelling.ID_TYPES`.
        gene_list: File that names the genes of an npz file; None looks beside it.
        genome: auto, or the genome to keep of a file with several.
        min_genes: See `check_cover`.
        min_share: See `check_cover`.

    Raises:
        FileNotFoundError: No such file or folder.
        UnusableError: Readable, but not counts of known human genes.
        ValueError: Damaged or of an unknown format.
    """
    resolver = GeneResolver(genes)
    source = open_source(
        path, format=format, genome=genome, gene_list=gene_list, gene_share=resolver.share
    )
    return harmonize(
        source,
        resolver=resolver,
        counts=counts,
        gene_column=gene_column,
        id_type=id_type,
        min_genes=min_genes,
        min_share=min_share,
    )


def harmonize(
    source: Source,
    *,
    resolver: GeneResolver,
    counts: str = "auto",
    gene_column: str = "auto",
    id_type: str = "auto",
    min_genes: int = MIN_GENES_MAPPED,
    min_share: float = MIN_SHARE_MAPPED,
    findings: list[MatrixFinding] | None = None,
) -> HarmonizedSource:
    """Choose the count matrix of an opened dataset and map its genes.

    Genes are looked at first: that a file is of another species says more than that it is
        normalised.

    Args:
        source: The opened dataset.
        resolver: Finder of the vocabulary in use; built once for many datasets.
        counts: Which matrix holds the raw counts, as in `counts_option.py`.
        gene_column: auto, or the column that names the genes.
        id_type: One of `spelling.ID_TYPES`.
        min_genes: See `check_cover`.
        min_share: See `check_cover`.
        findings: Takes what each matrix holds, also where none can be taken.

    Raises:
        UnusableError: Not counts of known human genes.
        ValueError: No cells, no genes, no such matrix or column, damaged values.
    """
    for matrix in source.matrices:
        if 0 in matrix.shape:
            raise ValueError(
                f"{matrix.name} has {matrix.shape[0]} cells and {matrix.shape[1]} genes; "
                "there is nothing to convert"
            )
    first = resolver.resolve(source.matrices[0], gene_column, id_type)
    choice = choose_counts(source.matrices, counts, findings)
    matrix = choice.matrix
    gene_map = (
        first
        if matrix.name == source.matrices[0].name
        else resolver.resolve(matrix, gene_column, id_type)
    )
    check_cover(gene_map, min_genes=min_genes, min_share=min_share)
    return HarmonizedSource(source=source, matrix=matrix, gene_map=gene_map, choice=choice)
