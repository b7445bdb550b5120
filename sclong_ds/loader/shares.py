"""Which visits of every batch are those of one rank, and where they stand among its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sclong_ds.loader.order import CellOrder
from sclong_ds.loader.pool import compiled

_MOST_PLACES = 2**22
"""Beyond it a batch is cut as it is: lanes and batches that hardly fit each other."""


class Share:
    """The visits of one rank from a position on.

    They are numbered: batch k after the start holds those from k * `size` to (k + 1) * `size` - 1,
    the first `micro` of them in the first micro-batch, and so on. Where a stream ends within a
    batch, the last numbers are left out.

    Attributes:
        size: Visits of a batch.
        lanes: (n,) lanes of the order that hold them.
    """

    def __init__(
        self,
        stream: CellOrder,
        *,
        start: int,
        stop: int | None,
        batch: int,
        micro: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Number the visits of the batches until they repeat.

        Args:
            stream: The order of cells.
            start: Position of the first batch.
            stop: Position at which the stream ends; None: never.
            batch: Visits of a batch of all ranks.
            micro: Visits of a micro-batch of one rank.
            rank: This rank.
            world_size: Number of ranks.
        """
        self._start, self._stop, self._batch, self._micro = start, stop, batch, micro
        self.size = batch // world_size
        repeats = stream.repeats_after(batch)
        sorts = repeats * batch <= _MOST_PLACES

        def numbers(k: int) -> NDArray[np.int64]:
            """Return the numbers within the share of the batch; -1: another rank's."""
            places = np.arange(batch)
            if sorts:
                places = stream.places(
                    start + k * batch, micro_batch_size=micro, world_size=world_size, batch=batch
                )
            return np.where(places // self.size == rank, places % self.size, -1)

        self._numbers = np.concatenate([numbers(k) for k in range(repeats if sorts else 1)])
        self._last, self._end = np.empty(0, np.int64), np.iinfo(np.int64).max
        if stop is not None:
            whole, rest = divmod(max(stop - start, 0), batch)
            self._last, self._end = _first_visits(numbers(whole), rest), start + whole * batch
        positions = np.arange(start, start + min(repeats * batch, _MOST_PLACES))
        if sorts:
            positions = positions[self._numbers >= 0]
        self.lanes = np.unique(stream.lane_of(positions))

    def numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the visits at some positions; -1 for those that are not its own.

        Args:
            positions: (visits,) positions in the stream, also before the start or after the stop.
        """
        found = np.empty(len(positions), np.int64)
        _find_numbers(
            positions, self._start, self._batch, self.size, self._numbers, self._end, self._last,
            found,
        )  # fmt: skip
        return found

    def micro_batches(self, k: int) -> list[int]:
        """Return the visits of each micro-batch of batch k after the start."""
        n_micro = self.size // self._micro
        if self._stop is None or self._start + (k + 1) * self._batch <= self._stop:
            return [self._micro] * n_micro
        return np.bincount(self._last[self._last >= 0] // self._micro, minlength=n_micro).tolist()


# One pass over the positions, since chunks are short: numpy took eight.
@compiled
def _find_numbers(positions, start, batch, size, numbers, end, last, found):  # type: ignore[no-untyped-def]
    for k in range(len(positions)):
        position = positions[k]
        relative = position - start
        number = -1
        if relative >= 0 and position < end:
            number = numbers[relative % len(numbers)]
        elif relative >= 0 and position - end < len(last):
            number = last[position - end]
        found[k] = relative // batch * size + number if number >= 0 else -1


def _first_visits(numbers: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Number the own visits among the first n of a batch again, in their order."""
    own = np.flatnonzero(numbers[:n] >= 0)
    again = np.full_like(numbers, -1)
    again[own[np.argsort(numbers[own])]] = np.arange(len(own))
    return again
