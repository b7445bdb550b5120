"""Read the Gene Ontology and its gene associations, and match them to a gene vocabulary.

Used by `python -m data_prep gene-graph`. The parsers are those of goatools (`GODag`,
`Gene2GoReader`, `GafReader`). This module checks the files first, because goatools ends the process
on a malformed line, prints to stdout, reads no gzip and may write its error log over the GAF that
it reads: it only ever sees a temporary copy of the wanted rows.

Reads: go-basic.obo, NCBI gene2go or a GAF 2.x file (plain or .gz), a gene list. Writes nothing.

Source: https://geneontology.org/docs/go-annotation-file-gaf-format-2.2/ and the README of NCBI's
gene2go, https://ftp.ncbi.nlm.nih.gov/gene/DATA/README.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from sclong_ds.corpus.genes import GeneVocabulary

GO_FOLDER = Path(__file__).parents[1] / "resources" / "go"
GENE_TABLE = Path(__file__).parents[1] / "resources" / "genes_27874.tsv.gz"
HUMAN = 9606  # NCBI taxonomy id
NAMESPACES = {"biological_process": "BP", "molecular_function": "MF", "cellular_component": "CC"}

GeneKey = tuple[Literal["entrez", "symbol", "ensembl"], str]
Propagation = Literal["none", "is_a", "all"]

_GENE2GO_HEADER = "#tax_id GeneID GO_ID Evidence Qualifier GO_term PubMed Category".split()
_GAF_VERSIONS = ("2.0", "2.1", "2.2")
# goatools keeps about 1.5 kB a GAF row; reading in parts bounds that at about 75 MB.
_ROWS_PER_PART = 50_000


@dataclass(frozen=True)
class Ontology:
    """The terms of a GO release."""

    version: str
    main_id: Mapping[str, str]  # live, alternative or replaced obsolete id -> live id
    namespace: Mapping[str, str]  # live id -> BP, MF or CC
    obsolete: frozenset[str]
    ancestors: Mapping[str, Collection[str]]  # live id -> ids above it; empty without propagation


@dataclass(frozen=True)
class Annotations:
    """GO terms of the genes of an association file."""

    format: Literal["gene2go", "gaf"]
    terms: Mapping[GeneKey, frozenset[str]]
    counts: Mapping[str, int]  # rows read, kept, and dropped by reason


@dataclass(frozen=True)
class GeneKeys:
    """A gene vocabulary and the foreign ids of its genes."""

    genes: GeneVocabulary
    positions: Mapping[GeneKey, tuple[int, ...]]  # foreign id -> positions in the vocabulary


def read_ontology(path: str | Path, *, propagate: Propagation = "none") -> Ontology:
    """Read an OBO file.

    Args:
        path: go-basic.obo, plain or .gz.
        propagate: Which ancestors to collect: none, is_a, or all (is_a and every relationship).

    Returns:
        The ontology.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an OBO file, or one with missing terms.
    """
    from goatools.godag.go_tasks import get_go2ancestors
    from goatools.obo_parser import GODag

    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "go.obo"
        with _open_text(path, "--obo") as source, plain.open("w", encoding="utf-8") as target:
            lines = _guarded_lines(source, path)
            first = next(lines, "")
            if not first.startswith("format-version:"):
                raise ValueError(
                    f"{path}: not an OBO file (first line {first[:40].rstrip()!r}); "
                    "expected go-basic.obo of geneontology.org"
                )
            target.write(first)
            replaced = _copy_terms(lines, target)
        attributes = {"relationship"} if propagate == "all" else None
        with _goatools(path):
            dag = GODag(str(plain), optional_attrs=attributes, load_obsolete=True, prt=None)
    live = {term for term in dag.values() if not term.is_obsolete}
    if not live:
        raise ValueError(f"{path}: holds no GO term; expected go-basic.obo of geneontology.org")
    above = get_go2ancestors(live, propagate == "all") if propagate != "none" else {}
    main_id = {key: term.item_id for key, term in dag.items() if not term.is_obsolete}
    obsolete = {key for key, term in dag.items() if term.is_obsolete}
    main_id |= {old: main_id[new] for old, new in replaced.items() if new in main_id}
    return Ontology(
        version=dag.data_version or "unknown",
        main_id=main_id,
        namespace={t.item_id: NAMESPACES.get(t.namespace, t.namespace) for t in live},
        obsolete=frozenset(obsolete - set(main_id)),
        ancestors=above,
    )


def _copy_terms(lines: Iterator[str], target: TextIO) -> dict[str, str]:
    """Copy an OBO file; return replacements of obsolete ids, which goatools leaves out."""
    replaced: dict[str, str] = {}
    term = ""
    for line in lines:
        target.write(line)
        if line.startswith("id: "):
            term = line[4:].strip()
        elif line.startswith("replaced_by: "):
            # Of several, none is the meaning of the old term.
            replaced[term] = "" if term in replaced else line[13:].strip()
    return replaced


def read_annotations(
    path: str | Path,
    *,
    ontology: Ontology,
    taxid: int = HUMAN,
    namespaces: Collection[str] = ("BP", "MF", "CC"),
    evidence_exclude: Collection[str] = ("ND",),
) -> Annotations:
    """Read which gene has which GO terms.

    NOT annotations are dropped, alternative ids and obsolete ones with one replacement become the
    live id, other obsolete and unknown terms are dropped.

    Args:
        path: NCBI gene2go or GAF 2.x, plain or .gz; told apart by content.
        ontology: Terms to resolve against.
        taxid: NCBI taxonomy id of the rows to keep.
        namespaces: Branches to keep: BP, MF, CC.
        evidence_exclude: Evidence codes to drop (ND: no data, only the root terms).

    Returns:
        Terms of each gene, with the ancestors where the ontology carries them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not such a file, a malformed row, no row of this organism or none that passes
            the filters.
    """
    path = Path(path)
    terms: defaultdict[GeneKey, set[str]] = defaultdict(set)
    counts: Counter[str] = Counter()
    layout: Literal["gene2go", "gaf"] = "gene2go"
    with tempfile.TemporaryDirectory() as folder:
        for layout, part in _parts(path, Path(folder), taxid, counts):
            for row in _parse(layout, part, path, taxid):
                reason, term = _judge(row, ontology, namespaces, evidence_exclude)
                counts[reason] += 1
                if reason == "kept":
                    terms[_gene_key(layout, row)].add(term)
    if not terms:
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        raise ValueError(
            f"{path}: no annotation is left ({dropped}); check --namespace and --evidence-exclude"
        )
    above = ontology.ancestors
    closed = {
        gene: frozenset(own.union(*(above.get(term, ()) for term in own)))
        for gene, own in terms.items()
    }
    return Annotations(format=layout, terms=closed, counts=dict(sorted(counts.items())))


def read_gene_keys(path: str | Path) -> GeneKeys:
    """Read a gene list and the Entrez ids, symbols and Ensembl ids of its genes.

    Args:
        path: Table with the columns ensembl_id, symbol, entrez_ids, entrez_symbols; a corpus'
            genes.tsv; or a plain list of ids. Genes of a file without entrez_ids are looked up in
            the bundled table by Ensembl id, then symbol.

    Returns:
        The vocabulary and its foreign ids.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a gene list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"--genes {path}: no such file; give a gene list or a corpus' genes.tsv"
        )
    genes = GeneVocabulary.read(path)
    rows = _gene_rows(path)
    if not rows or "entrez_ids" not in rows[0]:
        bundled = _gene_rows(GENE_TABLE)
        by_name = {row["symbol"]: row for row in bundled} | {
            row["ensembl_id"]: row for row in bundled
        }
        own = rows or [{} for _ in genes.ids]
        # A vocabulary may carry Ensembl versions (ENSG00000000003.15); the table does not.
        found = [
            by_name.get(gene_id) or by_name.get(gene_id.split(".")[0], {}) for gene_id in genes.ids
        ]
        rows = [known | mine for known, mine in zip(found, own, strict=True)]
    positions: defaultdict[GeneKey, list[int]] = defaultdict(list)
    for index, (gene_id, row) in enumerate(zip(genes.ids, rows, strict=True)):
        for key in _keys_of(gene_id, row):
            positions[key].append(index)
    return GeneKeys(genes=genes, positions={key: tuple(found) for key, found in positions.items()})


