r"""How much of the hidden error is noise of counting, and what knowing the cell's group would gain.

    python -m benchmarks.recipe.floor --corpus CORPUS --graph graph.npz \
        --held-out RNAmix_celseq2 cellmix1 --group RNAmix_celseq2=RNAmix_celseq2.h5ad:mix \
        --group cellmix1=cellmix1.h5ad:H1975,H2228

Three figures per held-out dataset beside the error of the cell's vector alone, trained here:

- `noise`: the mean variance of a hidden value, were the model's rates the truth and counts Poisson
  and known to be 1 or more. No predictor that sees the other genes goes below the noise at the true
  rates; those of the model are near them where its error is near its noise.
- `noise, spread`: the same with true rates that are gamma distributed about the model's (shape and
  factor by maximum likelihood). `spread` is the part of the error that knowing the rates would
  take away, `noise` what would stay. Variation of the measurement beyond Poisson counts as spread.
- `replicates`: the error of a predictor that is told the cell's group (mixture, cell line) and
  reads all other cells of that group and dataset: their pooled counts and the model's rate, which
  weighs as many counts as `PRIOR` says, the best of which is taken. It is no floor: cells of a line
  differ. It tells how much is to be had from knowing which kind of cell one looks at.
- `halves`: each count is drawn into one of two halves, and the value of the first is predicted at
  half the depth: by the model's rate, and by it and the second half's count of the same gene, the
  rate gamma distributed with the shape above. The last number is the noise at that. Halves of a
  Poisson count are independent, so the second says what the gene's own rate in this cell is.

Shapes: V hidden values, N cells of a dataset.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import anndata
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import gamma

from benchmarks.recipe.panel import Cells, Panel, read_panel
from benchmarks.recipe.training import BEFORE, Study, build, change, predict, train
from sclong_ds.config.load import load_config
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.model.values.depth import one_count

PRIOR = (0, 1, 5, 20, 50, 100)
RATES = (0.5, 1, 2, 4, 8)
_COUNTS = np.arange(1, 401)
_LARGEST = 300.0
_SHAPES = (0.3, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 20, 40, 100)
_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
_POINTS = 24

Vector = NDArray[np.float64]


class Hidden(NamedTuple):
    """The hidden values of the held-out cells, (V,) each."""

    rate: Vector
    """Counts that the model expects at the cell's depth, before it is known that one was seen."""
    one: Vector
    """What one count is before log1p."""
    count: Vector
    value: Vector
    predicted: Vector
    cell: NDArray[np.int64]
    gene: NDArray[np.int64]


