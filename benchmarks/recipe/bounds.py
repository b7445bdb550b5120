r"""What other imputers gain on the cell's vector: how far below it anything gets.

    python -m benchmarks.recipe.bounds --corpus CORPUS --graph graph.npz --out bounds.jsonl \
        --held-out RNAmix_celseq2 cellmix1 sc_celseq2_5cl_p1 --seeds 0 1

The vector alone is trained (9,600 visits in batches of 16), then each of these is given what it
leaves, on the same cells and the same hidden values:

- `wide MLP`: visible values less their means and which are visible, through 512 hidden units with
  dropout, added to the log level of every gene; the vector stays as it is.
- `boosted trees`: the residual of hidden training values from the vector's prediction, the cell's
  vector, the gene's principal directions, its bias, depth and number of visible genes.
- `residuals of other genes`: the linear prediction of least error of a gene's residual from the
  residuals of all visible genes of the cell, by the covariance of residuals in training cells and
  noise of its own for each gene (a kernel smoother over genes: what attention between genes could
  compute at most, were it linear in the values).
- `residuals of near cells`: the mean residual of the gene in the training cells nearest by vector.
- `four vectors`: mean prediction of vectors of four seeds.
- `told the dataset`: the mean residual of the gene in the other held-out cells of its dataset.

Numbers that these have (shrinkage, neighbours) are the best of several *on the held-out values*,
which flatters them: no gain here is none. `intervals.py` compares them with the vector.

Shapes: n cells, G genes, P target places.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.recipe.__main__ import read
from benchmarks.recipe.baselines import hidden_mask
from benchmarks.recipe.intervals import difference
from benchmarks.recipe.panel import Cells, read_panel
from benchmarks.recipe.training import BEFORE, Study, build, change, train
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.engine.schedule import learning_rate
from sclong_ds.model.sclong import ScLong
from sclong_ds.model.values.depth import expected_value, one_count

Matrix = NDArray[np.float32]
OVERRIDES = ["engine.train_batch_size=16", "run.max_steps=600", "model.top_seq_len=1000", *BEFORE]
SHRINKAGE = (3.0, 10.0, 30.0, 100.0)
"""Of a gene's residual variance that is noise of its own, in variances of the gene."""
NEIGHBOURS = (30, 100, 300)
PRIOR = (3, 10, 30, 100)
"""Cells that know nothing, by which a mean residual is drawn to 0."""
_HIDDEN_UNITS = 512
_BATCH = 64


class Told(NamedTuple):
    """Cells as the vector sees them: n cells, a draw of hidden values."""

    x: torch.Tensor
    """(n, G) values."""
    visible: torch.Tensor
    """(n, G) bool."""
    hidden: torch.Tensor
    """(n, G) bool."""
    cell: torch.Tensor
    """(n, C) vectors."""
    one: torch.Tensor
    """(n, 1) what a count is before log1p."""
    level: torch.Tensor
    """(n, G) log level of every gene by the vector."""
    value: torch.Tensor
    """(n, G) value that the vector expects where x is above 0, else 0."""

    def residual(self) -> Matrix:
        """Return (n, G) value less what is expected where it is visible, 0 elsewhere."""
        return np.asarray(torch.where(self.visible, self.x - self.value, 0.0).numpy())


def main(argv: Sequence[str] | None = None) -> None:
    """Train the vector and its rivals for each seed, print differences with intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--graph", required=True)
    parser.add_argument("--held-out", nargs="+", required=True, metavar="DATASET")
    parser.add_argument("--genes", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800, help="of the wide MLP, 64 cells each")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = load_config("sclong_tiny", OVERRIDES)
    asked = {"genes": args.genes, "held_out": args.held_out}
    panel = read_panel(args.corpus, args.graph, validation_cells=60, **asked)
    study = Study(panel, config.objective)
    for seed in args.seeds:
        for name, predicted, seconds in rivals(study, config, seed, args.steps):
            figures = study.figures(np.take_along_axis(predicted, study.targets.positions, 1))
            errors = study.cell_errors(np.take_along_axis(predicted, study.targets.positions, 1))
            found = {"name": name, "seed": seed, "cpu_s": seconds, **figures}
            found |= {"cell_dataset": panel.held_out.dataset.tolist(), "cell_errors": errors}
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(f"seed {seed}: {name}: {figures['val/mse']:.4f} ({seconds:.0f} s)", flush=True)
    print(table(read(args.out)))


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table: error, and less the vector with its interval."""
    lines = ["| imputer | hidden MSE by seed | less the vector | r per gene |", "|---|---|---|---|"]
    by_name = {n: [r for r in results if r["name"] == n] for n in {r["name"]: 0 for r in results}}
    vector = by_name["vector"]
    for name, own in by_name.items():
        errors = ", ".join(f"{r['val/mse']:.4f}" for r in own)
        less, low, high = difference(own, vector)
        apart = "" if name == "vector" else f"{less:+.4f} [{low:+.4f}, {high:+.4f}]"
        r = np.mean([r["val/pearson_per_gene"] for r in own])
        lines.append(f"| {name} | {errors} | {apart} | {r:.3f} |")
    return "\n".join(lines)


