"""Quality of cells: thresholds by reason, mitochondrial genes under any of their names."""

import numpy as np
from scipy import sparse

from data_prep.genes.gene_names import GeneMap, GeneResolver
from data_prep.source.source import Matrix
from data_prep.staging.quality import (
    MITOCHONDRIAL_IDS,
    CellLimits,
    default_min_genes,
    droplet_counts,
    failing_cells,
    mitochondrial_genes,
    mitochondrial_share,
)
from sclong_ds.corpus.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()


def gene_map(*names: str, genes: GeneVocabulary = GENES) -> GeneMap:
    labels = np.array(names, dtype=object)
    matrix = Matrix(
        name="X", shape=(1, len(names)), gene_columns={"index": labels}, blocks=lambda: iter(())
    )
    return GeneResolver(genes).resolve(matrix)


def test_the_mitochondrial_genes_are_the_37_of_chrm() -> None:
    listed = {
        gene for gene, symbol in zip(GENES.ids, GENES.symbols, strict=True) if symbol[:3] == "MT-"
    }
    assert len(listed) == 14
    assert listed < MITOCHONDRIAL_IDS
    assert len(MITOCHONDRIAL_IDS) == 37


def test_mitochondrial_genes_are_known_by_id_symbol_and_alias() -> None:
    # MT-RNR2 is not in the vocabulary; CYTB is the Entrez symbol of MT-CYB.
    names = ["ENSG00000210082.2", "GRCh38_MT-ND1", "MT-RNR2", "CYTB", "TP53", "MTOR", "MT1X"]
    found = mitochondrial_genes(gene_map(*names), GENES)
    assert found.tolist() == [True, True, True, True, False, False, False]
    ids = ("ENSG00000141510",)
    without = GeneVocabulary(ids, ids, ("unknown",))
    found = mitochondrial_genes(gene_map("MT-ND1", "TP53", genes=without), without)
    assert found.tolist() == [True, False]


def test_the_mitochondrial_share_is_that_of_all_counts() -> None:
    counts = sparse.csr_matrix(np.array([[3, 1, 0], [0, 4, 4], [0, 0, 0], [5, 0, 0]]))
    share = mitochondrial_share(counts, np.array([True, False, False]))
    assert share.tolist() == [0.75, 0, 0, 1]


def test_cells_fail_by_every_threshold() -> None:
    cells = sparse.csr_matrix(np.array([[0, 0], [9, 0], [1, 1], [50, 50]]))
    failing = failing_cells(cells, CellLimits(min_genes=2, min_counts=3, max_counts=99))
    assert {name: mask.tolist() for name, mask in failing.items()} == {
        "without counts": [True, False, False, False],
        "below min_genes": [True, True, False, False],
        "below min_counts": [True, False, True, False],
        "above max_counts": [False, False, False, True],
    }
    assert "above max_counts" not in failing_cells(cells, CellLimits(min_genes=1))


def test_the_default_thresholds_follow_the_genes_that_a_file_names() -> None:
    genes = [default_min_genes(n) for n in (1, 49, 400, 9_999, 10_000, 27_874)]
    assert genes == [1, 1, 8, 199, 200, 200]
    assert [droplet_counts(n) for n in (1, 400, 1_999, 2_000, 27_874)] == [1, 20, 99, 100, 100]
