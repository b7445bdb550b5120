"""Takes what is staged of a dataset out of a corpus folder: before it is staged again, or for good.

Reads and writes CORPUS/staging, CORPUS/ledger and CORPUS/manifests.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from data_prep.ledger.corpus_lock import shared_corpus
from data_prep.ledger.ledger import dataset_lock, ledger_path
from data_prep.ledger.pending import forget_in_manifests, known_names
from sclong_ds.files.atomic import remove_partials_of

PIECES = ".pieces"
"""Folder of a corpus in which row ranges of large datasets wait for the others."""


def part_folder(folder: Path) -> Path:
    """Return where a dataset is staged before it gets its name, with its scratch files.

    Args:
        folder: CORPUS/staging/DATASET. "~" cannot be part of a dataset's name.
    """
    return folder.with_name(f".{folder.name}~")


def remove_pieces(corpus: Path, dataset_id: str) -> None:
    """Remove the row ranges that were staged of a dataset.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset.
    """
    shutil.rmtree(corpus / PIECES / dataset_id, ignore_errors=True)


def clear(corpus: Path, dataset_id: str) -> None:
    """Remove what earlier runs left of a dataset; the entry first, so that none is without data.

    A kill in between leaves files without an entry, which nobody reads and the next `convert`
    removes.

    Args:
        corpus: The corpus folder.
        dataset_id: Name of the dataset; its `dataset_lock` is held.
    """
    entry, staged = ledger_path(corpus, dataset_id), corpus / "staging" / dataset_id
    for path in (entry, staged, part_folder(staged)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    remove_partials_of(entry)


def forget(corpus: str | Path, dataset_ids: Sequence[str]) -> None:
    """Remove datasets from a corpus folder: staging, ledger entry and place in the manifests.

    A finished corpus keeps their cells until the next `finalize`.

    Args:
        corpus: The corpus folder.
        dataset_ids: Names of its datasets.

    Raises:
        FileNotFoundError: No corpus folder.
        ValueError: A name that it does not have (nothing is removed then), a dataset that a
            `convert` is at, or a `finalize` is at work.
    """
    corpus = Path(corpus)
    if not (corpus / "ledger").is_dir():
        raise FileNotFoundError(f"{corpus}: no corpus here; give the --out folder of convert")
    with shared_corpus(corpus):
        unknown = sorted(set(dataset_ids) - known_names(corpus))
        if unknown:
            raise ValueError(
                f"{corpus}: no dataset '{unknown[0]}'; see: python -m data_prep status {corpus}"
            )
        for name in dataset_ids:
            with dataset_lock(corpus, name, wait=False) as held:
                if not held:
                    raise ValueError(f"{corpus}: a convert is at dataset '{name}'; wait for it")
                # Off the manifests first: killed in between, the dataset is as it was, not pending.
                forget_in_manifests(corpus, [name])
                clear(corpus, name)
                remove_pieces(corpus, name)
