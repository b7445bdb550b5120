"""Grows made corpora and counts who changes sides, and how near the split comes to its share.

    python -m benchmarks.split_growth [--trials 60]

Each trial makes 40 datasets of 1 to 7 donors (log-normal sizes, median about 400 cells a donor),
splits them, adds 10 and splits again under the rule that the first split left. Prints in how many
trials a validation donor became a training donor, with the rule and with a draw without it, and
the share of the cells that validation holds, at 40 and at 1,618 datasets. Seconds on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from data_prep.corpus.split.plan import SplitCells, SplitPlan, plan_split
from data_prep.corpus.split.rule import SplitOptions, SplitRule


def main() -> None:
    """Run the trials and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=60)
    args = parser.parse_args()
    kept = [trial(seed, keeps=True) for seed in range(args.trials)]
    drawn = [trial(seed, keeps=False) for seed in range(args.trials)]
    found = {
        "trials": args.trials,
        "with_the_rule": summary(kept),
        "drawn_again_without_it": summary(drawn),
        "share_of_cells_asked_for": 0.05,
        "share_of_cells_at_40_datasets": shares(40, args.trials),
        "share_of_cells_at_1618_datasets": shares(1618, 5),
    }
    print(json.dumps(found, indent=1))


def made(rng: np.random.Generator, n: int, first: int = 0) -> list[SplitCells]:
    """Return datasets of made donors."""
    datasets = []
    for number in range(first, first + n):
        n_donors = int(rng.integers(1, 8))
        sizes = np.maximum(1, rng.lognormal(6, 1.2, n_donors)).astype(int)
        n_cells = int(sizes.sum())
        datasets.append(
            SplitCells(
                dataset_id=f"d{number}",
                donors=tuple(f"d{number}_{donor}" for donor in range(n_donors)),
                donor=np.repeat(np.arange(n_donors, dtype=np.int32), sizes),
                kept=np.ones(n_cells, bool),
                rows=np.arange(n_cells),
            )
        )
    return datasets


def trial(seed: int, *, keeps: bool) -> float:
    """Return the share of the first validation cells that train after growth."""
    rng = np.random.default_rng(seed)
    first = made(rng, 40)
    grown = first + made(rng, 10, 40)
    before = plan_split(first, SplitRule(options=SplitOptions(seed=seed)))
    rule = before.rule if keeps else SplitRule(options=SplitOptions(seed=seed))
    after = plan_split(grown, rule)
    return moved(before, after)


def moved(before: SplitPlan, after: SplitPlan) -> float:
    """Return the share of the validation cells of a plan that another one trains on."""
    held = sum(int((codes == 1).sum()) for codes in before.codes)
    gone = sum(
        int(((old == 1) & (new != 1)).sum())
        for old, new in zip(before.codes, after.codes[: len(before.codes)], strict=True)
    )
    return gone / max(held, 1)


def summary(shares_moved: Sequence[float]) -> dict[str, float]:
    """Return in how many trials anyone moved, and how many cells."""
    return {
        "trials_with_a_donor_moved": sum(share > 0 for share in shares_moved),
        "mean_share_of_validation_cells": float(np.mean(shares_moved)),
        "worst": max(shares_moved),
    }


def shares(n_datasets: int, trials: int) -> dict[str, float]:
    """Return the least, median and largest share of the cells that validation gets."""
    found = []
    for seed in range(trials):
        datasets = made(np.random.default_rng(seed), n_datasets)
        plan = plan_split(datasets, SplitRule(options=SplitOptions(seed=seed)))
        found.append(plan.shares["validation"].cells)
    return {"least": min(found), "median": float(np.median(found)), "largest": max(found)}


if __name__ == "__main__":
    main()
