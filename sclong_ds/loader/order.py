"""The order of cells: one endless stream that every rank works out for itself.

The stream is a pure function of (seed, chunk borders, weights, group size), so the position in it
is one integer, the number of visits so far, valid for any number of ranks.

Uniform. An epoch visits every cell of the split once: its chunks are permuted, taken in groups of
`group_chunks`, and the cells of a group are permuted. Epochs follow each other without a gap.

Weighted. A cell of weight w is visited floor(w) or ceil(w) times an epoch, except for the piece
that an epoch leaves out (below). An epoch is P passes, P = ceil(largest w), each ordered as above;
a pass visits a cell at most once. The cells of the
split lie end to end on a ring, each as long as its weight; a pass visits those that one of its L
points falls on. Points of a pass are P weights of 1 apart, L = floor(length of the ring / P). Where
the first one lies is drawn for the epoch, and the passes are shifted against each other by a weight
of 1, so that the points of an epoch are 1 apart (systematic sampling; W. G. Cochran, Sampling
Techniques, 1977, chapter 8). The piece of the ring, shorter than P, that L leaves out lies
elsewhere each epoch. Every pass reads all chunks that it visits: reading costs up to P times as
much a visit as uniform sampling.

Weights are integers, 2^16 for one visit an epoch, so that the sums are the same on every machine.
Only their sums at the chunk borders are kept; numpy and the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

ONE = 2**16
"""The weight of a cell that is visited once an epoch."""
_BLOCK_CELLS = 2**20  # cells whose weights are held at a time while they are added up
_OFFSETS = 2**63  # second counter word of the draws of an epoch; passes stay below


def philox(seed: int, block: int, part: int, epoch: int) -> np.random.Generator:
    """Return the generator of one draw of an order."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, block, part, epoch]))


class DatasetColumn(Protocol):
    """What knows the dataset of every cell, for instance a `Corpus`."""

    @property
    def row_dataset(self) -> NDArray[np.uint32]:
        """(cells,) position of the cell's dataset."""


class VisitWeights(Protocol):
    """How often each cell is visited."""

    def of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the weights of the cells `start` to `stop` - 1; 2^16 is one visit an epoch."""


@dataclass(frozen=True, slots=True, eq=False)
class CellWeights:
    """How often each cell is visited, by its dataset."""

    datasets: NDArray[np.int64]
    """(datasets,) weight of the cells of each dataset; 2^16 is one visit an epoch, 0 none."""
    column: DatasetColumn
    """The dataset of every cell."""

    def of(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the weights of the cells `start` to `stop` - 1."""
        return self.datasets[np.asarray(self.column.row_dataset[start:stop])]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Visits to cells whose chunks are read together."""

    start: int
    """Position in the stream of the first one."""
    epoch: int
    pass_number: int
    """Pass within the epoch; always 0 where cells have no weights."""
    rows: NDArray[np.int64]
    """(visits,) the cells in their order, each at most once."""


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """Consecutive visits of the stream; all arrays are (visits,) int64."""

    start: int
    """Position in the stream of the first one."""
    rows: NDArray[np.int64]
    epochs: NDArray[np.int64]
    passes: NDArray[np.int64]


Visited = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""(visits,) positions in the stream, rows, passes."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRead:
    """A chunk to read, and the visits that need it."""

    first: int
    """Position in the stream before which no visit needs it."""
    last: int
    """Position after which no visit needs it."""
    visits: Callable[[], Visited]
    """Returns the visits, at least one; those of other ranks may be among them."""


class CellOrder(Protocol):
    """An endless order of cells that a loader can read."""

    epoch_visits: int
    """Visits of an epoch."""
    passes: int
    """Passes of an epoch, 1 without weights."""

    def between(self, start: int, stop: int) -> Visits:
        """Return the visits at the positions `start` to `stop` - 1."""

    def reads(
        self, start: int, *, stop: int | None, lanes: NDArray[np.int64] | None
    ) -> Iterator[ChunkRead]:
        """Yield the chunks to read from a position on, in the order in which they are needed.

        Args:
            start: Position of the first visit that is wanted.
            stop: Position after the last one. None: there is none.
            lanes: The lanes that are wanted. None: all.
        """

    def lane_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lane of each position."""

    def places(
        self, start: int, *, micro_batch_size: int, world_size: int, batch: int
    ) -> NDArray[np.int64]:
        """Return where the visits of a batch stand when they are put in order for the ranks.

        Rank r of W gets the places from r * batch / W to (r + 1) * batch / W - 1, and of them the
        first `micro_batch_size` in its first micro-batch, and so on.

        Args:
            start: Position of the first visit of the batch.
            micro_batch_size: Cells of a micro-batch.
            world_size: Number of ranks.
            batch: Cells of a batch.
        """

    def repeats_after(self, batch: int) -> int:
        """Return the number of batches after which the lanes of their visits repeat.

        Args:
            batch: Cells of a batch.
        """

    def chunks_in_use(self, lanes: int) -> tuple[int, int]:
        """Return how many chunks are in use at a time, and how many to hold with those ahead.

        Args:
            lanes: Number of lanes that are read.
        """


