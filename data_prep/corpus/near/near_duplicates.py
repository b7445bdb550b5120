"""Near duplicates: the same cells in datasets with another gene list, or a part of it.

Two cells of datasets with different gene lists are near duplicates if they have the same counts of
all genes that both lists name, and express at least FEWEST_GENES of those that they are compared on
(`gene_sets`). A digest is the sum of 128 random bits of each (gene, count), so that of a part of
the genes costs no more than a sum; two different cells share one with probability 2^-128.

1. Every cell gets a digest for each set of genes that its list is compared on.
2. Where cells of two lists agree, the pair of lists is asked for with each of them.
3. These cells are read again: the digest over all genes that the two lists share decides.

All records go to disk in runs (`data_prep.passes.buckets`). Each step is cut into units that any
number of processes share and that a kill leaves done or not: runs of chunks, then buckets. Memory:
the records of one unit (200 MB, 350 MB where all are of near duplicates) and four bytes a cell.
Disk: 24 bytes a cell and set, and as much for near duplicates. Datasets that all name the same
genes cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from data_prep.corpus.near.gene_sets import FEWEST_GENES, GeneSets
from data_prep.passes.buckets import (
    BucketRuns,
    bounds_path,
    bucket_of,
    forget_records,
    lacks_records,
    plan_runs,
    write_run,
)
from data_prep.passes.dedup import CELLS_PER_BUCKET
from sclong_ds.corpus.cell_store import CellStore

NearRule = Literal["primary", "drop", "keep"]
PRIMARY, UNKNOWN, SECONDARY = 0, 1, 2
"""What `is_primary_data` says of a cell."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("cell", "<u8")])
_ASKED = np.dtype([("cell", "<u8"), ("pair", "<u8")])
_SHARED = np.dtype([("high", "<u8"), ("low", "<u8"), ("cell", "<u8"), ("pair", "<u8")])
_SET_SHIFT = np.uint64(48)
"""A record's `cell` holds the number of its set above the number of the cell."""
_NONE = np.uint64(2**64 - 1)
_FIELD = "records"
_STEPS = ("compared", "asked", "shared")
"""Folders of what `compare`, `ask` and `answer` write."""
_BLOCK = 2**15
"""Values whose bits are made at once: they stay in the cache of a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """What was found."""

    dropped: NDArray[np.bool_]
    """(cells,) cells that the rule leaves out, as the same as one that it prefers."""
    kept: NDArray[np.bool_]
    """(cells,) cells that stay though another that stays is a near duplicate."""
    n_left_out: int
    """Pairs of gene lists that were not compared."""


class NearSearch:
    """The search for cells that are the same as one of a dataset with another gene list.

    The units of `compare` come first, then those of `ask`, then those of `answer`, then `found`;
    those of one step in any order and by any processes.
    """

    def __init__(
        self,
        stores: Sequence[CellStore],
        kept: NDArray[np.bool_],
        sets: GeneSets,
        folder: Path,
        *,
        run_bytes: int,
    ) -> None:
        """Describe the search; no cell is read.

        Args:
            stores: Cell stores with the same genes, one a dataset.
            kept: (cells,) which cells of all datasets count.
            sets: Of the gene lists of the datasets.
            folder: Scratch folder.
            run_bytes: Encoded cells of a unit of `compare`, at most: it makes about as many
                records as a bucket has.
        """
        self.sets, self.folder = sets, folder
        self._stores, self._kept = stores, kept
        self._first = np.cumsum([0, *(len(store) for store in stores)])
        """(datasets + 1,) number of the first cell of each."""
        n_sets = len(sets.genes)
        self.runs: list[list[tuple[int, int]]] = []
        """The (dataset, chunk) of each unit of `compare`."""
        if n_sets:
            self.runs = plan_runs(stores, run_bytes=min(run_bytes, self._most_bytes()))
        self.n_buckets = -(-len(kept) * n_sets // CELLS_PER_BUCKET)
        """Units of `ask` and of `answer`."""
        self._opened: dict[str, BucketRuns] = {}

    def _most_bytes(self) -> int:
        """Return the encoded cells that make as many records as a bucket has."""
        most_sets = int(self.sets.takes.sum(axis=0).max())
        n_bytes = 2 * sum(int(store.row_entries.sum(dtype=np.int64)) for store in self._stores)
        return n_bytes * CELLS_PER_BUCKET // max(1, len(self._kept) * most_sets)

    def n_cells(self, run: int) -> int:
        """Return the cells of a unit of `compare`."""
        rows = (self._stores[dataset].chunk_rows[c : c + 2] for dataset, c in self.runs[run])
        return sum(int(stop - start) for start, stop in rows)

    def compare(self, run: int) -> Path:
        """Write the digests of some cells on the sets that their lists are compared on.

        Args:
            run: Number of the unit.

        Returns:
            The file with the checksums of what was written, as of `ask` and `answer`.
        """
        parts, of = [np.zeros(0, _RECORD)], -1
        for dataset, chunk in self.runs[run]:
            store, first = self._stores[dataset], int(self._first[dataset])
            if dataset != of:
                numbers = np.flatnonzero(self.sets.takes[:, self.sets.of_dataset[dataset]])
                chosen, of = _as_numbers(self.sets.genes[numbers]), dataset
            start, stop = (int(row) for row in store.chunk_rows[chunk : chunk + 2])
            here = np.flatnonzero(self._kept[first + start : first + stop])
            if len(here) and len(numbers):
                counts = store.read_chunk(chunk)[here]
                parts += _records(counts, first + start + here, numbers, chosen)
        records = np.concatenate(parts)
        return self._write("compared", run, records, records["high"])

    def ask(self, bucket: int) -> Path:
        """Write which pairs of lists are to be compared with each cell of a bucket.

        Args:
            bucket: Number of the unit.
        """
        read = self._complete("compared", len(self.runs)).read(bucket, _FIELD, _RECORD)
        records = _agreeing(read)
        group = _groups(records["high"], records["low"])
        cell = records["cell"] & ((np.uint64(1) << _SET_SHIFT) - np.uint64(1))
        number = (records["cell"] >> _SET_SHIFT).astype(np.int64)
        own, n_lists = self._lists_of(cell), len(self.sets.lists)
        # Every list once in each group, and each cell beside every list of its group.
        lists = np.unique(group * n_lists + own)
        begins = np.searchsorted(lists, np.arange(len(records) and group[-1] + 2) * n_lists)
        size = np.diff(begins)[group] if len(records) else np.zeros(0, np.int64)
        several = np.flatnonzero(size > 1)
        of = np.repeat(several, size[several])
        ends = np.cumsum(size[several])
        place = np.arange(len(of)) - np.repeat(ends - size[several], size[several])
        other = lists[begins[group[of]] + place] % n_lists if len(of) else np.zeros(0, np.int64)
        wanted = (other != own[of]) & (self.sets.set_of[own[of], other] == number[of])
        of, other = of[wanted], other[wanted]
        asked = np.empty(len(of), _ASKED)
        asked["cell"] = cell[of]
        low, high = np.minimum(own[of], other), np.maximum(own[of], other)
        asked["pair"] = (low * n_lists + high).astype(np.uint64)
        # Buckets are ranges of cells, so that a bucket is read chunk by chunk.
        key = asked["cell"] * np.uint64((2**64 - 1) // max(len(self._kept), 1))
        return self._write("asked", bucket, asked, key)

    def answer(self, bucket: int) -> Path:
        """Write the digests over all genes that the lists of a pair share.

        Args:
            bucket: Number of the unit.
        """
        asked = self._complete("asked", self.n_buckets).read(bucket, _FIELD, _ASKED)
        asked = asked[np.lexsort((asked["pair"], asked["cell"]))]
        cell = asked["cell"].astype(np.int64)
        dataset = np.searchsorted(self._first, cell, side="right") - 1
        row = cell - self._first[dataset]
        parts = [np.zeros(0, _SHARED)]
        for position in np.unique(dataset).tolist():
            store = self._stores[position]
            mine = np.flatnonzero(dataset == position)
            chunks = np.searchsorted(store.chunk_rows, row[mine], side="right") - 1
            for chunk in np.unique(chunks).tolist():
                here = mine[chunks == chunk]
                counts = store.read_chunk(chunk)[row[here] - int(store.chunk_rows[chunk])]
                parts += self._shared(counts, asked[here])
        records = np.concatenate(parts)
        return self._write("shared", bucket, records, records["high"])

    def _shared(self, counts: csr_matrix, asked: NDArray[np.void]) -> Iterator[NDArray[np.void]]:
        """Yield the records of some cells, each asked for with a pair of lists."""
        for pair in np.unique(asked["pair"]).tolist():
            those = np.flatnonzero(asked["pair"] == pair)
            genes = self.sets.shared(*divmod(int(pair), len(self.sets.lists)))
            chosen, bits = counts[those], _bits_of(counts[those])
            _, digests = _digests(chosen, bits, _as_numbers(genes[None]))
            records = np.empty(len(those), _SHARED)
            records["high"], records["low"] = _scrambled(digests[:, 0, 0]), digests[:, 0, 1]
            records["cell"], records["pair"] = asked["cell"][those], pair
            yield records

    def found(self, primary: NDArray[np.uint8], rule: NearRule) -> NearDuplicates:
        """Return what all units have found.

        Args:
            primary: (cells,) PRIMARY, UNKNOWN or SECONDARY.
            rule: `primary` drops a secondary cell that is the same as a primary one; `drop` keeps
                of two the primary one, else that of the longer gene list, else the first; `keep`
                drops none.
        """
        dropped, still = np.zeros((2, len(self._kept)), bool)
        if self.n_buckets:
            shared = self._complete("shared", self.n_buckets)
            for bucket in range(self.n_buckets):
                records = shared.read(bucket, _FIELD, _SHARED)
                dropped[self._beaten(records, primary, rule)] = True
            for bucket in range(self.n_buckets):
                records = shared.read(bucket, _FIELD, _SHARED)
                still[self._beside(records, dropped)] = True
        return NearDuplicates(dropped=dropped, kept=still, n_left_out=self.sets.n_left_out)

    def forget_records(self) -> None:
        """Remove what takes disk; after what was `found` is kept."""
        for name in _STEPS:
            forget_records(self.folder / name, _FIELD)

    def _complete(self, name: str, n_runs: int) -> BucketRuns:
        """Return what all units of a step have written, opened once: it is complete."""
        if name not in self._opened:
            runs = BucketRuns.complete(self.folder / name, n_buckets=self.n_buckets, n_runs=n_runs)
            # Of the step before, nothing is read any more.
            self._opened = {name: runs}
        return self._opened[name]

    def _write(
        self, name: str, run: int, records: NDArray[np.void], key: NDArray[np.uint64]
    ) -> Path:
        """Write records as one run, ordered by bucket."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        bucket = bucket_of(key, self.n_buckets)
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(self.n_buckets + 1))
        write_run(folder, run, {_FIELD: bounds}, [{_FIELD: records[order]}])
        return bounds_path(folder, run)

    def _lists_of(self, cells: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the gene list of each of some cells."""
        dataset = np.searchsorted(self._first, cells.astype(np.int64), side="right") - 1
        return self.sets.of_dataset[dataset]

    def _ranks(
        self, cells: NDArray[np.integer], primary: NDArray[np.uint8], rule: NearRule
    ) -> NDArray[np.uint64]:
        """Return what decides which of two near duplicates stays: the lower."""
        first = primary[cells.astype(np.int64)].astype(np.uint64)
        if rule != "drop":
            return first
        n_lost = (~self.sets.lists).sum(axis=1).astype(np.uint64)[self._lists_of(cells)]
        return (first << np.uint64(62)) | (n_lost << np.uint64(40)) | cells.astype(np.uint64)

    def _beaten(
        self, records: NDArray[np.void], primary: NDArray[np.uint8], rule: NearRule
    ) -> NDArray[np.int64]:
        """Return the cells of a bucket that stand beside one that the rule prefers."""
        cell = records["cell"].astype(np.int64)
        if rule == "keep":
            return cell[:0]
        ranks = self._ranks(cell, primary, rule)
        other = self._best_of_others(records, ranks)
        lost = (other != _NONE) & (other < ranks)
        if rule == "primary":
            lost &= (ranks == SECONDARY) & (other == PRIMARY)
        return cell[lost]

    def _beside(self, records: NDArray[np.void], dropped: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the cells of a bucket that stay beside another that stays."""
        records = records[~dropped[records["cell"].astype(np.int64)]]
        other = self._best_of_others(records, np.zeros(len(records), np.uint64))
        return records["cell"][other != _NONE].astype(np.int64)

    def _best_of_others(
        self, records: NDArray[np.void], ranks: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """Return the lowest rank of the cells of the other list that agree with each, or _NONE."""
        order = np.lexsort((records["pair"], records["low"], records["high"]))
        here = records[order]
        group = _groups(here["high"], here["low"], here["pair"])
        low = (here["pair"] // np.uint64(len(self.sets.lists))).astype(np.int64)
        side = (self._lists_of(here["cell"]) != low).astype(np.int64)
        best = np.full((2, len(here)), _NONE)
        np.minimum.at(best, (side, group), ranks[order])
        found = np.empty(len(here), np.uint64)
        found[order] = best[1 - side, group]
        return found


def lacks_near_records(folder: Path) -> bool:
    """Tell whether `NearSearch.forget_records` has removed records, or some of them.

    Args:
        folder: Scratch folder of the search; it need not be there.
    """
    return any(lacks_records(folder / name, _FIELD) for name in _STEPS)


def _records(
    counts: csr_matrix,
    cells: NDArray[np.int64],
    numbers: NDArray[np.int64],
    chosen: NDArray[np.uint64],
) -> Iterator[NDArray[np.void]]:
    """Yield the records of some cells on each of some sets, (genes, sets)."""
    n_genes, digests = _digests(counts, _bits_of(counts), chosen)
    for place, number in enumerate(numbers.tolist()):
        enough = np.flatnonzero(n_genes[:, place] >= FEWEST_GENES)
        records = np.empty(len(enough), _RECORD)
        # Digests of different sets never meet.
        records["high"] = _scrambled(digests[enough, place, 0] + np.uint64(number))
        records["low"] = digests[enough, place, 1]
        records["cell"] = cells[enough].astype(np.uint64) | (np.uint64(number) << _SET_SHIFT)
        yield records


def _agreeing(records: NDArray[np.void]) -> NDArray[np.void]:
    """Return the records that have a digest with another one, ordered by it; others are many."""
    order = np.argsort(records["high"])
    high = records["high"][order]
    same = np.concatenate(([False], high[1:] == high[:-1], [False]))
    found = records[order[same[1:] | same[:-1]]] if len(records) else records
    # Few: the lower half is compared here, and decides the order.
    return found[np.lexsort((found["cell"], found["low"], found["high"]))]


def _groups(*keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return (n,) the number of the run of equal keys that each of n sorted records is in."""
    differs = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        differs |= key[1:] != key[:-1]
    return np.concatenate((np.zeros(min(len(keys[0]), 1), np.int64), np.cumsum(differs)))


def _as_numbers(genes: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return (genes, sets) 1 for the genes of each of some sets, (sets, genes)."""
    return np.ascontiguousarray(genes.T).astype(np.uint64)


def _bits_of(counts: csr_matrix) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return (values,) twice 64 bits of each (gene, count), as if drawn at random."""
    high, low = np.empty((2, counts.nnz), np.uint64)
    for start in range(0, counts.nnz, _BLOCK):
        part = slice(start, start + _BLOCK)
        key = high[part]
        key[:] = counts.indices[part]
        key <<= np.uint64(32)
        key |= counts.data[part].astype(np.uint64)
        key += np.uint64(0x9E3779B97F4A7C15)
        _scramble(key)
        low[part] = key + np.uint64(0xD1B54A32D192ED03)
        _scramble(low[part])
    return high, low


def _digests(
    counts: csr_matrix,
    bits: tuple[NDArray[np.uint64], NDArray[np.uint64]],
    chosen: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return how many genes of some sets each cell expresses, and its digest on them.

    Args:
        counts: (cells, genes).
        bits: Of its values.
        chosen: (genes, sets) 1 for the genes of each set.

    Returns:
        (cells, sets) numbers, (cells, sets, 2) sums that wrap around.
    """
    sums = [
        csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape) @ chosen
        for values in (np.ones(counts.nnz, np.uint64), *bits)
    ]
    return sums[0], np.stack(sums[1:], axis=2)


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return `_scramble` of a copy."""
    values = values.copy()
    _scramble(values)
    return values


def _scramble(values: NDArray[np.uint64]) -> None:
    """Put the finalizer of SplitMix64 in place of each value: a bijection, each bit depends on all.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
