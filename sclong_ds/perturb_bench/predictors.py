"""Predictors of the effect of perturbations that no training cell has.

| predictor | prediction |
|---|---|
| no_change | nothing changes |
| mean_shift | mean change of the training perturbations |
| additive | sum of the changes of single genes in training; the mean change where none is |
| ridge_pca | ridge regression from the genes' loadings in a PCA of the control cells |
| ridge_gene_vectors | the same from the model's gene vectors, before any cell is seen |
| frozen_linear | the same from frozen encodings |
| tuned_head | a head from encodings to vectors of all genes, trained from the model's |

Frozen encodings are the contextual vectors of the perturbed genes in control cells, and how the
cells' embedding moves when the model reads them with these genes changed.
Several genes have the sum of their features. All learn the deviation from the mean change, from
standardised features; the strength of the ridge, and the step at which the head stops, are chosen
on training perturbations that are held out for it. The control cells that all of this is from are
not those of the truth. The weights of the model stay.

Shapes: P perturbations, T of them in training, F features, G genes, C base width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import nn

from sclong_ds.embedding.opening import count_inputs
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.perturb_bench.screen import Screen, folds_of
from sclong_ds.progress import count_progress

SIMPLE = {"no_change", "mean_shift", "additive", "ridge_pca"}
"""Predictors that read no model."""
COMPONENTS = 10
_PCA_CELLS = 2000
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
_INNER = 4
_STEPS, _PATIENCE, _RANK, _RATE, _DECAY = 400, 40, 16, 3e-3, 1e-2
Floats = NDArray[np.float64]
Predictor = Callable[[NDArray[np.int64], NDArray[np.int64]], Floats]
"""From training and test perturbations to the changes (test, G)."""


@dataclass(frozen=True, slots=True)
class Encodings:
    """What a model says of the perturbed genes, a row for each perturbation."""

    vectors: Floats
    """(P, C) sums of gene vectors."""
    contextual: Floats
    """(P, C + W) sums of contextual vectors, and the shift of the embedding."""
    gene_vectors: NDArray[np.float32]
    """(G, C) of all genes."""


def predictors(screen: Screen, encodings: Encodings, *, seed: int) -> dict[str, Predictor]:
    """Return all predictors by name.

    Args:
        screen: Whose training perturbations they learn from.
        encodings: From `encode_targets`.
        seed: Of held-out perturbations and of the head.
    """
    deltas = screen.learned
    loadings = principal_loadings(screen.values)
    pca = np.array([loadings[list(genes)].sum(axis=0) for genes in screen.targets])

    def ridge(features: Floats) -> Predictor:
        return lambda train, test: ridge_deltas(features, deltas, train, test, seed=seed)

    return {
        "no_change": lambda train, test: np.zeros((len(test), deltas.shape[1])),
        "mean_shift": lambda train, test: np.tile(deltas[train].mean(axis=0), (len(test), 1)),
        "additive": lambda train, test: additive(screen, train, test),
        "ridge_pca": ridge(pca),
        "ridge_gene_vectors": ridge(encodings.vectors),
        "frozen_linear": ridge(encodings.contextual),
        "tuned_head": lambda train, test: tuned_head(encodings, deltas, train, test, seed=seed),
    }


def additive(screen: Screen, train: NDArray[np.int64], test: NDArray[np.int64]) -> Floats:
    """Return sums of the changes by single genes; the mean change for a gene without one."""
    single = {screen.targets[i][0]: i for i in train.tolist() if len(screen.targets[i]) == 1}
    mean = screen.learned[train].mean(axis=0)
    found = []
    for i in test.tolist():
        known = [screen.learned[single[gene]] for gene in screen.targets[i] if gene in single]
        found.append(np.sum(known, axis=0) if known else mean)
    return np.array(found)


def principal_loadings(values: csr_matrix) -> Floats:
    """Return loadings (G, K) of the genes in a PCA of cells (N, G), scaled by the deviations."""
    centred = values[:_PCA_CELLS].toarray().astype(np.float64)
    centred -= centred.mean(axis=0)
    width = min(COMPONENTS, min(centred.shape) - 1)
    start = np.ones(min(centred.shape))
    _, sizes, axes = svds(centred, k=width, v0=start)
    return np.asarray((axes * sizes[:, None]).T / np.sqrt(len(centred)))


def ridge_deltas(
    features: Floats,
    deltas: Floats,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    *,
    seed: int,
) -> Floats:
    """Return changes (test, G) by ridge regression of the deviation from the mean change.

    Args:
        features: (P, F).
        deltas: (P, G).
        train: (T,) perturbations to learn from.
        test: Perturbations to predict.
        seed: Of the training perturbations by which the strength is chosen.
    """
    inner = folds_of(len(train), folds=_INNER, seed=seed)
    errors = np.zeros(len(_STRENGTHS))
    for fold in range(int(inner.max()) + 1):
        fit, held = train[inner != fold], train[inner == fold]
        for number, found in enumerate(_ridge(features, deltas, fit, held, _STRENGTHS)):
            errors[number] += float(np.square(found - deltas[held]).sum())
    # Of equal ones the strongest: its prediction is nearest to the mean change.
    best = len(errors) - 1 - int(np.argmin(errors[::-1]))
    return next(_ridge(features, deltas, train, test, [_STRENGTHS[best]]))


def _ridge(
    features: Floats,
    deltas: Floats,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    strengths: Sequence[float],
) -> Iterator[Floats]:
    """Yield the changes (test, G) that each strength predicts."""
    x, mean = standardised_features(features, train), deltas[train].mean(axis=0)
    products, between = x[train] @ x[train].T, x[test] @ x[train].T
    for strength in strengths:
        weights = np.linalg.solve(products + strength * np.eye(len(train)), deltas[train] - mean)
        yield np.asarray(mean + between @ weights)


def standardised_features(features: Floats, train: NDArray[np.int64]) -> Floats:
    """Return features (P, F) less the mean of the training rows, over their deviation."""
    spread = features[train].std(axis=0)
    centred = features - features[train].mean(axis=0)
    scaled = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 1e-12)
    return np.asarray(scaled / np.sqrt(features.shape[1]))


def tuned_head(
    encodings: Encodings,
    deltas: Floats,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    *,
    seed: int,
) -> Floats:
    """Return changes (test, G) by a head whose gene vectors are trained from the model's.

    Arguments as `ridge_deltas`.
    """
    both = np.concatenate([encodings.vectors, encodings.contextual], axis=1)
    x = torch.from_numpy(standardised_features(both, train)).float()
    mean = deltas[train].mean(axis=0)
    scale = float(np.abs(deltas[train] - mean).max()) or 1.0
    y = torch.from_numpy((deltas - mean) / scale).float()
    inner = folds_of(len(train), folds=_INNER, seed=seed)
    held, fit = torch.from_numpy(train[inner == 0]), torch.from_numpy(train[inner != 0])
    best, steps, since = float(y[held].square().mean()), 0, 0
    head = _Head(x, y, encodings.gene_vectors, seed=seed)
    for step, _ in enumerate(head.steps(fit), start=1):
        loss = float((head.outputs(held) - y[held]).square().mean())
        since = 0 if loss < best else since + 1
        if loss < best:
            best, steps = loss, step
        if since >= _PATIENCE:
            break
    head = _Head(x, y, encodings.gene_vectors, seed=seed)
    for _ in itertools.islice(head.steps(torch.from_numpy(train)), steps):
        pass
    return np.asarray(mean + scale * head.outputs(torch.from_numpy(test)).double().numpy())


class _Head:
    """Features to a code, the code times a vector of each gene; at the start it gives zeros."""

    def __init__(
        self, x: torch.Tensor, y: torch.Tensor, vectors: NDArray[np.float32], *, seed: int
    ) -> None:
        self.x, self.y = x, y
        centred = torch.from_numpy(vectors - vectors.mean(axis=0))
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        genes = centred @ axes[:_RANK].T
        width = genes.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self.genes = nn.Parameter(genes / genes.std().clamp(min=1e-6))
        self.first = nn.Parameter(torch.randn(x.shape[1], width, generator=generator))
        self.second = nn.Parameter(torch.zeros(width, width))

    def _outputs(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.x[rows] @ self.first) @ self.second @ self.genes.T

    def outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Return outputs (B, G) of perturbations (B,)."""
        with torch.no_grad():
            return self._outputs(rows)

    def steps(self, train: torch.Tensor) -> Iterator[None]:
        """Take a step of training on perturbations (T,) whenever the next item is wanted."""
        parameters = [self.first, self.second, self.genes]
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            (self._outputs(train) - self.y[train]).square().mean().backward()
            optimizer.step()
            yield


