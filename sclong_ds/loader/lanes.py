"""The order of cells by lanes: every rank reads the chunks of its own cells, and no others.

Like `sclong_ds.loader.order`, one endless stream that is a pure function of (seed, chunk borders,
weights, lanes, batch): ranks, micro-batches and threads do not enter, and the position is one
integer, the number of visits so far.

Lanes. An epoch permutes its chunks and lays their visits end to end on a line. The line is cut into
Q consecutive lanes, each with as many visits as it has positions in the epoch. Position t of the
stream has slot t mod L, and each slot belongs to one lane, so that every L positions hold the same
number of visits of every lane. A lane goes through its chunks one after the other; lanes of even
number forwards, the others backwards. So at any time one chunk of each lane is in use, batches draw
from Q chunks that change at different times, and the two lanes that share a chunk at their border
use it at the same time, at the beginning or at the end of the epoch.

Slots. With Q lanes and batches of B = `batch` cells when the run began: if Q >= B, then Q is a
multiple of B, L = Q, and slot s is lane (s mod B) * Q / B + s div B; if Q < B, then L = B and slot
s is lane s * Q div B. A batch, sorted by lane, is cut into equal parts for the ranks: one rank gets
the same lanes in every batch, those next to each other on the line. The order does not end with
batches of B: a run that changes its batch size keeps its lanes and slots.

Chunks. The cells of a chunk are permuted for each epoch. With weights an epoch visits the cells
that `CellStream` visits in its P passes, but all visits to a chunk come while the chunk is in use,
pass by pass, each pass in the same permutation: a chunk is read once an epoch whatever P is, and
the visits to one cell are about as far apart as the chunk allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import lcm

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sclong_ds.loader.order import (
    ChunkRead,
    Draw,
    EpochDraw,
    Visited,
    Visits,
    VisitWeights,
    philox,
    split_borders,
    visits_of_weights,
)

_LANES = 2**62  # second counter word of the permutations; those of `CellStream` stay below


@dataclass(frozen=True, slots=True, eq=False)
class _Epoch:
    """How the visits of an epoch lie on the line."""

    number: int
    chunks: NDArray[np.int64]
    """(chunks,) in the order in which they lie."""
    before: NDArray[np.int64]
    """(chunks + 1,) visits before each one."""
    cuts: NDArray[np.int64]
    """(lanes + 1,) visits before each lane."""
    passed: NDArray[np.int64]
    """(lanes,) positions of each lane in all epochs before."""
    draw: EpochDraw | None
    points: Draw | None
    """Of all passes."""


def lanes_for(batch: int, *, most: int) -> int:
    """Return a number of lanes for batches of a size.

    It is the largest multiple of `batch` up to `most`; if there is none, the largest divisor of
    `batch`, or `most` itself where the divisors are less than half of it.

    Args:
        batch: Cells of a batch.
        most: Most lanes.
    """
    if batch <= most:
        return most // batch * batch
    divisor = next(n for n in range(most, 0, -1) if batch % n == 0)
    return divisor if 2 * divisor >= most else most


class LaneStream:
    """The endless global order of cells by lanes.

    Attributes:
        n_cells: Cells of the split.
        passes: Passes of an epoch, 1 without weights.
        epoch_visits: Visits of an epoch.
        lanes: Number of lanes; as many chunks are in use at a time.
        batch: Cells of a batch when the run began.
        slots: Positions after which the lanes repeat.
    """

    def __init__(
        self,
        chunk_rows: ArrayLike,
        *,
        seed: int,
        lanes: int,
        batch: int,
        weights: VisitWeights | None = None,
    ) -> None:
        """Add up the weights, if any; takes no more than a block of cells at a time.

        Args:
            chunk_rows: (n + 1,) first row of each chunk of the split, ascending; the last entry is
                the end.
            seed: `run.seed`.
            lanes: Number of lanes, see `lanes_for`.
            batch: Cells of a batch when the run begins.
            weights: None visits every cell once an epoch.

        Raises:
            ValueError: A split without cells, weights that give it no visit, or a number of lanes
                that does not fit the batch.
        """
        self._bounds = split_borders(chunk_rows)
        self.n_cells = int(self._bounds[-1] - self._bounds[0])
        if min(lanes, batch) < 1 or (lanes > batch and lanes % batch):
            raise ValueError(
                f"{lanes} lanes for batches of {batch} cells: allowed are 1 to {batch} and "
                f"multiples of {batch}"
            )
        self._seed, self._weights, self.lanes, self.batch = seed, weights, lanes, batch
        self.slots = max(lanes, batch)
        self.passes, self.epoch_visits = 1, self.n_cells
        if weights is not None:
            self._sums, self.passes, pass_visits = visits_of_weights(self._bounds, weights)
            self.epoch_visits = self.passes * pass_visits
        lane, slot = np.arange(lanes), np.arange(self.slots)
        if lanes >= batch:
            of_slot = slot % batch * (lanes // batch) + slot // batch
        else:
            of_slot = slot * lanes // batch
        self._lane_of_slot = of_slot
        by_lane = np.argsort(of_slot, kind="stable")
        self._first_slot = by_lane[np.searchsorted(of_slot[by_lane], lane)]
        self._width = np.bincount(of_slot, minlength=lanes)
        self._last: _Epoch | None = None

    def lane_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lane of each position."""
        return self._lane_of_slot[positions % self.slots]

    def batches(self, position: int, *, size: int, stop: int | None = None) -> Iterator[Visits]:
        """Yield consecutive visits from `position` on.

        Args:
            position: Visits before the first batch.
            size: Visits of a batch.
            stop: Position at which the batches end; the last one may be shorter. None: never.
        """
        while stop is None or position < stop:
            end = position + size if stop is None else min(position + size, stop)
            yield self.between(position, end)
            position = end

    def between(self, start: int, stop: int) -> Visits:
        """Return the visits at the positions `start` to `stop` - 1."""
        positions = np.arange(start, stop)
        epochs = positions // self.epoch_visits
        rows, passes = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            here = np.flatnonzero(epochs == number)
            on_line = self._on_line(epoch, positions[here])
            order = np.argsort(on_line)
            here, on_line = here[order], on_line[order]
            places = np.searchsorted(epoch.before, on_line, side="right") - 1
            cuts = np.flatnonzero(np.diff(places, prepend=-1, append=-1))
            for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                place = int(places[first])
                of_chunk, in_pass = self._visits(epoch, place)
                which = on_line[first:last] - epoch.before[place]
                rows[here[first:last]] = of_chunk[which]
                passes[here[first:last]] = in_pass[which]
        return Visits(start, rows, epochs, passes)

    def reads(
        self, start: int, *, stop: int | None = None, lanes: NDArray[np.int64] | None = None
    ) -> Iterator[ChunkRead]:
        """Yield the chunks to read from a position on, see `CellOrder`."""
        wanted = np.full(self.lanes, lanes is None)
        wanted[[] if lanes is None else lanes] = True
        for number in count(start // self.epoch_visits):
            if stop is not None and number * self.epoch_visits >= stop:
                return
            epoch = self._epoch(number)
            places, firsts, lasts = self._needed(epoch, wanted)
            use = lasts >= start if stop is None else (lasts >= start) & (firsts < stop)
            places, firsts, lasts = places[use], np.maximum(firsts[use], start), lasts[use]
            for k in np.argsort(firsts, kind="stable").tolist():
                visits = partial(self._read_visits, epoch, int(places[k]))
                yield ChunkRead(int(firsts[k]), int(lasts[k]), visits)

    def places(
        self, start: int, *, micro_batch_size: int, world_size: int, batch: int
    ) -> NDArray[np.int64]:
        """Return where the visits of a batch stand in the order of the ranks, see `CellOrder`.

        They are sorted by lane, whatever the number of ranks.
        """
        places = np.empty(batch, np.int64)
        lanes = self.lane_of(np.arange(start, start + batch))
        places[np.argsort(lanes, kind="stable")] = np.arange(batch)
        return places

    def repeats_after(self, batch: int) -> int:
        """Return the number of batches after which the lanes of their visits repeat."""
        return lcm(batch, self.slots) // batch

    def chunks_in_use(self, lanes: int) -> tuple[int, int]:
        """Return a chunk for each lane and one more, and a quarter more to read ahead."""
        return lanes + 1, lanes + max(4, lanes // 4)

    def _epoch(self, number: int) -> _Epoch:
        last = self._last
        if last is not None and last.number == number:
            return last
        draw = points = None
        sizes = np.diff(self._bounds)
        if self._weights is not None:
            draw = EpochDraw(
                self._seed, number, total=int(self._sums[-1]), passes=self.passes,
                pass_visits=self.epoch_visits // self.passes,
            )  # fmt: skip
            points = draw.of_all()
            sizes = np.diff(points.points_before(self._sums))
        order = philox(self._seed, _LANES, 0, number).permutation(len(sizes))
        before = np.concatenate(([0], np.cumsum(sizes[order])))
        passed, end = (self._positions_before((number + k) * self.epoch_visits) for k in (0, 1))
        cuts = np.concatenate(([0], np.cumsum(end - passed)))
        self._last = epoch = _Epoch(number, order, before, cuts, passed, draw, points)
        return epoch

    def _positions_before(self, position: int) -> NDArray[np.int64]:
        """Return (lanes,) positions of each lane before a position."""
        rounds, rest = divmod(position, self.slots)
        return rounds * self._width + np.clip(rest - self._first_slot, 0, self._width)

    def _on_line(self, epoch: _Epoch, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places on the line of an epoch's visits at chosen positions."""
        rounds, slots = np.divmod(positions, self.slots)
        lanes = self._lane_of_slot[slots]
        done = rounds * self._width[lanes] + slots - self._first_slot[lanes] - epoch.passed[lanes]
        forwards = epoch.cuts[lanes] + done
        return np.where(lanes % 2, epoch.cuts[lanes + 1] - 1 - done, forwards)

    def _positions(self, epoch: _Epoch, on_line: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of an epoch's visits at chosen places on the line."""
        lanes = np.searchsorted(epoch.cuts, on_line, side="right") - 1
        done = np.where(lanes % 2, epoch.cuts[lanes + 1] - 1 - on_line, on_line - epoch.cuts[lanes])
        rounds, slots = np.divmod(epoch.passed[lanes] + done, self._width[lanes])
        return rounds * self.slots + self._first_slot[lanes] + slots

    def _needed(
        self, epoch: _Epoch, wanted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return places on the line of the chunks of chosen lanes, and first and last positions."""
        edges = np.union1d(epoch.before, epoch.cuts)
        starts, ends = edges[:-1], edges[1:]
        own = wanted[np.searchsorted(epoch.cuts, starts, side="right") - 1]
        starts, ends = starts[own], ends[own]
        if not len(starts):
            return starts, starts, starts
        places = np.searchsorted(epoch.before, starts, side="right") - 1
        one, other = self._positions(epoch, starts), self._positions(epoch, ends - 1)
        first = np.flatnonzero(np.diff(places, prepend=-1))
        return (
            places[first],
            np.minimum.reduceat(np.minimum(one, other), first),
            np.maximum.reduceat(np.maximum(one, other), first),
        )

    def _read_visits(self, epoch: _Epoch, place: int) -> Visited:
        on_line = np.arange(epoch.before[place], epoch.before[place + 1])
        return self._positions(epoch, on_line), *self._visits(epoch, place)

    def _visits(self, epoch: _Epoch, place: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and passes of the visits to a chunk, in the order on the line."""
        chunk = int(epoch.chunks[place])
        first, last = int(self._bounds[chunk]), int(self._bounds[chunk + 1])
        order = philox(self._seed, _LANES, chunk + 1, epoch.number).permutation(last - first)
        if epoch.draw is None or epoch.points is None or self._weights is None:
            return first + order, np.zeros(last - first, np.int64)
        ends = self._sums[chunk] + np.cumsum(self._weights.of(first, last))
        points, ring = epoch.points.points_in(int(self._sums[chunk]), int(ends[-1]))
        cells = np.searchsorted(ends, ring, side="right")
        passes = epoch.draw.pass_of(points)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        sequence = np.lexsort((rank[cells], passes))
        return first + cells[sequence], passes[sequence]
