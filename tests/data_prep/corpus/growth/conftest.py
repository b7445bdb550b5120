"""Datasets that differ in what parts of a corpus may differ in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import data_prep.annotations.columns as columns_module
import sclong_ds.annotations.joined_columns as joined_columns_module

Stage = Callable[..., Path]
Counts = Callable[..., sparse.csr_matrix]


@pytest.fixture
def made(counts: Counts, stage_corpus: Stage, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five datasets: with repeated cells, donors, other gene lists, columns and text.

    Ids of an ontology with and without values, donors by one name, the other and both, and texts
    and numbers of too many values in one dataset.
    """
    for module in (columns_module, joined_columns_module):
        monkeypatch.setattr(module, "MOST_BITS", 6)
    rng = np.random.default_rng(4)
    a, b = counts(1, 90), counts(2, 70)
    copied = sparse.vstack([counts(3, 40), a[:9], b[[5, 5, 60]]], format="csr")
    few = np.arange(600) < 500
    near = a[20:50].multiply(few).tocsr().astype(a.dtype)
    near.sort_indices()
    part = sparse.vstack([near, counts(5, 30).multiply(few).tocsr()], format="csr").astype(a.dtype)
    part.eliminate_zeros()
    matrices = {"a": a, "b": b, "c": copied, "d": part, "e": counts(6, 30)}
    sizes = {name: matrix.shape[0] for name, matrix in matrices.items()}
    donors = {n: [f"{n}{row % 7}" for row in range(size)] for n, size in sizes.items() if n != "e"}
    donors["b"][:5] = ["a1"] * 5
    obs = {
        name: {
            "cell_type": [f"type {t}" for t in rng.integers(0, 3 + number, size)],
            "cell_type_ontology_term_id": [f"CL:{name}"] * size if number % 2 else [""] * size,
            "age": [str(t) for t in rng.integers(20, 40, size)],
            "is_primary_data": [str(t) for t in rng.integers(0, 2, size) > 0],
        }
        for number, (name, size) in enumerate(sizes.items())
        if name != "b"
    }
    obs["b"] = {"cell_type_ontology_term_id": ["CL:b", "", "CL:d"] * 23 + [""]}
    obs["a"] |= {
        "note": [f"note {i}" for i in range(90)],
        "score": [repr(i / 7) for i in range(90)],
    }
    obs["c"] |= {"score": ["7", ""] * 26, "disease": ["flu", "none"] * 26}
    obs["d"]["donor_id"] = [f"other {row % 5}" for row in range(60)]
    obs["e"] |= {"donor_id": [f"e{row % 3}" for row in range(30)], "note": ["x"] * 30}
    obs["e"]["disease_ontology_term_id"] = ["MONDO:1", "MONDO:2"] * 15
    return stage_corpus(
        matrices, donors=donors, obs=obs, measured={"d": few}, name="all", chunk_entries=8192
    )