def match_genes(
    annotations: Annotations, keys: GeneKeys, *, hold_out: float = 0.0
) -> tuple[list[set[str]], int]:
    """Give every gene of the vocabulary its GO terms.

    Args:
        annotations: Terms by foreign id.
        keys: Vocabulary and its foreign ids; an id of several genes annotates all of them.
        hold_out: Share of the terms that are left out, as `is_held_out` chooses them.

    Returns:
        One set of terms per gene in vocabulary order (empty: no annotation), and how many annotated
        ids found no gene.

    Raises:
        ValueError: No id matches.
    """
    terms: list[set[str]] = [set() for _ in keys.genes.ids]
    unmatched = 0
    for gene, own in annotations.terms.items():
        positions = keys.positions.get(gene, ())
        unmatched += not positions
        for index in positions:
            terms[index] |= own
    if unmatched == len(annotations.terms):
        kind, example = next(iter(annotations.terms))
        raise ValueError(
            f"none of the {unmatched} annotated genes is in the gene list: the associations name "
            f"them by {kind} id ('{example}'), the list begins with '{keys.genes.ids[0]}'; give a "
            "gene table of the same organism with the columns ensembl_id, symbol, class, entrez_ids"
        )
    if hold_out:
        terms = [{term for term in own if not is_held_out(term, hold_out)} for own in terms]
    return terms, unmatched


