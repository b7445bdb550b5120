"""Genes that a dataset does not measure: found by cell, and refused where a corpus does not say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sclong_ds.objective.measured import MeasuredGenes

TABLE = np.array([[True, True, False], [False, True, True]])


def test_each_cell_has_the_genes_of_its_dataset() -> None:
    measured = MeasuredGenes(TABLE, np.array([1, 0, 1], dtype=np.uint32))
    first, second = [True, False, False], [False, False, True]
    assert measured.unmeasured().tolist() == [first, second, first]
    assert measured.of(np.array([1])).unmeasured().tolist() == [[False, False, True]]
    assert measured.of(slice(2, 9)).unmeasured().tolist() == [[True, False, False]]


def test_a_corpus_that_does_not_say_is_refused() -> None:
    old = SimpleNamespace(measured_genes=None, location="/data/corpus", row_dataset=np.zeros(1))
    with pytest.raises(ValueError, match=r"/data/corpus: a corpus of version 1 .* finalize again"):
        MeasuredGenes.of_corpus(old)
