"""Choose how a model makes an embedding, on validation cells, when it is exported.

Candidates are those of `candidates`: which layer is averaged, over which genes with which weights,
beside the gene vectors or not, or the cell's vector, or all values along it or along principal
directions of training cells, and how the parts are scaled. Centres and scales come from a sample of
training cells, principal directions from more of them. The candidates are judged on a
sample of the validation split:

- `label accuracy`, where validation cells have a `cell_type` of two kinds at least: the share of
  cells whose label is the most common one of their nearest cells. Nearest cells are of other
  datasets than the cell's own where those have its label.
- `held-out counts` otherwise, and always recorded: each count is drawn into one of two halves; the
  embedding reads the first, and the second of a cell is predicted by the mean of its nearest cells'
  second halves, nearest among all cells that are read. The score is the mean over genes of the
  explained variance. Halves of counts are independent given the cell: to copy noise does not help.
  Source: count splitting (molecular cross-validation), https://doi.org/10.1101/786269

The folder keeps digests of the judged cells, and `evaluate` tells how many of its cells are among
them: their labels may have been seen here. The gene vectors alone, by the same weights, are
recorded beside: a context that is of use is better.

Shapes: m cells, of which n are judged, G genes, C base width, K variable genes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from sclong_ds.config.sections import DataConfig
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.parts.views import sample
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.exported.recipe_file import ChosenRecipe
from sclong_ds.exported.training_cells import same_corpus, short_digests
from sclong_ds.model.counts_input import model_input
from sclong_ds.model.pooling import (
    MEAN,
    OF_CELLS,
    PRINCIPAL,
    TOGETHER,
    Part,
    Recipe,
    principal_recipe,
    scaling_maps,
)
from sclong_ds.model.sclong import ScLong
from sclong_ds.model.values.principal import direction_counts, kept_columns, principal_blocks
from sclong_ds.progress import count_progress

CELLS = 256
"""Cells of either split that are read."""
DIRECTION_CELLS = 2048
"""Training cells that principal directions are of, those of `sample`."""
MIN_CELLS = 20
"""With fewer training or validation cells nothing is chosen."""
CPU_FLOPS = 2e13
"""Work on a CPU, in all, that an export may add: some minutes of one core."""
_BATCH = 8
_NEIGHBOURS = 15
_VARIABLE = 500
_SEED = 0
_MIN_LABEL = 5
_SEEN = 0.05
COUNTS, LABELS = "held-out counts", "label accuracy"
_log = logging.getLogger(__name__)

Pooled = dict[Part, torch.Tensor]


def candidates(*, cell_vector: bool = False) -> list[Recipe]:
    """Return the recipes that are tried, without statistics; the first is that of old folders.

    Args:
        cell_vector: Whether the model has one.
    """
    beside = (Part("gene_vectors", "top_128"), Part("gene_vectors", "value^3"))
    parts: list[tuple[Part, ...]] = []
    for layer in ("decoder", "encoders"):
        weights = ("expressed", "value", "value^3", "top_64", "top_128", "top_256")
        parts += [(Part(layer, name),) for name in weights]
        parts += [(Part(layer, name), *beside) for name in ("value^3", "top_64", "top_128")]
    if cell_vector:
        for of_cell in OF_CELLS:
            own = Part(of_cell, "expressed")
            parts += [(own,), (own, *beside)]
    scalings = ("scaled", "whitened 0.001", "whitened 0.1")
    return [MEAN, *(Recipe(some, scaling) for some in parts for scaling in scalings)]


def principal_candidates(counts: Sequence[int], base_dim: int) -> list[Recipe]:
    """Return the recipes along so many principal directions, which read no weight of a model.

    Together: directions keep the variance that they have. Each block scaled to the same gives later
    ones, which other tissues may need, more weight.
    """
    return [principal_recipe(n, base_dim, how) for n in counts for how in (TOGETHER, "scaled")]


def without_context(recipe: Recipe) -> Recipe:
    """Return a recipe with every layer replaced by the gene vectors, without statistics.

    In place of what is of the cell stands their mean, weighted by value.
    """
    of_cell = (*OF_CELLS, PRINCIPAL)
    parts = dict.fromkeys(
        Part("gene_vectors", "value" if part.layer in of_cell else part.weights)
        for part in recipe.parts
    )
    return Recipe(tuple(parts), recipe.scaling)


def choose_from_run(
    model: ScLong,
    data: DataConfig,
    *,
    corpus_hash: str,
    n_cells: int = CELLS,
    n_directions: int = 0,
) -> ChosenRecipe | None:
    """Choose the recipe of a run's model on the corpus that it was trained on.

    Args:
        model: The model, with its genes and transform.
        data: The run's section data.
        corpus_hash: Content hash of its corpus.
        n_cells: Cells of either split to read; 0 chooses nothing.
        n_directions: As in `choose_recipe`.

    Returns:
        None where nothing can be chosen; the log tells why.

    Raises:
        ValueError: As `cells_of_run`, of `n_directions` that are not 0.
    """
    if not n_directions and (data.corpus is None or n_cells == 0):
        return None
    try:
        # Principal directions are of cells alone: the model may be of any size.
        if not n_directions:
            n_cells = min(n_cells, affordable := _affordable(model))
            if affordable < MIN_CELLS:
                raise ValueError(
                    f"a model of this size on a CPU: {affordable} cells can be read, {MIN_CELLS} "
                    "are needed"
                )
        corpus, rows = cells_of_run(
            data, corpus_hash=corpus_hash, n_cells=n_cells, n_directions=n_directions
        )
        return choose_recipe(model, corpus, **rows, n_directions=n_directions)
    except (OSError, ValueError) as error:
        if n_directions:
            raise
        # Weights must not be lost for want of their corpus.
        _log.warning(
            "the embedding's recipe was not chosen (%s): the model embeds by the mean over the "
            "expressed genes; export where the corpus is, with --device cuda for a large model",
            error,
        )
        return None


def cells_of_run(
    data: DataConfig, *, corpus_hash: str, n_cells: int, n_directions: int
) -> tuple[Corpus, dict[str, NDArray[np.int64]]]:
    """Return a run's corpus, and the rows that `choose_recipe` reads, by argument.

    Args:
        data: As in `choose_from_run`.
        corpus_hash: As in `choose_from_run`.
        n_cells: As in `choose_from_run`.
        n_directions: As in `choose_recipe`.

    Raises:
        ValueError: The corpus is not there or another one by now, or has too few cells; with
            `n_directions` the message begins with them.
    """
    try:
        if data.corpus is None:
            raise ValueError("the run's configuration names no corpus")
        corpus = same_corpus(data, corpus_hash)
        rows = {name: _some(corpus, name, n_cells) for name in ("train", "validation")}
        for name, chosen in rows.items():
            if len(chosen) < MIN_CELLS:
                raise ValueError(f"{len(chosen)} cells of {name} to read, {MIN_CELLS} are needed")
        rows["directions_of"] = sample(corpus, "train", DIRECTION_CELLS)
        direction_counts(
            n_cells=len(rows["directions_of"]), n_genes=corpus.n_genes, wanted=n_directions
        )
    except (OSError, ValueError) as error:
        what = f"--principal-directions {n_directions}: " if n_directions else ""
        raise ValueError(f"{what}{error}") from error
    return corpus, rows


def choose_recipe(
    model: ScLong,
    corpus: Corpus,
    *,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    directions_of: NDArray[np.int64] | None = None,
    n_directions: int = 0,
) -> ChosenRecipe:
    """Choose the recipe of a model.

    Args:
        model: The model, with its transform.
        corpus: Cells of its genes.
        train: Rows whose statistics centre and scale the parts.
        validation: Rows that candidates are judged on.
        directions_of: Rows whose principal directions are offered; None: those of `train`.
        n_directions: Try only recipes along so many principal directions; 0: all candidates.

    Raises:
        ValueError: No gene varies in these, or too few cells for so many directions.
    """
    source, n = train if directions_of is None else directions_of, len(validation)
    counts, directions = _directions(model, corpus, source, n_directions)
    tried = principal_candidates(counts, model.config.base_dim)
    if not n_directions:
        tried = [*candidates(cell_vector=model.config.cell_vector != "none"), *tried]
    plain = [without_context(recipe) for recipe in tried]
    parts = list(dict.fromkeys(part for recipe in (*tried, *plain) for part in recipe.parts))
    # Those that are judged come first; all may be the neighbours of one.
    rows = np.concatenate([validation, train])
    whole = corpus.rows(rows)
    first, second = split_counts(whole)
    with count_progress("choose the embedding", len(train) + len(rows), "cells") as on_cells:
        fitted = _pooled(model, corpus, train, corpus.rows(train), parts, directions, on_cells)
        read = _pooled(model, corpus, rows, first, parts, directions, on_cells)
    judge = _judge(model, corpus, rows, second, n)
    scores = []
    for recipe in tried:
        points = with_statistics(recipe, fitted).apply([read[part] for part in recipe.parts])
        scores.append(judge.scores(points.numpy()))
    by = COUNTS if judge.labels is None else LABELS
    best = max(range(len(tried)), key=lambda i: scores[i][by])
    control = with_statistics(plain[best], fitted)
    facts: dict[str, Any] = {
        "criterion": by,
        "n_training_cells": len(train),
        "n_validation_cells": n,
        "score": scores[best],
        "gene vectors alone": judge.scores(
            control.apply([read[part] for part in control.parts]).numpy()
        ),
        "candidates": {r.text(): s for r, s in zip(tried, scores, strict=True)},
    }
    _log.info("embedding: %s (%s %.4f)", tried[best].text(), by, scores[best][by])
    recipe = with_statistics(tried[best], fitted)
    if directions is not None and (n_kept := recipe.n_directions):
        kept = kept_columns(n_kept, len(recipe.parts), model.config.base_dim)
        recipe = replace(recipe, directions=directions[: len(kept)] * kept)
    return ChosenRecipe(recipe, control, facts, np.unique(short_digests(whole[:n])))


def with_statistics(recipe: Recipe, fitted: Pooled) -> Recipe:
    """Return a recipe with the centres and scales of pooled cells.

    Args:
        recipe: Without statistics.
        fitted: (n, C) by part.
    """
    if recipe.scaling == "none":
        return recipe
    parts = [fitted[part] for part in recipe.parts]
    if n := recipe.n_directions:
        kept = kept_columns(n, len(parts), parts[0].shape[1])
        parts = [part * some for part, some in zip(parts, kept, strict=True)]
    centres, maps = scaling_maps(parts, recipe.scaling)
    return replace(recipe, centres=centres, maps=maps)


def split_counts(counts: csr_matrix) -> tuple[csr_matrix, csr_matrix]:
    """Return two halves of counts (n, G): each count is drawn into one of them."""
    rng = np.random.default_rng(_SEED)
    first = rng.binomial(counts.data.astype(np.int64), 0.5)
    halves = [
        csr_matrix((data, counts.indices.copy(), counts.indptr.copy()), counts.shape)
        for data in (first, counts.data.astype(np.int64) - first)
    ]
    for half in halves:
        half.eliminate_zeros()
    return halves[0], halves[1]


def held_out_values(counts: csr_matrix, *, target_sum: float, n_judged: int) -> NDArray[np.float64]:
    """Return (m, K) values of the most variable genes, of mean 0 and variance 1 in judged cells.

    Args:
        counts: (m, G) counts that the embedding does not read.
        target_sum: Of the transform.
        n_judged: How many cells, the first ones, are judged.

    Raises:
        ValueError: No gene varies in them.
    """
    values = np.expm1(log1p_normalise(counts, target_sum=target_sum).astype(np.float64))
    judged = values[:n_judged]
    mean, seen = judged.mean(axis=0), (judged > 0).mean(axis=0)
    dispersion = np.where(seen >= _SEEN, judged.var(axis=0), 0.0) / np.maximum(mean, 1e-12)
    best = np.sort(np.argsort(-dispersion, kind="stable")[:_VARIABLE])
    best = best[dispersion[best] > 0]
    if not len(best):
        raise ValueError("no gene varies among the held-out counts of the cells to judge on")
    chosen = np.log1p(values[:, best])
    judged = chosen[:n_judged]
    return np.asarray((chosen - judged.mean(axis=0)) / judged.std(axis=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What the candidates are judged by.

    Shapes: m cells, of which the first n are judged and all may be neighbours.
    """

    n: int
    targets: NDArray[np.float64]
    """(m, K) held-out values."""
    labels: NDArray[np.str_] | None
    """(m,) labels, "" for none; None: labels do not count."""
    groups: NDArray[np.integer]
    """(m,) datasets."""

    def scores(self, points: NDArray[np.float32]) -> dict[str, float]:
        """Return the scores of points (m, W)."""
        distance = _distances(points, self.n)
        k = min(_NEIGHBOURS, max(1, len(points) // 5))
        near = np.argsort(distance, axis=1, kind="stable")[:, :k]
        residual = self.targets[: self.n] - self.targets[near].mean(axis=1)
        found = {COUNTS: float(1 - np.square(residual).mean())}
        if self.labels is not None:
            distance = np.where(_may_name(self.labels, self.groups, self.n), distance, np.inf)
            near = np.argsort(distance, axis=1, kind="stable")[:, :k]
            # With fewer cells that may name it than k, a cell is named by these alone.
            hits = [
                _most_common(self.labels[near[i][np.isfinite(distance[i, near[i]])]])
                == self.labels[i]
                for i in np.flatnonzero(self.labels[: self.n] != "")
            ]
            found[LABELS] = float(np.mean(hits))
        return found


def _distances(points: NDArray[np.float32], n: int) -> NDArray[np.float64]:
    """Return squared distances (n, m) of the first n cells, a cell's to itself infinite."""
    x = points.astype(np.float64)
    size = np.square(x).sum(axis=1)
    distance = size[:n, None] + size[None, :] - 2 * x[:n] @ x.T
    distance[np.arange(n), np.arange(n)] = np.inf
    return np.asarray(distance)


def _may_name(labels: NDArray[np.str_], groups: NDArray[np.integer], n: int) -> NDArray[np.bool_]:
    """Return (n, m) which cells may name a cell: of other groups, where its label is in others."""
    same = groups[:n, None] == groups[None, :]
    elsewhere = ((labels[:n, None] == labels[None, :]) & ~same).any(axis=1)
    return (labels != "")[None, :] & (~same | ~elsewhere[:, None])


def _most_common(labels: NDArray[np.str_]) -> str:
    names, sizes = np.unique(labels, return_counts=True)
    return str(names[np.argmax(sizes)])


def _labels(corpus: Corpus, rows: NDArray[np.int64], n: int) -> NDArray[np.str_] | None:
    """Return the cell types of rows; None if those of the first n are of no use."""
    obs = corpus.obs(rows)
    if "cell_type" not in obs:
        return None
    values = obs["cell_type"].astype(object)
    labels = values.where(values.notna(), "").astype(str).to_numpy(dtype=str)
    names, sizes = np.unique(labels, return_counts=True)
    labels = np.where(np.isin(labels, names[sizes >= _MIN_LABEL]), labels, "")
    return labels if len(np.unique(labels[:n][labels[:n] != ""])) >= 2 else None


def _pooled(
    model: ScLong,
    corpus: Corpus,
    rows: NDArray[np.int64],
    counts: csr_matrix,
    parts: Sequence[Part],
    directions: torch.Tensor | None,
    on_cells: Callable[[int], None],
) -> Pooled:
    """Return the pooled parts of cells, (n, C) float32 on the CPU by part."""
    device = next(model.parameters()).device
    found: dict[Part, list[torch.Tensor]] = {part: [] for part in parts}
    masks = model.transform.unmeasured == "mask"
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            some = slice(start, start + _BATCH)
            unknown = None
            if masks and corpus.measured_genes is not None:
                unknown = ~corpus.measured_genes[corpus.row_dataset[rows[some]]]
            x, unmeasured = model_input(
                counts[some], target_sum=model.transform.target_sum, unmeasured=unknown,
                device=device,
            )  # fmt: skip
            own = model.pooled(x, parts, unmeasured=unmeasured, directions=directions)
            for part, pooled in zip(parts, own, strict=True):
                found[part].append(pooled.float().cpu())
            on_cells(len(x))
    return {part: torch.cat(some) for part, some in found.items()}


def _judge(
    model: ScLong, corpus: Corpus, rows: NDArray[np.int64], second: csr_matrix, n: int
) -> Judge:
    """Return what judges the first n of some cells, by labels and by the second halves (m, G)."""
    targets = held_out_values(second, target_sum=model.transform.target_sum, n_judged=n)
    labels, groups = _labels(corpus, rows, n), corpus.row_dataset[rows]
    return Judge(n=n, targets=targets, labels=labels, groups=groups)


def _directions(
    model: ScLong, corpus: Corpus, rows: NDArray[np.int64], wanted: int
) -> tuple[list[int], torch.Tensor | None]:
    """Return the numbers of principal directions to offer, and the directions."""
    counts = direction_counts(n_cells=len(rows), n_genes=model.n_genes, wanted=wanted)
    if not counts:
        return [], None
    values = _values(model, corpus, rows)
    return counts, principal_blocks(values, counts[-1], model.config.base_dim)


def _values(model: ScLong, corpus: Corpus, rows: NDArray[np.int64]) -> csr_matrix:
    """Return the values (n, G) of some cells, without stored zeros."""
    parts = [
        csr_matrix(log1p_normalise(corpus.rows(some), target_sum=model.transform.target_sum))
        for some in np.array_split(rows, max(1, len(rows) // 256))
    ]
    return csr_matrix(vstack(parts))


def _some(corpus: Corpus, split: str, n_cells: int) -> NDArray[np.int64]:
    """Return at most n cells of a split that have two counts, drawn at random, ascending."""
    rows = corpus.split(split)
    rows = rows[np.asarray(corpus.row_nnz)[rows] >= 2]
    if len(rows) > n_cells:
        rows = np.random.default_rng(_SEED).choice(rows, n_cells, replace=False)
    return np.sort(rows)


def _affordable(model: ScLong) -> int:
    """Return how many cells of either split a CPU may read; a GPU any number."""
    if next(model.parameters()).device.type != "cpu":
        return CELLS * 1000
    size = sum(p.numel() for stack in model.performers().values() for p in stack.parameters())
    zeros = model.config.zero_genes
    tokens = model.n_genes if zeros is None else min(model.n_genes, zeros + 2000)
    # For each: a training cell, and halves of a training and of a validation cell.
    return int(CPU_FLOPS / (3 * 2 * size * tokens))
