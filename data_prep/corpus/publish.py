"""The products of `finalize` from their work folder to their names, atomically."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.corpus.growth.part_list import LIST, add_part, is_whole, place_of
from data_prep.corpus.split.rule import write_rule
from data_prep.corpus.work_folder import PREFIX
from sclong_ds.corpus.catalogue import read_catalogue
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import read_metadata
from sclong_ds.files.atomic import (
    file_sha256,
    listed,
    partial_name,
    read_file,
    sync_folder,
    write_atomic,
)

logger = logging.getLogger(__name__)

PRODUCTS = (
    "cells.zarr",
    "obs",
    "columns",
    "genes.tsv",
    "gene_stats.npz",
    "measured_genes.npy",
    "CITATIONS.md",
    "checksums.json",
)
"""In the order in which they get their names; corpus.json comes last."""


def begun(corpus: Path) -> tuple[dict[str, Any], str]:
    """Return the catalogue of a finished corpus, and the codec of its cells.

    Where a killed `publish` has put the catalogue aside, that of the new corpus.

    Args:
        corpus: The corpus folder.

    Raises:
        FileNotFoundError: Nothing is finished.
        ValueError: What is finished is damaged.
    """
    cells = corpus / "cells.zarr"
    try:
        catalogue = read_catalogue(corpus)
    except FileNotFoundError:
        works = [path for path in listed(corpus) if path.name.startswith(PREFIX)]
        sealed = [work for work in works if (work / "corpus.json").is_file()]
        if not sealed:
            raise
        catalogue = read_catalogue(sealed[0])
        if (sealed[0] / "cells.zarr").is_dir():
            cells = sealed[0] / "cells.zarr"
    return catalogue, str(read_metadata(Location(cells))["attributes"]["codec"])


def is_sealed(corpus: Path, work: Path) -> bool:
    """Tell whether an earlier run has finished the work, and all products are as it left them.

    Args:
        corpus: The corpus folder.
        work: Its work folder; what does not hold there is removed.
    """
    if not (work / "corpus.json").exists():
        return False
    try:
        catalogue = read_catalogue(work)
        # Those that were moved already lie in the corpus folder.
        place = place_of(corpus, work)
        places = {name: work if (work / name).exists() else place for name in PRODUCTS}
        if (work / LIST).is_dir() and not is_whole(corpus, work):
            raise ValueError(f"{work / LIST}: changed")
        path = places["checksums.json"] / "checksums.json"
        if file_sha256(path) != catalogue["checksums_sha256"]:
            raise ValueError(f"{path}: changed")
        for name, digest in json.loads(read_file(path))["files"].items():
            path = places[name.partition("/")[0]] / name
            if file_sha256(path) != digest:
                raise ValueError(f"{path}: changed")
    except (OSError, ValueError) as error:
        logger.warning("what an earlier run has made is made again: %s", error)
        (work / "corpus.json").unlink()
        for name in PRODUCTS:
            shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink(True)
        return False
    return True


def publish(corpus: Path, work: Path) -> dict[str, Any]:
    """Move the products to their names; return the catalogue.

    A part is added to those that are there (`data_prep.corpus.growth.part_list`). Else
    corpus.json goes first and comes last: a run killed in between leaves no corpus, never a mix,
    and the next one continues with what it has moved. What fails puts the corpus before it back.

    Args:
        corpus: The corpus folder.
        work: Its work folder, complete.

    Raises:
        ValueError: A product is in neither folder.
    """
    if (work / LIST).is_dir():
        return add_part(corpus, work, PRODUCTS)
    for name in PRODUCTS:
        if not (work / name).exists() and not (corpus / name).exists():
            raise ValueError(f"{work / name}: missing; run finalize again")
    # First, so that whatever happens the next one splits by the same rule.
    write_rule(corpus, read_catalogue(work)["split_rule"])
    asides: dict[str, Path] = {}
    tried: list[str] = []
    if (corpus / "corpus.json").exists():
        aside = partial_name(work / "corpus.json")
        os.rename(corpus / "corpus.json", aside)
        asides["corpus.json"] = aside
    try:
        sync_folder(corpus)
        for name in PRODUCTS:
            if not (work / name).exists():
                continue
            tried.append(name)
            if (corpus / name).exists():
                asides[name] = _set_aside(corpus / name, work)
            os.replace(work / name, corpus / name)
        sync_folder(corpus)
        write_atomic(corpus / "corpus.json", read_file(work / "corpus.json"))
        sync_folder(corpus)
    except OSError:
        _put_back(corpus, work, tried, asides)
        raise
    return read_catalogue(corpus)


def _set_aside(path: Path, work: Path) -> Path:
    """Keep what is to be replaced under a name that goes with the work folder; return the name.

    A file is copied: the gene list must be there at all times.
    """
    aside = partial_name(work / path.name)
    if path.is_dir():
        os.rename(path, aside)
    else:
        shutil.copyfile(path, aside)
    return aside


def _put_back(corpus: Path, work: Path, tried: Sequence[str], asides: dict[str, Path]) -> None:
    """Undo what `publish` has moved, corpus.json last."""
    (corpus / "corpus.json").unlink(missing_ok=True)
    for name in reversed(tried):
        path = corpus / name
        if not (work / name).exists():
            if path.is_dir():
                os.rename(path, work / name)
            else:
                shutil.copyfile(path, work / name)
                if name not in asides:
                    path.unlink()
        if name in asides:
            os.replace(asides[name], path)
    if "corpus.json" in asides:
        os.replace(asides["corpus.json"], corpus / "corpus.json")
