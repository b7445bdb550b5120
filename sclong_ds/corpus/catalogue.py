"""`corpus.json`: the catalogue of a finished corpus, and the checksums of all its small files.

    catalogue = read_catalogue("CORPUS")
    write_catalogue("CORPUS", {...})

One JSON document with a checksum of itself. `files` names every file of the corpus except the
shards of the cells and `corpus.json`, with its size and CRC-32C: gene list, statistics, annotations
and the tables and descriptions of cells.zarr. Readers compare each of them when they first use it
(`sclong_ds.corpus.location`). Among the tables are the checksums of all chunks of cells, so the
catalogue vouches for every byte. Version 1 had no `files`; it is read without these checks.
Version 3 added the origin of each dataset, version 4 the columns of annotations,
version 5 near duplicates, version 6 parts.

A corpus that has grown is a list of parts. Its catalogue is that of all cells, of version 6, and
`parts` names the corpora that they lie in, each of them complete, with the catalogue that it was
finished with: the first in the corpus folder itself (`parts/000000.json`), those that were added in
`parts/000001` and so on. `files` then names the files of the list alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints

from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.location import Location
from sclong_ds.files.atomic import listed, write_atomic
from sclong_ds.files.checksums import file_crc32c
from sclong_ds.files.versions import refuse_later

FORMAT_VERSION = 6
"""The newest that is read."""
ONE_PART_VERSION = 5
"""Of the catalogue of a corpus that is no list of parts."""
CORPUS_FORMAT = "sclong_ds-corpus"
SPLITS = ("train", "validation", "test")
CITATIONS = "CITATIONS.md"
SINGLE_FILES = ("genes.tsv", "gene_stats.npz", "measured_genes.npy", CITATIONS, "checksums.json")
"""Files of a corpus besides cells.zarr, obs/, columns/ and corpus.json."""
_NAME = "corpus.json"
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHARD = re.compile(r"cells\.zarr/(gap|count)/c/.*")
PARTS = "parts"
"""Folder of the parts that were added, and of what belongs to their list."""


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of a corpus."""

    dataset_id: str
    """Name in the manifest."""
    n_cells: int
    """Cells in the corpus."""
    duplicates_dropped: int
    """Staged cells left out because another cell holds the same counts: of all genes, or of those
    that both datasets name."""
    split_cells: Mapping[str, int]
    """Cells in each split."""
    n_genes_mapped: int | None
    """Genes of the vocabulary that the source names; None where the ledger does not record it."""
    counts_kept: float | None
    """Share of the source's counts that fell on mapped genes; None where the ledger does not
    say."""
    organism: str | None
    """As in the manifest."""
    tissue: str | None
    """As in the manifest."""
    format: str | None
    """Format of the source file."""
    source: str | None
    """Path of the source as the manifest gave it."""
    source_hash: str | None
    """SHA-256 of the source."""
    n_cells_input: int | None = None
    """Cells of the source."""
    version: int | None = None
    """Version of the staged data that the cells were taken from."""
    matrix: str | None = None
    """Which matrix of the source held the counts."""
    restored: str | None = None
    """How counts were restored from other values; empty for raw counts taken as they are."""
    origin: Mapping[str, str] | None = None
    """Where the data come from, as manifest and file state: url, version, title, doi, licence,
    citation and the like, those that are known; None before version 3."""
    median_genes: float | None = None
    """Median genes a cell, of the cells staged; None before version 3."""
    n_donors: int | None = None
    """Donors that it names; None before version 3."""
    near_dropped: int | None = None
    """Those of `duplicates_dropped` with a near duplicate: the same cell with another gene list;
    None before version 5."""
    near_kept: int | None = None
    """Cells in the corpus with a near duplicate in it; None before version 5."""
    warnings: tuple[str, ...] | None = None
    """What to know about the dataset before training on it; None where no ledger records it."""

    def __post_init__(self) -> None:
        """Take the list that JSON gives."""
        if self.warnings is not None:
            object.__setattr__(self, "warnings", tuple(self.warnings))


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """One of the corpora that a corpus consists of."""

    folder: str
    """Inside the corpus folder; empty for the first one, which lies in that itself."""
    catalogue: str
    """File with its catalogue, inside the corpus folder."""
    checksum: str
    """Of its catalogue (`catalogue_checksum`)."""
    hash: str
    """Its content hash."""
    n_cells: int
    """Its cells."""


