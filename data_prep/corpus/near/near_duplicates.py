"""Near duplicates: the same cells in datasets with another gene list, or a part of it.

Two cells of datasets with different gene lists are near duplicates if they have the same counts of
all genes that both lists name, and express at least FEWEST_GENES of those that they are compared on
(`gene_sets`). A digest is the sum of 128 random bits of each (gene, count), so that of a part of
the genes costs no more than a sum; two different cells share one with probability 2^-128.

1. Every cell gets a digest for each set of genes that its list is compared on.
2. Where cells of two lists agree, the pair of lists is asked for with each of them.
3. These cells are read again: the digest over all genes that the two lists share decides.

All records go to disk in runs (`data_prep.passes.buckets`), each of the three steps continues where
a killed one stopped. Memory: one bucket (about 300 MB) and four bytes a cell. Disk: 24 bytes a
cell and set, and as much for near duplicates. Datasets that all name the same genes cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from data_prep.corpus.near.gene_sets import FEWEST_GENES, GeneSets, gene_sets
from data_prep.passes.buckets import BucketRuns, bucket_of, discard_scratch, plan_runs
from data_prep.passes.dedup import CELLS_PER_BUCKET, RUN_BYTES, Progress
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
_STAGE = "near"


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """What was found."""

    dropped: NDArray[np.bool_]
    """(cells,) cells that the rule leaves out, as the same as one that it prefers."""
    kept: NDArray[np.bool_]
    """(cells,) cells that stay though another that stays is a near duplicate."""
    n_left_out: int
    """Pairs of gene lists that were not compared."""


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of all datasets, numbered through."""

    stores: Sequence[CellStore]
    kept: NDArray[np.bool_]
    primary: NDArray[np.uint8]
    sets: GeneSets
    rule: NearRule

    @property
    def first(self) -> NDArray[np.int64]:
        """(datasets + 1,) number of the first cell of each."""
        return np.cumsum([0, *(len(store) for store in self.stores)])

    def lists_of(self, cells: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the gene list of each of some cells."""
        dataset = np.searchsorted(self.first, cells.astype(np.int64), side="right") - 1
        return self.sets.of_dataset[dataset]

    def ranks(self, cells: NDArray[np.integer]) -> NDArray[np.uint64]:
        """Return what decides which of two near duplicates stays: the lower."""
        primary = self.primary[cells.astype(np.int64)].astype(np.uint64)
        if self.rule != "drop":
            return primary
        n_lost = (~self.sets.lists).sum(axis=1).astype(np.uint64)[self.lists_of(cells)]
        return (primary << np.uint64(62)) | (n_lost << np.uint64(40)) | cells.astype(np.uint64)


def find_near_duplicates(
    stores: Sequence[CellStore],
    kept: Sequence[NDArray[np.bool_]],
    measured: NDArray[np.bool_],
    primary: Sequence[NDArray[np.uint8]],
    folder: Path,
    *,
    rule: NearRule = "primary",
    progress: Progress | None = None,
) -> NearDuplicates:
    """Find cells that are the same as one of a dataset with another gene list.

    Args:
        stores: Cell stores with the same genes, one a dataset.
        kept: Per store (cells,) which cells count.
        measured: (datasets, G) genes that each dataset measures.
        primary: Per store (cells,) PRIMARY, UNKNOWN or SECONDARY.
        folder: Scratch folder; it is created and removed. One that a killed call for the same
            cells has left is continued.
        rule: `primary` drops a secondary cell that is the same as a primary one; `drop` keeps of
            two the primary one, else that of the longer gene list, else the first; `keep` drops
            none.
        progress: Called after every chunk with ("near", cells done, all), half for the search and
            half for the comparison of what it has found.
    """
    sets = gene_sets(measured)
    cells = _Cells(stores, np.concatenate(kept), np.concatenate(primary), sets, rule)
    dropped, still = np.zeros((2, len(cells.kept)), bool)
    if len(sets.genes):
        n_buckets = max(1, -(-len(cells.kept) * len(sets.genes) // CELLS_PER_BUCKET))
        compared = BucketRuns(folder / "compared", n_buckets=n_buckets)
        _compare(cells, compared, progress)
        asked = BucketRuns(folder / "asked", n_buckets=n_buckets)
        for bucket in range(len(asked), n_buckets):
            _ask(cells, compared.read(bucket, "digest", _RECORD), asked)
        shared = BucketRuns(folder / "shared", n_buckets=n_buckets)
        for bucket in range(len(shared), n_buckets):
            _answer(cells, asked.read(bucket, "asked", _ASKED), shared, progress)
        for bucket in range(n_buckets):
            dropped[_beaten(cells, shared.read(bucket, "digest", _SHARED))] = True
        for bucket in range(n_buckets):
            still[_beside(cells, shared.read(bucket, "digest", _SHARED), dropped)] = True
        discard_scratch(folder)
    return NearDuplicates(dropped=dropped, kept=still, n_left_out=sets.n_left_out)


def _compare(cells: _Cells, runs: BucketRuns, progress: Progress | None) -> None:
    """Write the digests of all cells on the sets that their lists are compared on."""
    sets, first = cells.sets, cells.first
    run_bytes = RUN_BYTES // len(sets.genes)
    for number, run in enumerate(plan_runs(cells.stores, run_bytes=run_bytes)):
        parts = [np.zeros(0, _RECORD)]
        for position, chunk in run:
            store = cells.stores[position]
            start, stop = (int(row) for row in store.chunk_rows[chunk : chunk + 2])
            here = np.flatnonzero(cells.kept[first[position] + start : first[position] + stop])
            numbers = np.flatnonzero(sets.takes[:, sets.of_dataset[position]])
            if number >= len(runs) and len(here) and len(numbers):
                counts = store.read_chunk(chunk)[here]
                parts += _records(counts, first[position] + start + here, numbers, sets)
            if progress:
                progress(_STAGE, (int(first[position]) + stop) // 2, len(cells.kept))
        if number >= len(runs):
            records = np.concatenate(parts)
            _append(runs, records, records["high"], "digest")


def _records(
    counts: csr_matrix, cells: NDArray[np.int64], numbers: NDArray[np.int64], sets: GeneSets
) -> Iterator[NDArray[np.void]]:
    """Yield the records of some cells on each of some sets."""
    bits = _bits_of(counts)
    for number in numbers.tolist():
        n_genes, digests = _digests(counts, bits, sets.genes[number])
        enough = np.flatnonzero(n_genes >= FEWEST_GENES)
        records = np.empty(len(enough), _RECORD)
        # Digests of different sets never meet.
        records["high"] = _scrambled(digests[enough, 0] + np.uint64(number))
        records["low"] = digests[enough, 1]
        records["cell"] = cells[enough].astype(np.uint64) | (np.uint64(number) << _SET_SHIFT)
        yield records


def _ask(cells: _Cells, records: NDArray[np.void], runs: BucketRuns) -> None:
    """Write which pairs of lists are to be compared with each cell of a bucket."""
    records = records[np.lexsort((records["low"], records["high"]))]
    group = _groups(records["high"], records["low"])
    cell = records["cell"] & ((np.uint64(1) << _SET_SHIFT) - np.uint64(1))
    number = (records["cell"] >> _SET_SHIFT).astype(np.int64)
    own = cells.lists_of(cell)
    n_lists = len(cells.sets.lists)
    # Every list once in each group, and each cell beside every list of its group.
    lists = np.unique(group * n_lists + own)
    begins = np.searchsorted(lists, np.arange(len(records) and group[-1] + 2) * n_lists)
    size = np.diff(begins)[group] if len(records) else np.zeros(0, np.int64)
    several = np.flatnonzero(size > 1)
    of = np.repeat(several, size[several])
    ends = np.cumsum(size[several])
    place = np.arange(len(of)) - np.repeat(ends - size[several], size[several])
    other = lists[begins[group[of]] + place] % n_lists if len(of) else np.zeros(0, np.int64)
    wanted = (other != own[of]) & (cells.sets.set_of[own[of], other] == number[of])
    of, other = of[wanted], other[wanted]
    asked = np.empty(len(of), _ASKED)
    asked["cell"] = cell[of]
    low, high = np.minimum(own[of], other), np.maximum(own[of], other)
    asked["pair"] = (low * n_lists + high).astype(np.uint64)
    # Buckets are ranges of cells, so that a bucket is read chunk by chunk.
    key = asked["cell"] * np.uint64((2**64 - 1) // max(len(cells.kept), 1))
    _append(runs, asked, key, "asked")


def _answer(
    cells: _Cells, asked: NDArray[np.void], runs: BucketRuns, progress: Progress | None
) -> None:
    """Write the digests over all genes that the lists of a pair share."""
    asked = asked[np.lexsort((asked["pair"], asked["cell"]))]
    first, n_lists = cells.first, len(cells.sets.lists)
    cell = asked["cell"].astype(np.int64)
    dataset = np.searchsorted(first, cell, side="right") - 1
    row = cell - first[dataset]
    parts = [np.zeros(0, _SHARED)]
    for position in np.unique(dataset).tolist():
        store = cells.stores[position]
        mine = np.flatnonzero(dataset == position)
        chunks = np.searchsorted(store.chunk_rows, row[mine], side="right") - 1
        for chunk in np.unique(chunks).tolist():
            here = mine[chunks == chunk]
            start, all_counts = int(store.chunk_rows[chunk]), store.read_chunk(chunk)
            for pair in np.unique(asked["pair"][here]).tolist():
                those = here[asked["pair"][here] == pair]
                counts = all_counts[row[those] - start]
                genes = cells.sets.shared(*divmod(int(pair), n_lists))
                _, digests = _digests(counts, _bits_of(counts), genes)
                records = np.empty(len(those), _SHARED)
                records["high"], records["low"] = _scrambled(digests[:, 0]), digests[:, 1]
                records["cell"], records["pair"] = asked["cell"][those], pair
                parts.append(records)
            if progress:
                done = (len(cells.kept) + int(cell[here[-1]]) + 1) // 2
                progress(_STAGE, done, len(cells.kept))
    records = np.concatenate(parts)
    _append(runs, records, records["high"], "digest")


def _beaten(cells: _Cells, records: NDArray[np.void]) -> NDArray[np.int64]:
    """Return the cells of a bucket that stand beside one that the rule prefers."""
    cell = records["cell"].astype(np.int64)
    if cells.rule == "keep":
        return cell[:0]
    ranks = cells.ranks(cell)
    other = _best_of_others(cells, records, ranks)
    lost = (other != _NONE) & (other < ranks)
    if cells.rule == "primary":
        lost &= (ranks == SECONDARY) & (other == PRIMARY)
    return cell[lost]


def _beside(
    cells: _Cells, records: NDArray[np.void], dropped: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the cells of a bucket that stay beside another that stays."""
    records = records[~dropped[records["cell"].astype(np.int64)]]
    other = _best_of_others(cells, records, np.zeros(len(records), np.uint64))
    return records["cell"][other != _NONE].astype(np.int64)


def _best_of_others(
    cells: _Cells, records: NDArray[np.void], ranks: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return the lowest rank among the cells of the other list that agree with each, or _NONE."""
    order = np.lexsort((records["pair"], records["low"], records["high"]))
    here = records[order]
    group = _groups(here["high"], here["low"], here["pair"])
    low = (here["pair"] // np.uint64(len(cells.sets.lists))).astype(np.int64)
    side = (cells.lists_of(here["cell"]) != low).astype(np.int64)
    best = np.full((2, len(here)), _NONE)
    np.minimum.at(best, (side, group), ranks[order])
    found = np.empty(len(here), np.uint64)
    found[order] = best[1 - side, group]
    return found


def _append(
    runs: BucketRuns, records: NDArray[np.void], key: NDArray[np.uint64], field: str
) -> None:
    """Write records as one run, ordered by bucket."""
    bucket = bucket_of(key, runs.n_buckets)
    order = np.argsort(bucket, kind="stable")
    bounds = np.searchsorted(bucket[order], np.arange(runs.n_buckets + 1))
    runs.append({field: bounds}, [{field: records[order]}])


def _groups(*keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return (n,) the number of the run of equal keys that each of n sorted records is in."""
    differs = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        differs |= key[1:] != key[:-1]
    return np.concatenate((np.zeros(min(len(keys[0]), 1), np.int64), np.cumsum(differs)))


def _bits_of(counts: csr_matrix) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return (values,) twice 64 bits of each (gene, count), as if drawn at random."""
    key = counts.indices.astype(np.uint64) << np.uint64(32) | counts.data.astype(np.uint64)
    high = _scrambled(key + np.uint64(0x9E3779B97F4A7C15))
    return high, _scrambled(high ^ _scrambled(key + np.uint64(0xD1B54A32D192ED03)))


def _digests(
    counts: csr_matrix,
    bits: tuple[NDArray[np.uint64], NDArray[np.uint64]],
    genes: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return (cells,) how many of some genes each expresses, and (cells, 2) its digest on them."""
    inside = genes[counts.indices]
    sums = [
        np.concatenate((np.zeros(1, values.dtype), np.cumsum(values)))[counts.indptr]
        for values in (inside.astype(np.int64), *(lane * inside for lane in bits))
    ]
    # Sums of 64 bits wrap around, and so do their differences.
    n_genes, high, low = (np.diff(values) for values in sums)
    return n_genes, np.stack((high, low), axis=1)


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of SplitMix64, a bijection under which each bit depends on all.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
