"""The ledger of a corpus folder: one small JSON file per dataset that says what became of it.

`CORPUS/ledger/DATASET.json` is written when a dataset is done, so array tasks never write to the
same file; `python -m data_prep status` lists them. `finalize` takes the datasets that are `ok`.

`CORPUS/manifests/HASH.json` keeps which datasets a `convert` was to do, and in how many tasks, so
that a task that never ran is noticed: what is listed there and has no entry is pending. Another
manifest for the same corpus adds its datasets; only `forget` takes one off.

`CORPUS/.locks/DATASET` is locked by whoever works on a dataset.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from sclong_ds.files import write_atomic

_log = logging.getLogger(__name__)

Status = Literal["ok", "excluded", "failed"]
STATUSES: tuple[Status, ...] = ("ok", "excluded", "failed")
_MOST_TASKS = 20
"""Tasks that a message names."""


class LedgerEntry(TypedDict):
    """What is known of one dataset; sizes are 0 or null where it could not be read."""

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
    gene_column: str | None
    """Which column named the genes."""
    n_cells: int
    """Cells staged; 0 where the dataset is not ok, and then no cell counts as dropped either."""
    n_cells_input: int
    dropped_cells: dict[str, int]
    """Cells left out, by reason."""
    n_genes_input: int
    n_genes_known: int
    """Genes of the dataset that are in the vocabulary."""
    n_genes_mapped: int
    """Genes of the vocabulary that are reached (fewer where several genes were summed)."""
    n_genes_summed: int
    """Genes of the dataset that share their vocabulary gene with another, and were summed."""
    n_genes_mito: int
    """Mitochondrial genes of the dataset; 0 means that `max_mito_fraction` cannot drop a cell."""
    gene_names: dict[str, int]
    """Genes of the dataset by how their name was resolved (`gene_names.KINDS`)."""
    restored: str
    """How counts were restored from other values; empty for raw counts taken as they are."""
    counts_input: int
    """Sum of all counts of the dataset."""
    counts_kept: float | None
    """Share of them that fell on mapped genes."""
    largest_losses: dict[str, int]
    """Unmapped genes with most counts."""
    obs_columns: list[str]
    """Cell annotations kept."""
    texts_repaired: int
    """Annotations of cells kept that UTF-8 cannot hold; U+FFFD stands where it could not."""
    source_hash: str | None
    settings_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A dataset that was to be converted and has no ledger entry yet."""

    dataset_id: str
    task: int
    """Number of the task that it belongs to, from 0."""
    tasks: int
    """Number of tasks."""


def empty_entry(
    dataset_id: str, path: Path, *, organism: str, tissue: str, settings_hash: str
) -> LedgerEntry:
    """Return the entry of a dataset of which nothing is known yet.

    Args:
        dataset_id: Name of the dataset.
        path: Its file or folder.
        organism: As in the manifest.
        tissue: As in the manifest.
        settings_hash: See `convert.settings_hash`.
    """
    return LedgerEntry(
        dataset_id=dataset_id,
        path=str(path),
        status="failed",
        reason="",
        format=None,
        organism=organism,
        tissue=tissue,
        matrix=None,
        gene_column=None,
        n_cells=0,
        n_cells_input=0,
        dropped_cells={},
        n_genes_input=0,
        n_genes_known=0,
        n_genes_mapped=0,
        n_genes_summed=0,
        n_genes_mito=0,
        gene_names={},
        restored="",
        counts_input=0,
        counts_kept=None,
        largest_losses={},
        obs_columns=[],
        texts_repaired=0,
        source_hash=None,
        settings_hash=settings_hash,
    )


def ledger_path(corpus: Path, dataset_id: str) -> Path:
    """Return where the entry of a dataset lies.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    return corpus / "ledger" / f"{dataset_id}.json"


def write_entry(corpus: Path, entry: LedgerEntry) -> None:
    """Write the entry of a dataset, replacing an older one.

    Args:
        corpus: The corpus folder.
        entry: The entry.
    """
    path = ledger_path(corpus, entry["dataset_id"])
    write_atomic(path, (json.dumps(entry, indent=1) + "\n").encode())


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
    path = corpus / ".locks" / dataset_id
    path.parent.mkdir(exist_ok=True)
    # Never removed: a process that waits would then hold a file that no other one can find.
    with path.open("ab") as file:
        held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            _log.warning("%s: this file system has no locks; start one convert only", corpus)
        yield held


def read_entry(path: Path) -> LedgerEntry:
    """Read one entry.

    Args:
        path: A file of the ledger.

    Raises:
        ValueError: Not an entry.
    """
    try:
        entry = json.loads(path.read_bytes())
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or entry.get("status") not in STATUSES:
        raise ValueError(f"{path}: not a ledger entry; delete it and convert the dataset again")
    return entry  # type: ignore[return-value]


def previous_entry(corpus: Path, dataset_id: str) -> LedgerEntry | None:
    """Return the entry of a dataset on disk, None if there is none that can be read.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    path = ledger_path(corpus, dataset_id)
    if not path.is_file():
        return None
    try:
        return read_entry(path)
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
    usable = entry is not None and entry["status"] == "ok"
    return entry if usable and is_staged(corpus, dataset_id) else None


