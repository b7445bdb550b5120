"""Genes of a dataset onto the columns of the vocabulary, and a report of what was lost on the way.

An id is resolved by itself, whatever column it came from: a human Ensembl id (version and genome
prefix removed) must be listed; anything else is a symbol, looked up among the current symbols of
the vocabulary, then among the aliases of resources/symbol_aliases.tsv.gz. That table holds only
aliases that mean one gene; an ambiguous name is never guessed. Matching is case-sensitive: gene
names that differ only in case exist. Several columns of a dataset that mean the same gene are
summed before anything else looks at the values.

    with_genes = read_harmonized("cells.h5ad", genes=GeneVocabulary.bundled())
    for block in with_genes.blocks(): ...        # CSR (cells, genes of the vocabulary), raw counts
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.counts import choose_matrix, exact_counts
from data_prep.readers import open_source
from data_prep.source import Matrix, Source, StringArray, UnusableError
from sclong_ds.genes import GeneVocabulary

ALIASES_PATH = Path(__file__).parent / "resources" / "symbol_aliases.tsv.gz"
MIN_GENES_MAPPED = 200
MIN_SHARE_MAPPED = 0.25
"""A full GENCODE annotation has up to 79,000 genes, of which 27,874 are listed (35 %)."""
N_LOSSES = 10

_GENOME = re.compile(r"^(?:GRCh3[78]|hg19|hg38)_+")
_HUMAN_ID = re.compile(r"(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?")
_ANY_ENSEMBL_ID = re.compile(r"(?:[A-Za-z0-9.]+_+)?ENS([A-Z]{3,4})?G\d{11}(?:\.\d+)?(?:_PAR_Y)?")
_OTHER_IDS = {"FBgn": "fruit fly", "WBGene": "Caenorhabditis elegans", "AT1G": "Arabidopsis"}
_SPECIES = {
    "MUS": "mouse",
    "RNO": "rat",
    "DAR": "zebrafish",
    "MMU": "macaque",
    "MFA": "cynomolgus macaque",
    "PTR": "chimpanzee",
    "SSC": "pig",
    "GAL": "chicken",
    "CAF": "dog",
    "BTA": "cow",
    "CJA": "marmoset",
    "OCU": "rabbit",
    "XET": "frog",
}
_ENSEMBL_PREFERENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneMap:
    """Which column of the vocabulary each gene of a dataset goes to."""

    column: str
    """The gene column that was used."""
    names: StringArray
    """Its values: the dataset's genes in file order."""
    target: npt.NDArray[np.int64]
    """(n_input,) column in the vocabulary, -1 for genes that are not in it."""
    n_genes: int
    """Size of the vocabulary."""

    @property
    def n_mapped(self) -> int:
        """Number of different vocabulary genes that are reached."""
        return len(np.unique(self.target[self.target >= 0]))

    def apply(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Move counts to the columns of the vocabulary; columns of the same gene are summed.

        Args:
            counts: (cells, n_input) int64.

        Returns:
            (cells, n_genes) int64 with sorted columns; unmapped genes are gone.
        """
        columns = self.target[counts.indices]
        kept = columns >= 0
        row_ptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
        mapped = sparse.csr_matrix(
            (counts.data[kept], columns[kept], row_ptr), shape=(counts.shape[0], self.n_genes)
        )
        mapped.sum_duplicates()
        return mapped


class GeneResolver:
    """Finds the vocabulary column of a gene id, symbol or alias.

    Args:
        genes: The vocabulary. Where it has no symbols (a plain list of ids) those of the bundled
            table are used.
    """

    def __init__(self, genes: GeneVocabulary) -> None:
        self.genes = genes
        bundled = GeneVocabulary.bundled() if genes.ids == genes.symbols else genes
        self._columns = dict(genes.index)
        for symbol, gene in zip(bundled.symbols, bundled.ids, strict=True):
            if gene in genes.index:
                self._columns.setdefault(symbol, genes.index[gene])
        for alias, gene in _read_aliases().items():
            if gene in genes.index:
                self._columns.setdefault(alias, genes.index[gene])

    def columns(self, names: StringArray) -> npt.NDArray[np.int64]:
        """Return the vocabulary column of each name, -1 where it is not known.

        Args:
            names: (n,) Ensembl ids, symbols or aliases, in any mixture.
        """
        return np.fromiter((self._column(str(name)) for name in names), np.int64, len(names))

    def _column(self, name: str) -> int:
        name = _GENOME.sub("", name.strip())
        human = _HUMAN_ID.fullmatch(name)
        return self._columns.get(human.group(1) if human else name, -1)

    def share(self, names: StringArray) -> float:
        """Return the share of names that are genes: known ones, and Ensembl ids of any species."""
        if not len(names):
            return 0.0
        ensembl = [_ANY_ENSEMBL_ID.fullmatch(str(name)) is not None for name in names]
        return float(np.mean((self.columns(names) >= 0) | np.array(ensembl)))

    def resolve(self, matrix: Matrix, column: str = "auto") -> GeneMap:
        """Choose the gene column that reaches most genes of the vocabulary.

        Args:
            matrix: The matrix with its candidate columns.
            column: `auto`, or the name of one column. `auto` keeps to Ensembl ids where another
                column reaches hardly more: names change hands, ids do not.

        Returns:
            The mapping; it may be poor, `check_cover` decides.

        Raises:
            UnusableError: The ids are those of another species, or plain numbers.
            ValueError: There is no such column.
        """
        candidates = matrix.gene_columns
        if column != "auto":
            if column not in candidates:
                raise ValueError(
                    f"there is no gene column '{column}'; the file has {', '.join(candidates)}"
                )
            candidates = {column: candidates[column]}
        for names in candidates.values():
            _check_species(names)
        maps = [
            GeneMap(column=name, names=names, target=self.columns(names), n_genes=len(self.genes))
            for name, names in candidates.items()
        ]
        if not maps:
            raise ValueError("the file names no genes")
        best = max(maps, key=lambda gene_map: gene_map.n_mapped)
        if best.n_mapped == 0:
            _check_not_numbers(best.names)
        for gene_map in maps:
            if (
                _is_ensembl(gene_map.names)
                and gene_map.n_mapped >= _ENSEMBL_PREFERENCE * best.n_mapped
            ):
                return gene_map
        return best


def check_cover(gene_map: GeneMap, *, min_genes: int, min_share: float) -> None:
    """Refuse a dataset that shares too few genes with the vocabulary.

    Args:
        gene_map: The mapping of the dataset.
        min_genes: Smallest number of vocabulary genes reached.
        min_share: Smallest share of the dataset's genes that are known, 0 to 1.

    Raises:
        UnusableError: Below one of the two.
    """
    n_input, n_known = len(gene_map.target), int(np.count_nonzero(gene_map.target >= 0))
    examples = ", ".join(str(name) for name in gene_map.names[:3])
    if gene_map.n_mapped < min_genes:
        raise UnusableError(
            f"only {gene_map.n_mapped} of {n_input} genes are in the vocabulary "
            f"(column {gene_map.column}: {examples}...); at least {min_genes} "
            "are needed (--min-genes-mapped)"
        )
    if n_known < min_share * n_input:
        raise UnusableError(
            f"only {n_known} of {n_input} genes ({n_known / n_input:.0%}) are in the vocabulary "
            f"(column {gene_map.column}: {examples}...); at least {min_share:.0%} are needed "
            "(--min-share-mapped)"
        )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonizedSource:
    """A dataset opened in the gene order of a vocabulary."""

    source: Source
    """Barcodes, obs, format."""
    matrix: Matrix
    """The matrix that holds the counts."""
    gene_map: GeneMap
    """Where its genes went."""

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        """Yield consecutive blocks of raw counts.

        Yields:
            CSR (cells, genes of the vocabulary), int64, sorted columns.

        Raises:
            UnusableError: A value that is not a count.
            ValueError: A damaged value or file.
        """
        for block in self.matrix.blocks():
            yield self.gene_map.apply(exact_counts(block, where=self.matrix.name))


def read_harmonized(
    path: str | Path,
    *,
    genes: GeneVocabulary,
    format: str = "auto",
    counts: str = "auto",
    gene_column: str = "auto",
    genome: str = "auto",
    min_genes: int = MIN_GENES_MAPPED,
    min_share: float = MIN_SHARE_MAPPED,
) -> HarmonizedSource:
    """Open any supported file or folder in the gene order of a vocabulary.

    Args:
        path: File or folder.
        genes: The vocabulary (of a corpus or a model).
        format: One of `readers.FORMATS`, or auto.
        counts: auto, X, raw.X or layers/NAME.
        gene_column: auto, or the column that names the genes.
        genome: auto, or the genome to keep of a file with several.
        min_genes: See `check_cover`.
        min_share: See `check_cover`.

    Raises:
        FileNotFoundError: No such file or folder.
        UnusableError: Readable, but not counts of known human genes.
        ValueError: Damaged or of an unknown format.
    """
    resolver = GeneResolver(genes)
    source = open_source(path, format=format, genome=genome, gene_share=resolver.share)
    return harmonize(
        source,
        resolver=resolver,
        counts=counts,
        gene_column=gene_column,
        min_genes=min_genes,
        min_share=min_share,
    )


def harmonize(
    source: Source,
    *,
    resolver: GeneResolver,
    counts: str = "auto",
    gene_column: str = "auto",
    min_genes: int = MIN_GENES_MAPPED,
    min_share: float = MIN_SHARE_MAPPED,
) -> HarmonizedSource:
    """Choose the count matrix of an opened dataset and map its genes.

    Genes are looked at first: that a file is of another species says more than that it is
        normalised.

    Args:
        source: The opened dataset.
        resolver: Finder of the vocabulary in use; built once for many datasets.
        counts: auto, X, raw.X or layers/NAME.
        gene_column: auto, or the column that names the genes.
        min_genes: See `check_cover`.
        min_share: See `check_cover`.

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
    resolver.resolve(source.matrices[0], gene_column)
    matrix = choose_matrix(source.matrices, counts)
    gene_map = resolver.resolve(matrix, gene_column)
    check_cover(gene_map, min_genes=min_genes, min_share=min_share)
    return HarmonizedSource(source=source, matrix=matrix, gene_map=gene_map)


def _read_aliases() -> Mapping[str, str]:
    with gzip.open(ALIASES_PATH, "rt", encoding="utf-8") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        header = next(rows)
        alias, gene = header.index("alias"), header.index("ensembl_id")
        return {row[alias]: row[gene] for row in rows}


def _is_ensembl(names: StringArray) -> bool:
    return sum(_HUMAN_ID.search(str(name)) is not None for name in names) > len(names) / 2


def _check_species(names: StringArray) -> None:
    """Refuse ids of another species, or of several species together."""
    found: dict[str, int] = {}
    for name in names:
        ensembl = _ANY_ENSEMBL_ID.fullmatch(str(name))
        if ensembl and (code := ensembl.group(1)):
            species = _SPECIES.get(code, f"species ENS{code}")
            found[species] = found.get(species, 0) + 1
        elif str(name).startswith(tuple(_OTHER_IDS)):
            species = next(
                label for start, label in _OTHER_IDS.items() if str(name).startswith(start)
            )
            found[species] = found.get(species, 0) + 1
    # A tenth: spike-ins and a few transgenes are no reason to refuse, the second half of a mixed-
    # species run is.
    if sum(found.values()) > 0.1 * len(names):
        species, count = max(found.items(), key=lambda item: item[1])
        raise UnusableError(
            f"{count} of {len(names)} gene ids are {species} ids (such as {_example(names)}); "
            "the vocabulary is human"
        )


def _example(names: StringArray) -> str:
    for name in names:
        ensembl = _ANY_ENSEMBL_ID.fullmatch(str(name))
        if (ensembl and ensembl.group(1)) or str(name).startswith(tuple(_OTHER_IDS)):
            return str(name)
    return ""


def _check_not_numbers(names: StringArray) -> None:
    n_numbers = sum(str(name).strip().isdecimal() for name in names)
    if n_numbers > len(names) / 2:
        raise UnusableError(
            f"the genes are plain numbers ({', '.join(map(str, names[:3]))}...): "
            "neither Ensembl ids nor symbols; name them, or give the column that does (gene_column)"
        )
