"""The ledger of a corpus folder: one small JSON file per dataset that says what became of it.

`CORPUS/ledger/DATASET.json` is written when a dataset is done, so array tasks never write to the
same file; `python -m data_prep status` lists them. `finalize` takes the datasets that are `ok`.

An entry names every staged file with its size and SHA-256 and carries a checksum of itself:
`check_staged` compares them before anything staged is used. `CORPUS/.locks/DATASET` is locked by
whoever works on a dataset; `corpus_lock` keeps `finalize` away from those who change the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from sclong_ds.files.atomic import (
    file_sha256,
    files_below,
    listed,
    locked,
    read_json,
    write_atomic,
)
from sclong_ds.page.words import counted

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_SHARD = re.compile(r"cells\.zarr/(gap|count)/c/.*")


_log = logging.getLogger(__name__)

Status = Literal["ok", "excluded", "failed"]
STATUSES: tuple[Status, ...] = ("ok", "excluded", "failed")
LEDGER_VERSION = 2
"""Version 1 had no checksums and its staging another annotation table."""
OLDER = "staged by an older version, convert again"
"""Reason of an entry of an older version that is ok."""
_CURE = "delete it and convert the dataset again"
_EMPTY: Mapping[type, Any] = {str: "", int: 0}


class MatrixFinding(TypedDict):
    """What the first values of one matrix of a dataset are."""

    name: str
    genes: int
    cells: int
    """Cells looked at, from the first on; `total` and `largest` are theirs."""
    total: float | None
    largest: float | None
    """None where they are not finite or nothing was read."""
    looks: str
    """`counts`, or why it cannot be taken for them."""


class RoundingRecord(TypedDict):
    """What `counts = round:MATRIX` changed."""

    share_rounded: float
    """Share of the values that were not whole."""
    total_before: float
    total_after: int
    largest_distance: float
    """Largest change of a value."""


class LedgerEntry(TypedDict):
    """What is known of one dataset; sizes are 0 or null where it could not be read.

    A key that is added here needs nothing else: it begins empty (0, "", null, {} or []) and its
    type is checked whenever an entry is read.
    """

    version: int
    """LEDGER_VERSION, or 1."""
    dataset_id: str
    path: str
    status: Status
    """ok: staged; excluded: readable but not usable; failed: damaged, missing, or the work died."""
    reason: str
    """Why it is not ok; empty otherwise. `convert` returns, and does not write, a reason for an ok
    dataset that it could not compare with its source."""
    format: str | None
    organism: str
    tissue: str
    matrix: str | None
    """Which matrix held the counts: X, raw.X or layers/NAME."""
    matrix_reason: str
    """Why that one."""
    matrices: list[MatrixFinding]
    """Every matrix of the dataset."""
    gene_column: str | None
    """Which column named the genes."""
    n_cells: int
    """Cells staged; 0 where the dataset is not ok, and then no cell counts as dropped either."""
    n_cells_input: int
    dropped_cells: dict[str, int]
    """Cells left out, by reason."""
    features_left_out: dict[str, int]
    """Features of the file that are not genes of the genome read, by reason (`features`)."""
    features_read: list[int]
    """Features of the file that are genes of the genome read, as runs of places: start and stop in
    turn; empty where all are."""
    n_genes_input: int
    """Genes of the matrix, without them."""
    n_genes_known: int
    """Genes of the dataset that are in the vocabulary."""
    n_genes_mapped: int
    """Genes of the vocabulary that are reached (fewer where several genes were summed)."""
    n_genes_summed: int
    """Genes of the dataset that share their vocabulary gene with another, and were summed."""
    n_genes_mito: int
    """Mitochondrial genes of the dataset; 0 means that `max_mito_fraction` cannot drop a cell."""
    gene_names: dict[str, int]
    """Genes of the dataset by how their name was resolved (`gene_settlement.KINDS`)."""
    name_repairs: dict[str, int]
    """Genes found only after a repair of their name, by repair (`gene_spelling.REPAIRS`)."""
    excel_dates: dict[str, int]
    """Gene names that Excel made dates, and the counts lost with each."""
    restored: str
    """How counts were restored from other values; empty for raw counts taken as they are."""
    rounded: RoundingRecord | None
    """What rounding changed, where the manifest asks for it."""
    min_genes: int
    """Fewest genes of a cell that was kept."""
    median_genes: float | None
    """Median genes of the cells kept."""
    warnings: list[str]
    """What looks wrong and does not exclude the dataset."""
    counts_input: int
    """Sum of all counts of the dataset."""
    counts_kept: float | None
    """Share of them that fell on mapped genes."""
    counts_lost: dict[str, int]
    """The counts of the other genes, by kind of their name (as `gene_names`)."""
    largest_losses: dict[str, int]
    """Unmapped genes with most counts."""
    notes: dict[str, str]
    """Parts of the file that are not read or were repaired, and why."""
    obs_columns: list[str]
    """Cell annotations kept."""
    texts_repaired: int
    """Annotations of cells kept that UTF-8 cannot hold; U+FFFD stands where it could not."""
    source_hash: str | None
    settings_hash: str
    options: dict[str, str]
    """What the manifest asked for: `Dataset.options` and the gene list, those that are not empty;
    `verify --sources` reads the source again by them."""
    origin: dict[str, str]
    """Where the data come from: the columns `manifest.ORIGIN` that are not empty."""
    about: dict[str, str]
    """What the file states of that itself, by the same names, and its `schema_version`."""
    files: dict[str, list[int | str]]
    """Bytes and SHA-256 (hex) of every staged file, by its name below the staging folder."""
    checksum: str
    """SHA-256 (hex) of the rest of the entry; empty before it is written."""


@cache
def _kinds() -> dict[str, Any]:
    """Return the type of each key of an entry."""
    return get_type_hints(LedgerEntry)


def empty_entry(
    dataset_id: str, path: Path | str, *, organism: str, tissue: str, settings_hash: str
) -> LedgerEntry:
    """Return the entry of a dataset of which nothing is known yet.

    Args:
        dataset_id: Name of the dataset.
        path: Its file or folder, or its address.
        organism: As in the manifest.
        tissue: As in the manifest.
        settings_hash: See `one_dataset.settings_hash`.
    """
    entry = {name: _empty(kind) for name, kind in _kinds().items()}
    entry |= {"version": LEDGER_VERSION, "status": "failed", "dataset_id": dataset_id}
    entry |= {"path": str(path), "organism": organism, "tissue": tissue}
    entry["settings_hash"] = settings_hash
    return entry  # type: ignore[return-value]


def _empty(kind: Any) -> Any:
    """Return what a key of a type begins with."""
    if NoneType in get_args(kind):
        return None
    return (get_origin(kind) or kind)() if get_origin(kind) in (dict, list) else _EMPTY.get(kind)


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a value that was read from JSON is of a type."""
    origin, parts, fields = _taken_apart(kind)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, parts[1]) for v in value.values())
    if fields is not None:
        return (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(_fits(value[name], part) for name, part in fields.items())
        )
    if origin is list:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    # True and 1 are not the same here; JSON of another program may write 1.0 as 1.
    return type(value) is kind or (kind is float and type(value) is int)


