"""Gene statistics are those of the training cells alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
from data_prep.verify.verify import verify
from sclong_ds.corpus.corpus import Corpus

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


def test_gene_statistics_are_those_of_the_training_cells(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    for name in ("a", "b"):
        three[name] = sparse.csr_matrix(three[name].toarray() * (np.arange(600) != 5))
    folder = stage_corpus(three)
    finalize(folder, validation_datasets=["c"])
    corpus = Corpus(folder)
    train = np.vstack([three["a"].toarray(), three["b"].toarray()]).astype(float)
    values = np.log1p(1e4 * train / train.sum(axis=1, keepdims=True))
    stats = corpus.gene_stats
    assert stats.target_sum == 1e4
    np.testing.assert_array_equal(stats.n_expressing, (train > 0).sum(axis=0))
    np.testing.assert_array_equal(stats.total_counts, train.sum(axis=0))
    nonzero = values[train > 0]
    assert stats.mean_expressed_all == pytest.approx(nonzero.mean(), rel=1e-12)
    assert stats.var_expressed_all == pytest.approx(nonzero.var(), rel=1e-10)
    assert stats.n_expressing[5] == 0
    assert stats.mean_expressed[5] == stats.mean_expressed_all
    others = np.arange(600) != 5
    expected = values.sum(axis=0)[others] / (train > 0).sum(axis=0)[others]
    np.testing.assert_allclose(stats.mean_expressed[others], expected, rtol=1e-12)


def test_the_share_of_a_gene_is_that_of_the_cells_that_measure_it(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    """Against a slow count, cell by cell; no training cell measures gene 7."""
    rng = np.random.default_rng(0)
    measured = {
        name: rng.random(600) < share for name, share in zip("abc", (1, 0.5, 0.1), strict=True)
    }
    for name, genes in measured.items():
        genes[7] = name == "c"
        genes[8] = name == "b"
        three[name] = sparse.csr_matrix(three[name].toarray() * genes)
    folder = stage_corpus(three, measured=measured)
    finalize(folder, validation_datasets=["c"])
    stats, n, depth, own = Corpus(folder).gene_stats, [0] * 600, [0] * 600, [0] * 600
    for name in ("a", "b"):
        for cell in three[name].toarray().astype(int).tolist():
            for gene in range(600):
                if measured[name][gene]:
                    n[gene] += 1
                    depth[gene] += sum(cell)
                    own[gene] += cell[gene]
    assert stats.n_measuring is not None
    assert stats.counts_measuring is not None
    np.testing.assert_array_equal(stats.n_measuring, n)
    np.testing.assert_array_equal(stats.counts_measuring, depth)
    expected = [mine / total if total else 0.0 for mine, total in zip(own, depth, strict=True)]
    np.testing.assert_allclose(stats.share(), expected, rtol=1e-12)
    assert n[7] == 0
    assert stats.share()[7] == 0.0
    assert verify(folder)["ok"]


def test_a_corpus_without_them_takes_every_cell_for_measuring(
    stage_corpus: Stage, three: dict[str, sparse.csr_matrix]
) -> None:
    folder = stage_corpus(three)
    finalize(folder)
    stats = replace(Corpus(folder).gene_stats, n_measuring=None, counts_measuring=None)
    np.testing.assert_array_equal(stats.share(), stats.total_counts / stats.total_counts.sum())
