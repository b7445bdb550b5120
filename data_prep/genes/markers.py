"""Markers of cell types among the genes that a vocabulary lacks: what is lost with them is named.

Markers are the genes of immunoglobulins and T-cell receptors, by which B, plasma and T cells are
told apart (names: IMGT nomenclature as HGNC keeps it), and those that the Seurat tutorial of
peripheral blood names its clusters by (https://satijalab.org/seurat/articles/pbmc3k_tutorial).
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import numpy.typing as npt

from data_prep.genes.gene_names import GeneMap
from sclong_ds.corpus.genes import GeneVocabulary

BLOOD = frozenset(
    "IL7R CCR7 S100A4 CD14 LYZ MS4A1 CD8A FCGR3A MS4A7 GNLY NKG7 FCER1A CST3 PPBP".split()
)
_RECEPTOR = re.compile(
    r"IGH(A[12]|D|E|G[1-4]|M)|IG[KL]C[1-7]?|IG[HKL][VJ]\d.*|IGHD\d.*"  # immunoglobulins
    r"|TR[ABDG]C[12]?|TR[ABDG][VJ]\d.*|TR[BD]D\d"  # T-cell receptors
)
_SEGMENT = re.compile(r"(IG[HKL]|TR[ABDG])[VDJ]\d")
_FEW = 1e-3
_NAMED = 5


def is_marker(symbol: str) -> bool:
    """Return whether a gene symbol is that of a marker."""
    return symbol in BLOOD or _RECEPTOR.fullmatch(symbol) is not None


def lost_markers(gene_map: GeneMap, totals: npt.NDArray[np.int64]) -> dict[str, int]:
    """Return the markers among the genes that the vocabulary lacks.

    Args:
        gene_map: Where the genes of a dataset go.
        totals: (n_input,) counts of each gene of the dataset.

    Returns:
        Symbols and their counts, most first; genes without counts are left out.
    """
    found: dict[str, int] = {}
    for gene in np.flatnonzero((gene_map.target < 0) & (totals > 0)):
        name = str(gene_map.read[gene])
        symbol = _markers_by_id().get(name.partition(".")[0], name.upper())
        if is_marker(symbol):
            found[symbol] = found.get(symbol, 0) + int(totals[gene])
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def lost_markers_warning(gene_map: GeneMap, totals: npt.NDArray[np.int64]) -> str | None:
    """Return what to say of lost markers; None: nothing that matters.

    Variable segments of receptors, which no vocabulary of genes holds and every file counts, matter
    from a thousandth of the counts.

    Args:
        gene_map: Where the genes of a dataset go.
        totals: (n_input,) counts of each gene of the dataset.
    """
    lost, total = lost_markers(gene_map, totals), int(totals.sum())
    few = sum(lost.values()) < _FEW * total
    if not lost or (few and all(_SEGMENT.match(name) for name in lost)):
        return None
    named = ", ".join(f"{name} {count / total:.2%}" for name, count in list(lost.items())[:_NAMED])
    more = f" and {len(lost) - _NAMED} more" * (len(lost) > _NAMED)
    return (
        f"the vocabulary lacks {len(lost)} markers of cell types that are counted here: {named}"
        f"{more}; {sum(lost.values()) / total:.2%} of all counts are lost with them"
    )


@cache
def _markers_by_id() -> dict[str, str]:
    """Return the symbols of markers by Ensembl id, those of the bundled vocabulary."""
    bundled = GeneVocabulary.bundled()
    pairs = zip(bundled.ids, bundled.symbols, strict=True)
    return {gene: symbol for gene, symbol in pairs if is_marker(symbol)}
