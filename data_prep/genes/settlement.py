"""What the gene columns and the list as a whole decide about names that say too little alone.

`join` takes each gene from the column that knows most of it, ids first: names change hands, ids do
not. A gene whose id is of no known gene (retired) falls back to the symbol beside it, one whose id
is of a gene that is not listed does not. `compare` looks for rows of one column that were shifted
or sorted beside those of another one.

`settle` then looks at the list as a whole. An annotation names a gene once: where the list has a
gene by its current name, an alias of it is another place of the genome, which that annotation held
for a gene of its own, and yields; so does, among ids, the symbol of a gene that is there by its id:
it is that of an antibody. A name of several genes means the one that the list does not name
otherwise, if one alone is left. A list with names that HGNC replaced in 2020 (MARCH1, SEPT9) is of
an annotation from before: there SEPT2 and DEC1 are the symbols of SEPTIN2 and DELEC1, and not what
others also call SEPTIN6 and BHLHE40.

Source of the renaming: Bruford et al. 2020, https://doi.org/10.1038/s41588-020-0669-3
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.source.source import StringArray, UnusableError

KINDS = ("ensembl", "symbol", "alias", "settled", "yielded", "ambiguous", "date", "unlisted")
"""How a gene name was resolved. The first four are: by id, by current symbol, by another name of
one gene, by a name of several of which the list leaves one. yielded: an alias, or a symbol among
ids or beside a retired id, of a gene that the list names otherwise; ambiguous: of several genes
still; date: made a date by Excel; unlisted: of no gene of the vocabulary."""
ENSEMBL, SYMBOL, ALIAS, SETTLED, YIELDED, AMBIGUOUS, DATE, UNLISTED = range(len(KINDS))
_LEAST_AGREEMENT = 0.9
"""Two columns name the same genes: ids and symbols of one annotation differ in less than 1%."""
_MOSTLY_APART = 0.5
_FEWEST_PAIRS = 20
_EXAMPLES = 2
_OWN_NAMES = re.compile(
    r"_?index|column \d+|genes?|features?|hgnc|ensembl|accession|"
    r"(?:(?:hgnc|ensembl|gene|feature|var|hugo)[ _.-]*)*(?:ids?|index|names?|symbols?|short_name)",
    re.IGNORECASE,
)
"""Columns of the gene itself, and not of the nearest gene or of a paralog."""
_FEWEST_APART = 10
_APART = 0.01
"""Of the pairs of one annotation, fewer name two genes: symbols that a later gene got."""
_MOSTLY_IDS = 0.9
"""Share of ids from which on a symbol is a second feature of the gene that is there by its id, such
as its antibody."""

_REPLACED = re.compile(r"MARCH\d{1,2}|SEPT\d{1,2}|MARC[12]")
"""Symbols that HGNC replaced in 2020, since Excel made dates of them."""
_SYMBOLS_BEFORE = {"SEPT2": "ENSG00000168385", "DEC1": "ENSG00000173077"}
"""Those of them that Entrez gives to a second gene as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadColumn:
    """A gene column as understood; arrays of one element a gene (n,)."""

    names: StringArray
    """Names as the known ones are written."""
    target: npt.NDArray[np.int64]
    """Column in the vocabulary, -1 for none."""
    kind: npt.NDArray[np.int8]
    """Position in KINDS."""
    retired: npt.NDArray[np.bool_]
    """Whether an id of no known gene stands in the column, or beside it."""
    elsewhere: npt.NDArray[np.bool_]
    """Whether the id is of a known gene that is not in the vocabulary."""
    repairs: Mapping[int, tuple[str, ...]]
    """Repairs by position, where there are any."""

    @property
    def n_mapped(self) -> int:
        """Number of different vocabulary genes that are reached."""
        return int(np.count_nonzero(np.bincount(self.target[self.target >= 0])))


def kind_counts(kind: npt.NDArray[np.int8]) -> dict[str, int]:
    """Return a number of genes for each of KINDS.

    Args:
        kind: (n,) positions in KINDS.
    """
    found = np.bincount(kind, minlength=len(KINDS))
    return {name: int(number) for name, number in zip(KINDS, found, strict=True)}


