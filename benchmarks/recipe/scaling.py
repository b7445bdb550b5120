"""Loss against FLOPs: widths and numbers of cells, fitted exponents with intervals, a picture.

    python -m benchmarks.recipe --out scaling.jsonl --corpus CORPUS --graph FILE --held-out NAME \
        "width 16, 600: run.max_steps=150 model.base_dim=16" ...
    python -m benchmarks.recipe.scaling scaling.jsonl --out docs/pictures/scaling.svg

Reads the runs named `width W, V` (width of `model.base_dim`, visits). The fit is a power law
without a floor, log MSE = c - w log(width) - v log(visits), by least squares over all runs; three
sizes cannot tell a floor from a smaller exponent. Intervals: `benchmarks/recipe/intervals.py`; in
addition the seeds of each place of the grid are drawn again.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.recipe.__main__ import read
from benchmarks.recipe.intervals import difference, interval, mean_draws, pooled_mse

NAME = re.compile(r"width (\d+), (\d+)")
Grid = dict[tuple[int, int], list[dict[str, Any]]]
BASELINES = ("offset", "linear", "poisson", "30 nearest cells")


def main() -> None:
    """Print tables and exponents, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="picture, .svg or .png")
    args = parser.parse_args()
    runs = grid_of(read(args.results))
    print("| width | visits | TFLOP | seeds | hidden MSE | interval of cells and seeds |")
    print("|---|---|---|---|---|---|")
    for (width, visits), own in sorted(runs.items()):
        mean = np.mean([pooled_mse(r) for r in own])
        low, high = interval(mean_draws(own))
        flops = own[0]["flops"] / 1e12
        sizes = f"{width} | {visits:,} | {flops:.2f} | {len(own)}"
        print(f"| {sizes} | {mean:.4f} | {low:.4f}, {high:.4f} |")
    for name, (value, low, high) in exponents(runs).items():
        print(f"{name}: {value:.3f} [{low:.3f}, {high:.3f}]")
    longest = max(runs.items(), key=lambda place: (place[0][1], -place[0][0]))[1]
    for name in BASELINES:
        print(
            f"{longest[0]['name']} minus {name}: "
            + "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference(longest, longest[:1], predictor=name))
        )
    if args.out is not None:
        draw(runs, args.out)


def grid_of(results: list[dict[str, Any]]) -> Grid:
    """Return the runs by (width, visits); those of other names are left out."""
    found: Grid = {}
    for result in results:
        if match := NAME.fullmatch(result["name"]):
            found.setdefault((int(match[1]), int(match[2])), []).append(result)
    return found


def exponents(runs: Grid) -> dict[str, tuple[float, float, float]]:
    """Return the exponents of width, visits and FLOPs, each with its interval."""
    places = sorted(runs)
    drawn = np.array([mean_draws(runs[place]) for place in places])
    whole = np.array([np.mean([pooled_mse(r) for r in runs[place]]) for place in places])
    flops = np.array([[runs[place][0]["flops"]] for place in places])
    fits = {"width": 0, "visits": 1}
    found = {}
    for name, column in fits.items():
        sizes = np.array(places, dtype=float)
        value = fit(sizes, whole[:, None])[column, 0]
        found[name] = (float(value), *interval(fit(sizes, drawn)[column]))
    value = fit(flops, whole[:, None])[0, 0]
    found["FLOPs"] = (float(value), *interval(fit(flops, drawn)[0]))
    return found


def fit(sizes: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the exponents (K, D) of losses (places, D) as powers of 1 / sizes (places, K)."""
    table = np.column_stack([-np.log(sizes), np.ones(len(sizes))])
    return np.linalg.lstsq(table, np.log(losses), rcond=None)[0][:-1]


def draw(runs: Grid, path: Path) -> None:
    """Draw hidden MSE against FLOPs, a line per width, with the baselines."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.add_subplot()
        for width in sorted({width for width, _ in runs}):
            own = sorted((v, r) for (w, v), r in runs.items() if w == width)
            x = [r[0]["flops"] for _, r in own]
            y = [np.mean([pooled_mse(one) for one in r]) for _, r in own]
            spread = np.array([interval(mean_draws(r)) for _, r in own]).T
            bars = np.abs(spread - y)
            axes.errorbar(x, y, bars, marker="o", capsize=3, label=f"width {width}")
        first = next(iter(runs.values()))[0]
        for name, style in zip(BASELINES, ("-.", "--", ":", "-"), strict=True):
            level = pooled_mse(first, predictor=name)
            axes.axhline(level, color="0.4", lw=1, ls=style)
            place = (1.0, level)
            side = "top" if name == "linear" else "bottom"
            across = ("axes fraction", "data")
            axes.annotate(name, place, xycoords=across, ha="right", va=side)
        axes.set(xscale="log", xlabel="training FLOPs", ylabel="MSE of hidden values")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
