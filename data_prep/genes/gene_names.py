"""Gene names of any kind to columns of the vocabulary: Ensembl ids, symbols, aliases.

A human Ensembl id must be listed; anything else is a symbol, looked up among the current symbols of
the vocabulary, then among the previous and other names of resources/symbol_aliases.tsv.gz. That
table holds only names that mean one gene. Names that mean no gene as they stand are repaired where
the fault is mechanical (`gene_spelling.py`). Matching is case-sensitive: gene names that differ
only in case exist.

The gene columns and the list as a whole then decide what a name alone cannot
(`gene_settlement.py`): a retired id falls back to the symbol beside it, an alias yields to a gene
that the list names by its current name, and of a name of several genes
(resources/ambiguous_symbols.tsv.gz) the one that is not in the list otherwise is taken.

Genes that are known and not in the vocabulary (resources/other_genes.tsv.gz) count as unlisted:
their names are never repaired, and their ids never fall back, to those of a listed gene.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.genes.settlement import (
    DATE,
    KINDS,
    UNLISTED,
    ReadColumn,
    compare,
    join,
    kind_counts,
    repair_counts,
    settle,
)
from data_prep.genes.species import HUMAN, find_other_species, species_of
from data_prep.genes.spelling import (
    Speller,
    bare_name,
    is_day_number,
    is_excel_date,
    is_missing,
    without_suffix,
)
from data_prep.source.source import Matrix, StringArray, UnusableError
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.files.atomic import read_file

RESOURCES = Path(__file__).parents[1] / "resources"
ALIASES_PATH = RESOURCES / "symbol_aliases.tsv.gz"
AMBIGUOUS_PATH = RESOURCES / "ambiguous_symbols.tsv.gz"
OTHER_PATH = RESOURCES / "other_genes.tsv.gz"
_ENSEMBL_PREFERENCE = 0.95
_CODES = {kind: code for code, kind in enumerate(KINDS)}
_ID_IN_NAME = re.compile(r"ENS(?:[A-Z]{3,4})?G(?:\d{11}|R\d{10})(?!\d)", re.IGNORECASE)
_ANY_ENSEMBL_ID = re.compile(r"(?:[A-Za-z0-9.]+_+)?ENS(?:[A-Z]{3,4})?G\d{11}(?:\.\d+)?(?:_PAR_Y)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneMap:
    """Which column of the vocabulary each gene of a dataset goes to."""

    column: str
    """The gene column that was used."""
    names: StringArray
    """Its values: the dataset's genes in file order."""
    target: npt.NDArray[np.int64]
    """(n_input,) column in the vocabulary, -1 for genes that are not in it."""
    kind: npt.NDArray[np.int8]
    """(n_input,) how each name was resolved, as a position in KINDS."""
    repairs: Mapping[str, int]
    """Names by the repair (`gene_spelling.REPAIRS`) without which they had not been found."""
    read: StringArray
    """(n_input,) the names as they were understood."""
    n_genes: int
    """Size of the vocabulary."""
    warnings: tuple[str, ...] = ()
    """Where another gene column contradicts the one that was used."""

    @property
    def kinds(self) -> dict[str, int]:
        """Genes of the dataset by how their name was resolved (KINDS)."""
        return kind_counts(self.kind)

    @property
    def measured(self) -> npt.NDArray[np.bool_]:
        """(n_genes,) genes of the vocabulary that the dataset names; of others nothing is known."""
        named = np.zeros(self.n_genes, dtype=bool)
        named[self.target[self.target >= 0]] = True
        return named

    @property
    def n_mapped(self) -> int:
        """Number of different vocabulary genes that are reached."""
        return int(np.count_nonzero(self.measured))

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
        genes: The vocabulary. Where it has no symbols (a plain list of human ids) those of the
            bundled table are used. One of another species has no aliases.

    Attributes:
        species: The vocabulary's, as its ids tell it.

    Raises:
        ValueError: A vocabulary of several species.
    """

    def __init__(self, genes: GeneVocabulary) -> None:
        self.genes, self.species = genes, species_of(genes.ids)
        human = self.species == HUMAN
        index, named = genes.index, genes
        if human and genes.ids == genes.symbols:
            named = GeneVocabulary.bundled()
        symbols = dict(zip(named.symbols, named.ids, strict=True))
        aliases, several, others = _human_names(symbols, index) if human else ({}, {}, {})
        # What each name means, so that repairs see whether two names mean the same; a current name
        # comes before an alias, an alias before a name of several genes.
        single = others | aliases | symbols | {gene: gene for gene in genes.ids}
        self._meanings = several | single
        self._kinds = dict.fromkeys(several, "ambiguous") | dict.fromkeys(single, "unlisted")
        self._columns: dict[str, int] = {}
        for kind, table in (("alias", aliases), ("symbol", symbols)):
            for name, gene in table.items():
                if gene in index:
                    self._columns[name] = index[gene]
                    self._kinds[name] = kind
        self._columns |= index
        self._kinds |= dict.fromkeys(index, "ensembl")
        self._speller = Speller(self._meanings, species=self.species)

    def columns(self, names: StringArray) -> npt.NDArray[np.int64]:
        """Return the vocabulary column of each name of a dataset's list, -1 where it has none.

        Args:
            names: (n,) Ensembl ids, symbols or aliases, in any mixture.
        """
        return self._alone(names).target

    def kinds(self, names: StringArray) -> dict[str, int]:
        """Return how many names of a dataset's list are resolved as what, or not.

        Args:
            names: (n,) gene names.

        Returns:
            A number for each of KINDS.
        """
        return kind_counts(self._alone(names).kind)

    def read_name(self, name: object) -> str:
        """Return a name as the known ones are written, or as it stands where none is meant.

        Args:
            name: As in the file.
        """
        return self._speller.read(name)[0]

    def _alone(self, names: StringArray) -> ReadColumn:
        column = self._read_column(names)
        return settle(column, self._meanings, self.genes.index, n_genes=len(self.genes))

    def _read_column(self, texts: StringArray) -> ReadColumn:
        names, known = list(texts), self._meanings
        repairs = {}
        for row in [row for row, text in enumerate(names) if text not in known]:
            names[row], made = self._speller.read(names[row])
            if made:
                repairs[row] = made
        doubtful = self._undo_suffixes(texts, names, repairs)
        kinds, columns = self._kinds, self._columns
        unknown = np.array([name not in kinds for name in names], dtype=bool)
        kind = np.array([_CODES[kinds.get(name, "unlisted")] for name in names], dtype=np.int8)
        target = np.array([columns.get(name, -1) for name in names], dtype=np.int64)
        ids = np.array([name[:3] == "ENS" and name[-11:].isdecimal() for name in names], dtype=bool)
        kind[_dates(names, np.flatnonzero(unknown & ~ids))] = DATE
        kind[doubtful], target[doubtful] = UNLISTED, -1
        retired = ids & unknown
        for row, made in repairs.items():
            retired[row] |= "beside" in made
        return ReadColumn(
            names=np.array(names, dtype=object),
            target=target,
            kind=kind,
            retired=retired,
            elsewhere=ids & ~unknown & (kind == UNLISTED),
            repairs=repairs,
        )

    def _undo_suffixes(
        self, texts: StringArray, names: list[str], repairs: dict[int, tuple[str, ...]]
    ) -> list[int]:
        """Read TBCE.1 as TBCE where TBCE is there too, in place.

        Returns:
            Rows of names that may as well be another gene's: HCCS-1 is an alias of ST20, and a
            second HCCS of a list with HCCS; NKX2.1 is R's way to write NKX2-1, and a second NKX2.
        """
        there, known, kinds = {*names, *texts}, self._meanings, self._kinds
        doubtful = []
        sure = ("ensembl", "symbol", "unlisted")
        rows = [
            row
            for row, name in enumerate(names)
            if kinds.get(name) not in sure and name[-1:].isdigit()
        ]
        rows += [row for row, made in repairs.items() if "characters" in made]
        for row in dict.fromkeys(rows):
            name = names[row]
            text = str(texts[row]).strip() if name in known else name
            stem = without_suffix(text)
            if stem is None or stem not in there:
                continue
            stem = self.read_name(stem)
            if stem not in known:
                continue
            if name not in known:
                names[row], repairs[row] = stem, (*repairs.get(row, ()), "suffix")
            elif known[stem] != known[name]:
                doubtful.append(row)
        return doubtful

    def knows(self, name: str) -> bool:
        """Return whether a name is a gene name of the vocabulary's species, listed or not.

        Args:
            name: Ensembl id, symbol or alias.
        """
        return name in self._kinds or self.read_name(name) in self._kinds

    def share(self, names: StringArray) -> float:
        """Return the share of names that are genes: known ones, in any case, and Ensembl ids.

        Args:
            names: (n,) names of genes of any species, or of something else.
        """
        if not len(names):
            return 0.0
        return float(np.mean([self._is_gene(self.read_name(name)) for name in names]))

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
            id_type: One of `spelling.ID_TYPES`; leaves only columns of that type to choose from.

        Returns:
            The mapping; it may be poor, `check_cover` decides.

        Raises:
            UnusableError: The ids are those of another species, or plain numbers, or another
                column contradicts them in most rows.
            ValueError: There is no such column.
        """
        candidates = _candidates(matrix.gene_columns, column, id_type)
        for names in candidates.values():
            _check_species(names, self)
        read = {name: self._read_column(names) for name, names in candidates.items()}
        most = max(column.n_mapped for column in read.values())
        chosen = next(name for name, c in read.items() if c.n_mapped == most)
        if most == 0:
            _check_not_numbers(candidates[chosen])
        for name, found in read.items():
            if found.n_mapped >= _ENSEMBL_PREFERENCE * most and _are_ids(found.names):
                chosen = name
                break
        warnings = compare(read, chosen, self.genes.symbols)
        joined = settle(
            join(read, chosen), self._meanings, self.genes.index, n_genes=len(self.genes)
        )
        return GeneMap(
            column=chosen,
            names=candidates[chosen],
            target=joined.target,
            kind=joined.kind,
            repairs=repair_counts(joined),
            read=joined.names,
            n_genes=len(self.genes),
            warnings=tuple(warnings),
        )