def rivals(
    study: Study, config: RunConfig, seed: int, steps: int
) -> Iterator[tuple[str, Matrix, float]]:
    """Yield name, predictions (n, G) of the held-out cells and CPU seconds of each imputer."""
    started = time.process_time()

    def since() -> float:
        return time.process_time() - started

    net = vector(study, config, seed)
    seen = told(net, study.x, study.hidden)
    plain = seen.value.numpy()
    yield "vector", plain, since()
    train_cells, every = study.panel.train, np.arange(len(study.panel.train.rows))
    drawn = train_cells.targets(every, config.objective, seed=seed, epoch=1000)
    x = train_cells.values(every)
    known = told(net, x, hidden_mask(x.shape, drawn))
    residual = known.residual()

    def best(name: str, of: Callable[..., Matrix], *choices: Sequence[float]) -> tuple[str, Matrix]:
        grid = [()] if not choices else [(a, *b) for a in choices[0] for b in _rest(choices[1:])]
        tried = [(plain + of(*numbers), numbers) for numbers in grid]
        errors = [_error(study, predicted) for predicted, _ in tried]
        chosen = int(np.argmin(errors))
        return f"{name} {tried[chosen][1]}".replace(" ()", ""), tried[chosen][0]

    started = time.process_time()
    covariance = residual_covariance(residual, known.visible.numpy())
    own = seen.residual()
    name, found = best(
        "residuals of other genes",
        lambda shrink: from_other_genes(own, seen.visible.numpy(), *covariance, shrink),
        SHRINKAGE,
    )
    yield "residuals of other genes", found, since()
    print("  ", name)
    started = time.process_time()
    near = torch.cdist(_scaled(seen.cell, known.cell), _scaled(known.cell, known.cell))
    name, found = best(
        "residuals of near cells",
        lambda k, prior: from_near(near, residual, known.visible.numpy(), int(k), prior),
        NEIGHBOURS,
        PRIOR,
    )
    yield "residuals of near cells", found, since()
    print("  ", name)
    started = time.process_time()
    name, found = best("told the dataset", lambda prior: of_dataset(study, plain, prior), PRIOR)
    yield "told the dataset", found, since()
    print("  ", name)
    started = time.process_time()
    yield "boosted trees", boosted(net, known, seen, x, seed), since()
    started = time.process_time()
    yield "wide MLP", wide(study, net, config, seed, steps), since()
    started = time.process_time()
    others = [told(vector(study, config, seed + 10 * k), study.x, study.hidden) for k in (1, 2, 3)]
    yield "four vectors", np.mean([plain, *(o.value.numpy() for o in others)], 0), since()


def vector(study: Study, config: RunConfig, seed: int) -> ScLong:
    """Return a trained model of the cell's vector alone."""
    torch.manual_seed(seed)
    net = build(study.panel, config, {}, seed=seed)
    change(net, {"parts": "vector"})
    train(net, study.panel, config, seed=seed)
    return net.eval()


def told(net: ScLong, x: torch.Tensor, hidden: torch.Tensor, *, values: bool = True) -> Told:
    """Return what a vector says of cells x (n, G) whose values are hidden in some places.

    Without `values` its expected values are left at 0: they take the most time.
    """
    visible = (x > 0) & ~hidden
    with torch.no_grad():
        cell, one = net.cell_vector(x, visible), one_count(x, visible)
        quiet = net.head.body(torch.zeros(net.config.base_dim)) @ net.head.weight
        level = net.head.bias + quiet + cell @ net.head.cell_weight.T
    where = (x > 0) & values
    return Told(x, visible, hidden, cell, one, level, expected(level, one, where))


