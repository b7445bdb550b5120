"""Perturb genes of cells in a model, and compare what moves with random genes.

    python -m sclong_ds perturb MODEL_DIR INPUT --genes "A,B;C" --mode delete --out effects.tsv

The value of the named genes is changed in the model's input, the other values stay; genes are read
and routed as in the unperturbed cell. Effect: Euclidean distance that a gene's representation, or
the cell's embedding by the model's recipe, moves; mean over the cells. Each effect is compared with
those of random sets of genes. For `delete` each is within a factor of 1.5 of the one that it stands
for in the number of cells that express it and in its mean over these, otherwise in its mean over
all cells. `delete` is over the cells that express a gene of the set, the others over all cells;
with `model.zero_genes`, which leaves genes unread, over those that express every gene of the set.

With `--towards disease=normal` the cells of that state give a goal, the mean of their embeddings;
only the others are perturbed, and `towards` is how much nearer to it a cell's embedding comes along
the straight line there, in shares of that line: 1 is all the way, below 0 is away from it. Its p is
that of random sets coming as near.

Shapes: S sets (named ones and those of their nulls), N null sets, G genes.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.opening import cells_of, known_from_training, model_inputs, model_of
from sclong_ds.embedding.perturbed.effects import Effects, tested, write
from sclong_ds.embedding.record import origin_of, record_of
from sclong_ds.embedding.stored import UNS_KEY
from sclong_ds.files.atomic import make_folder
from sclong_ds.model.sclong import ScLong
from sclong_ds.page.words import counted
from sclong_ds.progress import count_progress

FACTOR = 1.5
"""Between the expression of a gene and of those that stand for it in the null."""
Over = Literal["any", "every", "all"]
"""Cells that express any gene of a set, every gene of it, or all cells."""
_log = logging.getLogger(__name__)


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
    names = names_of(args.genes)
    sets = [genes_of(name, model.genes) for name in names]
    cells = cells_of(args, model)
    goal = None
    if args.towards is not None:
        goal = goal_of(args.towards, model, cells, batch_size=args.batch_size)
    means, n_expressing = expression(model, cells, keep=None if goal is None else goal.others)
    which = "no cell" if goal is None else f"no cell outside of {goal.name}"
    for name, genes in zip(names, sets, strict=True):
        if value == 0 and not means[genes].any():
            raise ValueError(f"--genes {name}: {which} expresses it, so there is nothing to delete")
    avoid = {gene for genes in sets for gene in genes}
    if model.transform.unmeasured == "mask" and cells.measured is not None:
        avoid |= set(np.flatnonzero(~cells.measured.table.any(axis=0)).tolist())
    every = list(sets)
    alike = measures(means, n_expressing, mode=args.mode)
    rng, symbols = np.random.default_rng(args.seed), model.genes.symbols
    for genes in sets:
        every += null_sets(genes, alike, n=args.null, avoid=avoid, rng=rng, symbols=symbols)
    over = cells_changed(model, args.mode)
    n_cells = cells_reached(model, cells, every, over=over, goal=goal)
    check_reached(names, n_cells, n_null=args.null, over=over, which=which)
    make_folder(args.out.parent)
    effects = measure(
        model, cells, every, value=value, over=over, batch_size=args.batch_size, goal=goal
    )
    table = tested(names, every, effects, n_null=args.null, model=model)
    table.uns[UNS_KEY] = record_of(model, args.model_dir) | origin_of(args)
    write(table, args.out)
    print(known_from_training(args.model_dir, cells))
    for name, row in zip(names, table.obs.itertuples(), strict=True):
        print(
            f"{name}: {counted(row.n_cells, 'cell')}, embedding moves {row.shift:.4g} (null "
            f"{row.null_mean:.4g}), p {row.p:.3g}, q {row.q:.3g}"
        )
        if goal is not None:
            print(
                f"  towards {goal.name}: {row.towards:+.2%} of the way (null "
                f"{row.towards_null_mean:+.2%}), p {row.towards_p:.3g}, q {row.towards_q:.3g}"
            )
    return 0


def names_of(text: str) -> list[str]:
    """Return the sets that a text names, each once.

    Args:
        text: Sets divided by semicolons.

    Raises:
        ValueError: There is none.
    """
    named = (part.strip() for part in text.split(";"))
    names = list(dict.fromkeys(part for part in named if part))
    if not names:
        raise ValueError("--genes names no gene; give symbols or Ensembl ids")
    return names


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


def expression(
    model: ScLong, cells: Cells, *, keep: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean input (G,) of each gene over cells, and how many cells (G,) express it.

    Args:
        model: From `load_model`.
        cells: From `open_cells`; B cells.
        keep: (B,) bool, the cells that count, which are those that are perturbed; None: all.
    """
    total, n_expressing = np.zeros(model.n_genes), np.zeros(model.n_genes)
    for x, _, place in model_inputs(model, cells, batch_size=1):
        if keep is None or keep[place.start]:
            values = x[0].cpu().numpy()
            total += values
            n_expressing += values > 0
    n_cells = len(cells.obs) if keep is None else int(keep.sum())
    return total / max(n_cells, 1), n_expressing