def join(columns: Mapping[str, ReadColumn], first: str) -> ReadColumn:
    """Take each gene from the column that knows it, of those that name the same genes.

    Args:
        columns: All gene columns of a matrix.
        first: The one that names the genes; the others stand in where it does not.

    Returns:
        One column; `first` itself where no other agrees with it.
    """
    main = columns[first]
    others = [c for name, c in columns.items() if name != first and _agree(main, c)]
    if not others:
        return main
    names, target, kind = main.names.copy(), main.target.copy(), main.kind.copy()
    retired, repairs = main.retired.copy(), dict(main.repairs)
    elsewhere = main.elsewhere.copy()

    def take(column: ReadColumn, rows: npt.NDArray[np.bool_]) -> None:
        for row in np.flatnonzero(rows & (main.target < 0) & (column.target >= 0)).tolist():
            repairs[row] = (*column.repairs.get(row, ()), "beside")
        names[rows], target[rows], kind[rows] = (
            values[rows] for values in (column.names, column.target, column.kind)
        )

    by_id = kind == ENSEMBL
    for column in others:
        rows = ~by_id & (column.kind == ENSEMBL)
        take(column, rows)
        by_id |= rows
    for column in others:
        rows = ~by_id & ~elsewhere & column.elsewhere
        take(column, rows)
        elsewhere |= rows
        retired |= column.retired
    for column in others:
        take(column, (target < 0) & ~elsewhere & (column.target >= 0))
    for column in others:
        unclear = (target < 0) & ~elsewhere & (kind != AMBIGUOUS)
        take(column, unclear & (column.kind == AMBIGUOUS))
    return ReadColumn(
        names=names,
        target=target,
        kind=kind,
        retired=retired & ~by_id,
        elsewhere=elsewhere & ~by_id,
        repairs=repairs,
    )


def compare(columns: Mapping[str, ReadColumn], first: str, symbols: Sequence[str]) -> list[str]:
    """Count the genes that another column calls something else than the one that names them.

    Aliases are no other names. Columns of other genes (the nearest, a paralog) are left out.

    Args:
        columns: All gene columns of a matrix.
        first: The one that names the genes.
        symbols: Of the vocabulary.

    Returns:
        Warnings where some genes are called something else.

    Raises:
        UnusableError: Most are, in each other column with the same genes.
    """
    main, warnings, refused, agreed = columns[first], [], "", False
    there = np.unique(main.target[main.target >= 0])
    for name, other in columns.items():
        both = (main.target >= 0) & (other.target >= 0)
        n_both, known = int(both.sum()), other.target[other.target >= 0]
        same_genes = np.isin(np.unique(known), there).sum()
        own = name != first and _OWN_NAMES.fullmatch(name) is not None
        if not own or n_both < _FEWEST_PAIRS or 2 * same_genes < len(known):
            continue
        apart = np.flatnonzero(both & (main.target != other.target))
        agreed |= len(apart) <= _MOSTLY_APART * n_both
        # A symbol that changed hands stands beside one id; rows that changed places are two.
        moved = np.isin(other.target[apart], main.target[apart]).sum()
        if moved < _FEWEST_APART and len(apart) < max(_FEWEST_APART, _APART * n_both):
            continue
        text = (
            f"the gene columns {first} and {name} name different genes in {len(apart)} of {n_both} "
            f"rows ({_examples(main, other, apart, symbols)})"
        )
        if len(apart) > _MOSTLY_APART * n_both:
            refused = refused or f"{text}: rows of one were shifted or sorted"
        warnings.append(f"{text}; {first} was taken, find out which one is right")
    if refused and not agreed:
        raise UnusableError(
            f"{refused}; correct the table, or name the column that is right in the manifest "
            "column gene_column (--gene-column)"
        )
    return warnings


