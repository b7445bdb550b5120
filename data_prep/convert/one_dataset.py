"""One dataset from its source to its ledger entry; `convert` runs it in a worker process.

What is done is left alone unless its files or options changed; what is wrong with a dataset becomes
the status and reason of its entry. Files whose size, times and inode are those of files that were
hashed before are not hashed again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_prep.convert.entry import is_taken, new_entry, read_hash, taken
from data_prep.convert.limits import reason_of
from data_prep.convert.shares import Piece
from data_prep.convert.source_identity import (
    FileState,
    remember_hash,
    remembered_hash,
    source_state,
)
from data_prep.genes.gene_names import GeneResolver
from data_prep.ledger.corpus_lock import shared_corpus
from data_prep.ledger.ledger import (
    LedgerEntry,
    check_staged,
    dataset_lock,
    is_older,
    previous_entry,
    staged_entry,
    write_entry,
)
from data_prep.manifest.manifest import Dataset
from data_prep.source.source import UnusableError
from data_prep.staging.dataset import stage, stage_piece
from data_prep.staging.forget import clear, part_folder, remove_pieces
from data_prep.staging.pieces import NotToBeCutError, Pieces
from data_prep.staging.settings import Settings
from sclong_ds.files.atomic import locked, named_errors

_log = logging.getLogger(__name__)


def convert_dataset(
    dataset: Dataset,
    *,
    corpus: Path,
    settings: Settings,
    resolver: GeneResolver,
    replace: bool = False,
    verify_sources: bool = False,
    pieces: Pieces | None = None,
) -> LedgerEntry:
    """Stage one dataset and write its ledger entry; a dataset that is done is left alone.

    Waits while another process is at the same dataset.

    Args:
        dataset: The dataset.
        corpus: A folder made by `prepare_corpus`.
        settings: Those of the folder.
        resolver: Of the vocabulary of the folder.
        replace: Replace what is staged under its name from another path.
        verify_sources: Hash files whose size, times and inode are those of before, too.
        pieces: Its cells, staged by row ranges; None: they are read from the source.

    Returns:
        The entry; whatever is wrong with the dataset is its status and reason.

    Raises:
        ValueError: A `finalize` is at work in the folder.
        OSError: The corpus folder cannot be written.
    """
    with shared_corpus(corpus), dataset_lock(corpus, dataset.dataset_id):
        entry = new_entry(dataset, settings)
        staged = staged_entry(corpus, dataset.dataset_id)
        if dataset.remote and not dataset.fetched:
            return _as_staged(corpus, entry, dataset)
        try:
            state, found, is_new = _identified(corpus, dataset, verify=verify_sources)
        except (ValueError, OSError) as error:
            if isinstance(error, UnusableError):
                entry["status"] = "excluded"
            return _keep_or_fail(corpus, entry, staged, str(error))
        if pieces is not None and not pieces.are_of(_piece_key(entry, state)):
            raise ValueError(_changed(dataset))
        entry["source_hash"] = found
        if is_new:
            remember_hash(corpus, dataset.dataset_id, state, found)
        if (previous := _unchanged(corpus, entry)) is not None:
            return _with_origin(corpus, previous, entry, remote=dataset.remote)
        if staged is not None and not replace and is_taken(staged, dataset, entry["source_hash"]):
            return _keep_or_fail(corpus, entry, staged, taken(staged))
        if staged is None:
            clear(corpus, dataset.dataset_id)
        else:
            shutil.rmtree(part_folder(_folder(corpus, dataset)), ignore_errors=True)
        unchanged = partial(_require_unchanged, dataset, state, found)
        _stage_or_explain(
            dataset, entry, staged, corpus=corpus, settings=settings, resolver=resolver,
            unchanged=unchanged, pieces=pieces,
        )  # fmt: skip
        return entry


def convert_piece(
    dataset: Dataset,
    piece: Piece,
    *,
    corpus: Path,
    settings: Settings,
    resolver: GeneResolver,
    replace: bool = False,
    verify_sources: bool = False,
) -> LedgerEntry | None:
    """Stage a row range of a dataset; whoever finishes the last one puts them together.

    Who finds that it cannot be cut, or that something is wrong with it, stages it in one go.

    Args:
        dataset: The dataset.
        piece: Which range.
        corpus: A folder made by `prepare_corpus`.
        settings: Those of the folder.
        resolver: Of the vocabulary of the folder.
        replace: As in `convert_dataset`.
        verify_sources: As in `convert_dataset`.

    Returns:
        The entry of the dataset if it is done with this; None while pieces are missing.

    Raises:
        ValueError: A `finalize` is at work in the folder, or the source changed meanwhile.
        OSError: The corpus folder cannot be written.
    """
    whole = partial(
        convert_dataset, dataset, corpus=corpus, settings=settings, resolver=resolver,
        replace=replace, verify_sources=verify_sources,
    )  # fmt: skip
    is_first = piece.number == 0 and not piece.taken_over
    with shared_corpus(corpus):
        entry = new_entry(dataset, settings)
        try:
            state = source_state(dataset.path, gene_list=dataset.gene_list)
            is_done = _is_done(corpus, entry, state) or _is_done_by_hash(corpus, dataset, entry)
        except (ValueError, OSError):
            return whole() if is_first else None
        key = _piece_key(entry, state)
        pieces = Pieces(corpus, dataset.dataset_id, of=piece.of, depends_on=key)
        if is_done or pieces.not_to_be_cut():
            return whole() if is_first else None
        stage_it = partial(
            stage_piece, dataset, entry, pieces=pieces, settings=settings, resolver=resolver
        )
        try:
            _stage_range(dataset, piece.number, stage_it, corpus=corpus, pieces=pieces, state=state)
        except NotToBeCutError as error:
            pieces.refuse(str(error))
            return whole()
        if _is_done(corpus, entry, state):
            # Another process has put them together meanwhile.
            return whole()
        if not pieces.are_there() or pieces.drop_damaged():
            return None
        return whole(pieces=pieces)


def _piece_key(entry: LedgerEntry, state: list[FileState]) -> list[object]:
    """Return what the pieces of a dataset depend on: settings and files.

    Not the inode, which some file systems number in another way on each node.
    """
    files = [(path, size, *times) for path, _, size, *times in state]
    return [entry["settings_hash"], files]


def _stage_range(
    dataset: Dataset,
    number: int,
    stage_it: Callable[..., None],
    *,
    corpus: Path,
    pieces: Pieces,
    state: list[FileState],
) -> None:
    """Stage a piece, unless it is there or another process is at it.

    Raises:
        NotToBeCutError: It cannot be cut, or something is wrong with it.
        ValueError: The source changed meanwhile.
    """
    name = dataset.dataset_id
    # "~" cannot be part of a dataset's name.
    with locked(corpus / ".locks" / f"{name}~{number}", wait=False) as held:
        if not held or pieces.is_there(number):
            return
        if number == 0 and not remembered_hash(corpus, name, state):
            # For who puts them together.
            remember_hash(corpus, name, state, read_hash(dataset))
        try:
            with named_errors(f"{dataset.path} -> {pieces.folder}"):
                stage_it(number=number)
        except ValueError as error:
            if isinstance(error.__cause__, MemoryError):
                raise MemoryError(str(error)) from error
            raise NotToBeCutError(str(error)) from error
        except OSError:
            # Who staged the dataset in one go has removed the folder.
            if pieces.folder.is_dir():
                raise
            return
        if source_state(dataset.path, gene_list=dataset.gene_list) != state:
            raise ValueError(_changed(dataset))


def _changed(dataset: Dataset) -> str:
    return f"{dataset.path}: changed while it was read; run convert again when it is complete"


def _is_done(corpus: Path, entry: LedgerEntry, state: list[FileState]) -> bool:
    """Tell whether the ledger has a dataset of these files and options, staged or excluded."""
    previous = _same_settings(corpus, entry)
    known = remembered_hash(corpus, entry["dataset_id"], state)
    return previous is not None and known is not None and previous["source_hash"] == known


def _is_done_by_hash(corpus: Path, dataset: Dataset, entry: LedgerEntry) -> bool:
    """Hash files that may be those of the ledger, one process for all pieces.

    Raises:
        ValueError: They cannot be hashed.
        OSError: They cannot be read.
    """
    name = dataset.dataset_id
    previous = _same_settings(corpus, entry)
    if previous is None:
        return False
    with locked(corpus / ".locks" / f"{name}~hash"):
        state = source_state(dataset.path, gene_list=dataset.gene_list)
        known = remembered_hash(corpus, name, state)
        if known is None:
            known = read_hash(dataset)
            remember_hash(corpus, name, state, known)
    return previous["source_hash"] == known


def _same_settings(corpus: Path, entry: LedgerEntry) -> LedgerEntry | None:
    """Return the entry of an earlier run that holds if the files are the same."""
    previous = previous_entry(corpus, entry["dataset_id"])
    if previous is None or previous["status"] == "failed" or is_older(previous):
        return None
    return previous if previous["settings_hash"] == entry["settings_hash"] else None


def _folder(corpus: Path, dataset: Dataset) -> Path:
    return corpus / "staging" / dataset.dataset_id


def _as_staged(corpus: Path, entry: LedgerEntry, dataset: Dataset) -> LedgerEntry:
    """Return the entry of an earlier run for an address that was not fetched, if it holds.

    Otherwise the entry is failed, and not written: the file is fetched next.
    """
    previous = previous_entry(corpus, dataset.dataset_id)
    entry["source_hash"] = previous["source_hash"] if previous else None
    held = _unchanged(corpus, entry)
    entry["reason"] = "what is staged does not hold any more"
    return held or entry


def _identified(
    corpus: Path, dataset: Dataset, *, verify: bool
) -> tuple[list[FileState], str, bool]:
    """Return state and hash of the files of a dataset, and whether the hash is to be remembered."""
    state = source_state(dataset.path, gene_list=dataset.gene_list)
    known = None if verify else remembered_hash(corpus, dataset.dataset_id, state)
    return state, known or read_hash(dataset), not (known or dataset.fetched)


def _with_origin(
    corpus: Path, previous: LedgerEntry, entry: LedgerEntry, *, remote: bool
) -> LedgerEntry:
    """Record that the bytes of an earlier run have another title, version or address now.

    Those behind an address would be fetched by every run otherwise.
    """
    remove_pieces(corpus, previous["dataset_id"])
    if previous["origin"] != entry["origin"]:
        previous["origin"] = entry["origin"]
        if remote:
            previous["path"] = entry["path"]
        write_entry(corpus, previous)
    return previous


def _require_unchanged(dataset: Dataset, state: list[FileState], found_hash: str | None) -> None:
    """Refuse a source that is no longer what was hashed."""
    # Hashing all of it a second time would cost as much as the first.
    now = source_state(dataset.path, gene_list=dataset.gene_list)
    if now != state and read_hash(dataset) != found_hash:
        raise ValueError(_changed(dataset))


def _stage_or_explain(
    dataset: Dataset,
    entry: LedgerEntry,
    staged: LedgerEntry | None,
    *,
    corpus: Path,
    settings: Settings,
    resolver: GeneResolver,
    unchanged: Callable[[], None],
    pieces: Pieces | None,
) -> None:
    """Stage a dataset and write its entry, which says why where it cannot be.

    What an earlier run has staged (`staged`) outlives a failure, and then its entry stays, too. A
    verdict on the dataset, excluded, takes it away.
    """
    folder = _folder(corpus, dataset)
    try:
        with named_errors(f"{dataset.path} -> {folder}"):
            stage(
                dataset,
                entry,
                folder=folder,
                settings=settings,
                resolver=resolver,
                unchanged=unchanged,
                record=lambda: write_entry(corpus, entry),
                pieces=pieces,
            )
        remove_pieces(corpus, dataset.dataset_id)
        return
    except UnusableError as error:
        entry["status"], entry["reason"] = "excluded", str(error)
    except (ValueError, OSError, MemoryError) as error:
        entry["status"], entry["reason"] = "failed", reason_of(error)
    # Of a dataset that is not used nothing is staged, and what was dropped on the way is no loss.
    entry["n_cells"], entry["dropped_cells"], entry["obs_columns"] = 0, {}, []
    entry["texts_repaired"], entry["files"] = 0, {}
    if entry["status"] == "failed" and staged is not None and _holds(corpus, staged):
        entry["reason"] += "; what was staged before stays"
        return
    clear(corpus, dataset.dataset_id)
    write_entry(corpus, entry)
    if entry["status"] == "excluded":
        remove_pieces(corpus, dataset.dataset_id)


def _holds(corpus: Path, staged: LedgerEntry) -> bool:
    """Tell whether what is staged is still what its entry says."""
    try:
        check_staged(corpus, staged)
    except ValueError:
        return is_older(staged)
    return True


def _keep_or_fail(
    corpus: Path, entry: LedgerEntry, staged: LedgerEntry | None, reason: str
) -> LedgerEntry:
    """Return what this run says of a dataset whose files could not be taken.

    What is staged stays, with its entry on disk; only without it the failure is written.
    """
    if staged is not None and entry["source_hash"] is None:
        entry["status"] = "failed"
        problem = _why_not_kept(corpus, entry, staged)
        if not problem:
            kept = staged.copy()
            kept["reason"] = f"source not reachable, kept as staged ({reason})"
            return kept
        reason += f"; what is staged {problem}"
    entry["reason"] = reason
    if staged is None:
        clear(corpus, entry["dataset_id"])
        write_entry(corpus, entry)
    return entry


def _why_not_kept(corpus: Path, entry: LedgerEntry, staged: LedgerEntry) -> str:
    """Return why what is staged cannot stand in for a source that is away; empty if it can."""
    if is_older(staged):
        return "was made by an older version"
    if staged["settings_hash"] != entry["settings_hash"]:
        return "was made with other options"
    try:
        check_staged(corpus, staged)
    except ValueError as error:
        return f"is damaged ({error})"
    return ""


def _unchanged(corpus: Path, entry: LedgerEntry) -> LedgerEntry | None:
    """Return the entry of an earlier run if it still holds."""
    previous = previous_entry(corpus, entry["dataset_id"])
    if previous is None or previous["status"] == "failed":
        return None
    if not all(previous.get(key) == entry.get(key) for key in ("source_hash", "settings_hash")):
        return None
    if previous["status"] == "ok":
        try:
            check_staged(corpus, previous)
        except ValueError as error:
            _log.warning("%s; staging it again", error)
            return None
    return previous