def encode_targets(
    model: ScLong,
    screen: Screen,
    *,
    measured: MeasuredGenes | None,
    n_cells: int,
    mode: str,
    batch_size: int,
    seed: int,
) -> Encodings:
    """Return what the model says of the perturbed genes, from control cells alone.

    Args:
        model: From `load_model`.
        screen: The screen.
        measured: Genes that the input names, of the control cells.
        n_cells: Most control cells that are read.
        mode: delete or overexpress.
        batch_size: Perturbed cells at a time.
        seed: Of the choice of cells.
    """
    n = screen.controls.shape[0]
    rows = np.sort(np.random.default_rng(seed).permutation(n)[:n_cells])
    width = model.recipe.width(model.config.base_dim)
    moved = np.zeros((len(screen.targets), width))
    sums = np.zeros((model.n_genes, model.config.base_dim))
    numbers = np.zeros(model.n_genes)
    chosen = None if measured is None else measured.of(rows)
    batches = count_inputs(model, screen.controls[rows], batch_size=1, measured=chosen)
    with torch.inference_mode(), count_progress("encode", len(rows), "cells") as on_cells:
        for _, x, unmeasured in batches:
            known = x > 0 if unmeasured is None else (x > 0) & ~unmeasured
            found = model.encode(x, unmeasured=unmeasured, genes="all")[0].double()
            # A gene without counts has a representation too; where no cell expresses it, that.
            weight = torch.where(known[0], 1.0, 1e-6).double()
            sums += (found * weight[:, None]).cpu().numpy()
            numbers += weight.cpu().numpy()
            moved += _moved(model, screen.targets, x, unmeasured, mode, batch_size)
            on_cells(1)
        vectors = model.gene_encoder()[: model.n_genes].float().cpu().numpy()
    contextual = sums / np.maximum(numbers, 1e-12)[:, None]
    own = [list(genes) for genes in screen.targets]
    return Encodings(
        np.array([vectors[genes].sum(axis=0) for genes in own], dtype=np.float64),
        np.concatenate(
            [np.array([contextual[genes].sum(axis=0) for genes in own]), moved / len(rows)], axis=1
        ),
        vectors,
    )


def _moved(
    model: ScLong,
    targets: Sequence[Sequence[int]],
    x: torch.Tensor,
    unmeasured: torch.Tensor | None,
    mode: str,
    batch_size: int,
) -> Floats:
    """Return how the embedding of one cell moves (P, W) with the genes of each perturbation."""
    found = []
    before = model.recipe.apply(model.pooled(x, model.recipe.parts, unmeasured=unmeasured))
    for start in range(0, len(targets), batch_size):
        part = targets[start : start + batch_size]
        changed = x.repeat(len(part), 1)
        for row, genes in enumerate(part):
            changed[row, list(genes)] = 0.0 if mode == "delete" else float(x.max())
        many = None if unmeasured is None else unmeasured.expand(len(part), -1)
        pooled = model.pooled(
            changed, model.recipe.parts, unmeasured=many, routes=x.expand(len(part), -1)
        )
        found.append((model.recipe.apply(pooled) - before).double().cpu().numpy())
    return np.concatenate(found)