class CellStream:
    """The endless global order of cells by groups of chunks.

    Attributes:
        n_cells: Cells of the split.
        passes: Passes of an epoch, 1 without weights.
        pass_visits: Visits of a pass.
        epoch_visits: Visits of an epoch.
        group_chunks: Chunks that are read and shuffled together.
    """

    def __init__(
        self,
        chunk_rows: ArrayLike,
        *,
        seed: int,
        group_chunks: int,
        weights: VisitWeights | None = None,
    ) -> None:
        """Add up the weights, if any; takes no more than a block of cells at a time.

        Args:
            chunk_rows: (n + 1,) first row of each chunk of the split, ascending; the last entry is
                the end.
            seed: `run.seed`.
            group_chunks: Chunks that are shuffled together.
            weights: None visits every cell once an epoch.

        Raises:
            ValueError: A split without cells, or weights that give it no visit.
        """
        self._bounds = split_borders(chunk_rows)
        self.n_cells = int(self._bounds[-1] - self._bounds[0])
        if group_chunks < 1:
            raise ValueError(f"group_chunks {group_chunks}: must be at least 1")
        self._seed, self.group_chunks, self._weights = seed, group_chunks, weights
        self.passes, self.pass_visits = 1, self.n_cells
        if weights is not None:
            self._sums, self.passes, self.pass_visits = visits_of_weights(self._bounds, weights)
        self.epoch_visits = self.passes * self.pass_visits

    def groups(self, position: int) -> Iterator[Group]:
        """Yield the groups of the stream from the one that holds `position` on, without end."""
        for number in count(position // self.pass_visits):
            epoch, pass_number = divmod(number, self.passes)
            draw = None if self._weights is None else self._draw(epoch).of_pass(pass_number)
            order = self._rng(pass_number, 0, epoch).permutation(len(self._bounds) - 1)
            sizes = np.diff(self._bounds if draw is None else draw.points_before(self._sums))
            firsts = np.arange(0, len(order), self.group_chunks)
            ends = np.cumsum(np.add.reduceat(sizes[order], firsts)) + number * self.pass_visits
            starts = np.concatenate(([number * self.pass_visits], ends[:-1]))
            for k in np.flatnonzero((ends > position) & (ends > starts)):
                first = int(firsts[k])
                members = order[first : first + self.group_chunks]
                rows = np.concatenate([self._rows(chunk, draw) for chunk in members])
                shuffled = self._rng(pass_number, first + 1, epoch).permutation(rows)
                yield Group(int(starts[k]), epoch, pass_number, shuffled)

    def batches(self, position: int, *, size: int, stop: int | None = None) -> Iterator[Visits]:
        """Yield consecutive visits from `position` on.

        Args:
            position: Visits before the first batch.
            size: Visits of a batch.
            stop: Position at which the batches end; the last one may be shorter. None: never.
        """
        if stop is not None and position >= stop:
            return
        parts: list[tuple[Group, slice]] = []
        start, end = position, position + size if stop is None else min(position + size, stop)
        for group in self.groups(position):
            group_end = group.start + len(group.rows)
            while start < group_end:
                parts.append(
                    (group, slice(max(start, group.start) - group.start, end - group.start))
                )
                if end > group_end:
                    break
                yield _joined(start, parts)
                if end == stop:
                    return
                parts, start = [], end
                end = start + size if stop is None else min(start + size, stop)

    def between(self, start: int, stop: int) -> Visits:
        """Return the visits at the positions `start` to `stop` - 1."""
        return next(self.batches(start, size=stop - start))

    def reads(
        self, start: int, *, stop: int | None = None, lanes: NDArray[np.int64] | None = None
    ) -> Iterator[ChunkRead]:
        """Yield the chunks to read from a position on, see `CellOrder`; there is one lane."""
        for group in self.groups(start):
            if stop is not None and group.start >= stop:
                return
            first = max(start, group.start)
            rows = group.rows[first - group.start : None if stop is None else stop - group.start]
            chunks = np.searchsorted(self._bounds, rows, side="right") - 1
            # Sorted faster, by radix, where the numbers have 16 bits.
            chunks = chunks.astype(np.min_scalar_type(len(self._bounds)))
            order = np.argsort(chunks, kind="stable")
            for of_chunk in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1):
                visited = partial(self._visited, group, first + of_chunk)
                yield ChunkRead(first, first + int(of_chunk[-1]), visited)

    def _visited(self, group: Group, positions: NDArray[np.int64]) -> Visited:
        passes = np.full(len(positions), group.pass_number)
        return positions, group.rows[positions - group.start], passes

    def lane_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lane of each position: the only one."""
        return np.zeros_like(positions)

    def places(
        self, start: int, *, micro_batch_size: int, world_size: int, batch: int
    ) -> NDArray[np.int64]:
        """Return where the visits of a batch stand in the order of the ranks, see `CellOrder`.

        The ranks take turns, a micro-batch each.
        """
        turn, cell = np.divmod(np.arange(batch), micro_batch_size)
        micro_step, rank = np.divmod(turn, world_size)
        return rank * (batch // world_size) + micro_step * micro_batch_size + cell

    def repeats_after(self, batch: int) -> int:
        """Return 1: the places of a batch are those of every other."""
        return 1

    def chunks_in_use(self, lanes: int) -> tuple[int, int]:
        """Return the chunks of two groups, and of three: the last one of an epoch may be small."""
        return 2 * self.group_chunks, 3 * self.group_chunks

    def _rows(self, chunk: int, draw: Draw | None) -> NDArray[np.int64]:
        """Return the cells of a chunk that a pass visits."""
        first, last = int(self._bounds[chunk]), int(self._bounds[chunk + 1])
        rows = np.arange(first, last)
        if draw is None or self._weights is None:
            return rows
        ends = np.concatenate(([0], np.cumsum(self._weights.of(first, last))))
        return rows[np.diff(draw.points_before(self._sums[chunk] + ends)) > 0]

    def _draw(self, epoch: int) -> EpochDraw:
        return EpochDraw(
            self._seed, epoch, total=int(self._sums[-1]), passes=self.passes,
            pass_visits=self.pass_visits,
        )  # fmt: skip

    def _rng(self, block: int, part: int, epoch: int) -> np.random.Generator:
        return philox(self._seed, block, part, epoch)


@dataclass(frozen=True, slots=True)
class Draw:
    """Points on the ring of weights: `turn + offset + k * unit` for k < points."""

    total: int
    points: int
    unit: int
    turn: int
    offset: int

    def points_before(self, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many points lie in [0, place) for places from 0 to `total`."""
        beyond = self._unturned(place - self.turn + self.total)
        return self._unturned(place - self.turn) + beyond - self._unturned(self.total - self.turn)

    def points_in(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers k and the places of the points in [start, stop)."""
        numbers, places = [], []
        for lap in (0, self.total):
            first, last = self._unturned(np.array([start, stop]) - self.turn + lap).tolist()
            numbers.append(np.arange(first, last))
            places.append(self.turn + self.offset + numbers[-1] * self.unit - lap)
        return np.concatenate(numbers), np.concatenate(places)

    def _unturned(self, place: NDArray[np.int64] | int) -> NDArray[np.int64]:
        return np.clip((place - self.offset + self.unit - 1) // self.unit, 0, self.points)


class EpochDraw:
    """The points of the passes of an epoch."""

    def __init__(self, seed: int, epoch: int, *, total: int, passes: int, pass_visits: int) -> None:
        """Draw where the first point of the first pass lies.

        Args:
            seed: `run.seed`.
            epoch: Number of the epoch.
            total: Length of the ring.
            passes: Passes of an epoch.
            pass_visits: Points of a pass.
        """
        self._total, self._passes, self._pass_visits = total, passes, pass_visits
        rng = philox(seed, _OFFSETS, 0, epoch)
        self._turn, self._offset = int(rng.integers(total)), int(rng.integers(passes * ONE))

    def of_pass(self, number: int) -> Draw:
        """Return the points of one pass."""
        unit = self._passes * ONE
        offset = (self._offset + number * ONE) % unit
        return Draw(self._total, self._pass_visits, unit, turn=self._turn, offset=offset)

    def of_all(self) -> Draw:
        """Return the points of all passes, which are a weight of 1 apart."""
        points = self._passes * self._pass_visits
        return Draw(self._total, points, ONE, turn=self._turn, offset=self._offset % ONE)

    def pass_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the passes of points by their numbers among all."""
        return (numbers - self._offset // ONE) % self._passes


def split_borders(chunk_rows: ArrayLike) -> NDArray[np.int64]:
    """Return the chunk borders of a split.

    Args:
        chunk_rows: (n + 1,) first row of each chunk, ascending; the last entry is the end.

    Raises:
        ValueError: It has no cells.
    """
    bounds = np.asarray(chunk_rows, dtype=np.int64)
    if bounds[-1] - bounds[0] < 1:
        raise ValueError(
            "the split has no cells: check the split of `python -m data_prep finalize`"
        )
    return bounds


def visits_of_weights(
    bounds: NDArray[np.int64], weights: VisitWeights
) -> tuple[NDArray[np.int64], int, int]:
    """Return (n + 1,) weights before each chunk border, passes of an epoch, visits of a pass.

    Args:
        bounds: (n + 1,) chunk borders.
        weights: Of the cells between them.

    Raises:
        ValueError: They give less than one visit in a pass.
    """
    sums, largest = _border_sums(bounds, weights)
    passes = max(1, -(-largest // ONE))
    pass_visits = int(sums[-1]) // (passes * ONE)
    if pass_visits < 1:
        raise ValueError(
            f"the weights of the datasets give the {bounds[-1] - bounds[0]} cells of the split "
            f"less than one visit in each of the {passes} passes of an epoch: make them more equal"
        )
    return sums, passes, pass_visits


def _border_sums(bounds: NDArray[np.int64], weights: VisitWeights) -> tuple[NDArray[np.int64], int]:
    """Return (n + 1,) sums of the weights before each chunk border, and the largest weight."""
    sums, largest = np.zeros(len(bounds), np.int64), 0
    first = 0
    while first < len(bounds) - 1:
        # int64 holds the sum of 10^14 visits.
        last = int(np.searchsorted(bounds, bounds[first] + _BLOCK_CELLS, side="right")) - 1
        last = max(last, first + 1)
        of_cells = weights.of(int(bounds[first]), int(bounds[last]))
        before = np.concatenate(([0], np.cumsum(of_cells)))
        sums[first + 1 : last + 1] = (
            sums[first] + before[bounds[first + 1 : last + 1] - bounds[first]]
        )
        largest = max(largest, int(of_cells.max(initial=0)))
        first = last
    return sums, largest


def _joined(start: int, parts: list[tuple[Group, slice]]) -> Visits:
    rows = [group.rows[part] for group, part in parts]
    lengths = [len(part) for part in rows]
    return Visits(
        start,
        np.concatenate(rows),
        np.repeat([group.epoch for group, _ in parts], lengths),
        np.repeat([group.pass_number for group, _ in parts], lengths),
    )
