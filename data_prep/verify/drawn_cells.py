"""Draws the cells that `verify --sources` reads again: some of every dataset, and some left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.ledger.ledger import LedgerEntry
from sclong_ds.corpus.corpus import Corpus

DROPPED_SHARE = 0.25
"""Cells that are not in the corpus, as a share of those drawn from it."""


def draw_cells(
    corpus: Corpus, number: int, rng: np.random.Generator
) -> dict[int, npt.NDArray[Any]]:
    """Return positions of drawn cells by dataset, as evenly spread as its sizes allow.

    Args:
        corpus: The corpus.
        number: Cells to draw; all where there are fewer.
        rng: Of the draw.
    """
    sizes = np.array([info.n_cells for info in corpus.datasets], dtype=np.int64)
    share = np.zeros(len(sizes), dtype=np.int64)
    left = min(number, int(sizes.sum()))
    while left:
        open_ = rng.permutation(np.flatnonzero(share < sizes))[:left]
        step = max(1, left // len(open_))
        more = np.minimum(step, sizes[open_] - share[open_])
        share[open_] += more
        left -= int(more.sum())
    ranks = {
        int(code): np.sort(rng.choice(sizes[code], share[code], replace=False))
        for code in np.flatnonzero(share)
    }
    return _positions(corpus.row_dataset, ranks)


def _positions(
    row_dataset: npt.NDArray[np.uint32], ranks: Mapping[int, npt.NDArray[np.int64]]
) -> dict[int, npt.NDArray[np.int64]]:
    """Return where the r-th cell of each dataset is, in one pass over all cells."""
    seen: Counter[int] = Counter()
    found: dict[int, list[npt.NDArray[np.int64]]] = {code: [] for code in ranks}
    step = 2**22
    for start in range(0, len(row_dataset), step):
        part = np.asarray(row_dataset[start : start + step])
        order = np.argsort(part, kind="stable")
        codes, firsts, counts = np.unique(part[order], return_index=True, return_counts=True)
        for code, first, count in zip(codes.tolist(), firsts, counts.tolist(), strict=True):
            here = ranks.get(code, np.empty(0, np.int64)) - seen[code]
            inside = here[(here >= 0) & (here < count)]
            if len(inside):
                found[code].append(start + order[first + inside])
            seen[code] += count
    return {code: np.concatenate(parts) for code, parts in found.items() if parts}


def cells_by_dataset(corpus: Corpus) -> list[npt.NDArray[np.int64]]:
    """Return the positions of the cells of each dataset, ascending, from one sort of all cells."""
    dataset = np.asarray(corpus.row_dataset)
    order = np.argsort(dataset, kind="stable")
    borders = np.searchsorted(dataset, np.arange(1, len(corpus.datasets)), sorter=order)
    return np.split(order, borders)


def draw_dropped(
    there: npt.NDArray[np.int64], entry: LedgerEntry, n_cells: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return some rows of a source that are not in the corpus.

    Args:
        there: (cells,) rows of the source that are in the corpus.
        entry: Ledger entry of the dataset.
        n_cells: Cells of the dataset that were drawn.
        rng: Of the draw.

    Returns:
        (rows,) at most DROPPED_SHARE of `n_cells`, rounded up.
    """
    missing = np.ones(max(entry["n_cells_input"], int(there.max()) + 1), dtype=bool)
    missing[there] = False
    rows = np.flatnonzero(missing)
    number = min(len(rows), math.ceil(DROPPED_SHARE * n_cells))
    return np.sort(rng.choice(rows, number, replace=False))
