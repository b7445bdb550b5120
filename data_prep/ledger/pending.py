"""Which datasets a `convert` was to do, so that a task that never ran is noticed.

`CORPUS/manifests/HASH.json` keeps the datasets of a manifest and the number of tasks; its name is
the hash of its content. What is listed there and has no ledger entry is pending. Another manifest
for the same corpus adds its datasets; only `forget` takes one off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.ledger.ledger import LedgerEntry, is_safe_id, json_files
from sclong_ds.files.atomic import locked, read_json, remove_partials, write_atomic

_MOST_TASKS = 20
"""Tasks that a message names."""
_KEYS = ("tasks", "datasets")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A dataset that was to be converted and has no ledger entry yet."""

    dataset_id: str
    task: int
    """Number of the task that it belongs to, from 0."""
    tasks: int
    """Number of tasks."""


def known_names(corpus: Path) -> set[str]:
    """Return every dataset that the ledger or a manifest of a corpus folder names.

    Args:
        corpus: The corpus folder.

    Raises:
        ValueError: A damaged file in CORPUS/manifests.
    """
    names = {path.stem for path in json_files(corpus / "ledger")}
    return names | {dataset.dataset_id for dataset in read_pending(corpus, [])}


def record_manifest(corpus: Path, dataset_ids: Sequence[str | None], *, tasks: int) -> None:
    """Keep which datasets are to be converted; every task of an array writes the same file.

    Args:
        corpus: The corpus folder.
        dataset_ids: All datasets of the manifest, each at a place of its task; None at others.
        tasks: Number of tasks; task I does every dataset whose place is I modulo `tasks`.
    """
    with _locked(corpus):
        _write_file(corpus, dataset_ids, tasks)


@contextmanager
def _locked(corpus: Path) -> Iterator[None]:
    """Write to CORPUS/manifests alone; what killed writers have left is removed."""
    with locked(corpus / ".locks" / "~manifests"):
        folder = corpus / "manifests"
        folder.mkdir(exist_ok=True)
        remove_partials(folder)
        yield


def _content(names: Sequence[str | None], tasks: int) -> tuple[bytes, str]:
    """Return the bytes of a file of CORPUS/manifests and its name without the suffix."""
    content = (json.dumps({"tasks": tasks, "datasets": list(names)}, indent=1) + "\n").encode()
    return content, hashlib.sha256(content).hexdigest()[:16]


def _write_file(corpus: Path, names: Sequence[str | None], tasks: int) -> None:
    content, name = _content(names, tasks)
    write_atomic(corpus / "manifests" / f"{name}.json", content)


def _paths(corpus: Path) -> list[Path]:
    return json_files(corpus / "manifests")


def _read_file(path: Path) -> tuple[int, list[str | None]]:
    cure = "delete it and run convert again"
    found = read_json(path, cure=cure)
    tasks: Any
    names: Any
    tasks, names = (found.get(key) if isinstance(found, dict) else None for key in _KEYS)
    sound = (
        type(tasks) is int
        and tasks > 0
        and isinstance(names, list)
        and all(name is None or (isinstance(name, str) and is_safe_id(name)) for name in names)
        and _content(names, tasks)[1] == path.stem
    )
    if not sound:
        raise ValueError(f"{path}: damaged (its name is not that of its content); {cure}")
    return tasks, names


def forget_in_manifests(corpus: Path, dataset_ids: Sequence[str]) -> None:
    """Take datasets off the manifests of a corpus folder; the tasks of the others stay the same.

    Args:
        corpus: The corpus folder.
        dataset_ids: Names of datasets; those that no manifest lists are passed over.

    Raises:
        ValueError: A damaged file in CORPUS/manifests.
    """
    with _locked(corpus):
        for path in _paths(corpus):
            tasks, names = _read_file(path)
            # A place left empty: the place of a dataset decides its task.
            kept = [None if name in dataset_ids else name for name in names]
            if kept == names:
                continue
            if any(kept):
                _write_file(corpus, kept, tasks)
            path.unlink()


def read_pending(corpus: str | Path, entries: Iterable[LedgerEntry]) -> list[Pending]:
    """Return the datasets that were to be converted and have no entry, sorted by name.

    Args:
        corpus: The corpus folder.
        entries: Its ledger.

    Raises:
        ValueError: A damaged file in CORPUS/manifests.
    """
    known = {entry["dataset_id"] for entry in entries}
    found: dict[str, Pending] = {}
    for path in _paths(Path(corpus)):
        tasks, names = _read_file(path)
        for place, name in enumerate(names):
            if name is not None and name not in known:
                found[name] = Pending(dataset_id=name, task=place % tasks, tasks=tasks)
    return [found[name] for name in sorted(found)]


def tasks_to_run(pending: Sequence[Pending]) -> str:
    """Return what has to be run for datasets that are pending, as the end of a sentence.

    Args:
        pending: At least one.
    """
    numbers: dict[int, set[int]] = {}
    for dataset in pending:
        if dataset.tasks > 1:
            numbers.setdefault(dataset.tasks, set()).add(dataset.task)
    parts = []
    for tasks, missing in sorted(numbers.items()):
        named = ", ".join(map(str, sorted(missing)[:_MOST_TASKS]))
        more = ", ..." if len(missing) > _MOST_TASKS else ""
        parts.append(f"task {named}{more} of {tasks}")
    return f"run convert again ({'; '.join([*parts, 'what is done is skipped'])})"
