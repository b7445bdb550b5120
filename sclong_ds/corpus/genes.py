"""The gene vocabulary: which genes a corpus and a model know, in which order, and its hash.

Reads tab-separated tables with a header that names `ensembl_id`, `symbol` and `class` (gzip or not,
other columns are ignored) and plain lists of ids, one a line. Writes tab-separated tables. A
corpus, a gene graph and a model fit together only if the `hash` of their vocabularies is the same.

    genes = GeneVocabulary.bundled()
    genes.index["ENSG00000141510"]          # column of TP53
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from sclong_ds.files.atomic import read_file, write_atomic
from sclong_ds.files.places import place_of

BUNDLED_PATH = place_of("data_prep") / "resources" / "genes_27874.tsv.gz"
UNKNOWN_CLASS = "unknown"
_CLASSES = ("protein_coding", "non_coding", UNKNOWN_CLASS)
_COLUMNS = ("ensembl_id", "symbol", "class")


@dataclass(frozen=True)
class GeneVocabulary:
    """An ordered list of genes; position i is column i of every cell and every model output."""

    ids: tuple[str, ...]
    """Ensembl gene ids without version, unique, in column order."""
    symbols: tuple[str, ...]
    """Gene symbols; the id where the source has no symbol."""
    classes: tuple[str, ...]
    """protein_coding or non_coding; unknown where the source was a plain list of ids."""

    def __post_init__(self) -> None:
        """Refuse tables whose columns differ in length, and empty or repeated ids."""
        if not len(self.ids) == len(self.symbols) == len(self.classes):
            raise ValueError(
                f"gene vocabulary: {len(self.ids)} ids, {len(self.symbols)} symbols and "
                f"{len(self.classes)} classes; give one of each per gene"
            )
        _check_ids(self.ids, "gene vocabulary")
        wrong = sorted(set(self.classes) - set(_CLASSES))
        if wrong:
            raise ValueError(f"gene vocabulary: class '{wrong[0]}', allowed: {', '.join(_CLASSES)}")

    def __len__(self) -> int:
        """Return the number of genes."""
        return len(self.ids)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the ids joined by line feeds; symbols and classes do not enter."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Column of each id."""
        return {gene: position for position, gene in enumerate(self.ids)}

    def columns(self, names: Iterable[str]) -> list[int]:
        """Return the columns of genes, in the order given.

        Args:
            names: Ensembl ids or symbols; of a symbol that several genes have, the first.

        Raises:
            ValueError: A gene that is not there.
        """
        found = []
        for name in names:
            column = self.index.get(name, self._of_symbol.get(name))
            if column is None:
                near = difflib.get_close_matches(name, [*self.index, *self._of_symbol], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"the model has no gene '{name}'{hint}")
            found.append(column)
        return found

    @cached_property
    def _of_symbol(self) -> Mapping[str, int]:
        """Column of the first gene of each symbol."""
        return {symbol: i for i, symbol in reversed(list(enumerate(self.symbols)))}

    @classmethod
    def read(cls, path: str | Path) -> GeneVocabulary:
        """Read a gene table or a plain list of ids.

        Args:
            path: Table with the header columns ensembl_id, symbol and class, or ids one a line;
            `.gz` is inflated.

        Returns:
            The vocabulary, in file order.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not a gene table, no genes, an empty or repeated id.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"gene list {path}: no such file")
        lines = _read_lines(path)
        if not lines:
            raise ValueError(f"gene list {path}: the file is empty; expected one gene a line")
        if "\t" in lines[0] or lines[0] in _COLUMNS:
            return cls._from_table(lines, path)
        _check_ids(lines, f"gene list {path}")
        tabbed = next((number for number, line in enumerate(lines, 1) if "\t" in line), None)
        if tabbed is not None:
            raise ValueError(
                f"gene list {path}: line {tabbed} holds a tab; a table needs a header with "
                f"{_header_text()}"
            )
        return cls(tuple(lines), tuple(lines), (UNKNOWN_CLASS,) * len(lines))

    @classmethod
    def bundled(cls) -> GeneVocabulary:
        """Return the 27,874 human genes that ship with the project; they are read once.

        Raises:
            FileNotFoundError: The resource folder of the checkout is incomplete.
        """
        return _read_bundled()

    @classmethod
    def _from_table(cls, lines: Sequence[str], path: Path) -> GeneVocabulary:
        header = lines[0].split("\t")
        missing = [name for name in _COLUMNS if name not in header]
        if missing:
            raise ValueError(
                f"gene list {path}: no column {', '.join(missing)}; expected a header with "
                f"{_header_text()}"
            )
        rows = [line.split("\t") for line in lines[1:]]
        short = next(
            (number for number, row in enumerate(rows, 2) if len(row) != len(header)), None
        )
        if short is not None:
            raise ValueError(
                f"gene list {path}: line {short} has {len(rows[short - 2])} columns, "
                f"the header has {len(header)}"
            )
        ids, symbols, classes = ([row[header.index(name)] for row in rows] for name in _COLUMNS)
        _check_ids(ids, f"gene list {path}", first_line=2)
        named = (symbol or gene for symbol, gene in zip(symbols, ids, strict=True))
        try:
            return cls(tuple(ids), tuple(named), tuple(classes))
        except ValueError as error:
            raise ValueError(f"gene list {path}: {error}") from None

    def write(self, path: str | Path) -> None:
        """Write a tab-separated table (ensembl_id, symbol, class) that `read` accepts, atomically.

        Args:
            path: Target file; replaced if it exists.
        """
        write_atomic(path, self._table())

    def _table(self) -> bytes:
        rows = [_COLUMNS, *zip(self.ids, self.symbols, self.classes, strict=True)]
        return "".join("\t".join(row) + "\n" for row in rows).encode()

    @cached_property
    def table_sha256(self) -> str:
        """SHA-256 (hex) of the file that `write` writes; symbols and classes enter."""
        return hashlib.sha256(self._table()).hexdigest()


@cache
def _read_bundled() -> GeneVocabulary:
    return GeneVocabulary.read(BUNDLED_PATH)


def _header_text() -> str:
    return ", ".join(_COLUMNS)


def _read_lines(path: Path) -> list[str]:
    try:
        raw = read_file(path)
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"gene list {path}: not readable as text or gzip ({error})") from None
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _check_ids(ids: Sequence[str], where: str, *, first_line: int = 1) -> None:
    """Refuse an empty list, blank ids and repeats; the first id stands in line `first_line`."""
    if not ids:
        raise ValueError(f"{where}: no genes")
    seen: dict[str, int] = {}
    for number, gene in enumerate(ids, first_line):
        if not gene or gene != gene.strip():
            raise ValueError(f"{where}: line {number} has the blank or padded id '{gene}'")
        if gene in seen:
            raise ValueError(
                f"{where}: id {gene} occurs twice (lines {seen[gene]} and {number}); "
                "ids must be unique"
            )
        seen[gene] = number