@cache
def _taken_apart(kind: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any] | None]:
    """Return what a type is of, its arguments, and the keys of a TypedDict with their types."""
    fields = get_type_hints(kind) if is_typeddict(kind) else None
    return get_origin(kind), get_args(kind), fields


def ledger_path(corpus: Path, dataset_id: str) -> Path:
    """Return where the entry of a dataset lies.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    return corpus / "ledger" / f"{dataset_id}.json"


def write_entry(corpus: Path, entry: LedgerEntry) -> None:
    """Write the entry of a dataset, replacing an older one, and fill in its checksum.

    Args:
        corpus: The corpus folder.
        entry: The entry.
    """
    entry["checksum"] = _checksum(entry)
    path = ledger_path(corpus, entry["dataset_id"])
    write_atomic(path, (json.dumps(entry, indent=1) + "\n").encode())


def _checksum(entry: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in entry.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_entry(path: Path) -> LedgerEntry:
    """Read one entry.

    Args:
        path: A file of the ledger.

    Returns:
        The entry; one of version 1 lacks nothing but `files`, and is OLDER where it is ok.

    Raises:
        ValueError: Not an entry, damaged, of another dataset, or of a newer version.
    """
    found = read_json(path, cure=_CURE)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a ledger entry ({type(found).__name__}); {_CURE}")
    version = found.get("version", 1)
    if type(version) is int and version > LEDGER_VERSION:
        raise ValueError(
            f"{path}: ledger version {version}, this program reads {LEDGER_VERSION}; update it"
        )
    if version == 1 and "checksum" not in found:
        found = _of_version_1(found)
    elif found.get("checksum") != _checksum(found):
        raise ValueError(f"{path}: damaged (its checksum differs); {_CURE}")
    # Came after the first entries of this version.
    for name in ("origin", "about"):
        found.setdefault(name, {})
    kinds = _kinds()
    for name, kind in kinds.items():
        if name not in found:
            raise ValueError(f"{path}: not a ledger entry (no '{name}'); {_CURE}")
        if not _fits(found[name], kind):
            raise ValueError(f"{path}: not a ledger entry ('{name}' is no {kind}); {_CURE}")
    if found["dataset_id"] != path.stem:
        raise ValueError(
            f"{path}: the entry of dataset '{found['dataset_id'][:128]}'; give the file its name "
            f"back, or {_CURE}"
        )
    return found


def _of_version_1(found: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of version 1 with the keys of today; those that it must have stay absent."""
    kinds = _kinds()
    entry = {name: _empty(kind) for name, kind in kinds.items()}
    for name in ("dataset_id", "path", "status", "reason", "settings_hash"):
        del entry[name]
    entry |= {name: value for name, value in found.items() if name in kinds}
    if entry.get("status") == "ok":
        entry["reason"] = OLDER
    return entry | {"version": 1, "files": {}, "checksum": ""}