def id_type_of(names: StringArray) -> str:
    """Return ensembl if most names are Ensembl ids, else symbol.

    Args:
        names: (n,) gene names.
    """
    return "ensembl" if _are_ids(names) else "symbol"


def _are_ids(names: StringArray) -> bool:
    n_ids = 0
    for name in names:
        n_ids += _ID_IN_NAME.search(str(name)) is not None
        if n_ids > len(names) / 2:
            return True
    return False


def _dates(names: Sequence[str], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which of some rows are names that Excel made dates."""
    days = [row for row in rows if is_day_number(names[row])]
    dates = [row for row in rows if is_excel_date(names[row])]
    # Where numbers are many they are numbers.
    return np.array(dates + (days if len(days) <= len(names) / 20 else []), dtype=np.int64)


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


def _human_names(
    symbols: Mapping[str, str], index: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Return what the bundled tables know beside the symbols of a vocabulary.

    Args:
        symbols: Id of each current symbol.
        index: Column of each id of the vocabulary.

    Returns:
        Ids of aliases, ids joined by `|` of names of several genes, ids of other genes.
    """
    aliases = dict(_aliases())
    several = {
        name: candidates
        for name, candidates in _read_names(AMBIGUOUS_PATH).items()
        if any(gene in index for gene in candidates.split("|"))
    }
    for symbol, gene in symbols.items():
        # KRTAP16.1 is an alias of KRTAP17-1, and what R makes of KRTAP16-1.
        dotted = symbol.replace("-", ".")
        if dotted in aliases and aliases[dotted] != gene:
            several[dotted] = f"{gene}|{aliases.pop(dotted)}"
    bundled = GeneVocabulary.bundled()
    listed = {symbol for symbol, gene in symbols.items() if gene in index}
    others: dict[str, str] = {}
    bundled_symbols = zip(bundled.symbols, bundled.ids, strict=True)
    for symbol, gene in (*bundled_symbols, *_read_names(OTHER_PATH).items()):
        # The second id of a listed symbol is as good as retired: it may fall back to it.
        if symbol not in listed:
            others[gene] = others[symbol] = gene
    return aliases, several, others


@cache
def _bundled_resolver() -> GeneResolver:
    return GeneResolver(GeneVocabulary.bundled())


def resolver_of(genes: GeneVocabulary) -> GeneResolver:
    """Return the resolver of a vocabulary; that of the bundled one is made once a process.

    Args:
        genes: The vocabulary.

    Raises:
        ValueError: A vocabulary of several species.
    """
    return _bundled_resolver() if genes == GeneVocabulary.bundled() else GeneResolver(genes)


@cache
def _aliases() -> Mapping[str, str]:
    """Return the gene of each alias that cannot stand for a missing name."""
    names = _read_names(ALIASES_PATH)
    short = [name for name in names if len(name) <= 4 or not name[0].isalpha()]
    for name in filter(is_missing, short):
        del names[name]
    return names


def _read_names(path: Path) -> dict[str, str]:
    """Read a table whose first two columns are names and what they mean."""
    header, _, rows = gzip.decompress(read_file(path)).decode().partition("\n")
    n_columns = header.count("\t") + 1
    cells = rows.removesuffix("\n").replace("\n", "\t").split("\t")
    return dict(zip(cells[::n_columns], cells[1::n_columns], strict=True))


def _check_species(names: StringArray, resolver: GeneResolver) -> None:
    """Refuse names of another species, or of several species together."""
    other = find_other_species(names, resolver.knows, home=resolver.species)
    if other is not None:
        raise UnusableError(
            f"{other.n_genes} of {len(names)} gene {other.kind} are {other.name} {other.kind} "
            f"(such as {other.example}); the vocabulary is {resolver.species}"
        )


def _check_not_numbers(names: StringArray) -> None:
    n_numbers = sum(bare_name(name).isdecimal() for name in names)
    if n_numbers > len(names) / 2:
        raise UnusableError(
            f"the genes are plain numbers ({', '.join(map(str, names[:3]))}...): "
            "neither Ensembl ids nor symbols; name them, or give the column that does (gene_column)"
        )
