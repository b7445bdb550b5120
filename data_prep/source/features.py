"""Which features of a matrix are genes of the one genome to read: one rule behind every reader.

A file may hold antibodies, hashtags, guides and peaks beside genes, and the genes of two species.
Under a gene's name (antibody CD4 is the gene CD4, too) their counts would be added onto genes, so
they are taken out before anything looks at names:

- **Types.** Where a column says the type of each feature (`feature_types`, `feature_type`,
  `modality`, or any column that names a type of 10x Genomics, or holds such words as gene, protein
  and peak alone), only genes are kept. Gene biotypes
  (`feature_type` of CELLxGENE: protein_coding, lncRNA, ...) are not such types, and numbers that
  differ are refused: what they stand for is not in the file. A matrix without types takes those of
  another matrix of the file by the names of the features (raw.X from X).
- **Names.** Without types, a feature is out if one of its names is that of an antibody, hashtag or
  guide (CD4_TotalSeqB, anti-CD4, HTO_1), or if it has a gene's name where nearly all others have an
  Ensembl id, and that gene is there by its id.
- **Genome.** Where a column `genome`, or the fronts of the names (GRCh38_X, mm10___X), tell several
  genomes, one must be chosen by name.

What was left out is counted by reason (`Matrix.left_out`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.source.other_table import found_by_name, stem
from data_prep.source.source import Matrix, RowRange, StringArray, UnusableError

GENE_EXPRESSION = "Gene Expression"
ANTIBODY_NAME = "named like an antibody, hashtag or guide"
SECOND_NAME = "a gene's name among Ensembl ids, beside that gene"
"""Reasons of `Matrix.left_out` where the file gives no types; the others name the type or genome
that was left out."""
TYPE_OF_OTHER = "by its type in another matrix of the file"

_TYPE_COLUMNS = frozenset({"featuretype", "featuretypes", "modality"})
_GENES = frozenset({"geneexpression", "gene", "genes", "gex", "rna", "mrna", "expression"})
_OTHERS = frozenset(
    "abseq adt antibody antibodies antibodycapture antibodyderivedtag antibodyderivedtags antigen "
    "antigencapture atac cite crispr crisprguidecapture custom fragments gdo grna guide guides "
    "hashtag hashtags hto multiplexingcapture peak peaks prot protein proteins sgrna vdj".split()
)
"""Types as they are written, without case, blanks and punctuation."""
_TENX_TYPES = frozenset(
    "geneexpression antibodycapture crisprguidecapture multiplexingcapture antigencapture".split()
)
"""Types that no column of something else holds, whatever its name."""
_BIOTYPE = re.compile(r"(?i)gene|rna|coding|transcript|spike|\btec\b|ribozyme|^(ig|tr)_|ensembl")
_NUMBER = re.compile(r"(?i)[+-]?\d+(\.\d*)?|true|false")
_MOST_TYPES = 64
_ALIKE = 0.9
_GENOME_COLUMNS = frozenset({"genome", "genomes"})
_HUMAN_GENOME = re.compile(r"(?i)^(hg19|hg38|grch37|grch38|human|homo_sapiens)")
_ASSEMBLY = (
    r"(?:GRC[a-z]\d{1,2}|hg\d\d|mm\d{1,2}|rn\d|danRer\d+|canFam\d|susScr\d+|bosTau\d|galGal\d|"
    r"rheMac\d+|human|mouse|[Hh]omo_sapiens|[Mm]us_musculus)(?:\.p\d+)?"
)
_BETWEEN = r"(?:[_-]+|\.{2,})(?=.)"
"""Cell Ranger pads genome names with `_`, Seurat writes `-`, R dots."""
_ENSEMBL_ID = re.compile(r"ENS(?:[A-Z]{3,4})?G\d{11}(?:\.\d+)?(?:_PAR_Y)?")
_MOSTLY = 0.9
_NOT_A_GENE = re.compile(
    r"""(?i:total[-_. ]?seq|hash[-_. ]?tag)
    |^(?:[Aa]nti|ADT|adt|HTO|hto|CMO|prot|Prot|protein|Protein|antibody|Antibody|CITE|cite)[-_. ]
    |^[Aa][Bb]_
    |^(?i:hto|cmo|adt)[-_. ]?\d+$
    |[-_. ](?i:adt|hto|totala|totalb|totalc|antibody|sgrna|grna)(?:[-_.]?\d+)?$
    |[-_.](?:prot|Prot|PROT|protein|Protein)(?:[-_.]?\d+)?$
    |_(?:AB|Ab|ab)(?:[-_.]?\d+)?$""",
    re.VERBOSE,
)
"""No symbol or alias of the bundled tables is like this."""
_PARTS = "seq hash anti adt hto cmo prot body cite ab_ _ab total grna".split()
"""Of which each such name has one, in lower case."""

_Columns = Mapping[str, StringArray]
_Keep = npt.NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class _Selection:
    """Which features of one gene table are read."""

    keep: _Keep
    left_out: Counter[str]
    not_names: set[str]
    """Columns that hold types or genomes."""
    typed: bool = False
    front: re.Pattern[str] | None = None
    """What the chosen genome puts in front of names; taken off."""

    def drop(self, out: _Keep, reasons: StringArray | str) -> None:
        """Leave features out.

        Args:
            out: (features,) which; those that are out already keep their reason.
            reasons: One for all, or (features,).
        """
        out = out & self.keep
        if isinstance(reasons, str):
            reasons = np.full(len(out), reasons, dtype=object)
        self.left_out.update(Counter(str(reason) for reason in reasons[out]))
        self.keep &= ~out


def is_kind_column(name: str) -> bool:
    """Return whether a column of genes is called as those of feature types and genomes are.

    Args:
        name: Of the column.
    """
    return _plain(name) in _TYPE_COLUMNS | _GENOME_COLUMNS


def require_names_only(name: str, reason: str) -> None:
    """Refuse to do without a column that may say which features are genes.

    Args:
        name: Of the column, which cannot be read.
        reason: Why.

    Raises:
        ValueError: It is called as those of feature types and genomes are.
    """
    if is_kind_column(name):
        raise ValueError(
            f"the column '{name}' of the features, which may say what is a gene, cannot be read: "
            f"{reason}; write it again, or remove it if all are genes"
        )


def genes_only(matrices: Sequence[Matrix], *, genome: str) -> tuple[Matrix, ...]:
    """Return the matrices with only the genes of one genome.

    Args:
        matrices: As a reader found them; X and its layers share the mapping of gene columns.
        genome: The genome to keep, or auto (the only one there is).

    Returns:
        Those that hold genes, with `left_out` filled in and without columns of types and genomes.

    Raises:
        UnusableError: No gene expression, or several genomes and none is chosen.
        ValueError: A feature type that is nearly the one of genes; a genome that is not there.
    """
    tables = {id(matrix.gene_columns): matrix.gene_columns for matrix in matrices}
    found = {key: _by_type(columns) for key, columns in tables.items()}
    typed = [(tables[key], selection) for key, selection in found.items() if selection.typed]
    for key, columns in tables.items():
        if not found[key].typed:
            _types_of_others(found[key], columns, typed)
        if found[key].keep.any():
            names = _name_columns(found[key], columns)
            _by_name(found[key], names)
            _by_genome(found[key], columns, names, genome)
    kept = [matrix for matrix in matrices if not _is_empty(found[id(matrix.gene_columns)])]
    if not kept and matrices:
        left_out = found[id(matrices[0].gene_columns)].left_out
        reasons = ", ".join(reason.removeprefix("feature type ") for reason in left_out)
        raise UnusableError(f"no features of type '{GENE_EXPRESSION}'; found: {reasons}")
    selected = {key: _selected_columns(found[key], columns) for key, columns in tables.items()}
    return tuple(
        _selected(matrix, found[id(matrix.gene_columns)], selected[id(matrix.gene_columns)])
        for matrix in kept
    )


def pick_genome(names: Sequence[str], wanted: str, *, guess: bool = True) -> str:
    """Return the genome to read of a file that holds several.

    Args:
        names: The genomes of the file.
        wanted: The user's choice, or auto.
        guess: Whether auto may take the only human one of several.

    Raises:
        UnusableError: Several, and the choice is open.
        ValueError: The genome asked for is not there.
    """
    if wanted != "auto":
        alike = [name for name in names if name.lower() == wanted.lower()]
        if wanted not in names and len(alike) != 1:
            raise ValueError(
                f"there is no genome '{wanted}'; the file holds {', '.join(names) or 'none'}"
            )
        return wanted if wanted in names else alike[0]
    human = [name for name in names if _HUMAN_GENOME.match(name)]
    if len(names) == 1:
        return names[0]
    if guess and len(human) == 1:
        return human[0]
    raise UnusableError(
        f"several genomes ({', '.join(names)}): "
        "name the one to keep in the manifest column 'genome'"
    )


def kept_columns(block: sparse.csr_matrix, keep: _Keep) -> sparse.csr_matrix:
    """Return some columns of a block; repeated and unsorted values stay as they are.

    Args:
        block: (cells, features).
        keep: (features,) which.
    """
    place = np.where(keep, np.cumsum(keep) - 1, -1)
    columns = place[block.indices]
    inside = columns >= 0
    row_ptr = np.concatenate(([0], np.cumsum(inside)))[block.indptr]
    shape = (block.shape[0], int(keep.sum()))
    return sparse.csr_matrix((block.data[inside], columns[inside], row_ptr), shape=shape)


def _is_empty(selection: _Selection) -> bool:
    """Return whether nothing is left of a table that had features."""
    return bool(len(selection.keep)) and not selection.keep.any()


def _selected_columns(selection: _Selection, columns: _Columns) -> _Columns:
    named = {}
    for name, values in columns.items():
        if name in selection.not_names:
            continue
        kept = values if selection.keep.all() else values[selection.keep]
        if selection.front is not None:
            front = selection.front
            kept = np.array([front.sub("", str(value), count=1) for value in kept], dtype=object)
        named[name] = kept
    return named


def _selected(matrix: Matrix, selection: _Selection, columns: _Columns) -> Matrix:
    keep = selection.keep
    # Whether a matrix fits its gene table is for the readers to say.
    if keep.all() or matrix.shape[1] != len(keep):
        return replace(matrix, gene_columns=columns)

    def blocks() -> Iterator[sparse.csr_matrix]:
        for block in matrix.blocks():
            yield kept_columns(block, keep)

    def ranges(start: int, stop: int) -> RowRange:
        assert matrix.ranges is not None
        first, last, found = matrix.ranges(start, stop)
        return first, last, (kept_columns(block, keep) for block in found)

    return replace(
        matrix,
        shape=(matrix.shape[0], int(keep.sum())),
        gene_columns=columns,
        blocks=blocks,
        ranges=matrix.ranges and ranges,
        left_out=dict(selection.left_out.most_common()),
        features=np.flatnonzero(keep),
    )


def _plain(text: object) -> str:
    """Return a text without case, blanks and punctuation."""
    return re.sub(r"[^a-z0-9]+", "", str(text).lower())


def _by_type(columns: _Columns) -> _Selection:
    n_features = len(next(iter(columns.values()), ()))
    selection = _Selection(
        keep=np.ones(n_features, dtype=bool), left_out=Counter(), not_names=set()
    )
    for name, values in columns.items():
        types = {str(value) for value in values}
        if _plain(name) in _TYPE_COLUMNS and _are_numbers(name, types):
            selection.not_names.add(name)
        elif len(types) <= _MOST_TYPES and _are_types(types, _plain(name)):
            selection.not_names.add(name)
            selection.typed = True
            _drop_types(selection, values, columns)
    return selection


def _are_numbers(column: str, types: set[str]) -> bool:
    """Return whether the values of a column of types are one number, which tells nothing.

    Raises:
        ValueError: They are different numbers.
    """
    numbers = sorted(types - {""})
    if not numbers or not all(_NUMBER.fullmatch(value) for value in numbers):
        return False
    if len(types) > 1:
        raise ValueError(
            f"the column '{column}' of the features holds numbers ({', '.join(numbers[:4])}), "
            f"which do not say what is a gene; write '{GENE_EXPRESSION}' for genes and another "
            "word for the others, or remove the column if all are genes"
        )
    return True


def _are_types(types: set[str], column: str) -> bool:
    """Return whether the values of a column are types of features, and not of genes.

    Args:
        types: The different values.
        column: Its name, without case and punctuation. In a column that is called feature type any
            word is one, even if it is not known, unless it is a biotype.
    """
    plain = {_plain(value) for value in types}
    if column not in _TYPE_COLUMNS:
        # Genes beside something else, and no other word; gene_type may mean rna and protein coding.
        alone = plain <= _GENES | _OTHERS | {""} and "gene" not in column and "bio" not in column
        both = alone and plain & _GENES and plain & _OTHERS
        return bool(plain & _TENX_TYPES or both)
    if plain & (_GENES | _OTHERS) or any(_is_damaged(value) for value in types if value):
        return True
    biotypes = any(_BIOTYPE.search(value) for value in types)
    return column != "modality" and not biotypes and bool(plain - {""})


def _is_damaged(name: str) -> bool:
    alike = SequenceMatcher(None, GENE_EXPRESSION, name).ratio() > _ALIKE
    return alike or GENE_EXPRESSION.startswith(name)


def _drop_types(selection: _Selection, types: StringArray, columns: _Columns) -> None:
    others = {str(name) for name in set(types) if _plain(name) not in _GENES}
    for name in sorted(others - {""}):
        # Such a gene would be dropped in silence.
        if _is_damaged(name):
            raise ValueError(f"a feature is of type '{name}'; a damaged '{GENE_EXPRESSION}'?")
    untyped = types == ""
    if untyped.any():
        # Concatenation leaves types out; an Ensembl id is that of a gene all the same.
        unknown = untyped & ~_with_ensembl_id(columns)
        if unknown.any():
            example = next(iter(columns.values()))[unknown][0]
            raise ValueError(
                f"{np.count_nonzero(unknown)} features (such as '{example}') are of no type "
                f"(''), others are; a damaged '{GENE_EXPRESSION}'? Write the type of each"
            )
    out = np.isin(types, list(others - {""}))
    reasons = np.array([f"feature type {name}" for name in types], dtype=object)
    selection.drop(out, reasons)


def _with_ensembl_id(columns: _Columns) -> _Keep:
    """Return (features,) which have an Ensembl id in any column."""
    ids = [
        [_ENSEMBL_ID.search(str(value)) is not None for value in values]
        for values in columns.values()
    ]
    return np.logical_or.reduce(np.array(ids, dtype=bool))


def _types_of_others(
    selection: _Selection, columns: _Columns, typed: Sequence[tuple[_Columns, _Selection]]
) -> None:
    """Take the types of another gene table of the file, place by place or by names.

    Features that the other table does not name keep the rules of names.

    Raises:
        ValueError: Nobody can tell which of these features are the others of that table.
    """
    own = _name_columns(selection, columns)
    for other, types in typed:
        names = _name_columns(types, other)
        if not own or not names:
            continue
        alike = [name for name in own if name in names and len(own[name]) == len(names[name])]
        if any((own[name] == names[name]).all() for name in alike):
            selection.typed = True
            selection.drop(~types.keep, TYPE_OF_OTHER)
            continue
        is_gene, is_other, missed = found_by_name(own, names, types.keep)
        first, both = next(iter(own.values())), is_gene & is_other
        if both.any():
            raise ValueError(
                f"the feature '{first[both][0]}' is a gene and something else in "
                "the table of X; give the gene table of raw.X its own feature_types"
            )
        unknown = ~is_gene & ~is_other
        untold = unknown & ~_with_ensembl_id(columns)
        if missed and untold.any():
            raise ValueError(
                f"in the table of X '{missed}' is no gene, and {np.count_nonzero(untold)} features "
                f"of raw.X (such as '{first[untold][0]}') are not in that table; "
                "give the gene table of raw.X its own feature_types"
            )
        selection.typed |= not unknown.any()
        selection.drop(is_other, TYPE_OF_OTHER)


def _name_columns(selection: _Selection, columns: _Columns) -> dict[str, StringArray]:
    """Return the columns that hold names, not text about features or classes of them."""
    named = {}
    for name, values in columns.items():
        if name != "index":
            n_blank = sum(" " in str(value).strip() for value in values)
            few = len(set(values)) < len(values) / 2
            if name in selection.not_names or few or n_blank > len(values) * (1 - _MOSTLY):
                continue
        named[name] = values
    # Where every column is like text about features, one of them names them all the same.
    return named or {n: v for n, v in columns.items() if n not in selection.not_names}


def _by_name(selection: _Selection, names: Mapping[str, StringArray]) -> None:
    like = np.zeros(len(selection.keep), dtype=bool)
    for values in names.values():
        text = "\n".join(map(str, values)).lower()
        if any(part in text for part in _PARTS):
            like |= [_NOT_A_GENE.search(str(value)) is not None for value in values]
    selection.drop(like, ANTIBODY_NAME)
    if selection.typed or len(names) < 2:
        return
    for name, ids in names.items():
        is_id = np.array([_ENSEMBL_ID.search(str(value)) is not None for value in ids], dtype=bool)
        if not _MOSTLY <= np.mean(is_id) < 1:
            continue
        listed: set[str] = set()
        for other, values in names.items():
            if other != name:
                listed.update(values[is_id])
        listed.discard("")
        second = np.zeros(len(ids), dtype=bool)
        for values in names.values():
            second |= [value in listed or stem(value) in listed for value in values]
        selection.drop(~is_id & second, SECOND_NAME)


def _by_genome(
    selection: _Selection, columns: _Columns, names: Mapping[str, StringArray], wanted: str
) -> None:
    sources: list[tuple[StringArray, bool]] = []
    for name, values in columns.items():
        if _plain(name) in _GENOME_COLUMNS and name != "index":
            selection.not_names.add(name)
            sources.append((values, False))
    sources.append((_fronts(list(names.values()), wanted, len(selection.keep)), True))
    found: list[str] = []
    chosen = wanted == "auto"
    for labels, of_names in sources:
        genomes = sorted({str(label) for label in labels[selection.keep]} - {""})
        found += genomes
        if len(genomes) < 2 and wanted.lower() not in (name.lower() for name in genomes):
            continue
        # Cells of the other genome share the barcode list, so that nobody can choose for the user.
        picked, chosen = pick_genome(genomes, wanted, guess=False), True
        # Where one genome alone is named, a feature that names none is not of another.
        if len(genomes) > 1:
            reasons = np.array([f"genome {label or 'not given'}" for label in labels], dtype=object)
            selection.drop(labels != picked, reasons)
        if of_names:
            selection.front = re.compile(rf"^{re.escape(picked)}{_BETWEEN}")
    if not chosen:
        raise ValueError(
            f"there is no genome '{wanted}'; the file holds {', '.join(found) or 'none by name'}"
        )


def _fronts(columns: Sequence[StringArray], wanted: str, n_features: int) -> StringArray:
    """Return (features,) the genome in front of each feature's names, '' where there is none."""
    own = "" if wanted == "auto" else f"{re.escape(wanted)}|"
    front = re.compile(rf"({own}{_ASSEMBLY}){_BETWEEN}")
    labels = np.full(n_features, "", dtype=object)
    anywhere = re.compile(f"^{front.pattern}", re.MULTILINE)
    for values in columns:
        # One search through all of them is much faster than one for each.
        if not anywhere.search("\n".join(map(str, values))):
            continue
        for place, value in enumerate(values):
            match = front.match(str(value))
            if match is not None and not labels[place]:
                labels[place] = match.group(1)
    return labels