def is_staged(corpus: Path, dataset_id: str) -> bool:
    """Return whether the staging folder of a dataset is there; it is whole or absent.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    return (corpus / "staging" / dataset_id / "obs.parquet").is_file()


def known_names(corpus: Path) -> set[str]:
    """Return every dataset that the ledger or a manifest of a corpus folder names.

    Args:
        corpus: The corpus folder.

    Raises:
        ValueError: A damaged file in CORPUS/manifests.
    """
    names = {path.stem for path in (corpus / "ledger").glob("[!.]*.json")}
    return names | {dataset.dataset_id for dataset in read_pending(corpus, [])}


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
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    return [read_entry(path) for path in paths]


def count_statuses(entries: Iterable[LedgerEntry]) -> dict[str, int]:
    """Return how many datasets have each status.

    Args:
        entries: Entries of the ledger.
    """
    statuses = [entry["status"] for entry in entries]
    return {status: statuses.count(status) for status in STATUSES}


def record_manifest(corpus: Path, dataset_ids: Sequence[str], *, tasks: int) -> None:
    """Keep which datasets are to be converted; every task of an array writes the same file.

    Args:
        corpus: The corpus folder.
        dataset_ids: All datasets of the manifest, in its order.
        tasks: Number of tasks; task I does every dataset whose place is I modulo `tasks`.
    """
    _write_manifest_file(corpus, dataset_ids, tasks)


def _write_manifest_file(corpus: Path, names: Sequence[str | None], tasks: int) -> None:
    content = json.dumps({"tasks": tasks, "datasets": list(names)}, indent=1) + "\n"
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = corpus / "manifests" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, content.encode())


def _manifest_paths(corpus: Path) -> list[Path]:
    return sorted((corpus / "manifests").glob("[!.]*.json"))


def _read_manifest_file(path: Path) -> tuple[int, list[str | None]]:
    try:
        content = json.loads(path.read_bytes())
        return int(content["tasks"]), list(content["datasets"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged; delete it and run convert again") from None


def forget_in_manifests(corpus: Path, dataset_ids: Sequence[str]) -> None:
    """Take datasets off the manifests of a corpus folder; the tasks of the others stay the same.

    Args:
        corpus: The corpus folder.
        dataset_ids: Names of datasets; those that no manifest lists are passed over.

    Raises:
        ValueError: A damaged file in CORPUS/manifests.
    """
    for path in _manifest_paths(corpus):
        tasks, names = _read_manifest_file(path)
        # A place left empty: the place of a dataset decides its task.
        kept = [None if name in dataset_ids else name for name in names]
        if kept == names:
            continue
        if any(kept):
            _write_manifest_file(corpus, kept, tasks)
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
    for path in _manifest_paths(Path(corpus)):
        tasks, names = _read_manifest_file(path)
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


def format_table(entries: Sequence[LedgerEntry], pending: Sequence[Pending] = ()) -> str:
    """Return a text table (dataset, status, cells, genes mapped, reason) and lines of totals.

    Datasets that are not ok come last, where a reader of a long table looks first.

    Args:
        entries: Entries of the ledger.
        pending: Datasets that have none yet.
    """
    rows = [("dataset", "status", "cells", "genes mapped", "reason")]
    rows += [
        (
            entry["dataset_id"],
            entry["status"],
            str(entry["n_cells"]),
            str(entry["n_genes_mapped"]),
            entry["reason"],
        )
        for entry in sorted(entries, key=lambda entry: STATUSES.index(entry["status"]))
    ]
    rows += [
        (p.dataset_id, "pending", "", "", f"not converted yet (task {p.task} of {p.tasks})")
        for p in pending
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, status, cells, mapped, reason in rows:
        line = f"{name:<{widths[0]}}  {status:<{widths[1]}}  {cells:>{widths[2]}}"
        lines.append(f"{line}  {mapped:>{widths[3]}}  {reason}".rstrip())
    counts = ", ".join(f"{number} {status}" for status, number in count_statuses(entries).items())
    if pending:
        counts += f", {len(pending)} pending"
        lines.append(f"pending: {tasks_to_run(pending)}")
    usable = [entry for entry in entries if entry["status"] == "ok"]
    n_cells = sum(entry["n_cells"] for entry in usable)
    dropped: Counter[str] = Counter()
    for entry in usable:
        dropped.update(entry["dropped_cells"])
    if dropped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
        lines.append(f"cells dropped: {reasons}")
    totals = f"{len(entries) + len(pending)} datasets: {counts}; {n_cells} cells"
    n_kept = sum(bool(entry["reason"]) for entry in usable)
    if n_kept:
        totals += f"; {n_kept} kept as staged (source not reachable)"
    return "\n".join([*lines, totals])
