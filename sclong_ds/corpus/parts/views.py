"""Views of a corpus that may have parts: a sample of a split, and what it was before it grew."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sclong_ds.corpus.catalogue import PARTS, SPLITS, hash_of_parts
from sclong_ds.corpus.corpus import Corpus


def sample(corpus: Corpus, split: str, n_cells: int) -> NDArray[np.int64]:
    """Return the same cells of a split at every call, ascending positions, at most `n_cells`.

    A part is shuffled: the first cells of each, as many as its share of the split says.

    Args:
        corpus: The corpus.
        split: Name of the split.
        n_cells: Number of cells.

    Raises:
        ValueError: No such split.
    """
    rows = corpus.split(split)
    n_cells = min(n_cells, len(rows))
    sizes = np.array([len(part.splits[split]) for part in corpus.parts or (corpus,)])
    ends = np.cumsum(sizes)
    # By rounded borders, so that the numbers add up.
    wanted = np.diff(ends * n_cells // max(1, len(rows)), prepend=0)
    return np.concatenate(
        [rows[end - size :][:n] for end, size, n in zip(ends, sizes, wanted, strict=True)]
    )


def earlier_hashes(corpus: Corpus) -> tuple[str, ...]:
    """Return the content hashes that a corpus had before it grew, oldest first."""
    hashes = [part.hash for part in corpus.parts]
    return tuple(hash_of_parts(hashes[:number]) for number in range(1, len(hashes)))


def as_it_was(corpus: Corpus, content_hash: str) -> Corpus:
    """Return a corpus before it grew, of its oldest parts alone; itself where it did not.

    Args:
        corpus: The corpus.
        content_hash: Its own, or one that it had.

    Raises:
        ValueError: It never had this hash.
    """
    if content_hash == corpus.hash:
        return corpus
    known = earlier_hashes(corpus)
    if content_hash not in known:
        raise ValueError(f"{corpus.location} is another corpus by now")
    parts = corpus.parts[: known.index(content_hash) + 1]
    if len(parts) == 1:
        return parts[0]
    sizes = [sum(len(part.splits[name]) for part in parts) for name in SPLITS]
    stops = list(accumulate(sizes, initial=0))
    return corpus.of_parts(
        parts,
        {
            **corpus.catalogue,
            "hash": content_hash,
            "n_cells": stops[-1],
            "splits": {name: stops[n : n + 2] for n, name in enumerate(SPLITS)},
            "datasets": corpus.catalogue["datasets"][: sum(len(part.datasets) for part in parts)],
            PARTS: corpus.catalogue[PARTS][: len(parts)],
        },
    )
