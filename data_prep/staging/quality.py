"""Which cells are good enough: genes, counts and the mitochondrial share of a cell.

Order: values are proven on the matrix of the file; columns of one gene are summed and moved to the
vocabulary; genes and counts of a cell are those after that, since they are what the model sees. The
mitochondrial share is taken before it, over all counts of the file, so that it is the same whether
the vocabulary lists the mitochondrial genes or not.

Where nobody says otherwise a cell needs MIN_GENES genes. Cells of a file that names few genes of
the vocabulary (a panel, a small vocabulary) cannot reach that: there it is GENES_SHARE of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.staging.settings import GENES_SHARE, MIN_GENES

if TYPE_CHECKING:
    from scipy import sparse

    from data_prep.genes.gene_names import GeneMap
    from sclong_ds.corpus.genes import GeneVocabulary

DROPLET_COUNTS = 100
"""Droplets without a cell hold fewer counts; CellRanger and EmptyDrops take up to 100 for sure."""
COUNTS_SHARE = 0.05
"""The same as GENES_SHARE, for DROPLET_COUNTS."""

_Mask = npt.NDArray[np.bool_]

MITOCHONDRIAL_IDS = frozenset(
    f"ENSG00000{number}"
    for number in (
        # 13 protein-coding genes: MT-ND1-6, MT-ND4L, MT-CO1-3, MT-ATP6, MT-ATP8, MT-CYB
        *("198888", "198763", "198840", "198886", "212907", "198786", "198695"),
        *("198804", "198712", "198938", "198899", "228253", "198727"),
        # 2 rRNA genes: MT-RNR1, MT-RNR2
        *("211459", "210082"),
        # 22 tRNA genes
        *("210049", "210077", "209082", "210100", "210107", "210112", "210117", "210127"),
        *("210135", "210140", "210144", "210151", "210154", "210156", "210164", "210174"),
        *("210176", "210184", "210191", "210194", "210195", "210196"),
    )
)
"""The 37 genes of human mitochondrial DNA (GENCODE, chrM)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellLimits:
    """Thresholds on the cells of one dataset, over the genes of the vocabulary."""

    min_genes: int
    min_counts: int = 1
    max_counts: int | None = None
    max_mito_fraction: float | None = None
    given: bool = False
    """Whether the user said what a cell is (min_genes or min_counts)."""


def default_min_genes(n_mapped: int) -> int:
    """Return the fewest genes of a cell where nobody says how many.

    Args:
        n_mapped: Genes of the vocabulary that the file names.

    Returns:
        MIN_GENES, or GENES_SHARE of `n_mapped` where that is less; 1 at least.
    """
    return max(1, min(MIN_GENES, int(GENES_SHARE * n_mapped)))


def droplet_counts(n_mapped: int) -> int:
    """Return the counts from which on a barcode may be a cell.

    Args:
        n_mapped: Genes of the vocabulary that the file names.

    Returns:
        DROPLET_COUNTS, or COUNTS_SHARE of `n_mapped` where that is less; 1 at least.
    """
    return max(1, min(DROPLET_COUNTS, int(COUNTS_SHARE * n_mapped)))


def mitochondrial_genes(gene_map: GeneMap, genes: GeneVocabulary) -> _Mask:
    """Return which genes of a dataset lie on the mitochondrial DNA.

    Args:
        gene_map: Names of the dataset's genes and where they went.
        genes: The vocabulary.

    Returns:
        (n_input,) True for the 37 Ensembl ids, for symbols that begin with `MT-` (mouse: `mt-`),
        and for other names of these genes that the vocabulary resolves.
    """
    listed = [genes.index[gene] for gene in MITOCHONDRIAL_IDS if gene in genes.index]
    named = [name in MITOCHONDRIAL_IDS or name.startswith(("MT-", "mt-")) for name in gene_map.read]
    return np.array(named, dtype=bool) | np.isin(gene_map.target, listed)


def mitochondrial_share(counts: sparse.csr_matrix, mitochondrial: _Mask) -> npt.NDArray[np.float64]:
    """Return the share of each cell's counts that is mitochondrial.

    Args:
        counts: (cells, n_input) all counts of the file.
        mitochondrial: See `mitochondrial_genes`.

    Returns:
        (cells,) 0 to 1; 0 for a cell without counts.
    """
    total = np.asarray(counts.sum(axis=1)).ravel()
    return np.asarray(counts @ mitochondrial.astype(np.int64)).ravel() / np.maximum(total, 1)


def failing_cells(cells: sparse.csr_matrix, limits: CellLimits) -> dict[str, _Mask]:
    """Return which cells fail each threshold on genes and counts.

    Args:
        cells: (cells, n_genes) counts in the vocabulary, no stored zeros.
        limits: The thresholds.

    Returns:
        By reason, (cells,) True where a cell fails; reasons in the order they are counted in.
    """
    n_genes = np.diff(cells.indptr)
    n_counts = np.asarray(cells.sum(axis=1)).ravel()
    failing = {
        "without counts": n_genes == 0,
        "below min_genes": n_genes < limits.min_genes,
        "below min_counts": n_counts < limits.min_counts,
    }
    if limits.max_counts is not None:
        failing["above max_counts"] = n_counts > limits.max_counts
    return failing
