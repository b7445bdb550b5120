"""The parts that a finished corpus has, for a finalize that adds one to them.

A part is added where all that was finished stays: the same settings, gene list and rule of the
split, the datasets of before unchanged in the ledger, the same options. Else the corpus is made
again as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.corpus.inputs import Inputs
from data_prep.corpus.split.rule import SplitRule, in_order_of_arrival, rule_of
from data_prep.ledger.ledger import ledger_path
from sclong_ds.corpus.catalogue import (
    ONE_PART_VERSION,
    PARTS,
    PartInfo,
    catalogue_checksum,
    parts_of,
    read_catalogue,
)
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import read_metadata
from sclong_ds.files.atomic import file_sha256
from sclong_ds.files.checksums import check_file

MOST_PARTS = 1000
"""Parts of a corpus: each is opened, and every one of its files, by every process that trains."""
MANY_PARTS = 100
"""From here on finalize recommends to make one part of them."""
_CURE = "restore it from a copy of the corpus"
EARLIER = "earlier"
"""Folder inside the work folder with the catalogue of before."""


@dataclass(frozen=True, kw_only=True)
class EarlierPart:
    """One part that is there."""

    info: PartInfo
    """What the list of parts says of it."""
    first: int
    """Place of its first dataset among all."""
    stop: int
    """Place after its last one."""
    digests: Path | None
    """File with the digests of its staged cells; None where they were never kept."""


@dataclass(frozen=True, kw_only=True)
class EarlierParts:
    """All parts that are there."""

    corpus: Path
    """The corpus folder."""
    catalogue: Mapping[str, Any]
    """Of the finished corpus."""
    parts: tuple[EarlierPart, ...]
    """Its parts, oldest first."""

    @property
    def n_datasets(self) -> int:
        """Datasets of all of them."""
        return len(self.catalogue["datasets"])

    @property
    def rule(self) -> SplitRule:
        """The rule by which they were split."""
        return rule_of(self.catalogue["split_rule"])

    def kept(self) -> list[NDArray[np.bool_]]:
        """Return per dataset (cells,) True for the staged cells that are in the corpus.

        Raises:
            ValueError: Another corpus lies there by now.
        """
        corpus = Corpus(self.corpus)
        if corpus.hash != self.catalogue["hash"]:
            raise ValueError(f"{self.corpus}: changed while finalize was at work; start it again")
        order = np.argsort(corpus.row_dataset, kind="stable")
        rows = corpus.cells.table("obs_row")[order]
        found, start = [], 0
        for info in corpus.datasets:
            kept = np.zeros(info.n_cells + info.duplicates_dropped, bool)
            kept[rows[start : start + info.n_cells]] = True
            found.append(kept)
            start += info.n_cells
        return found


def earlier_parts(corpus: Path, catalogue: Mapping[str, Any]) -> EarlierParts:
    """Return the parts of a finished corpus.

    Args:
        corpus: The corpus folder.
        catalogue: Its catalogue.
    """
    infos = parts_of(catalogue) or [first_part(catalogue)]
    parts: list[EarlierPart] = []
    first = 0
    for info in infos:
        n_datasets = len(catalogue["datasets"])
        if PARTS in catalogue:
            n_datasets = len(read_catalogue(corpus, name=info.catalogue)["datasets"])
        digests = digests_name(len(parts))
        path = corpus / digests if digests in catalogue["files"] else None
        part = EarlierPart(info=info, first=first, stop=first + n_datasets, digests=path)
        parts.append(part)
        first += n_datasets
    return EarlierParts(corpus=corpus, catalogue=catalogue, parts=tuple(parts))


MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of a file that is not there; others may pass, and are no reason to make a corpus again."""


def first_part(catalogue: Mapping[str, Any]) -> PartInfo:
    """Return a corpus that is no list of parts as the first part of one.

    Args:
        catalogue: Its catalogue.
    """
    return PartInfo(
        folder="",
        catalogue=f"{PARTS}/000000.json",
        checksum=catalogue_checksum(catalogue),
        hash=catalogue["hash"],
        n_cells=catalogue["n_cells"],
    )


def digests_name(number: int) -> str:
    """Return the file with the digests of a part, inside the corpus folder."""
    return f"{PARTS}/{number:06d}.digests.npy"


def find_earlier(
    corpus: Path, inputs: Inputs, rule: SplitRule, *, codec: str, near: str
) -> tuple[EarlierParts | None, str]:
    """Return the parts that new datasets can be added to, or why there are none.

    Args:
        corpus: The corpus folder.
        inputs: What lies there.
        rule: Of the split.
        codec: Of the cells.
        near: Which near duplicates to leave out.

    Returns:
        The parts; or None and the reason, empty where nothing was finished before, or one corpus
        without parts of the same datasets.

    Raises:
        ValueError: A part is damaged, which nothing makes again, or there are too many to add one.
        OSError: What was finished cannot be read: that tells nothing of whether it is whole.
    """
    try:
        catalogue = read_catalogue(corpus)
    except FileNotFoundError:
        return None, ""
    except ValueError as error:
        return None, str(error)
    try:
        reason = _what_changed(corpus, catalogue, inputs, rule, codec=codec, near=near)
        n_new = len(inputs.used) - len(catalogue["datasets"])
        if reason or (not n_new and PARTS not in catalogue):
            return None, reason
        found = earlier_parts(corpus, catalogue)
        for part in found.parts:
            _check_part(corpus, part, catalogue)
    except (ValueError, LookupError, *MISSING) as error:
        if PARTS in catalogue:
            raise ValueError(_beyond_repair(corpus, error)) from None
        return None, f"what was finished is damaged: {error}"
    if n_new and len(found.parts) >= MOST_PARTS:
        raise ValueError(
            f"{corpus}: has {len(found.parts)} parts, the most that are allowed; run: "
            f"python -m data_prep compact {corpus}"
        )
    return found, ""


