"""Harmonised datasets: enough known genes, losses named, counts in the order of the vocabulary.

Covers also `data_prep/genes/cover.py`.
"""

import numpy as np
import pytest
from gene_matrices import GENES, matrix, names

from data_prep.genes.cover import check_cover
from data_prep.genes.gene_names import GeneResolver
from data_prep.genes.harmonize import harmonize, largest_losses
from data_prep.source.source import Source, UnusableError


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return GeneResolver(GENES)


def test_too_few_genes_in_number_or_share(resolver: GeneResolver) -> None:
    gene_map = resolver.resolve(matrix(np.ones((1, 3)), index=names("TP53", "GAPDH", "what")))
    check_cover(gene_map, min_genes=2, min_share=0.6)
    with pytest.raises(UnusableError, match="only 2 of 3 genes are in the vocabulary"):
        check_cover(gene_map, min_genes=3, min_share=0.0)
    with pytest.raises(UnusableError, match=r"only 2 of 3 genes \(67%\)"):
        check_cover(gene_map, min_genes=1, min_share=0.7)


def test_losses_are_named_largest_first(resolver: GeneResolver) -> None:
    gene_map = resolver.resolve(matrix(np.ones((1, 4)), index=names("x", "TP53", "y", "z")))
    assert largest_losses(gene_map, np.array([3, 100, 5, 0])) == {"y": 5, "x": 3}


def test_a_source_without_cells_or_genes_is_refused(resolver: GeneResolver) -> None:
    for shape in ((0, 3), (3, 0)):
        empty = matrix(np.zeros(shape), index=names(*GENES.ids[: shape[1]]))
        source = Source(path=None, format="h5ad", barcodes=names(), obs=None, matrices=(empty,))
        with pytest.raises(ValueError, match="nothing to convert"):
            harmonize(source, resolver=resolver)


def test_blocks_come_out_in_vocabulary_order(resolver: GeneResolver) -> None:
    counts = np.random.default_rng(5).poisson(1.0, (20, 30)).astype(np.float64)
    labels = names(*GENES.symbols[100:130])
    source = Source(
        path=None,
        format="h5ad",
        barcodes=names(),
        obs=None,
        matrices=(matrix(counts, index=labels),),
    )
    opened = harmonize(source, resolver=resolver, min_genes=30, min_share=1.0)
    (block,) = opened.blocks()
    np.testing.assert_array_equal(block[:, 100:130].toarray(), counts)
    assert block.sum() == counts.sum()


def test_log1p_values_come_out_as_the_counts_they_were_made_of(resolver: GeneResolver) -> None:
    counts = np.random.default_rng(1).poisson(1.0, (30, 300)).astype(np.float64)
    logged = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    source = Source(
        path=None, format="h5ad", barcodes=names(), obs=None, matrices=(matrix(logged),)
    )
    for wanted in ("invert_log1p", "invert_log1p:X"):
        opened = harmonize(source, resolver=resolver, counts=wanted)
        (block,) = opened.blocks()
        assert opened.target == 10_000
        np.testing.assert_array_equal(block[:, :300].toarray(), counts)
    with pytest.raises(UnusableError, match="no raw counts: X is log1p of cells scaled to 10000"):
        harmonize(source, resolver=resolver)
    with pytest.raises(ValueError, match=r"no matrix 'raw\.X'"):
        harmonize(source, resolver=resolver, counts="invert_log1p:raw.X")
