"""The list of parts: `corpus.json` of a corpus that has grown, and the files that belong to it.

    CORPUS/corpus.json                   the catalogue of all cells, with the list of parts
    CORPUS/parts/000000.json             the catalogue of the first part, which lies in CORPUS
    CORPUS/parts/NUMBER/                 a part that was added: a complete corpus
    CORPUS/parts/NUMBER.digests.npy      the digests of its staged cells

A part is moved to its name before corpus.json lists it, and corpus.json is replaced by one rename:
whenever the command is killed, the corpus before it or the new one is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep.corpus.growth.digests import join_pieces
from data_prep.corpus.growth.earlier import MANY_PARTS, EarlierParts, digests_name
from data_prep.corpus.near.kept_cells import NearCounts
from data_prep.corpus.split.rule import write_rule
from sclong_ds.corpus.catalogue import (
    PARTS,
    DatasetInfo,
    PartInfo,
    catalogue_checksum,
    checked_files,
    hash_of_parts,
    parts_of,
    read_catalogue,
    with_version,
    write_catalogue,
)
from sclong_ds.files.atomic import listed, read_file, sync_folder, write_atomic
from sclong_ds.files.checksums import check_file

LIST = "list"
"""Folder inside the work folder with the new corpus.json and its files."""
_COPY = "corpus.json.copy"
"""File of the work folder, on its way to the part."""


def earlier_datasets(earlier: EarlierParts, near: NearCounts) -> list[DatasetInfo]:
    """Return the datasets of earlier parts, whose cells may have near duplicates by now.

    Args:
        earlier: The parts.
        near: The numbers of near duplicates of all datasets.
    """
    return [
        replace(DatasetInfo(**dataset), near_kept=near.near_kept[number])
        for number, dataset in enumerate(earlier.catalogue["datasets"])
    ]


def growth_warnings(earlier: EarlierParts, overdue: int) -> list[str]:
    """Return what the user should know of a corpus that grows.

    Args:
        earlier: The parts before.
        overdue: Cells of theirs that would be left out as near duplicates now.
    """
    found = []
    if overdue:
        found.append(
            f"{overdue} cells of earlier parts are near duplicates of new ones and stay, since "
            "parts do not change; python -m data_prep compact leaves them out"
        )
    if len(earlier.parts) + 1 >= MANY_PARTS:
        found.append(
            f"{len(earlier.parts) + 1} parts: every process opens each of them; "
            "python -m data_prep compact makes one of them"
        )
    return found


def write_list(
    work: Path,
    earlier: EarlierParts,
    about: dict[str, Any],
    new: Mapping[str, Any],
    documents: Mapping[str, str],
    firsts: Sequence[int],
) -> None:
    """Write the list of parts and its files into the work folder.

    Args:
        work: The work folder.
        earlier: The parts before.
        about: The catalogue of all cells, as far as it says nothing of parts.
        new: The catalogue of the new part.
        documents: SHA-256 of settings and ledger entries.
        firsts: (datasets + 1,) number of the first staged cell of each dataset.
    """
    number, folder = len(earlier.parts), work / LIST
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    before = earlier.catalogue
    names = []
    if PARTS not in before:
        names.append(earlier.parts[0].info.catalogue)
        write_atomic(folder / names[0], read_file(work / "earlier" / "corpus.json"))
    for place, part in enumerate(earlier.parts):
        if part.digests is None:
            names.append(digests_name(place))
            first, stop = firsts[part.first], firsts[part.stop]
            join_pieces(work / "digests-kept", folder / names[-1], first=first, stop=stop)
    names.append(digests_name(number))
    first = firsts[earlier.n_datasets]
    join_pieces(work / "digests-kept", folder / names[-1], first=first, stop=firsts[-1])
    infos = [part.info for part in earlier.parts]
    infos.append(
        PartInfo(
            folder=f"{PARTS}/{number:06d}",
            catalogue=f"{PARTS}/{number:06d}/corpus.json",
            checksum=catalogue_checksum(with_version(new)),
            hash=new["hash"],
            n_cells=new["n_cells"],
        )
    )
    files = before["files"] if PARTS in before else {}
    about |= {
        "n_cells": before["n_cells"] + new["n_cells"],
        "n_genes": new["n_genes"],
        "n_values": before["n_values"] + new["n_values"],
        "genes_hash": new["genes_hash"],
        "hash": hash_of_parts([info.hash for info in infos]),
        "documents": dict(documents),
        PARTS: [asdict(info) for info in infos],
        "files": files | checked_files(folder, names),
    }
    write_catalogue(folder, about)


def is_whole(corpus: Path, work: Path) -> bool:
    """Tell whether the new list and its files are as they were written, wherever they lie by now.

    Args:
        corpus: The corpus folder.
        work: Its work folder.
    """
    try:
        catalogue = read_catalogue(work / LIST)
        for name, (size, crc32c) in catalogue["files"].items():
            path = work / LIST / name
            place = path if path.exists() else corpus / name
            check_file(place, (size, crc32c), cure="")
    except (OSError, ValueError):
        return False
    return True


def place_of(corpus: Path, work: Path) -> Path:
    """Return the folder that the products of some work go to.

    Args:
        corpus: The corpus folder.
        work: Its work folder, sealed.
    """
    if not (work / LIST).is_dir():
        return corpus
    return corpus / parts_of(read_catalogue(work / LIST))[-1].folder


def add_part(corpus: Path, work: Path, products: Sequence[str]) -> dict[str, Any]:
    """Move a part to its name and list it; return the catalogue of all.

    Args:
        corpus: The corpus folder.
        work: Its work folder, complete.
        products: Names of what the part consists of, besides its catalogue.

    Raises:
        ValueError: A product is in neither folder.
    """
    place = place_of(corpus, work)
    for name in products:
        if not (work / name).exists() and not (place / name).exists():
            raise ValueError(f"{work / name}: missing; run finalize again")
    place.mkdir(parents=True, exist_ok=True)
    for name in products:
        if not (work / name).exists():
            continue
        # What another run has left, which was killed before its part was listed.
        if (place / name).is_dir():
            shutil.rmtree(place / name)
        os.replace(work / name, place / name)
    # A copy that is complete before it gets there: a kill leaves nothing half written in the part.
    write_atomic(work / _COPY, read_file(work / "corpus.json"))
    os.replace(work / _COPY, place / "corpus.json")
    for path in listed(work / LIST / PARTS):
        os.replace(path, corpus / PARTS / path.name)
    for folder in (place, corpus / PARTS, corpus):
        sync_folder(folder)
    # First, so that whatever happens the next one splits by the same rule.
    write_rule(corpus, read_catalogue(work / LIST)["split_rule"])
    write_atomic(corpus / "corpus.json", read_file(work / LIST / "corpus.json"))
    sync_folder(corpus)
    return read_catalogue(corpus)


def remove_unlisted(corpus: Path) -> None:
    """Remove parts, and files of parts, that a finished corpus does not list.

    Args:
        corpus: The corpus folder, in which no other finalize is at work.
    """
    folder = corpus / PARTS
    if not folder.is_dir() or not (corpus / "corpus.json").exists():
        return
    catalogue = read_catalogue(corpus)
    known = {*catalogue["files"], *(part.folder for part in parts_of(catalogue))}
    for path in listed(folder):
        if f"{PARTS}/{path.name}" not in known:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not listed(folder):
        folder.rmdir()