def moments(rate: Vector, one: Vector) -> tuple[Vector, Vector]:
    """Return mean and variance (V,) of log1p(k one) for Poisson counts k >= 1 of some rates.

    Args:
        rate: (V,), those above 300 are taken for 300.
        one: (V,).
    """
    mean, variance = np.empty(len(rate)), np.empty(len(rate))
    for start in range(0, len(rate), 2000):
        some = slice(start, start + 2000)
        logs = _COUNTS * np.log(np.minimum(rate[some], _LARGEST))[:, None] - gammaln(_COUNTS + 1)
        chance = np.exp(logs - logs.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        values = np.log1p(_COUNTS * one[some, None])
        mean[some] = (chance * values).sum(1)
        variance[some] = (chance * values**2).sum(1) - mean[some] ** 2
    return mean, variance


def spread_of_rates(found: Hidden) -> tuple[float, float, float]:
    """Return shape, noise and spread of gamma distributed rates about those of the model."""
    _, shape, factor = min(
        (_negative_log_likelihood(factor * found.rate, found.count, shape), shape, factor)
        for shape in _SHAPES
        for factor in _FACTORS
    )
    total, mean, square, noise = (np.zeros(len(found.rate)) for _ in range(4))
    for times in gamma.ppf((np.arange(_POINTS) + 0.5) / _POINTS, shape, scale=1 / shape):
        rate = np.maximum(factor * found.rate * times, 1e-8)
        own_mean, own_variance = moments(rate, found.one)
        chance = -np.expm1(-rate)  # that a count is seen at all
        total += chance
        mean += chance * own_mean
        square += chance * own_mean**2
        noise += chance * own_variance
    spread = square / total - (mean / total) ** 2
    return shape, float((noise / total).mean()), float(spread.mean())


def halves(found: Hidden, shape: float) -> tuple[float, float, float]:
    """Return errors of the first half by the model, and told the second, and the noise then."""
    first = np.random.default_rng(0).binomial(found.count.astype(np.int64), 0.5).astype(np.float64)
    seen = first > 0
    rate, one = found.rate[seen] / 2, 2 * found.one[seen]
    value = np.log1p(first[seen] * one)
    told = (shape + (found.count - first)[seen]) / (shape / rate + 1)
    plain, (mean, noise) = moments(rate, one)[0], moments(told, one)
    return (
        float(((plain - value) ** 2).mean()),
        float(((mean - value) ** 2).mean()),
        float(noise.mean()),
    )


def _negative_log_likelihood(mean: Vector, count: Vector, shape: float) -> float:
    zero = shape * np.log(shape / (shape + mean))
    logs = gammaln(count + shape) - gammaln(shape) - gammaln(count + 1) + zero
    logs += count * np.log(mean / (shape + mean)) - np.log(-np.expm1(zero))
    return -float(logs.mean())


def replicate_errors(
    found: Hidden, cells: Cells, own: NDArray[np.int64], group: NDArray[np.str_]
) -> list[float]:
    """Return the mean squared errors of predictors that know the group, one for each of PRIOR.

    Args:
        found: Hidden values of some cells of one dataset.
        cells: All N cells of the dataset.
        own: (V,) which of these each hidden value is of.
        group: (N,).
    """
    counts = cells.counts.toarray().astype(np.float64)
    errors: list[list[Vector]] = [[] for _ in PRIOR]
    for cell in np.unique(own):
        mine = own == cell
        others = (group == group[cell]) & (np.arange(len(group)) != cell)
        pooled, one = counts[others].sum(0), found.one[mine]
        read = pooled.sum() * one / 1e4  # how many times as many counts as the cell has
        for weight, into in zip(PRIOR, errors, strict=True):
            above = pooled[found.gene[mine]] + weight
            rate = np.maximum(above / (read + weight / found.rate[mine]), 0.02)
            into.append((moments(rate, one)[0] - found.value[mine]) ** 2)
    return [float(np.concatenate(some).mean()) for some in errors]


def hidden_values(study: Study, *, seed: int) -> Hidden:
    """Train the cell's vector alone, 2,400 visits, and return what it says of hidden values."""
    sizes = ["model.top_seq_len=1000", "run.max_steps=600", "engine.train_batch_size=4"]
    config = load_config("sclong_tiny", [*sizes, *BEFORE])  # its vector is part of the log rate
    torch.manual_seed(seed)
    net = build(study.panel, config, {}, seed=seed)
    change(net, {"parts": "vector"})
    train(net, study.panel, config, seed=seed)
    net.eval()
    targets = study.targets
    wanted = targets.valid & targets.hidden
    positions = torch.from_numpy(targets.positions)
    with torch.no_grad():
        level = net(study.x, study.hidden, positions=positions, outputs=("log_level",))
    one = one_count(study.x, (study.x > 0) & ~study.hidden).clamp(min=1e-6)
    at = np.where(wanted)
    gene = targets.positions[at]
    return Hidden(
        rate=(level - one.log()).double().exp().numpy()[at],
        one=np.broadcast_to(one.double().numpy(), wanted.shape)[at],
        count=np.asarray(study.panel.held_out.counts[at[0], gene], dtype=np.float64).ravel(),
        value=study.x.double().numpy()[at[0], gene],
        predicted=predict(net, study).astype(np.float64)[at],
        cell=at[0],
        gene=gene,
    )


def some_of(found: Hidden, which: NDArray[np.bool_]) -> Hidden:
    """Return some of the hidden values; `which` is (V,)."""
    return Hidden(*(part[which] for part in found))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures of every held-out dataset, and of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe.floor", description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--graph", required=True, help="gene graph of its vocabulary")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="DATASET")
    parser.add_argument("--group", action="append", default=[], metavar="DATASET=H5AD:KEY,KEY")
    parser.add_argument("--genes", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked = {"genes": args.genes, "held_out": args.held_out}
    panel = read_panel(args.corpus, args.graph, validation_cells=60, **asked)
    every = read_panel(args.corpus, None, validation_cells=10**9, **asked)
    study = Study(panel, load_config("sclong_tiny").objective)
    found = hidden_values(study, seed=args.seed)
    dataset = panel.held_out.dataset[found.cell]
    files = dict(text.split("=", 1) for text in args.group)
    print("| dataset | values | error | noise | shape: noise + spread | halves | replicates |")
    print("|---|---|---|---|---|---|---|")
    for number, name in panel.datasets.items():
        own = some_of(found, dataset == number)
        errors = ""
        if name in files:
            told = _replicates(args.corpus, own, panel, every, number, files[name])
            errors = ", ".join(f"{w}: {e:.4f}" for w, e in zip(PRIOR, told, strict=True))
        print(_row(name, own, errors))
    print(_row("all", found, ""))
    for low, high in zip((0.0, *RATES), (*RATES, np.inf), strict=True):
        inside = (found.rate >= low) & (found.rate < high)
        print(_row(f"rates {low} to {high}", some_of(found, inside), ""))


def _row(name: str, own: Hidden, replicates: str) -> str:
    error = float(((own.predicted - own.value) ** 2).mean())
    noise = float(moments(own.rate, own.one)[1].mean())
    shape, apart, spread = spread_of_rates(own)
    plain, told, left = halves(own, shape)
    return (
        f"| {name} | {len(own.rate):,} | {error:.4f} | {noise:.4f} "
        f"| {shape:g}: {apart:.4f} + {spread:.4f} "
        f"| {plain:.4f}, {told:.4f}, {left:.4f} | {replicates} |"
    )


def _replicates(
    corpus: str, own: Hidden, panel: Panel, every: Panel, number: int, where: str
) -> list[float]:
    path, _, keys = where.rpartition(":")
    cells = every.held_out
    inside = np.flatnonzero(cells.dataset == number)
    cells = Cells(cells.rows[inside], cells.counts[inside], cells.dataset[inside])
    names = Corpus(corpus).obs(cells.rows)["barcode"].astype(str)
    columns = anndata.read_h5ad(path).obs.loc[names, keys.split(",")].astype(str)
    group = columns.agg(" ".join, axis=1).to_numpy(dtype=str)
    place = {row: i for i, row in enumerate(cells.rows.tolist())}
    places = np.array([place[row] for row in panel.held_out.rows[own.cell].tolist()])
    return replicate_errors(own, cells, places, group)


if __name__ == "__main__":
    main()
