"""What is known of a dataset before anything of it is read: its entry, its hashes, its name.

Imported by the parent of the workers, which needs no library that reads data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

from data_prep.convert.source_identity import fetched_hash, source_files, source_hash
from data_prep.ledger.ledger import LedgerEntry, empty_entry
from data_prep.manifest.manifest import ORIGIN, Dataset
from data_prep.staging.settings import STAGING_VERSION, Settings


def settings_hash(dataset: Dataset, settings: Settings) -> str:
    """Return the SHA-256 (hex) of everything but the files that decides what is staged.

    Args:
        dataset: Its options count, its path does not.
        settings: Those of the folder.
    """
    content = {
        "staging_version": STAGING_VERSION,
        "settings": dataclasses.asdict(settings),
        "options": dataset.options(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def new_entry(dataset: Dataset, settings: Settings) -> LedgerEntry:
    """Return the entry of a dataset before anything of it is read.

    Args:
        dataset: The dataset.
        settings: Those of the corpus folder.
    """
    entry = empty_entry(
        dataset.dataset_id,
        dataset.url if dataset.remote else dataset.path,
        organism=dataset.organism,
        tissue=dataset.tissue,
        settings_hash=settings_hash(dataset, settings),
    )
    options = dataset.options() | {"gene_list": dataset.gene_list}
    entry["options"] = {name: str(value) for name, value in options.items() if value}
    origin = {name: getattr(dataset, name) for name in ORIGIN}
    entry["origin"] = {name: str(value) for name, value in origin.items() if value}
    return entry


def read_hash(dataset: Dataset) -> str:
    """Return the hash of the files of a dataset; of one that was just fetched it is known.

    Args:
        dataset: The dataset.

    Raises:
        FileNotFoundError: No such file, or an empty folder, which may be a disk that is away.
        ValueError: It cannot be read.
    """
    if dataset.path.is_dir() and not source_files(dataset.path):
        raise FileNotFoundError(f"{dataset.path}: no file in this folder")
    if dataset.fetched and dataset.sha256 and source_files(dataset.path) == [dataset.path]:
        return fetched_hash(dataset.path, dataset.sha256)
    return source_hash(dataset.path, gene_list=dataset.gene_list)


def is_taken(staged: LedgerEntry, dataset: Dataset, found_hash: str | None) -> bool:
    """Tell whether a dataset is another one than what is staged under its name.

    Args:
        staged: The entry of what is staged.
        dataset: The dataset. A file that moved has the old hash, one that changed the old path.
        found_hash: Hash of its files.
    """
    if dataset.remote:
        same = bool(dataset.sha256) and dataset.sha256 == staged["origin"].get("sha256")
        return staged["path"] != dataset.url and not same
    moved = os.path.realpath(staged["path"]) != os.path.realpath(dataset.path)
    return moved and staged["source_hash"] != found_hash


def taken(staged: LedgerEntry) -> str:
    """Return what is wrong with a dataset for which `is_taken` holds.

    Args:
        staged: The entry of what is staged.
    """
    return (
        f"dataset_id '{staged['dataset_id']}' is already {staged['path']} in this corpus; "
        "rename it in the manifest, or add --replace"
    )
