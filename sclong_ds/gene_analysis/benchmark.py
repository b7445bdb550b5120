"""How well vectors of genes find the genes of a set by the others of it, beside controls.

A gene's score for a set is its mean cosine with the genes of the set, itself left out, of vectors
standardised over the genes (all but the graph, which is sparse); the figure
of a set is the area under the ROC curve of these scores (0.5 by chance), that of a representation
the mean over the sets, with an interval from resampled sets. Controls: singular vectors of the
cells' values, genes of like mean expression, and the gene graph alone where the model has one.

Shapes: G genes, U of them that are compared, T sets, C width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, diags_array, issparse, vstack
from scipy.stats import rankdata
from sklearn.decomposition import TruncatedSVD

from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import Cells
from sclong_ds.gene_analysis.term_sets import TermSets

RANK = 50
MOST_CELLS = 20_000
"""Cells of the SVD, evenly spread over the input."""
RESAMPLES = 1000
AT_A_TIME = 256
"""Sets whose scores are held at once."""


def set_areas(vectors: Any, members: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each set (T,).

    Args:
        vectors: (U, C), dense or sparse; the scores of a zero row are 0.
        members: (U, T) bool, at least 2 and less than U of each set.
    """
    norms = np.sqrt(np.asarray(_squares(vectors)).ravel())
    inverse = (norms > 0) / np.where(norms > 0, norms, 1)
    unit = diags_array(inverse) @ vectors
    own = (norms > 0).astype(float)[:, None]
    found = []
    for start in range(0, members.shape[1], AT_A_TIME):
        some = members[:, start : start + AT_A_TIME].astype(float)
        centre = unit.T @ some
        sums = np.asarray(unit @ centre)
        size = some.sum(axis=0)
        scores = np.where(some > 0, (sums - own) / (size - 1), sums / size)
        found.append(areas(scores, some > 0))
    return np.concatenate(found)


def level_areas(means: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the areas (T,) where like mean expression is all that is known of the genes.

    Args:
        means: (U,) mean value over the cells.
        members: (U, T) bool.
    """
    found = []
    for member in members.T:
        n = member.sum()
        centre = np.where(member, (means[member].sum() - means) / (n - 1), means[member].mean())
        found.append(areas(-np.abs(means - centre)[:, None], member[:, None])[0])
    return np.array(found)


def areas(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return areas under the ROC curve (T,) of scores (U, T) for members (U, T)."""
    n = members.sum(axis=0)
    ranks = rankdata(scores, axis=0)
    first = np.where(members, ranks, 0.0).sum(axis=0) - n * (n + 1) / 2
    return np.asarray(first / (n * (len(scores) - n)))


def _squares(vectors: Any) -> Any:
    if issparse(vectors):
        return vectors.multiply(vectors).sum(axis=1)
    return np.square(vectors, dtype=np.float64).sum(axis=1)


def count_vectors(
    cells: Cells, *, target_sum: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the cells' values alone say of genes.

    Args:
        cells: From `open_cells`.
        target_sum: Of the model's transform.
        seed: Of the SVD.

    Returns:
        (G, R) genes' singular vectors of the values, times the singular values; (G,) mean value;
        (G,) number of cells that express the gene.
    """
    step, done, kept = max(1, -(-len(cells.obs) // MOST_CELLS)), 0, []
    for block in cells.blocks():
        rows = np.arange((-done) % step, block.counts.shape[0], step)
        part = block.counts[rows]
        kept.append(csr_matrix(log1p_normalise(part, target_sum=target_sum)))
        done += block.counts.shape[0]
    values = vstack(kept).tocsr()
    rank = min(RANK, min(values.shape) - 1)
    svd = TruncatedSVD(rank, random_state=seed).fit(values)
    means = np.asarray(values.mean(axis=0)).ravel()
    return (svd.components_ * svd.singular_values_[:, None]).T, means, values.getnnz(axis=0)


def score_table(found: Mapping[str, np.ndarray], *, seed: int) -> pd.DataFrame:
    """Return the mean area of each representation with its interval, the best first.

    Args:
        found: (T,) areas by representation.
        seed: Of the resampled sets.
    """
    draws = _drawn(found, seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=1)
    means = {name: float(areas.mean()) for name, areas in found.items()}
    table = pd.DataFrame({"auroc": means, "low": dict(zip(found, low, strict=True))})
    table["high"] = dict(zip(found, high, strict=True))
    table = table.rename_axis("representation")
    return table.sort_values("auroc", ascending=False, kind="stable")


def verdict(found: Mapping[str, np.ndarray], own: set[str], sets: TermSets, *, seed: int) -> str:
    """Return one sentence: whether the model's vectors are better than the best control.

    Args:
        found: As in `score_table`.
        own: Names of the model's representations.
        sets: What was scored.
        seed: As in `score_table`.
    """
    means = {name: areas.mean() for name, areas in found.items()}
    best = max(own & set(found), key=lambda name: means[name])
    text = f"{best} {means[best]:.3f}"
    if set(found) - own:
        control = max(set(found) - own, key=lambda name: means[name])
        gaps = _drawn({"gap": found[best] - found[control]}, seed)[0]
        low, high = np.percentile(gaps, [2.5, 97.5])
        word = "better than" if low > 0 else "worse than" if high < 0 else "not better than"
        text += f": {word} {control} {means[control]:.3f} (gap [{low:+.3f}, {high:+.3f}])"
    seen = "; the model's graph was made from GO, which names these genes together"
    return f"{text}, over {len(sets.names)} sets{seen if sets.known else ''}"


def _drawn(found: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    """Return means (representations, RESAMPLES) over the same resampled sets."""
    values = np.stack(list(found.values()))
    rng = np.random.default_rng(seed)
    draws = rng.integers(values.shape[1], size=(RESAMPLES, values.shape[1]))
    return np.stack([row[draws].mean(axis=1) for row in values])