def is_held_out(term: str, share: float) -> bool:
    """Return whether a term is among those held out, by the hash of its id.

    Args:
        term: Id, such as GO:0006955.
        share: Of all terms, 0 to 1; those of a smaller share are among those of a larger one.
    """
    digest = hashlib.sha256(term.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def _keys_of(gene_id: str, row: Mapping[str, str]) -> set[GeneKey]:
    """List the foreign ids of one gene."""
    keys: set[GeneKey] = {("ensembl", gene_id.split(".")[0])}
    keys |= {("entrez", name) for name in row.get("entrez_ids", "").split("|") if name}
    keys |= {("symbol", name) for name in row.get("entrez_symbols", "").split("|") if name}
    if row.get("symbol"):
        keys.add(("symbol", row["symbol"]))
    return keys


def _gene_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a gene table; an empty list for a plain list of ids."""
    with _open_text(path, "--genes") as source:
        reader = csv.DictReader(source, delimiter="\t")
        if "ensembl_id" not in (reader.fieldnames or ()):
            return []
        return list(reader)


def _judge(
    row: Any, ontology: Ontology, namespaces: Collection[str], evidence_exclude: Collection[str]
) -> tuple[str, str]:
    """Return 'kept' and the live term of an association row, or why it does not count."""
    if any(word.upper() == "NOT" for word in row.Qualifier):
        return "dropped: NOT", ""
    if row.Evidence_Code in evidence_exclude:
        return f"dropped: evidence {row.Evidence_Code}", ""
    term = ontology.main_id.get(row.GO_ID)
    if term is None:
        known = row.GO_ID in ontology.obsolete
        return ("dropped: obsolete term" if known else "dropped: term not in the ontology"), ""
    if ontology.namespace[term] not in namespaces:
        return "dropped: namespace", ""
    return "kept", term


def _gene_key(layout: str, row: Any) -> GeneKey:
    """Name the gene of a row: by Entrez or Ensembl id, else by symbol (rows of UniProt)."""
    if layout == "gene2go":
        return "entrez", str(row.DB_ID)
    database = row.DB.lower()
    if "ncbi" in database or "entrez" in database:
        return "entrez", row.DB_ID
    if "ensembl" in database:
        return "ensembl", row.DB_ID.split(".")[0]
    return "symbol", row.DB_Symbol


def _parse(layout: str, part: Path, path: Path, taxid: int) -> Sequence[Any]:
    """Run goatools' reader over one checked part."""
    from goatools.anno.gaf_reader import GafReader
    from goatools.anno.genetogo_reader import Gene2GoReader

    with _goatools(path):
        if layout == "gaf":
            return GafReader(str(part), prt=None).associations
        return Gene2GoReader(str(part), taxids=[taxid]).associations


def _parts(
    path: Path, folder: Path, taxid: int, counts: Counter[str]
) -> Iterator[tuple[Literal["gene2go", "gaf"], Path]]:
    """Check an association file; yield the rows of one organism as files of bounded length."""
    part = folder / "part"
    organisms: Counter[str] = Counter()
    with _open_text(path, "--associations") as source:
        lines = _guarded_lines(source, path)
        header = next(lines, "")
        layout = _layout(header, path)
        rows: list[str] = []
        for number, line in enumerate(lines, start=2):
            if line[0] in "#!" or line == "\n":
                # The GAF reader looks for more header lines than the first.
                header += line if line[0] == "!" and not organisms else ""
                continue
            fields = line.rstrip("\n").split("\t")
            organism = _organism(layout, fields, f"{path}: line {number}")
            organisms[organism] += 1
            if organism != str(taxid):
                continue
            rows.append(line if line.endswith("\n") else line + "\n")
            if len(rows) == _ROWS_PER_PART:
                part.write_text(header + "".join(rows), encoding="utf-8")
                yield layout, part
                rows = []
    counts["rows"] = organisms.total()
    counts["dropped: other organism"] = organisms.total() - organisms[str(taxid)]
    if not organisms[str(taxid)]:
        seen = ", ".join(name for name, _ in organisms.most_common(5)) or "no row at all"
        raise ValueError(
            f"{path}: no row of organism {taxid} (taxids in the file: {seen}); see --taxid"
        )
    if rows:
        part.write_text(header + "".join(rows), encoding="utf-8")
        yield layout, part


def _layout(header: str, path: Path) -> Literal["gene2go", "gaf"]:
    """Tell gene2go from GAF by the first line."""
    if header.rstrip("\n").split("\t") == _GENE2GO_HEADER:
        return "gene2go"
    if header.startswith("!gaf-version:"):
        version = header.partition(":")[2].strip()
        if version in _GAF_VERSIONS:
            return "gaf"
        raise ValueError(f"{path}: GAF version {version}, allowed: {', '.join(_GAF_VERSIONS)}")
    raise ValueError(
        f"{path}: neither NCBI gene2go nor GAF (first line {header[:40].rstrip()!r}; expected "
        "'#tax_id<TAB>GeneID...' or '!gaf-version: 2.2')"
    )


def _organism(layout: str, fields: list[str], where: str) -> str:
    """Return the taxid of a row after checking all that goatools would end the process for."""
    if layout == "gene2go":
        good = len(fields) == 8 and fields[0].isdigit() and fields[1].isdigit()
        if not good or fields[7] not in ("Process", "Function", "Component"):
            raise ValueError(
                f"{where}: not a gene2go row (8 tab-separated columns, the last Process, ...)"
            )
        return fields[0]
    organism = fields[12].split("|")[0] if len(fields) == 17 else ""
    prefix, _, taxid = organism.partition(":")
    # The first taxon of column 13 is the gene's, a second one that of an interaction partner.
    if prefix != "taxon" or not taxid.isdigit() or fields[8] not in ("P", "F", "C"):
        raise ValueError(
            f"{where}: not a GAF 2 row (17 tab-separated columns, column 9 P, F or C, 13 taxon:N)"
        )
    if len(fields[13]) != 8 or not fields[13].isdigit():
        raise ValueError(f"{where}: column 14 is '{fields[13]}', expected a date as YYYYMMDD")
    return taxid


@contextlib.contextmanager
def _goatools(path: Path) -> Iterator[None]:
    """Keep goatools off stdout and turn its exits into errors that name the file."""
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            yield
    except KeyError as error:
        raise ValueError(
            f"{path}: refers to {error}, which it does not define; is the file complete?"
        ) from None
    except (SystemExit, AssertionError):
        last = [line for line in chatter.getvalue().splitlines() if line.strip()][-1:]
        raise ValueError(f"{path}: goatools cannot read it ({' '.join(last).strip()})") from None


@contextlib.contextmanager
def _open_text(path: Path, option: str) -> Iterator[TextIO]:
    """Open a plain or gzip text file, whatever its name says."""
    if not path.is_file():
        raise FileNotFoundError(f"{option} {path}: no such file")
    with path.open("rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    opener = gzip.open if zipped else open
    with opener(path, "rt", encoding="utf-8", newline="") as source:
        yield source


def _guarded_lines(source: TextIO, path: Path) -> Iterator[str]:
    """Yield lines with Unix ends; a cut or damaged file is an error that names it."""
    try:
        for line in source:
            yield line.rstrip("\r\n") + "\n"
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged or cut short ({error})") from None
