"""Perturb genes of cells in a model, and compare what moves with random genes.

    python -m sclong_ds perturb MODEL_DIR INPUT --genes "A,B;C" --mode delete --out effects.tsv

The value of the named genes is changed in the model's input, the other values stay; genes are read
and routed as in the unperturbed cell. Effect: Euclidean distance that a gene's representation, or
the cell's embedding by the model's recipe, moves; mean over the cells. Each effect is compared with
those of random sets of genes, each within a factor of 1.5 of the mean expression of the one that it
stands for. `delete` is over the cells that express a gene of the set, the others over all cells;
with `model.zero_genes`, which leaves genes unread, over those that express every gene of the set.

With `--towards disease=normal` the cells of that state give a goal, the mean of their embeddings;
only the others are perturbed, and `towards` is how much nearer to it a cell's embedding comes along
the straight line there, in shares of that line: 1 is all the way, below 0 is away from it. Its p is
that of random sets coming as near.

Shapes: S sets (named ones and those of their nulls), N null sets, G genes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.stats import false_discovery_control
from torch import Tensor

from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.embed import plain_columns
from sclong_ds.embedding.opening import cells_of, known_from_training, model_inputs, model_of
from sclong_ds.embedding.record import origin_of, record_of
from sclong_ds.embedding.stored import UNS_KEY
from sclong_ds.files.atomic import whole_file, write_atomic
from sclong_ds.model.sclong import ScLong
from sclong_ds.progress import count_progress

FACTOR = 1.5
"""Between the mean expression of a gene and of those that stand for it in the null."""
Over = Literal["any", "every", "all"]
"""Cells that express any gene of a set, every gene of it, or all cells."""
CELL = "cell_embedding"
"""Target of the rows about the cell's embedding in a table."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Mean shifts of S sets over their cells."""

    genes: np.ndarray
    """(S, G) float64, of each gene's representation."""
    cell: np.ndarray
    """(S,) float64, of the cell's embedding."""
    n_cells: np.ndarray
    """(S,) int64."""
    towards: np.ndarray | None = None
    """(S,) float64, share of the way to a goal; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A state of cells to move to."""

    name: str
    place: Tensor
    """(W,) mean embedding of its cells."""
    others: np.ndarray
    """(B,) bool, the cells that are not in it."""


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds perturb`.

    Args:
        args: Parsed arguments of `add_arguments`.

    Returns:
        0.

    Raises:
        FileNotFoundError: No such model or input.
        ValueError: A wrong option, an unknown gene, or one that no cell expresses.
    """
    value = value_of(args.mode)
    if args.out.suffix not in (".tsv", ".h5ad"):
        raise ValueError(f"--out {args.out}: the name must end in .tsv or .h5ad")
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists; choose another name, or remove it")
    model = model_of(args)
    names = [text.strip() for text in args.genes.split(";")]
    sets = [genes_of(name, model.genes) for name in names]
    cells = cells_of(args, model)
    goal = None
    if args.towards is not None:
        goal = goal_of(args.towards, model, cells, batch_size=args.batch_size)
    means = mean_expression(model, cells, keep=None if goal is None else goal.others)
    which = "no cell" if goal is None else f"no cell outside of {goal.name}"
    for name, genes in zip(names, sets, strict=True):
        if value == 0 and not means[genes].any():
            raise ValueError(f"--genes {name}: {which} expresses it, so there is nothing to delete")
    rng = np.random.default_rng(args.seed)
    avoid = {gene for genes in sets for gene in genes}
    if model.transform.unmeasured == "mask" and cells.measured is not None:
        avoid |= set(np.flatnonzero(~cells.measured.table.any(axis=0)).tolist())
    every = list(sets)
    for genes in sets:
        every += null_sets(
            genes, means, n=args.null, avoid=avoid, rng=rng, symbols=model.genes.symbols
        )
    effects = measure(
        model, cells, every, value=value, over=cells_changed(model, args.mode),
        batch_size=args.batch_size, goal=goal,
    )  # fmt: skip
    table = tested(names, every, effects, n_null=args.null, model=model)
    table.uns[UNS_KEY] = record_of(model, args.model_dir) | origin_of(args)
    write(table, args.out)
    print(known_from_training(args.model_dir, cells))
    for name, row in zip(names, table.obs.itertuples(), strict=True):
        print(
            f"{name}: {row.n_cells} cells, embedding moves {row.shift:.4g} (null "
            f"{row.null_mean:.4g}), p {row.p:.3g}, q {row.q:.3g}"
        )
        if goal is not None:
            print(
                f"  towards {goal.name}: {row.towards:+.2%} of the way (null "
                f"{row.towards_null_mean:+.2%}), p {row.towards_p:.3g}, q {row.towards_q:.3g}"
            )
    return 0


def value_of(mode: str) -> float:
    """Return the value that a mode sets; NaN: the highest one of the cell.

    Raises:
        ValueError: No such mode.
    """
    if mode in ("delete", "overexpress"):
        return 0.0 if mode == "delete" else math.nan
    try:
        value = float(mode.removeprefix("set:")) if mode.startswith("set:") else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise ValueError(
            f"--mode {mode}: allowed are delete, overexpress and set:X with a number X >= 0"
        )
    return value


def cells_changed(model: ScLong, mode: str) -> Over:
    """Return in which cells a mode changes genes.

    With `model.zero_genes` a gene may go unread where it is not expressed: a new value of it would
    change nothing there.

    Args:
        model: The model.
        mode: As in `value_of`.
    """
    if mode == "delete":
        return "any"
    return "all" if model.config.zero_genes is None else "every"


def genes_of(text: str, genes: GeneVocabulary, *, option: str = "--genes") -> list[int]:
    """Return the columns of a set of genes, without repeats.

    Args:
        text: Symbols or Ensembl ids, divided by commas.
        genes: Of the model.
        option: That names them, for the error.

    Raises:
        ValueError: A gene that the model lacks, or none.
    """
    try:
        return list(dict.fromkeys(genes.columns(part.strip() for part in text.split(","))))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def goal_of(text: str, model: ScLong, cells: Cells, *, batch_size: int) -> Goal:
    """Return the state that KEY=VALUE names.

    Args:
        text: Column of obs and value.
        model: From `load_model`.
        cells: From `open_cells`.
        batch_size: Cells at a time.

    Raises:
        ValueError: No such column or value, or no cell that is not in the state.
    """
    key, equals, value = text.partition("=")
    if not equals or key not in cells.obs:
        there = ", ".join(map(str, cells.obs)) or "none"
        raise ValueError(f"--towards {text}: give KEY=VALUE with a column of obs; it has {there}")
    inside = (cells.obs[key].astype(str) == value).to_numpy()
    if inside.all() or not inside.any():
        values = ", ".join(sorted(map(str, cells.obs[key].dropna().unique()))[:10])
        which = "every cell" if inside.all() else "no cell"
        raise ValueError(f"--towards {text}: {which} is in this state; {key} has {values}")
    total = torch.zeros(model.recipe.width(model.config.base_dim), dtype=torch.float64)
    with torch.inference_mode():
        for x, unmeasured, place in model_inputs(model, cells, batch_size=batch_size):
            chosen = torch.from_numpy(inside[place]).to(x.device)
            if chosen.any():
                hidden = None if unmeasured is None else unmeasured[chosen]
                total += model.embed(x[chosen], unmeasured=hidden).double().sum(0).cpu()
    return Goal(name=text, place=total / inside.sum(), others=~inside)


def mean_expression(model: ScLong, cells: Cells, *, keep: np.ndarray | None = None) -> np.ndarray:
    """Return the mean input (G,) of each gene over cells.

    Args:
        model: From `load_model`.
        cells: From `open_cells`; B cells.
        keep: (B,) bool, the cells that count, which are those that are perturbed; None: all.
    """
    total = np.zeros(model.n_genes)
    for x, _, place in model_inputs(model, cells, batch_size=1):
        if keep is None or keep[place.start]:
            total += x[0].cpu().numpy()
    return total / max(len(cells.obs) if keep is None else int(keep.sum()), 1)


def null_sets(
    genes: Sequence[int],
    means: np.ndarray,
    *,
    n: int,
    avoid: set[int],
    rng: np.random.Generator,
    symbols: Sequence[str],
) -> list[list[int]]:
    """Return N random sets, a gene of nearly equal mean expression for each of a set.

    Args:
        genes: The set.
        means: (G,) mean expression.
        n: How many; the sets of a single gene differ from each other.
        avoid: Genes that are in no null set.
        rng: Source of chance.
        symbols: (G,) names, for the error.

    Raises:
        ValueError: Too few genes of such expression.
    """
    found: list[list[int]] = [[] for _ in range(n)]
    for gene in genes:
        near = (means <= FACTOR * means[gene]) & (means * FACTOR >= means[gene])
        near[list(avoid)] = False
        pool = rng.permutation(np.flatnonzero(near))
        if len(pool) < n + len(genes) - 1:
            raise ValueError(
                f"--genes {symbols[gene]}: only {len(pool)} other genes are within a factor of "
                f"{FACTOR} of its mean expression, --null {n} needs {n + len(genes) - 1}; lower it"
            )
        for number, one in enumerate(found):
            turned = np.roll(pool, -number)
            one.append(int(next(other for other in turned if other not in one)))
    return found


def measure(
    model: ScLong,
    cells: Cells,
    sets: Sequence[Sequence[int]],
    *,
    value: float,
    over: Over,
    batch_size: int,
    goal: Goal | None = None,
) -> Effects:
    """Return the effects of sets; all those of a cell go through the model in batches.

    Args:
        model: From `load_model`.
        cells: From `open_cells`.
        sets: S sets of columns.
        value: From `value_of`.
        over: The cells that express any gene of a set, or every gene of it, or all cells.
        batch_size: Perturbed cells at a time.
        goal: State to move to: only cells outside of it are perturbed.

    Raises:
        ValueError: A set that has no cell.
    """
    genes, cell = np.zeros((len(sets), model.n_genes)), np.zeros(len(sets))
    towards = np.zeros(len(sets))
    n_cells = np.zeros(len(sets), dtype=np.int64)
    with torch.inference_mode(), count_progress("perturb", len(cells.obs), "cells") as on_cells:
        for x, unmeasured, place in model_inputs(model, cells, batch_size=1):
            if goal is not None and not goal.others[place.start]:
                on_cells(1)
                continue
            reached = x[0] > 0 if over != "all" else torch.ones_like(x[0], dtype=torch.bool)
            if unmeasured is not None:
                reached = reached & ~unmeasured[0]
            known, enough = reached.cpu().numpy(), np.all if over == "every" else np.any
            these = [i for i, one in enumerate(sets) if enough(known[list(one)])]
            before = None
            for start in range(0, len(these), batch_size):
                part = these[start : start + batch_size]
                if before is None:
                    before = _represented(model, x, x, unmeasured)
                changed = x.repeat(len(part), 1)
                for row, number in enumerate(part):
                    changed[row, list(sets[number])] = float(x.max()) if value != value else value
                many = None if unmeasured is None else unmeasured.expand(len(part), -1)
                after = _represented(model, changed, x.expand(len(part), -1), many)
                genes[part] += (after[0] - before[0]).norm(dim=2).double().cpu().numpy()
                cell[part] += (after[1] - before[1]).norm(dim=1).double().cpu().numpy()
                if goal is not None:
                    towards[part] += shares_of_way(before[1], after[1], goal.place)
                n_cells[part] += 1
            on_cells(1)
    if not n_cells.all():
        raise ValueError(
            "--genes: no cell has a value to change for one of the sets (or of its null)"
        )
    way = None if goal is None else towards / n_cells
    return Effects(genes / n_cells[:, None], cell / n_cells, n_cells, way)


def shares_of_way(before: Tensor, after: Tensor, goal: Tensor) -> np.ndarray:
    """Return which share (B,) of the straight way to a goal embeddings have gone.

    Args:
        before: (1, W) embedding of the cell.
        after: (B, W) its embeddings when perturbed.
        goal: (W,).
    """
    start = before[0].double().cpu()
    way = goal - start
    length = way.square().sum()
    moved = (after.double().cpu() - start) @ way
    return np.asarray((moved / torch.where(length > 0, length, 1.0)).numpy())


def _represented(
    model: ScLong, x: Tensor, routes: Tensor, unmeasured: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the genes' representations (B, G, C) and the embeddings (B, W)."""
    genes = model.encode(x, routes=routes, unmeasured=unmeasured, genes="all")
    parts = model.pooled(x, model.recipe.parts, routes=routes, unmeasured=unmeasured)
    known = x if unmeasured is None else x.masked_fill(unmeasured, 0.0)
    found = torch.where((known > 0).any(dim=1, keepdim=True), model.recipe.apply(parts), 0.0)
    return genes.float(), found.float()


def tested(
    names: Sequence[str],
    sets: Sequence[Sequence[int]],
    effects: Effects,
    *,
    n_null: int,
    model: ScLong,
) -> AnnData:
    """Return the effects of the named sets beside their nulls.

    Args:
        names: Of the P named sets.
        sets: The P named sets, then the N null sets of each.
        effects: Of all of them.
        n_null: N.
        model: Whose genes they are.

    Returns:
        (P, G): X the shift of each gene; layers null_mean, p and q, where NaN stands for a gene of
        the set itself; obs the same of the embedding, with n_cells, and of the way to a goal. q is
        p after
        Benjamini-Hochberg: over the genes of a set, and over the sets for the embedding.
    """
    shape = (len(names), model.n_genes)
    layers = {name: np.full(shape, np.nan) for name in ("null_mean", "p", "q")}
    rows, ways = [], []
    for i, own in enumerate(sets[: len(names)]):
        of_null = slice(len(names) + i * n_null, len(names) + (i + 1) * n_null)
        null = effects.genes[of_null].copy()
        for row, one in zip(null, sets[of_null], strict=True):
            row[list(one)] = np.nan  # A gene moves by its own change, which is no effect.
        p = empirical_p(effects.genes[i], null)
        p[list(own)] = np.nan
        counted = ~np.isnan(p)
        layers["p"][i], layers["q"][i, counted] = p, false_discovery_control(p[counted])
        n = (~np.isnan(null)).sum(axis=0)
        layers["null_mean"][i] = np.nansum(null, axis=0) / np.where(n, n, np.nan)
        cell = effects.cell[of_null]
        p_cell = empirical_p(effects.cell[i : i + 1], cell[:, None])[0]
        rows.append((effects.n_cells[i], effects.cell[i], cell.mean(), p_cell))
        if effects.towards is not None:
            way, null_way = effects.towards[i], effects.towards[of_null]
            p_way = empirical_p(np.array([way]), null_way[:, None])[0]
            ways.append((way, null_way.mean(), p_way))
    obs = pd.DataFrame(rows, columns=["n_cells", "shift", "null_mean", "p"], index=list(names))
    obs["q"] = false_discovery_control(obs["p"])
    if ways:
        obs[["towards", "towards_null_mean", "towards_p"]] = ways
        obs["towards_q"] = false_discovery_control(obs["towards_p"])
    var = pd.DataFrame({"symbol": model.genes.symbols}, index=list(model.genes.ids))
    return AnnData(effects.genes[: len(names)], obs=obs, var=plain_columns(var), layers=layers)


def empirical_p(effect: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return (1 + null effects as large) / (1 + null effects) for K effects.

    Args:
        effect: (K,).
        null: (N, K); NaN is left out.
    """
    as_large = (null >= effect).sum(axis=0)
    return (1.0 + as_large) / (1.0 + (~np.isnan(null)).sum(axis=0))


def write(table: AnnData, out: Path) -> None:
    """Write effects as h5ad, or as a table with a row for each set and target; atomic.

    Args:
        table: From `tested`.
        out: Ends in .h5ad or .tsv.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".h5ad":
        with whole_file(out) as partial:
            table.write_h5ad(partial)
        return
    parts = []
    for i, name in enumerate(table.obs_names):
        cell = {"target": CELL, "symbol": ""} | dict(table.obs.iloc[i].drop("n_cells"))
        genes = {
            "target": table.var_names,
            "symbol": list(table.var["symbol"]),
            "shift": table.X[i],
        }
        genes |= {key: table.layers[key][i] for key in ("null_mean", "p", "q")}
        part = pd.concat([pd.DataFrame([cell]), pd.DataFrame(genes)])
        part.insert(0, "n_cells", int(table.obs["n_cells"].iloc[i]))
        part.insert(0, "perturbed", name)
        parts.append(part)
    text = pd.concat(parts).to_csv(sep="\t", index=False, float_format="%.6g")
    write_atomic(out, text.encode())
