"""Networks of genes as edge lists: by cosine of vectors, attention, gradients or ablation.

- `cosine`: of the contextual vectors, of the gene vectors without INPUT, standardised (each
  number less its mean over the genes, over its standard deviation): what all genes have in common
  would make every cosine 1.
- `attention`: how much more weight than other genes the source gives the target in the decoder's
  attention, in equal shares: 1 is as much more as a key gets where all keys get the same. Weights
  as computed (`sclong_ds.model.attention_use`), mean over layers, heads and the cells in which both
  genes are read and the source is expressed; the rest of the weights is that of 32 other genes.
- `gradient`: change of the source's predicted value with the target's value, the source being
  hidden; mean over the cells that express both.
- `ablation`: how far the target's representation moves when the source's value is deleted, with
  the routing of the whole cell kept (`python -m sclong_ds perturb` tests it against a null).

Shapes: Q sources, G genes, C width, N tokens of a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.opening import model_inputs
from sclong_ds.embedding.perturb import measure
from sclong_ds.model.attention_use import (
    Projections,
    attentions,
    computed_weights,
    looking,
    spread,
    without_compiling,
)
from sclong_ds.model.performer import SelfAttention
from sclong_ds.model.sclong import ScLong
from sclong_ds.progress import count_progress

ROWS = 512
"""Sources whose cosines with all genes are held at a time."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of edges from some genes to all."""

    values: np.ndarray
    """(Q, G) float64; NaN: not known."""
    n_cells: np.ndarray | None = None
    """(Q, G) cells that the weight is a mean over."""


