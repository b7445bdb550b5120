"""The cells of the study: the most expressed genes of a finalized corpus, whole datasets held out.

Shapes: n cells, G genes of the panel, P target places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from sclong_ds.config.sections import ObjectiveConfig
from sclong_ds.corpus.corpus import Corpus, GeneStats
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.model.gene_encoder import GeneGraph
from sclong_ds.objective.targets import VALIDATION_EPOCH, Targets, draw_targets

TARGET_SUM = 1e4


@dataclass(frozen=True)
class Cells:
    """Some cells of one split."""

    rows: NDArray[np.int64]
    """(n,) rows in the corpus."""
    counts: csr_matrix
    """(n, G) raw counts."""
    dataset: NDArray[np.int64]
    """(n,) number of each cell's dataset."""

    def targets(
        self, which: NDArray[np.int64], objective: ObjectiveConfig, *, seed: int, epoch: int
    ) -> Targets:
        """Draw targets of some of the cells as training does; epoch -1 is validation."""
        counts = self.counts[which]
        return draw_targets(
            counts.indptr, counts.indices, cell_ids=self.rows[which],
            epochs=np.full(len(which), VALIDATION_EPOCH if epoch < 0 else epoch),
            passes=np.zeros(len(which), dtype=np.int64),
            objective=objective, seed=seed, n_genes=counts.shape[1],
        )  # fmt: skip

    def values(self, which: NDArray[np.int64]) -> Tensor:
        """Return the values (n, G) of some of the cells."""
        return torch.from_numpy(log1p_normalise(self.counts[which], target_sum=TARGET_SUM))


@dataclass(frozen=True)
class Panel:
    """The study's cells and genes."""

    train: Cells
    held_out: Cells
    datasets: dict[int, str]
    """Names of the held-out datasets by number."""
    stats: GeneStats
    """Of the training cells."""
    graph: GeneGraph | None
    """The gene graph among the panel's genes."""


def read_panel(
    corpus_dir: str,
    graph: str | None,
    *,
    genes: int,
    validation_cells: int,
    held_out: Sequence[str] = (),
) -> Panel:
    """Read the study's cells.

    Args:
        corpus_dir: A finalized corpus.
        graph: Gene graph of its vocabulary, or None.
        genes: Genes G: those that most training cells express.
        validation_cells: Most cells of each held-out dataset.
        held_out: Datasets to hold out whole; without any, those of the corpus's own split.

    Raises:
        ValueError: A dataset to hold out is not in the corpus.
    """
    corpus = Corpus(corpus_dir)
    train_rows, rows = _split(corpus, held_out)
    n_expressing = np.asarray((corpus.rows(train_rows) > 0).sum(0)).ravel()
    chosen = np.sort(np.argsort(-n_expressing, kind="stable")[:genes])
    train = _cells(corpus, train_rows, chosen)
    rng = np.random.default_rng(7)
    numbers, picked = corpus.row_dataset[rows], []
    for number in np.unique(numbers):
        own = rows[numbers == number]
        picked.append(rng.choice(own, min(validation_cells, len(own)), replace=False))
    out = _cells(corpus, np.sort(np.concatenate(picked)), chosen)
    names = corpus.obs(out.rows)["dataset_id"].astype(str).to_numpy()
    datasets = {int(n): str(s) for n, s in zip(out.dataset, names, strict=True)}
    edges = None
    if graph is not None:
        (ends, weights) = read_gene_graph(graph, genes_hash=corpus.genes.hash)
        place = np.full(corpus.n_genes, -1)
        place[chosen] = np.arange(genes)
        inside = (place[ends] >= 0).all(0)
        edges = place[ends][:, inside], weights[inside]
    return Panel(train, out, datasets, _statistics(train), edges)


def with_share(panel: Panel, share: float, *, seed: int) -> Panel:
    """Return the panel with some of its training cells and their statistics, on the same genes.

    Args:
        panel: All training cells.
        share: Of the cells of each dataset, drawn without replacement; one at least stays.
        seed: Other seeds draw other cells.
    """
    rng, number = np.random.default_rng([seed, 11]), panel.train.dataset
    kept = []
    for one in np.unique(number):
        own = np.flatnonzero(number == one)
        kept.append(rng.choice(own, max(1, round(share * len(own))), replace=False))
    some = np.sort(np.concatenate(kept))
    train = Cells(panel.train.rows[some], panel.train.counts[some], number[some])
    return replace(panel, train=train, stats=_statistics(train))


def _split(corpus: Corpus, held_out: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of training and of held-out cells; raises as `read_panel`."""
    train, validation = corpus.split("train"), corpus.split("validation")
    if not held_out:
        return train, validation
    rows = np.sort(np.concatenate([train, validation]))
    names = corpus.obs(rows)["dataset_id"].astype(str).to_numpy()
    if unknown := sorted(set(held_out) - set(names)):
        known = ", ".join(sorted(set(names)))
        raise ValueError(f"--held-out: got {', '.join(unknown)}; the corpus has {known}")
    out = np.isin(names, held_out)
    return rows[~out], rows[out]


def _cells(corpus: Corpus, rows: NDArray[np.int64], genes: NDArray[np.int64]) -> Cells:
    counts = csr_matrix(corpus.rows(rows)[:, genes])
    counts.sort_indices()
    kept = np.flatnonzero(np.diff(counts.indptr) > 1)
    return Cells(rows[kept], counts[kept], corpus.row_dataset[rows][kept].astype(np.int64))


def _statistics(cells: Cells) -> GeneStats:
    values = csr_matrix(log1p_normalise(cells.counts, target_sum=TARGET_SUM)).astype(np.float64)
    n = np.asarray((cells.counts > 0).sum(0)).ravel()
    mean = float(values.data.mean())
    sums = np.asarray(values.sum(0)).ravel()
    return GeneStats(
        n_expressing=n,
        total_counts=np.asarray(cells.counts.sum(0)).ravel().astype(np.int64),
        mean_expressed=np.where(n > 0, sums / np.maximum(n, 1), mean),
        mean_expressed_all=mean,
        var_expressed_all=float(values.data.var()),
        target_sum=TARGET_SUM,
    )
