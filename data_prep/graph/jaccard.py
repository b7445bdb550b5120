"""Link sets of terms by their Jaccard index: the core of `python -m data_prep gene-graph`.

`jaccard_graph` works on plain sets, whatever they are sets of. It multiplies the sparse gene x term
matrix with its transpose in blocks of targets, so its memory does not grow with the square of the
number of genes.

Reads and writes nothing. Source: scLong, doi:10.1101/2024.11.09.622759, gene ontology graph.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from data_prep.graph.gene_graph_arguments import NEIGHBOURS, THRESHOLD
from sclong_ds.progress import each_with_progress

# Genes per block of the term overlap: about 30 MB of counts for 20,000 annotated genes, most of
# them sharing "protein binding" with half of all others.
_BLOCK = 256


@dataclass(frozen=True)
class GeneGraph:
    """A directed, weighted graph over the genes of a vocabulary."""

    n_genes: int
    edge_index: np.ndarray  # (2, E) int32, source and target, sorted by target, then source
    edge_weight: np.ndarray  # (E,) float32 in (0, 1]


def jaccard_graph(
    gene_terms: Sequence[Collection[str]],
    *,
    threshold: float = THRESHOLD,
    neighbours: int = NEIGHBOURS,
) -> GeneGraph:
    """Link each gene to the genes whose sets of terms are most like its own.

    Args:
        gene_terms: Terms of each gene, in vocabulary order; empty for genes without annotation.
        threshold: Edges need a Jaccard index strictly above it.
        neighbours: Best sources kept per target, besides the gene itself.

    Returns:
        The graph. Ties are broken by the lower source index.

    Raises:
        ValueError: Threshold outside [0, 1) or a negative number of neighbours.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"--threshold: got {threshold}, allowed: 0 <= threshold < 1")
    if neighbours < 0:
        raise ValueError(f"--neighbours: got {neighbours}, must be >= 0")
    annotated = np.array([i for i, terms in enumerate(gene_terms) if terms], dtype=np.int32)
    matrix = _term_matrix([gene_terms[i] for i in annotated])
    sizes = np.diff(matrix.indptr)
    transposed = matrix.T.tocsr()
    sources, targets, weights = [], [], []
    blocks = range(0, len(annotated), _BLOCK)
    for start in each_with_progress(blocks, "gene graph", "blocks"):
        shared = (matrix[start : start + _BLOCK] @ transposed).tocoo()
        target, source = shared.row + start, shared.col
        # float64 quotients of integers are correctly rounded, so 1/10 is not above 0.1 and 1/9 is.
        score = shared.data / (sizes[target] + sizes[source] - shared.data)
        above = score > threshold
        target, source, score = target[above], source[above], score[above]
        best = _best_per_target(target, source, score, limit=neighbours + 1)
        sources.append(annotated[source[best]])
        targets.append(annotated[target[best]])
        weights.append(score[best].astype(np.float32))
    empty = np.empty(0, dtype=np.int32)
    edge_index = np.stack([np.concatenate([empty, *sources]), np.concatenate([empty, *targets])])
    edge_weight = np.concatenate([empty.astype(np.float32), *weights])
    order = np.lexsort((edge_index[0], edge_index[1]))
    return GeneGraph(len(gene_terms), edge_index[:, order], edge_weight[order])


def degrees(graph: GeneGraph) -> tuple[np.ndarray, np.ndarray]:
    """Return in-degree and out-degree (n_genes,) of every gene, edges to itself left out."""
    source, target = graph.edge_index[:, graph.edge_index[0] != graph.edge_index[1]]
    return np.bincount(target, minlength=graph.n_genes), np.bincount(
        source, minlength=graph.n_genes
    )


def _term_matrix(gene_terms: Sequence[Collection[str]]) -> sp.csr_array:
    """Return genes x terms, 1 where the gene has the term."""
    column: dict[str, int] = {}
    rows = [
        sorted(column.setdefault(t, len(column)) for t in sorted(set(own))) for own in gene_terms
    ]
    bounds = np.cumsum([0, *map(len, rows)])
    columns = np.fromiter((c for row in rows for c in row), dtype=np.int32, count=int(bounds[-1]))
    ones = np.ones(len(columns), dtype=np.int32)
    return sp.csr_array((ones, columns, bounds), shape=(len(rows), len(column)))


def _best_per_target(
    target: np.ndarray, source: np.ndarray, score: np.ndarray, *, limit: int
) -> np.ndarray:
    """Return the positions of each target's `limit` highest scores; ties: lower source first."""
    order = np.lexsort((source, -score, target))
    sorted_target = target[order]
    group_start = np.searchsorted(sorted_target, sorted_target, side="left")
    return order[np.arange(len(order)) - group_start < limit]
