"""Intervals of the study: held-out cells and seeds drawn again with replacement.

The cells of a dataset are drawn from that dataset, the same for all runs of a draw, so differences
between runs are paired. Cells of one dataset share their protocol and cell lines: the intervals are
those of other cells of these datasets, not of other datasets.

Shapes: n held-out cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000


def draws(cell_dataset: Sequence[int], seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield (n,) positions of cells, drawn with replacement inside each dataset."""
    rng, numbers = np.random.default_rng(seed), np.asarray(cell_dataset)
    places = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
    for _ in range(DRAWS):
        yield np.concatenate([rng.choice(own, len(own)) for own in places])


def pooled_mse(
    run: dict[str, Any], cells: NDArray[np.int64] | slice = slice(None), predictor: str = "model"
) -> float:
    """Return the mean squared error of the hidden values of some cells of a run."""
    errors = run["cell_errors"]
    return float(np.sum(np.asarray(errors[predictor])[cells])) / float(
        np.sum(np.asarray(errors["n_hidden"])[cells])
    )


def interval(values: Sequence[float] | NDArray[np.floating]) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile."""
    low, high = np.percentile(np.asarray(values), [2.5, 97.5])
    return float(low), float(high)


def mean_draws(runs: list[dict[str, Any]]) -> list[float]:
    """Return the mean MSE of the runs of one candidate for each draw of cells and seeds."""
    rng, found = np.random.default_rng(1), []
    for cells in draws(runs[0]["cell_dataset"]):
        drawn = rng.integers(len(runs), size=len(runs))
        found.append(float(np.mean([pooled_mse(runs[i], cells) for i in drawn])))
    return found


def difference(
    runs: list[dict[str, Any]], others: list[dict[str, Any]], *, predictor: str = "model"
) -> tuple[float, float, float]:
    """Return the mean MSE of runs minus that of others, and its interval over cells and seeds.

    Args:
        runs: Runs of one candidate, a seed each.
        others: Runs to compare with; the same runs for a baseline.
        predictor: What of `others` counts: `model`, or the name of a baseline.
    """
    rng, found = np.random.default_rng(1), []
    for cells in draws(runs[0]["cell_dataset"]):
        mine = np.mean(
            [pooled_mse(runs[i], cells) for i in rng.integers(len(runs), size=len(runs))]
        )
        drawn = rng.integers(len(others), size=len(others))
        found.append(mine - np.mean([pooled_mse(others[i], cells, predictor) for i in drawn]))
    whole = np.mean([pooled_mse(r) for r in runs])
    whole -= np.mean([pooled_mse(r, predictor=predictor) for r in others])
    return (float(whole), *interval(found))