def expected(level: torch.Tensor, one: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return (n, G) expected values for log levels (n, G) at some places, 0 elsewhere."""
    found, wide = torch.zeros_like(level), one.expand_as(level)
    if not where.any():
        return found
    parts = zip(level[where].split(50_000), wide[where].split(50_000), strict=True)
    found[where] = torch.cat([expected_value(a[:, None], b[:, None])[:, 0] for a, b in parts])
    return found


def residual_covariance(residual: Matrix, visible: NDArray[np.bool_]) -> tuple[Matrix, Matrix]:
    """Return mean products (G, G) of residuals in cells that show both, and variances (G,).

    Pairs that are seen together in few cells are drawn to 0 by ten cells without covariance.
    """
    both = visible.astype(np.float32)
    products = residual.T @ residual / (both.T @ both + 10)
    return products, np.diagonal(products).copy()


def from_other_genes(
    residual: Matrix, visible: NDArray[np.bool_], products: Matrix, own: Matrix, shrink: float
) -> Matrix:
    """Return (n, G) residuals predicted from those of the visible genes; 0 for visible ones."""
    found = np.zeros_like(residual)
    for i, (row, seen) in enumerate(zip(residual, visible, strict=True)):
        at = np.flatnonzero(seen)
        inner = products[np.ix_(at, at)].astype(np.float64)
        inner[np.diag_indices(len(at))] += shrink * own[at]
        weights = np.linalg.solve(inner, row[at])
        found[i] = np.where(seen, 0.0, products[:, at] @ weights)
    return found


def from_near(
    distance: torch.Tensor, residual: Matrix, visible: NDArray[np.bool_], k: int, prior: float
) -> Matrix:
    """Return (n, G) mean residuals of the k nearest training cells that show the gene."""
    near = distance.topk(k, largest=False).indices.numpy()
    total = np.stack([residual[own].sum(0) for own in near])
    return np.asarray(total / (np.stack([visible[own].sum(0) for own in near]) + prior))


def of_dataset(study: Study, plain: Matrix, prior: float) -> Matrix:
    """Return (n, G) mean residuals of the gene in other held-out cells of the cell's dataset.

    Of their expressed values, hidden or not: of visible ones the vector has read the value itself,
    which at thousands of genes is little of it.
    """
    x, number = study.x.numpy(), study.panel.held_out.dataset
    shown = x > 0
    residual = np.where(shown, x - plain, 0.0)
    found = np.zeros_like(plain)
    for one in np.unique(number):
        own = np.flatnonzero(number == one)
        total, seen = residual[own].sum(0), shown[own].sum(0)
        found[own] = (total - residual[own]) / (seen - shown[own] + prior)
    return found


def boosted(net: ScLong, known: Told, seen: Told, x: torch.Tensor, seed: int) -> Matrix:
    """Return predictions (n, G) with residuals of hidden training values told by boosted trees."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    genes = net.head.cell_weight.detach().numpy()
    bias = net.head.bias.detach().numpy()

    def features(of: Told, cell: NDArray[np.int64], gene: NDArray[np.int64]) -> Matrix:
        number = of.visible.sum(1).numpy()
        parts = [of.cell.numpy()[cell], genes[gene], bias[gene], of.one.numpy()[cell, 0]]
        parts += [of.level.numpy()[cell, gene], of.value.numpy()[cell, gene], number[cell]]
        return np.column_stack(parts).astype(np.float32)

    cell, gene = np.nonzero(known.hidden.numpy())
    rng = np.random.default_rng(seed)
    some = rng.permutation(len(cell))[:150_000]
    residual = (x - known.value).numpy()[cell, gene]
    trees = HistGradientBoostingRegressor(
        max_iter=150, learning_rate=0.05, max_leaf_nodes=31, l2_regularization=10.0,
        early_stopping=True, random_state=seed,
    )  # fmt: skip
    trees.fit(features(known, cell[some], gene[some]), residual[some])
    found = seen.value.numpy().copy()
    cell, gene = np.nonzero(seen.hidden.numpy())
    found[cell, gene] += trees.predict(features(seen, cell, gene))
    return found


def wide(study: Study, net: ScLong, config: RunConfig, seed: int, steps: int) -> Matrix:
    """Return predictions (n, G) of the vector with a wide MLP beside it, itself left as it is."""
    torch.manual_seed(seed)
    g = study.x.shape[1]
    body = nn.Sequential(
        nn.Dropout(0.1), nn.Linear(2 * g, _HIDDEN_UNITS), nn.GELU(), nn.Dropout(0.3),
        nn.Linear(_HIDDEN_UNITS, _HIDDEN_UNITS), nn.GELU(), nn.Dropout(0.3),
        nn.Linear(_HIDDEN_UNITS, g),
    )  # fmt: skip
    nn.init.zeros_(body[-1].weight)
    nn.init.zeros_(body[-1].bias)
    optim = config.optim.in_steps(steps)
    optimizer = torch.optim.AdamW(body.parameters(), lr=5e-4, weight_decay=0.05)
    centre = net.cell_vector.centre.detach()

    def level(of: Told) -> torch.Tensor:
        above = torch.where(of.visible, of.x - centre, 0.0)
        return of.level + body(torch.cat([above, of.visible.float()], 1))

    cells: Cells = study.panel.train
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * learning_rate(optim, step) / optim.lr
        rows = rng.integers(len(cells.rows), size=_BATCH)
        drawn = cells.targets(rows, config.objective, seed=seed, epoch=step)
        x = cells.values(rows)
        hidden = hidden_mask(x.shape, drawn)
        of = told(net, x, hidden, values=False)
        positions = torch.from_numpy(drawn.positions)
        valid = torch.from_numpy(drawn.valid & drawn.hidden)
        said = expected_value(level(of).gather(1, positions), of.one)
        error = ((said - x.gather(1, positions))[valid] ** 2).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    body.eval()
    seen = told(net, study.x, study.hidden)
    with torch.no_grad():
        return np.asarray(expected(level(seen), seen.one, seen.x > 0).numpy())


def _scaled(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (rows - like.mean(0)) / like.std(0)


def _error(study: Study, predicted: Matrix) -> float:
    hidden = study.hidden.numpy()
    return float(np.square((predicted - study.x.numpy())[hidden]).mean())


def _rest(choices: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return [(a,) for a in choices[0]] if choices else [()]


if __name__ == "__main__":
    main()
