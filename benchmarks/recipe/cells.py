r"""Error against training cells and against parameters of the cell's vector: table, fits, picture.

    python -m benchmarks.recipe "rank 32, cells 0.25: study.parts=vector run.max_steps=600 \
        engine.train_batch_size=16 study.cells=0.25 model.base_dim=32" ... --corpus CORPUS \
        --graph graph.npz --held-out NAME --seeds 0 1 --out cells.jsonl
    python -m benchmarks.recipe.cells cells.jsonl --floor 0.117 --out docs/pictures/cells.svg

Reads the runs named `rank R, cells SHARE`: R is `model.base_dim`, the numbers that the vector has;
SHARE of the training cells were used. For each rank with all shares the error is fitted by least
squares of logs as a power of the number of cells, log MSE = c - a log(cells), and the same above a
floor that is given, the noise of counting (`benchmarks.recipe.floor`): log(MSE - floor). Four sizes
tell no floor by themselves. Intervals are those of `benchmarks/recipe/intervals.py`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recipe.__main__ import read
from benchmarks.recipe.intervals import difference, interval, mean_draws, pooled_mse
from benchmarks.recipe.scaling import fit

NAME = re.compile(r"rank (\d+), cells ([\d.]+)")
NEAREST = "30 nearest cells"
Grid = dict[tuple[int, int], list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables and exponents, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--floor", type=float, default=0.0, help="error that is noise of counting")
    parser.add_argument("--out", type=Path, help="picture, .svg or .png")
    args = parser.parse_args(argv)
    runs = grid_of(read(args.results))
    whole = max(cells for _, cells in runs)
    print("| rank | training cells | parameters | seeds | hidden MSE [95%] | r per gene |")
    print("|---|---|---|---|---|---|")
    for (rank, cells), own in sorted(runs.items()):
        low, high = interval(mean_draws(own))
        r = ", ".join(f"{run['val/pearson_per_gene']:.3f}" for run in own)
        mean = f"{mean_mse(own):.4f} [{low:.4f}, {high:.4f}]"
        parameters = f"{vector_parameters(rank, own[0]['genes']):,}"
        print(f"| {rank} | {cells:,} | {parameters} | {len(own)} | {mean} | {r} |")
    for rank, floor in [(r, f) for r in ranks_of(runs) for f in sorted({0.0, args.floor})]:
        found = "{:.3f} [{:.3f}, {:.3f}]".format(*exponent(runs, rank, floor))
        print(f"rank {rank}, above {floor}: cells^-{found}")
    base = runs[32, whole]
    for rank in sorted({rank for rank, cells in runs if cells == whole} - {32}):
        less = difference(runs[rank, whole], base)
        print(f"rank {rank} less rank 32: " + "{:+.4f} [{:+.4f}, {:+.4f}]".format(*less))
    if args.out is not None:
        draw(runs, args.floor, args.out)


def grid_of(results: list[dict[str, Any]]) -> Grid:
    """Return the runs by (rank, training cells); those of other names are left out."""
    found: Grid = {}
    for result in results:
        if match := NAME.fullmatch(result["name"]):
            found.setdefault((int(match[1]), result["n_training_cells"]), []).append(result)
    return found


def ranks_of(runs: Grid) -> list[int]:
    """Return the ranks that have runs of three numbers of cells at least."""
    ranks = [rank for rank, _ in runs]
    return sorted({rank for rank in ranks if ranks.count(rank) > 2})


def mean_mse(runs: list[dict[str, Any]]) -> float:
    """Return the mean over seeds of the pooled error."""
    return float(np.mean([pooled_mse(run) for run in runs]))


def vector_parameters(rank: int, genes: int) -> int:
    """Return the parameters of a model without its transformer: `cell_vector.py`, `value_head.py`.

    A vector, a weight, a centre and a bias per gene; layer norm, MLP and shift.
    """
    return genes * (2 * rank + 2) + 2 * rank + (rank + 1) * 2 * rank + 2 * rank * rank + rank


def exponent(runs: Grid, rank: int, floor: float) -> tuple[float, float, float]:
    """Return a of (MSE - floor) = c cells^-a for one rank, with its interval over cells, seeds."""
    places = sorted(place for place in runs if place[0] == rank)
    sizes = np.array([[cells] for _, cells in places], dtype=float)
    drawn = np.array([mean_draws(runs[place]) for place in places])
    whole = np.array([[mean_mse(runs[place])] for place in places])
    value = fit(sizes, whole - floor)[0, 0]
    return (float(value), *interval(fit(sizes, drawn - floor)[0]))


def draw(runs: Grid, floor: float, path: Path) -> None:
    """Draw the error against training cells, a line per rank, and against rank."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cells", "font.size": 9}):
        figure = Figure(figsize=(7.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for rank in ranks_of(runs):
            _line(left, [(n, own) for (r, n), own in runs.items() if r == rank], f"rank {rank}")
        whole = max(cells for _, cells in runs)
        _line(right, [(r, own) for (r, n), own in runs.items() if n == whole], "all cells")
        first = next(iter(runs.values()))[0]
        for axes in (left, right):
            lines = {NEAREST: pooled_mse(first, predictor=NEAREST)}
            if floor:
                lines["noise of counting"] = floor
            for name, level in lines.items():
                axes.axhline(level, color="0.4", lw=1, ls="--" if name == NEAREST else ":")
                place = {"xy": (0.02, level), "xycoords": ("axes fraction", "data")}
                axes.annotate(name, **place, va="bottom", color="0.3")
            axes.legend(frameon=False)
        left.set(xscale="log", xlabel="training cells", ylabel="MSE of hidden values")
        right.set(xscale="log", xlabel="numbers of the cell's vector (rank)")
        for axes, ticks in ((left, {n for _, n in runs}), (right, {r for r, _ in runs})):
            axes.set_xticks(sorted(ticks), [f"{n:,}" for n in sorted(ticks)])
            axes.minorticks_off()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _line(axes: Axes, points: list[tuple[int, list[dict[str, Any]]]], label: str) -> None:
    points = sorted(points, key=lambda point: point[0])
    y = np.array([mean_mse(own) for _, own in points])
    bars = np.abs(np.array([interval(mean_draws(own)) for _, own in points]).T - y)
    axes.errorbar([n for n, _ in points], y, bars, marker="o", capsize=3, label=label)


if __name__ == "__main__":
    main()