def _what_changed(
    corpus: Path,
    catalogue: Mapping[str, Any],
    inputs: Inputs,
    rule: SplitRule,
    *,
    codec: str,
    near: str,
) -> str:
    """Return why the datasets of before cannot stay as they are; empty if they can."""
    if catalogue["version"] < ONE_PART_VERSION or "split_rule" not in catalogue:
        return "it was finished by an earlier version"
    before = rule_of(catalogue["split_rule"])
    # Killed before it was published, a part has its datasets in the rule already.
    known = rule.datasets[: len(before.datasets)]
    if replace(rule, datasets=known) != before:
        return "the split is another"
    if catalogue.get("near_duplicates") != near:
        return f"near duplicates: {catalogue.get('near_duplicates')} before, {near} now"
    stored = read_metadata(Location(corpus / "cells.zarr"))["attributes"]["codec"]
    if stored != codec:
        return f"codec {stored} before, {codec} now"
    used = {entry["dataset_id"] for entry in inputs.used}
    documents = finished_documents(corpus, catalogue)
    for name in ("settings.json", *(d["dataset_id"] for d in catalogue["datasets"])):
        document = name
        if name != "settings.json":
            document = ledger_path(corpus, name).relative_to(corpus).as_posix()
            if name not in used:
                return f"{name} is gone"
        if documents.get(document) != inputs.documents.get(document):
            return f"{name} is not what it was"
    names = [dataset["dataset_id"] for dataset in catalogue["datasets"]]
    # The rule remembers the place of a dataset that was forgotten, or excluded, and is back.
    back = {*in_order_of_arrival([*used], before)[: len(names)]} - {*names}
    if back:
        return f"{min(back)} is back, which came before others"
    return ""


def finished_documents(corpus: Path, catalogue: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the SHA-256 of the settings, ledger entries and more that a corpus was made of.

    Args:
        corpus: The corpus folder.
        catalogue: Its catalogue.

    Raises:
        ValueError: Its checksums are damaged.
    """
    if PARTS in catalogue:
        found: Mapping[str, str] = catalogue["documents"]
        return found
    path = corpus / "checksums.json"
    if file_sha256(path) != catalogue.get("checksums_sha256"):
        raise ValueError(f"{path}: damaged (its checksum differs)")
    found = json.loads(path.read_bytes())["inputs"]
    return found


def finished_inputs(corpus: Path, catalogue: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of all inputs that a finished corpus was made of, by name.

    Args:
        corpus: The corpus folder.
        catalogue: Its catalogue.

    Raises:
        ValueError: It is damaged, or lacks a file.
    """
    if PARTS not in catalogue:
        _check_there(corpus, catalogue)
        return dict(finished_documents(corpus, catalogue))
    found = dict(catalogue["documents"])
    for part in earlier_parts(corpus, catalogue).parts:
        _check_part(corpus, part, catalogue)
        own = _own_catalogue(corpus, part, catalogue)
        inputs = finished_documents(corpus / part.info.folder, own)
        found |= {name: digest for name, digest in inputs.items() if name.startswith("staging/")}
    return found


def _check_part(corpus: Path, part: EarlierPart, catalogue: Mapping[str, Any]) -> None:
    """Refuse a part files of which are missing or cut, and damaged digests."""
    own = _own_catalogue(corpus, part, catalogue)
    if PARTS in catalogue and catalogue_checksum(own) != part.info.checksum:
        raise ValueError(f"{corpus / part.info.catalogue}: of another part")
    _check_there(corpus / part.info.folder, own)
    if part.digests is not None:
        name = part.digests.relative_to(corpus).as_posix()
        size, crc32c = catalogue["files"][name]
        check_file(part.digests, (size, crc32c), cure=_CURE)


def _own_catalogue(corpus: Path, part: EarlierPart, catalogue: Mapping[str, Any]) -> dict[str, Any]:
    """Return the catalogue of a part: that of the corpus where it has no list of parts."""
    if PARTS not in catalogue:
        return dict(catalogue)
    return read_catalogue(corpus, name=part.info.catalogue)


def _check_there(folder: Path, catalogue: Mapping[str, Any]) -> None:
    """Refuse a part, or a corpus without, that lacks a file or has a cut shard; reads no cell."""
    missing = [name for name in catalogue["files"] if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / missing[0]}: missing")
    CellStore(folder / "cells.zarr").check_shards()


def check_parts(parts: EarlierParts) -> None:
    """Compare every file and every chunk of cells with its checksum, which reads all of them.

    Args:
        parts: Parts that stay as they are.

    Raises:
        ValueError: One is damaged.
    """
    try:
        for part in parts.parts:
            folder = parts.corpus / part.info.folder
            own = _own_catalogue(parts.corpus, part, parts.catalogue)
            for name, (size, crc32c) in own["files"].items():
                check_file(folder / name, (size, crc32c), cure=_CURE)
            CellStore(folder / "cells.zarr").check_shards(chunks=True)
    except (ValueError, *MISSING) as error:
        raise ValueError(_beyond_repair(parts.corpus, error)) from None


def _beyond_repair(corpus: Path, error: Exception) -> str:
    """Return what to say of a damaged part instead of the cure of a corpus without parts."""
    return (
        f"{str(error).partition('; ')[0]}; parts are not made again: restore the file from a copy "
        f"of the corpus, or run: python -m data_prep compact {corpus} (one new corpus, on which a "
        "run that began on the parts does not continue)"
    )
