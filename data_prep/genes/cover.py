"""Whether a dataset shares enough genes with the vocabulary to be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_prep.source.source import UnusableError

if TYPE_CHECKING:
    from data_prep.genes.gene_names import GeneMap

MIN_GENES_MAPPED = 200
MIN_SHARE_MAPPED = 0.25
"""A full GENCODE annotation has up to 79,000 genes, of which 27,874 are listed (35 %)."""


def check_cover(gene_map: GeneMap, *, min_genes: int, min_share: float) -> None:
    """Refuse a dataset that shares too few genes with the vocabulary.

    Args:
        gene_map: The mapping of the dataset.
        min_genes: Smallest number of vocabulary genes reached.
        min_share: Smallest share of the dataset's genes that are known, 0 to 1.

    Raises:
        UnusableError: Below one of the two.
    """
    n_input, n_known = len(gene_map.target), int((gene_map.target >= 0).sum())
    examples = ", ".join(str(name) for name in gene_map.names[:3])
    if gene_map.n_mapped < min_genes:
        raise UnusableError(
            f"only {gene_map.n_mapped} of {n_input} genes are in the vocabulary "
            f"(column {gene_map.column}: {examples}...); at least {min_genes} "
            "are needed (--min-genes-mapped)"
        )
    if n_known < min_share * n_input:
        raise UnusableError(
            f"only {n_known} of {n_input} genes ({n_known / n_input:.0%}) are in the vocabulary "
            f"(column {gene_map.column}: {examples}...); at least {min_share:.0%} are needed "
            "(--min-share-mapped)"
        )