def _examples(
    one: ReadColumn, other: ReadColumn, rows: npt.NDArray[np.int64], symbols: Sequence[str]
) -> str:
    found = []
    for row in rows[:_EXAMPLES].tolist():
        by_id, beside = (one, other) if one.kind[row] == ENSEMBL else (other, one)
        found.append(
            f"{by_id.names[row]} is {symbols[by_id.target[row]]}, beside it stands "
            f"{beside.names[row]}"
        )
    return "; ".join(found)


def settle(
    column: ReadColumn, meanings: Mapping[str, str], index: Mapping[str, int], *, n_genes: int
) -> ReadColumn:
    """Let aliases yield to current names, and settle names of several genes.

    Args:
        column: The names of a dataset.
        meanings: Gene id of each known name; ids joined by `|` for a name of several genes.
        index: Vocabulary column of each id.
        n_genes: Size of the vocabulary.

    Returns:
        The column, settled.
    """
    target, kind = column.target.copy(), column.kind.copy()
    mapped = target >= 0

    def named(rows: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which of the mapped genes are among those of some rows."""
        reached = np.zeros(n_genes, dtype=bool)
        reached[target[rows]] = True
        return mapped & reached[target]

    yields = column.retired & named(kind == ENSEMBL)
    yields |= (kind == ALIAS) & named(np.isin(kind, (ENSEMBL, SYMBOL)) & ~yields)
    if np.mean((kind == ENSEMBL) | column.elsewhere | column.retired) >= _MOSTLY_IDS:
        yields |= (kind == SYMBOL) & named(kind == ENSEMBL)
    target[yields], kind[yields] = -1, YIELDED
    for gene, name in (_symbols_before(column, meanings) | _only_left(column, meanings)).items():
        if gene in index:
            rows = (kind == AMBIGUOUS) & (column.names == name)
            target[rows], kind[rows] = index[gene], SETTLED
    return ReadColumn(
        names=column.names,
        target=target,
        kind=kind,
        retired=column.retired,
        elsewhere=column.elsewhere,
        repairs=column.repairs,
    )


def repair_counts(column: ReadColumn) -> dict[str, int]:
    """Return how many genes of the vocabulary were found by each repair, most first.

    Args:
        column: The names of a dataset.
    """
    made = (
        repair
        for row, repairs in column.repairs.items()
        if column.target[row] >= 0
        for repair in repairs
    )
    return dict(Counter(made).most_common())


def _only_left(column: ReadColumn, meanings: Mapping[str, str]) -> dict[str, str]:
    """Return the genes that names of several are left with: gene -> the only name that is."""
    unclear = column.kind == AMBIGUOUS
    if not unclear.any():
        return {}
    named = {meanings[name] for name in column.names[~unclear] if name in meanings}
    found: dict[str, set[str]] = {}
    for name in dict.fromkeys(column.names[unclear]):
        left = [gene for gene in meanings[name].split("|") if gene not in named]
        if len(left) == 1:
            found.setdefault(left[0], set()).add(name)
    return {gene: names.pop() for gene, names in found.items() if len(names) == 1}


def _symbols_before(column: ReadColumn, meanings: Mapping[str, str]) -> dict[str, str]:
    """Return the genes that a list from before 2020 names by their symbols of then, by gene."""
    unclear = {name for name in column.names[column.kind == AMBIGUOUS] if name in _SYMBOLS_BEFORE}
    if not unclear:
        return {}
    others = column.names[column.kind == ALIAS]
    if not any(_REPLACED.fullmatch(name) for name in others):
        return {}
    named = {meanings[name] for name in column.names if name in meanings}
    genes = {_SYMBOLS_BEFORE[name]: name for name in unclear}
    return {gene: name for gene, name in genes.items() if gene not in named}


def _agree(first: ReadColumn, second: ReadColumn) -> bool:
    """Return whether two columns name the same genes, wherever both name one."""
    both = (first.target >= 0) & (second.target >= 0)
    n_both = int(np.count_nonzero(both))
    n_same = int(np.count_nonzero(both & (first.target == second.target)))
    alone = int(np.count_nonzero(second.target >= 0))
    return n_same >= _LEAST_AGREEMENT * n_both and 2 * n_both > alone