def measures(means: np.ndarray, n_expressing: np.ndarray, *, mode: str) -> dict[str, np.ndarray]:
    """Return what null genes share with those they stand for, by name; inputs of `expression`."""
    if mode != "delete":
        return {"mean expression": means}
    # The mean there up to a factor, which is the same for all genes.
    there = means / np.maximum(n_expressing, 1)
    return {"number of expressing cells": n_expressing, "mean expression there": there}


def null_sets(
    genes: Sequence[int],
    alike: Mapping[str, np.ndarray],
    *,
    n: int,
    avoid: set[int],
    rng: np.random.Generator,
    symbols: Sequence[str],
) -> list[list[int]]:
    """Return N random sets, a gene of nearly equal expression for each of a set.

    Args:
        genes: The set.
        alike: Measures (G,) of expression by name, each of which is within the factor.
        n: How many; the sets of a single gene differ from each other.
        avoid: Genes that are in no null set.
        rng: Source of chance.
        symbols: (G,) names, for the error.

    Raises:
        ValueError: Too few genes of such expression.
    """
    found: list[list[int]] = [[] for _ in range(n)]
    for gene in genes:
        near = np.ones(len(symbols), dtype=bool)
        for size in alike.values():
            near &= (size <= FACTOR * size[gene]) & (size * FACTOR >= size[gene])
        near[list(avoid)] = False
        pool = rng.permutation(np.flatnonzero(near))
        if len(pool) < n + len(genes) - 1:
            raise ValueError(
                f"--genes {symbols[gene]}: only {len(pool)} other genes are within a factor of "
                f"{FACTOR} of its {' and '.join(alike)}, --null {n} needs {n + len(genes) - 1}; "
                "lower it"
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
    """
    genes, cell = np.zeros((len(sets), model.n_genes)), np.zeros(len(sets))
    towards = np.zeros(len(sets))
    n_cells = np.zeros(len(sets), dtype=np.int64)
    with torch.inference_mode(), count_progress("perturb", len(cells.obs), "cells") as on_cells:
        for x, unmeasured, place in model_inputs(model, cells, batch_size=1):
            if goal is not None and not goal.others[place.start]:
                on_cells(1)
                continue
            these = sets_reached(x, unmeasured, sets, over=over)
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
    share = np.where(n_cells, 1 / np.maximum(n_cells, 1), np.nan)
    way = None if goal is None else towards * share
    return Effects(genes * share[:, None], cell * share, n_cells, way)


def sets_reached(
    x: Tensor, unmeasured: Tensor | None, sets: Sequence[Sequence[int]], *, over: Over
) -> list[int]:
    """Return the numbers of the sets that a cell's value is changed of.

    Args:
        x: (1, G) the cell.
        unmeasured: (1, G) bool, genes of which nothing is known; None: all are known.
        sets: S sets of columns.
        over: As in `measure`.
    """
    reached = x[0] > 0 if over != "all" else torch.ones_like(x[0], dtype=torch.bool)
    if unmeasured is not None:
        reached = reached & ~unmeasured[0]
    known, enough = reached.cpu().numpy(), np.all if over == "every" else np.any
    return [i for i, one in enumerate(sets) if enough(known[list(one)])]


def cells_reached(
    model: ScLong, cells: Cells, sets: Sequence[Sequence[int]], *, over: Over, goal: Goal | None
) -> np.ndarray:
    """Return the number (S,) of cells that each set is changed in; arguments as `measure`."""
    found = np.zeros(len(sets), dtype=np.int64)
    for x, unmeasured, place in model_inputs(model, cells, batch_size=1):
        if goal is None or goal.others[place.start]:
            found[sets_reached(x, unmeasured, sets, over=over)] += 1
    return found


def check_reached(
    names: Sequence[str], n_cells: np.ndarray, *, n_null: int, over: Over, which: str
) -> None:
    """Refuse a set that no cell is changed for, and one with no null; warn where some are left out.

    Args:
        names: Of the P named sets.
        n_cells: (P + P N,) from `cells_reached`, the null sets behind the named ones.
        n_null: N.
        over: As in `measure`.
        which: Words for "no cell".

    Raises:
        ValueError: Which set, and why.
    """
    does = {
        "any": "expresses it, so there is nothing to delete",
        "every": "expresses all of it, and the model does not read all other genes: there is "
        "nothing to change; name genes that are expressed together",
        "all": "measures it, so there is nothing to change",
    }[over]
    does_null = {
        "any": "expresses a gene", "every": "expresses all genes", "all": "measures a gene"
    }[over]  # fmt: skip
    null = n_cells[len(names) :].reshape(len(names), n_null)
    for name, n, of_null in zip(names, n_cells, null, strict=False):
        empty = int((of_null == 0).sum())
        if not n:
            raise ValueError(f"--genes {name}: {which} {does}")
        if empty == n_null:
            raise ValueError(
                f"--genes {name}: {which} {does_null} of any of the {n_null} random sets "
                "that stand for it; give a larger --null, or fewer genes in a set"
            )
        if empty:
            _log.warning(
                "--genes %s: %d of %d random sets left out: %s %s of them",
                name, empty, n_null, which, does_null,
            )  # fmt: skip


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
