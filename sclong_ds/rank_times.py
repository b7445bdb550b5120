"""Where the time of each rank goes, to find the rank that holds up the others.

Every rank adds up its own figures of the steps since the last validation; then they are gathered
once. Forward, backward and optimizer contain collectives, in which the fast ranks wait for the slow
one: the slow rank is the one with the longest time for data, or with the least waiting elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sclong_ds.engine.ranks import Ranks
from sclong_ds.run_folder.pending_pictures import RANK_COLUMNS


class RankTimes:
    """Means of this rank's figures since the last `gather`."""

    def __init__(self) -> None:
        self._sums = np.zeros(len(RANK_COLUMNS))
        self._steps = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of one step."""
        self._sums += [figures.get(name, 0.0) for name in RANK_COLUMNS]
        self._steps += 1

    def gather(self, ranks: Ranks) -> NDArray[np.float64] | None:
        """Return the means of all ranks and begin anew; every rank must call it.

        Args:
            ranks: The ranks.

        Returns:
            (ranks, RANK_COLUMNS) per step; None before the first step.
        """
        if self._steps == 0:
            return None
        mine = torch.from_numpy(self._sums / self._steps)
        self._sums, self._steps = np.zeros(len(RANK_COLUMNS)), 0
        everyone = [torch.zeros_like(mine) for _ in range(ranks.world_size)]
        dist.all_gather(everyone, mine, group=ranks.control)
        return torch.stack(everyone).numpy()


def skew(times: NDArray[np.float64]) -> dict[str, float]:
    """Return the figures of the worst rank, by metric name.

    Args:
        times: (ranks, RANK_COLUMNS) of `RankTimes.gather`.
    """
    worst = dict(zip(RANK_COLUMNS, times.max(axis=0).tolist(), strict=True))
    # The whole step ends at the same time everywhere; its first half, data and forward, does not.
    own = (
        times[:, RANK_COLUMNS.index("perf/data_wait_s")]
        + times[:, RANK_COLUMNS.index("perf/forward_s")]
    )
    return {
        "perf/data_wait_max_s": worst["perf/data_wait_s"],
        "mem/peak_max_gib": worst["mem/peak_gib"],
        "perf/rank_skew": float(own.max() / max(np.median(own), 1e-9)),
    }