def origin_of(entry: LedgerEntry) -> dict[str, str]:
    """Return where the data of a dataset come from: what its file states, and over it the manifest.

    Args:
        entry: An entry of the ledger.
    """
    return {**entry["about"], **entry["origin"]}


def is_older(entry: LedgerEntry) -> bool:
    """Return whether a dataset was staged by an older version, whose staging is not read.

    Args:
        entry: An entry of the ledger.
    """
    return entry["version"] < LEDGER_VERSION and entry["status"] == "ok"


def require_current(corpus: str | Path, entries: Iterable[LedgerEntry]) -> None:
    """Refuse a ledger with datasets that an older version has staged.

    Args:
        corpus: The corpus folder, for the message.
        entries: Its ledger.

    Raises:
        ValueError: There are such datasets.
    """
    older = [entry["dataset_id"] for entry in entries if is_older(entry)]
    if older:
        raise ValueError(
            f"{corpus}: staged by an older version: {counted(len(older), 'dataset')} ({older[0]}"
            f"{', ...' if len(older) > 1 else ''}); run convert again with their manifest"
        )


def staged_files(folder: Path) -> dict[str, list[int | str]]:
    """Return bytes and SHA-256 of every file of a staging folder, for `LedgerEntry.files`.

    Args:
        folder: CORPUS/staging/DATASET, or the folder that becomes it.
    """
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)]
        for path in files_below(folder)
    }


def check_staged(corpus: str | Path, entry: LedgerEntry, *, shards: bool = True) -> None:
    """Compare the staged files of a dataset with its ledger entry.

    Args:
        corpus: The corpus folder.
        entry: The entry, of a dataset that is ok.
        shards: Compare the shards of its cells; else their sizes alone.

    Raises:
        ValueError: A file is missing, extra, of another size or of other content.
    """
    folder = Path(corpus) / "staging" / entry["dataset_id"]
    cure = "convert the dataset again"
    found = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    missing = sorted(entry["files"].keys() - found.keys())
    if missing or not entry["files"]:
        raise ValueError(f"{folder / missing[0] if missing else folder}: missing; {cure}")
    extra = sorted(found.keys() - entry["files"].keys())
    if extra:
        raise ValueError(f"{folder / extra[0]}: not in the ledger entry; {cure}")
    for name, path in found.items():
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path}: not a plain file; {cure}")
        size, digest = path.stat().st_size, entry["files"][name]
        if size != digest[0]:
            raise ValueError(f"{path}: damaged ({size} bytes, {digest[0]} on record); {cure}")
        if (shards or not _SHARD.fullmatch(name)) and [size, file_sha256(path)] != digest:
            raise ValueError(f"{path}: damaged (its SHA-256 differs); {cure}")


@contextmanager
def dataset_lock(corpus: Path, dataset_id: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold a dataset for this process alone; the lock ends with the process.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
        wait: Wait for another process that holds it.

    Yields:
        Whether it is held; False only where another process has it and `wait` is off.
    """
    with locked(corpus / ".locks" / dataset_id, wait=wait) as held:
        yield held


def previous_entry(corpus: Path, dataset_id: str) -> LedgerEntry | None:
    """Return the entry of a dataset on disk, None if there is none that can be read.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    try:
        return read_entry(ledger_path(corpus, dataset_id))
    except FileNotFoundError:
        return None
    except ValueError as error:
        _log.warning("%s", error)
        return None


def staged_entry(corpus: Path, dataset_id: str) -> LedgerEntry | None:
    """Return the entry on disk of a dataset that is ok and has its staging, else None.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    entry = previous_entry(corpus, dataset_id)
    if entry is None or entry["status"] != "ok":
        return None
    return entry if (corpus / "staging" / dataset_id / "cells.zarr").is_dir() else None


def read_ledger(corpus: str | Path) -> list[LedgerEntry]:
    """Read all entries of a corpus folder, sorted by dataset.

    Args:
        corpus: The corpus folder.

    Raises:
        FileNotFoundError: No corpus folder, or nothing was converted into it.
        ValueError: A damaged entry.
    """
    folder = Path(corpus) / "ledger"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{corpus}: no corpus here; run: python -m data_prep convert MANIFEST --out {corpus}"
        )
    return [read_entry(path) for path in json_files(folder)]


def json_files(folder: Path) -> list[Path]:
    """Return the finished JSON files of a folder, sorted; nothing where there is no such folder.

    Args:
        folder: `ledger` or `manifests` of a corpus.

    Raises:
        OSError: It cannot be listed.
    """
    return [path for path in listed(folder) if path.suffix == ".json" and path.name[0] != "."]


def count_statuses(entries: Iterable[LedgerEntry]) -> dict[str, int]:
    """Return how many datasets have each status.

    Args:
        entries: Entries of the ledger.
    """
    statuses = [entry["status"] for entry in entries]
    return {status: statuses.count(status) for status in STATUSES}


def is_safe_id(name: str) -> bool:
    """Tell whether a text may name a dataset, and with it files and folders.

    Args:
        name: The text.
    """
    return _SAFE_ID.fullmatch(name) is not None