def standardised(vectors: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Return vectors (G, C) of which each number has mean 0 and variance 1 over some genes.

    Args:
        vectors: (G, C).
        genes: (G,) bool.
    """
    some = vectors[genes].astype(np.float64)
    spread_of = some.std(axis=0)
    found: np.ndarray = (vectors - some.mean(axis=0)) / np.where(spread_of > 0, spread_of, 1.0)
    return found


def cosine_edges(
    vectors: np.ndarray, sources: Sequence[int], genes: GeneVocabulary, *, edges: int
) -> pd.DataFrame:
    """Return the nearest genes of each source.

    Args:
        vectors: (G, C); a zero row is no gene's neighbour and has none.
        sources: Q genes.
        genes: Of the model.
        edges: Most edges of a source.
    """
    known = np.any(vectors != 0, axis=1)
    vectors = np.where(known[:, None], standardised(vectors, known), 0.0)
    norms = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.where(norms > 0, norms, 1.0)[:, None]
    parts = []
    for start in range(0, len(sources), ROWS):
        some = list(sources[start : start + ROWS])
        values = (unit[some] @ unit.T).astype(np.float64)
        values[norms[some] == 0] = np.nan
        values[:, norms == 0] = np.nan
        parts.append(edge_table(Weights(values), some, genes, edges=edges))
    return pd.concat(parts, ignore_index=True)


def edge_table(
    weights: Weights,
    sources: Sequence[int],
    genes: GeneVocabulary,
    *,
    edges: int,
    min_cells: int = 1,
) -> pd.DataFrame:
    """Return the strongest edges, a row each: of a source by falling absolute weight.

    Args:
        weights: From the sources to all genes.
        sources: Q genes.
        genes: Of the model.
        edges: Most edges of a source; a gene has none to itself.
        min_cells: Fewest cells that an edge rests on.
    """
    rows = []
    for i, source in enumerate(sources):
        values = weights.values[i].copy()
        values[source] = np.nan
        if weights.n_cells is not None:
            values[weights.n_cells[i] < min_cells] = np.nan
        known = np.flatnonzero(~np.isnan(values))
        best = known[np.argsort(-np.abs(values[known]), kind="stable")[:edges]]
        for target in best:
            row = {
                "source": genes.ids[source],
                "source_symbol": genes.symbols[source],
                "target": genes.ids[target],
                "target_symbol": genes.symbols[target],
                "weight": values[target],
            }
            if weights.n_cells is not None:
                row["n_cells"] = int(weights.n_cells[i, target])
            rows.append(row)
    columns = ["source", "source_symbol", "target", "target_symbol", "weight"]
    return pd.DataFrame(rows, columns=columns + ["n_cells"] * (weights.n_cells is not None))


def attention_weights(model: ScLong, cells: Cells, sources: Sequence[int]) -> Weights:
    """Return the excess of attention in the decoder, in equal shares.

    Args:
        model: From `load_model`.
        cells: From `open_cells`.
        sources: Q genes.
    """
    sums = np.zeros((len(sources), model.n_genes))
    n_cells = np.zeros((len(sources), model.n_genes), dtype=np.int64)
    with torch.inference_mode(), count_progress("attention", len(cells.obs), "cells") as on_cells:
        for x, hidden, _ in model_inputs(model, cells, batch_size=1):
            tokens = model.decoder_tokens(x, unmeasured=hidden)
            place = {gene: i for i, gene in enumerate(tokens.tolist())}
            expressed = (x[0] > 0).cpu().numpy()
            these = [i for i, gene in enumerate(sources) if expressed[gene] and gene in place]
            if these:
                rows = [place[sources[i]] for i in these]
                found: list[Tensor] = []
                with _decoder_rows(model, rows, found):
                    model.encode(x, unmeasured=hidden, genes="all")
                excess = torch.stack(found).mean(0)[:, : len(tokens)].double().cpu().numpy()
                keys = tokens.cpu().numpy()
                for i, row in zip(these, excess, strict=True):
                    sums[i, keys] += row
                    n_cells[i, keys] += 1
            on_cells(1)
    return _mean(sums, n_cells)


@contextmanager
def _decoder_rows(model: ScLong, rows: list[int], found: list[Tensor]) -> Iterator[None]:
    """Add the excess weights (P, N) of some tokens of a cell to `found`, for each decoder layer."""

    def look(
        _: str, attention: SelfAttention, features: Tensor | None, projections: Projections
    ) -> None:
        q, k, _values = next(projections)
        own = computed_weights(q[rows], k, features, attention).weights.mean(0)
        others = computed_weights(q[spread(len(q))], k, features, attention).weights
        found.append((own - others.mean((0, 1))) * len(k))

    decoder = [pair for pair in attentions(model) if pair[0].startswith("decoder.")]
    with without_compiling([model.performers()["decoder"]]), looking(decoder, look):
        yield


def gradient_weights(model: ScLong, cells: Cells, sources: Sequence[int]) -> Weights:
    """Return the change of the sources' predictions with the values of all genes.

    Args:
        model: From `load_model`.
        cells: From `open_cells`.
        sources: Q genes.
    """
    sums = np.zeros((len(sources), model.n_genes))
    n_cells = np.zeros((len(sources), model.n_genes), dtype=np.int64)
    with count_progress("gradient", len(cells.obs), "cells") as on_cells:
        for values, hidden, _ in model_inputs(model, cells, batch_size=1):
            expressed = values > 0 if hidden is None else (values > 0) & ~hidden
            known = expressed[0].cpu().numpy()
            for i, gene in enumerate(sources):
                if not known[gene]:
                    continue
                x = values.clone().requires_grad_()
                mask = torch.zeros_like(expressed)
                mask[0, gene] = True
                position = torch.tensor([[gene]], device=x.device)
                predicted = model(x, mask, positions=position, unmeasured=hidden)
                (slope,) = torch.autograd.grad(predicted.float().sum(), x)
                sums[i, known] += slope[0].double().cpu().numpy()[known]
                n_cells[i, known] += 1
            on_cells(1)
    return _mean(sums, n_cells)


def ablation_weights(
    model: ScLong, cells: Cells, sources: Sequence[int], *, batch_size: int
) -> Weights:
    """Return how far representations move when a source is deleted.

    Args:
        model: From `load_model`.
        cells: From `open_cells`.
        sources: Q genes.
        batch_size: Perturbed cells at a time.
    """
    found = measure(
        model, cells, [[gene] for gene in sources], value=0.0, over="any", batch_size=batch_size
    )
    return Weights(found.genes, np.broadcast_to(found.n_cells[:, None], found.genes.shape))


def _mean(sums: np.ndarray, n_cells: np.ndarray) -> Weights:
    return Weights(np.where(n_cells > 0, sums / np.maximum(n_cells, 1), np.nan), n_cells)
