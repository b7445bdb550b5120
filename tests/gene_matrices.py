"""Small matrices over genes of the bundled vocabulary, as readers hand them over."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from data_prep.source.source import Matrix
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()


def names(*values: str) -> np.ndarray:
    """Return names as a reader does."""
    return np.array(values, dtype=object)


def matrix(values: np.ndarray, name: str = "X", **columns: np.ndarray) -> Matrix:
    """Return a matrix of one block; its genes are the vocabulary's first unless named."""
    columns = columns or {"index": names(*GENES.ids[: values.shape[1]])}
    return Matrix(
        name=name,
        shape=values.shape,
        gene_columns=columns,
        blocks=lambda: iter([sparse.csr_matrix(values)]),
    )
