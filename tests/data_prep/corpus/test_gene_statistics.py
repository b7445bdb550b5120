"""Gene statistics are those of the training cells alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_prep.corpus.finalize import finalize
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
