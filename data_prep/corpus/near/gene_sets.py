"""The sets of genes on which cells of datasets with different gene lists are compared.

Two cells with the same counts of all genes that both datasets measure have the same counts of any
part of these genes. So cells are compared on few sets, each shared by many gene lists, and only
those that agree there on all genes that their two lists share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_GENES = 30
"""Genes that a cell must express among those compared: fewer may be the same by chance."""
MOST_SETS = 64
"""Each costs a digest of every cell; pairs of gene lists that none of them covers are counted."""
_KEPT = 0.5
"""Share of the genes of the pair that a set began with which it keeps while lists are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneSets:
    """Gene lists that differ, and what their cells are compared on.

    Shapes: L gene lists, K sets, G genes.
    """

    lists: NDArray[np.bool_]
    """(L, G) the different gene lists."""
    of_dataset: NDArray[np.int64]
    """(datasets,) gene list of each dataset."""
    genes: NDArray[np.bool_]
    """(K, G) genes of each set."""
    takes: NDArray[np.bool_]
    """(K, L) whether the cells of a list are compared on a set."""
    set_of: NDArray[np.int64]
    """(L, L) set on which two lists are compared, symmetric; -1: on none."""
    n_left_out: int
    """Pairs of gene lists with enough genes in common that no set covers."""

    def shared(self, first: int, second: int) -> NDArray[np.bool_]:
        """Return (G,) the genes that two lists share."""
        return self.lists[first] & self.lists[second]


def gene_sets(measured: NDArray[np.bool_] | Sequence[NDArray[np.bool_]]) -> GeneSets:
    """Choose the sets for some datasets; the same for the same lists in the same order.

    Args:
        measured: (datasets, G) genes that each dataset measures.
    """
    measured = np.asarray(measured, dtype=bool)
    packed = np.packbits(measured, axis=1)
    _, first, of_dataset = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    # In the order of the datasets, whatever the bits.
    order = np.argsort(first, kind="stable")
    lists = measured[first[order]]
    of_dataset = np.argsort(order, kind="stable")[of_dataset.ravel()]
    n = len(lists)
    # float32 sums are exact below 2^24 genes.
    shared = (lists.astype(np.float32) @ lists.T.astype(np.float32)).astype(np.int64)
    left = np.triu(shared >= FEWEST_GENES, 1)
    set_of = np.full((n, n), -1)
    genes: list[NDArray[np.bool_]] = []
    while left.any() and len(genes) < MOST_SETS:
        chosen, members = _grown(lists, np.where(left, shared, -1))
        inside = np.zeros((n, n), bool)
        inside[np.ix_(members, members)] = True
        covered = left & inside
        set_of[covered | covered.T] = len(genes)
        left &= ~covered
        genes.append(chosen)
    takes = np.array([(set_of == number).any(axis=0) for number in range(len(genes))], bool)
    return GeneSets(
        lists=lists,
        of_dataset=of_dataset,
        genes=np.array(genes, bool).reshape(len(genes), measured.shape[1]),
        takes=takes.reshape(len(genes), n),
        set_of=set_of,
        n_left_out=int(left.sum()),
    )


def _grown(
    lists: NDArray[np.bool_], left: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], list[int]]:
    """Return a set of genes and the lists that have all of them.

    Args:
        lists: (L, G).
        left: (L, L) genes that two lists share, -1 where the pair is covered already.
    """
    first, second = np.unravel_index(int(np.argmax(left)), left.shape)
    members = [int(first), int(second)]
    genes = lists[first] & lists[second]
    fewest = max(FEWEST_GENES, int(_KEPT * genes.sum()))
    open_pairs = (left >= 0) | (left >= 0).T
    for other in np.argsort(-lists.sum(axis=1), kind="stable").tolist():
        both = genes & lists[other]
        if other not in members and open_pairs[other, members].any() and both.sum() >= fewest:
            genes = both
            members.append(other)
    return genes, members