class Catalogue(TypedDict):
    """Keys of `corpus.json`; those that a program can do without are not required."""

    format: str
    version: int
    hash: str
    genes_hash: str
    n_cells: int
    splits: dict[str, list[int]]
    datasets: list[dict[str, Any]]
    files: NotRequired[dict[str, list[int]]]
    n_genes: NotRequired[int]
    n_values: NotRequired[int]
    split_unit: NotRequired[str]
    held_out: NotRequired[dict[str, list[str]]]
    split_rule: NotRequired[dict[str, Any]]
    split_shares: NotRequired[dict[str, dict[str, float]]]
    options: NotRequired[dict[str, Any]]
    duplicates_dropped: NotRequired[int]
    near_duplicates: NotRequired[str]
    warnings: NotRequired[list[str]]
    unused: NotRequired[list[dict[str, Any]]]
    parts: NotRequired[list[dict[str, Any]]]
    documents: NotRequired[dict[str, str]]
    checksums_sha256: NotRequired[str]


def read_catalogue(corpus: str | Path | Location, *, name: str = _NAME) -> dict[str, Any]:
    """Read and check `corpus.json`.

    Args:
        corpus: Corpus folder.
        name: File with the catalogue, where another one than the folder's own is meant.

    Returns:
        Its content without the checksum.

    Raises:
        FileNotFoundError: No such folder, or not finalized.
        ValueError: Another format or version, changed bytes, or a content that is no catalogue.
    """
    location = corpus if isinstance(corpus, Location) else Location(corpus)
    path = f"{location}/{name}"
    cure = f"run: python -m data_prep finalize {corpus}"
    if not location.is_local:
        cure = "copy the corpus there again"
    elif name != _NAME:
        cure = "restore it from a copy of the corpus"
    try:
        raw = location.read_bytes(name)
    except FileNotFoundError:
        if not location.is_local:
            raise FileNotFoundError(
                f"{corpus}: no {name} at this address; it is mistyped, or the copy of the corpus "
                "there is not complete"
            ) from None
        if name != _NAME:
            raise FileNotFoundError(f"{path}: missing; {cure}") from None
        reason = "the corpus is not finalized" if location.folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{corpus}: {reason}; {cure}") from None
    try:
        catalogue = json.loads(raw)
    except (ValueError, RecursionError):
        catalogue = None
    if not isinstance(catalogue, dict):
        raise ValueError(f"{path}: damaged (not JSON); {cure}")
    stored = catalogue.pop("checksum", None)
    form, version = catalogue.get("format"), catalogue.get("version")
    if form == CORPUS_FORMAT:
        refuse_later(version, newest=FORMAT_VERSION, what=CORPUS_FORMAT, where=path)
    if form != CORPUS_FORMAT or type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {form} version {version}, this program reads {CORPUS_FORMAT} "
            f"version 1 to {FORMAT_VERSION}; {cure}"
        )
    # Comparing the whole text also finds changes that JSON does not see, such as white space.
    checksum = catalogue_checksum(catalogue)
    if stored != checksum or raw != _catalogue_bytes({**catalogue, "checksum": checksum}):
        raise ValueError(f"{path}: damaged (its checksum differs); {cure}")
    problem = next(_problems(catalogue), None)
    if problem:
        raise ValueError(f"{path}: not a catalogue of this program ({problem}); {cure}")
    return catalogue


def write_catalogue(corpus: str | Path, catalogue: Mapping[str, Any]) -> None:
    """Write `corpus.json` with its own checksum.

    Args:
        corpus: Corpus folder with all other files.
        catalogue: Content; format and version are added, and `files`, of what lies in the folder,
            if it lacks them.
    """
    document = with_version(catalogue)
    if "files" not in document:
        document["files"] = checked_files(corpus, corpus_files(corpus))
    document["checksum"] = catalogue_checksum(document)
    write_atomic(Path(corpus) / "corpus.json", _catalogue_bytes(document))


def with_version(catalogue: Mapping[str, Any]) -> dict[str, Any]:
    """Return a catalogue with format and version, as it is written and read.

    Args:
        catalogue: Content.
    """
    version = FORMAT_VERSION if PARTS in catalogue else ONE_PART_VERSION
    return {**catalogue, "format": CORPUS_FORMAT, "version": version}


def parts_of(catalogue: Mapping[str, Any]) -> list[PartInfo]:
    """Return the parts of a corpus; none of one that is no list of parts.

    Args:
        catalogue: What `read_catalogue` returns.
    """
    return [PartInfo(**part) for part in catalogue.get(PARTS, ())]


def hash_of_parts(hashes: Sequence[str]) -> str:
    """Return the content hash of a corpus of some parts; that of the part where it is one.

    Args:
        hashes: Content hashes of the parts, in order.
    """
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(json.dumps({PARTS: list(hashes)}).encode()).hexdigest()


