"""The lock file: exactly which files a command took, so that it takes the same ones next year.

JSON with the sources and filters that made the list, and every file with its address, version,
bytes and, once it was fetched, its SHA-256.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from data_prep.fetch.item import Item
from data_prep.ledger.ledger import is_safe_id
from data_prep.manifest.address import check_address
from sclong_ds.files.atomic import read_file, read_json, write_atomic

LOCK_VERSION = 1
LOCK_NAME = "fetch.lock.json"
_CURE = "restore it, or make a new list with --update"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A list of files that stays as it is."""

    sources: list[str]
    """What the list was made from."""
    filters: dict[str, Any]
    """See `Filters.as_json`."""
    made: str
    """Day, as 2026-11-29."""
    items: list[Item]


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock file; one that says the same is left alone.

    Args:
        path: The file.
        lock: Its content.
    """
    items = [
        {
            name: value
            for name, value in dataclasses.asdict(item).items()
            if name != "address" and value not in (None, "", {})
        }
        for item in sorted(lock.items, key=lambda item: item.dataset_id)
    ]
    content = {"fetch_lock": LOCK_VERSION, "made": lock.made}
    content |= {"sources": lock.sources, "filters": lock.filters, "items": items}
    data = (json.dumps(content, indent=1) + "\n").encode()
    if not path.exists() or read_file(path) != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a lock file, damaged, or of a newer version.
    """
    found = read_json(path, cure=_CURE)
    if not isinstance(found, dict) or "fetch_lock" not in found:
        raise ValueError(f"{path}: not a lock file of fetch; {_CURE}")
    if found["fetch_lock"] != LOCK_VERSION:
        raise ValueError(
            f"{path}: lock version {found['fetch_lock']}, this program reads {LOCK_VERSION}"
        )
    try:
        lock = Lock(
            sources=[str(source) for source in found["sources"]],
            filters=dict(found["filters"]),
            made=str(found["made"]),
            items=[_item_of(entry) for entry in found["items"]],
        )
        count = Counter(item.dataset_id.lower() for item in lock.items)
        if twice := [name for name, number in count.items() if number > 1]:
            raise ValueError(f"dataset '{twice[0]}' twice")
        return lock
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}); {_CURE}") from None


def with_digests(lock: Lock, digests: Mapping[str, tuple[int, str]]) -> Lock:
    """Return a lock with the bytes and SHA-256 of files that were fetched; what it had stays.

    Args:
        lock: The lock.
        digests: Bytes and SHA-256 (hex) by dataset id.
    """
    items: Sequence[Item] = [
        dataclasses.replace(
            item, size=digests[item.dataset_id][0], sha256=digests[item.dataset_id][1]
        )
        if item.dataset_id in digests and not item.sha256
        else item
        for item in lock.items
    ]
    return dataclasses.replace(lock, items=list(items))


def _item_of(entry: Mapping[str, Any]) -> Item:
    kinds = get_type_hints(Item)
    for name, value in entry.items():
        whole = kinds.get(name) == int | None
        good = type(value) is int and value >= 0 if whole else isinstance(value, str | dict)
        if (
            name not in kinds
            or name == "address"
            or not good
            or (name == "terms") != isinstance(value, dict)
        ):
            raise ValueError(f"'{name}' of {entry.get('dataset_id')}")
    item = Item(**entry)
    check_address(item.url)
    if not is_safe_id(item.dataset_id):
        raise ValueError(f"dataset id '{item.dataset_id[:100]}'")
    return item
