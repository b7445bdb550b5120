"""Gene names of any kind to columns of the vocabulary: Ensembl ids, symbols, aliases.

A name is resolved by itself, whatever column it came from: a human Ensembl id (version and genome
prefix removed) must be listed; anything else is a symbol, looked up among the current symbols of
the vocabulary, then among the previous and other names of resources/symbol_aliases.tsv.gz. That
table holds only names that mean one gene; names of several (resources/ambiguous_symbols.tsv.gz) are
counted and never guessed. Matching is case-sensitive: gene names that differ only in case exist.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.source import Matrix, StringArray, UnusableError
from data_prep.species import find_other_species
from sclong_ds.genes import GeneVocabulary

RESOURCES = Path(__file__).parent / "resources"
ALIASES_PATH = RESOURCES / "symbol_aliases.tsv.gz"
AMBIGUOUS_PATH = RESOURCES / "ambiguous_symbols.tsv.gz"
ID_TYPES = ("auto", "ensembl", "symbol")
KINDS = ("ensembl", "symbol", "alias", "ambiguous", "unlisted")
"""How a gene name was resolved; the last two are not."""

_GENOME = re.compile(r"^(?:GRCh3[78]|hg19|hg38)_+")
_HUMAN_ID = re.compile(r"(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?")
_ANY_ENSEMBL_ID = re.compile(r"(?:[A-Za-z0-9.]+_+)?ENS(?:[A-Z]{3,4})?G\d{11}(?:\.\d+)?(?:_PAR_Y)?")
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
    kinds: Mapping[str, int]
    """Genes of the dataset by how their name was resolved (KINDS)."""
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
        columns = self.target.astype(np.int32)[counts.indices]
        data, row_ptr = counts.data, counts.indptr
        gone = np.flatnonzero(columns < 0)
        if len(gone):
            kept = columns >= 0
            data, columns = data[kept], columns[kept]
            row_ptr = row_ptr - np.searchsorted(gone, row_ptr)
        shape = (counts.shape[0], self.n_genes)
        mapped = sparse.csr_matrix((data, columns, row_ptr), shape=shape)
        if not mapped.has_sorted_indices:
            # By way of the transpose: twice as fast as sorting every row by itself.
            mapped = mapped.tocsc().tocsr()
        elif not mapped.has_canonical_format:
            # Summing works in place, and the values may be those of `counts`.
            mapped = mapped.copy()
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
        self._kinds = dict.fromkeys(genes.ids, "ensembl")
        symbols = dict(zip(bundled.symbols, bundled.ids, strict=True))
        for kind, table in (("symbol", symbols), ("alias", _read_names(ALIASES_PATH))):
            for name, gene in table.items():
                if gene in genes.index and name not in self._columns:
                    self._columns[name] = genes.index[gene]
                    self._kinds[name] = kind
        for name, candidates in _read_names(AMBIGUOUS_PATH).items():
            if any(gene in genes.index for gene in candidates.split("|")):
                self._kinds.setdefault(name, "ambiguous")

    def columns(self, names: StringArray) -> npt.NDArray[np.int64]:
        """Return the vocabulary column of each name, -1 where it is not known.

        Args:
            names: (n,) Ensembl ids, symbols or aliases, in any mixture.
        """
        known = self._columns
        return np.fromiter((known.get(bare_name(name), -1) for name in names), np.int64, len(names))

    def kinds(self, names: StringArray) -> dict[str, int]:
        """Return how many names are resolved as what, or not.

        Args:
            names: (n,) gene names.

        Returns:
            A number for each of KINDS.
        """
        found = Counter(self._kinds.get(bare_name(name), "unlisted") for name in names)
        return {kind: found[kind] for kind in KINDS}

    def knows(self, name: str) -> bool:
        """Return whether a name is a human gene name: listed, or of several genes.

        Args:
            name: Ensembl id, symbol or alias.
        """
        return bare_name(name) in self._kinds

    def share(self, names: StringArray) -> float:
        """Return the share of names that are genes: known ones, in any case, and Ensembl ids.

        Args:
            names: (n,) names of genes of any species, or of something else.
        """
        if not len(names):
            return 0.0
        return float(np.mean([self._is_gene(bare_name(name)) for name in names]))

    def _is_gene(self, name: str) -> bool:
        return (
            name in self._kinds
            or name.upper() in self._kinds
            or _ANY_ENSEMBL_ID.fullmatch(name) is not None
        )

    def resolve(self, matrix: Matrix, column: str = "auto", id_type: str = "auto") -> GeneMap:
        """Choose the gene column that reaches most genes of the vocabulary.

        Args:
            matrix: The matrix with its candidate columns.
            column: `auto`, or the name of one column. `auto` keeps to Ensembl ids where another
                column reaches hardly more: names change hands, ids do not.
            id_type: One of ID_TYPES; leaves only columns of that type to choose from.

        Returns:
            The mapping; it may be poor, `check_cover` decides.

        Raises:
            UnusableError: The ids are those of another species, or plain numbers.
            ValueError: There is no such column.
        """
        candidates = _candidates(matrix.gene_columns, column, id_type)
        for names in candidates.values():
            _check_species(names, self)
        maps = [
            GeneMap(
                column=name,
                names=names,
                target=self.columns(names),
                kinds=self.kinds(names),
                n_genes=len(self.genes),
            )
            for name, names in candidates.items()
        ]
        best = max(maps, key=lambda gene_map: gene_map.n_mapped)
        if best.n_mapped == 0:
            _check_not_numbers(best.names)
        for gene_map in maps:
            if (
                id_type_of(gene_map.names) == "ensembl"
                and gene_map.n_mapped >= _ENSEMBL_PREFERENCE * best.n_mapped
            ):
                return gene_map
        return best


@lru_cache(maxsize=2**18)
def bare_name(name: object) -> str:
    """Return a gene name without blanks around it, genome prefix and Ensembl version.

    Args:
        name: As in the file.
    """
    text = _GENOME.sub("", str(name).strip())
    human = _HUMAN_ID.fullmatch(text)
    return human.group(1) if human else text


def id_type_of(names: StringArray) -> str:
    """Return ensembl if most names are human Ensembl ids, else symbol.

    Args:
        names: (n,) gene names.
    """
    n_ids = sum(_HUMAN_ID.fullmatch(bare_name(name)) is not None for name in names)
    return "ensembl" if n_ids > len(names) / 2 else "symbol"


def _candidates(
    columns: Mapping[str, StringArray], column: str, id_type: str
) -> Mapping[str, StringArray]:
    if not columns:
        raise ValueError("the file names no genes")
    if column != "auto":
        if column not in columns:
            raise ValueError(
                f"there is no gene column '{column}'; the file has {', '.join(columns)}"
            )
        columns = {column: columns[column]}
    if id_type == "auto":
        return columns
    chosen = {name: names for name, names in columns.items() if id_type_of(names) == id_type}
    if not chosen:
        found = ", ".join(f"{name} ({id_type_of(names)})" for name, names in columns.items())
        raise ValueError(f"no gene column is of the id_type {id_type}; the file has {found}")
    return chosen


def _read_names(path: Path) -> dict[str, str]:
    """Read a table of two columns, names and what they mean."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        next(file)
        return dict(line.rstrip("\n").split("\t")[:2] for line in file)


def _check_species(names: StringArray, resolver: GeneResolver) -> None:
    """Refuse names of another species, or of several species together."""
    other = find_other_species(names, resolver.knows)
    if other is not None:
        raise UnusableError(
            f"{other.n_genes} of {len(names)} gene {other.kind} are {other.name} {other.kind} "
            f"(such as {other.example}); the vocabulary is human"
        )


def _check_not_numbers(names: StringArray) -> None:
    n_numbers = sum(str(name).strip().isdecimal() for name in names)
    if n_numbers > len(names) / 2:
        raise UnusableError(
            f"the genes are plain numbers ({', '.join(map(str, names[:3]))}...): "
            "neither Ensembl ids nor symbols; name them, or give the column that does (gene_column)"
        )