def corpus_files(corpus: str | Path) -> list[str]:
    """Return the sorted names of the files of a corpus except corpus.json, with its shards.

    Args:
        corpus: Corpus folder; that corpus.json is still missing is no matter.
    """
    corpus = Path(corpus)
    names = [name for name in SINGLE_FILES if (corpus / name).is_file()]
    for folder, suffix in (("obs", ".parquet"), ("columns", "columns.json"), ("columns", ".codes")):
        found = (path.name for path in listed(corpus / folder))
        names += [f"{folder}/{name}" for name in found if name.endswith(suffix)]
    if (corpus / "cells.zarr").is_dir():
        names += [f"cells.zarr/{name}" for name in CellStore(corpus / "cells.zarr").file_names()]
    return sorted(names)


def checked_files(corpus: str | Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Return size and CRC-32C of files, for `files` of the catalogue.

    Args:
        corpus: Corpus folder.
        names: Files inside it; shards, which the tables of chunk checksums vouch for, are skipped.
    """
    paths = {name: Path(corpus) / name for name in names if not _SHARD.fullmatch(name)}
    return {name: [path.stat().st_size, file_crc32c(path)] for name, path in paths.items()}


def catalogue_checksum(catalogue: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a catalogue; with it, of the whole corpus.

    Args:
        catalogue: What `read_catalogue` returns.
    """
    return hashlib.sha256(json.dumps(dict(catalogue), sort_keys=True).encode()).hexdigest()


def _catalogue_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _problems(catalogue: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the content of a catalogue."""
    kinds = get_type_hints(Catalogue, include_extras=True)
    required = {name for name, kind in kinds.items() if get_origin(kind) is not NotRequired}
    required |= {"files"} if catalogue["version"] > 1 else set()
    yield from _misfits(catalogue, kinds, required, "")
    wanted = {field.name for field in fields(DatasetInfo) if field.default is MISSING}
    kinds = get_type_hints(DatasetInfo)
    for number, dataset in enumerate(catalogue["datasets"]):
        yield from _misfits(dataset, kinds, wanted, f"dataset {number}: ")
        name = dataset["dataset_id"]
        # It names a file of annotations, which must not be one outside the corpus.
        if not _SAFE_ID.fullmatch(name):
            yield f"dataset {number} is called '{name[:128]}'; allowed are letters, digits and _.-"
    for name, size_and_sum in catalogue.get("files", {}).items():
        if len(size_and_sum) != 2 or name.startswith("/") or {"", ".."} & {*name.split("/")}:
            yield f"files: '{name[:128]}' is no file inside the corpus with bytes and checksum"
    yield from _part_problems(catalogue)
    n_cells, borders = catalogue["n_cells"], catalogue["splits"]
    for name in SPLITS:
        border = borders.get(name, [])
        if len(border) != 2 or not 0 <= border[0] <= border[1] <= n_cells:
            yield f"split {name} is {border}, of {n_cells} cells"


def _part_problems(catalogue: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the list of parts."""
    parts, kinds = catalogue.get(PARTS), get_type_hints(PartInfo)
    if parts is None:
        return
    for number, part in enumerate(parts):
        wrong = list(_misfits(part, kinds, set(kinds), f"part {number}: "))
        yield from wrong
        # They name files, which must not be ones outside the corpus.
        folder = f"{PARTS}/{number:06d}"
        places = (folder, f"{folder}/corpus.json") if number else ("", f"{folder}.json")
        if not wrong and (part["folder"], part["catalogue"]) != places:
            yield f"part {number} is in {part['folder'][:64]}, not in {folder}"
    if not parts:
        yield "it lists no part"


def _misfits(
    found: Mapping[str, Any], kinds: Mapping[str, Any], required: set[str], where: str
) -> Iterator[str]:
    """Yield the keys that are missing, unknown or of another type than they must have."""
    yield from (f"{where}'{name}' is missing" for name in sorted(required - found.keys()))
    yield from (f"{where}'{name[:64]}' is unknown" for name in sorted(found.keys() - kinds.keys()))
    for name, value in found.items():
        if not _fits(value, kinds[name]):
            yield f"{where}'{name}' is {str(value)[:64]}"


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a value that was read from JSON is of a type."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is NotRequired:
        return _fits(value, parts[0])
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(v, parts[1]) for v in value.values())
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if kind is NoneType:
        return value is None
    # True and 1 are not the same here; JSON of another program may write 1.0 as 1.
    return type(value) is kind or (kind is float and type(value) is int)
