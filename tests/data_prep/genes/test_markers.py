"""Lost markers: which names are markers, what is said of their counts, and when."""

import numpy as np
import pytest
from gene_matrices import matrix, names

from data_prep.genes.gene_names import GeneResolver
from data_prep.genes.markers import is_marker, lost_markers, lost_markers_warning
from sclong_ds.corpus.genes import GeneVocabulary

MARKERS = "IGHM IGHA2 IGHG4 IGKC IGLC3 TRAC TRBC2 TRDC TRGC1 IGHV3-23 TRAV1-2 IGKJ4 MS4A1"
OTHERS = "IGHMBP2 IGLL5 IGLON5 TRADD TRAF1 TRDN TRDMT1 IGFBP3 GAPDH TRAP1 TRAK2"


def without_markers() -> GeneVocabulary:
    bundled = GeneVocabulary.bundled()
    kept = [i for i, symbol in enumerate(bundled.symbols) if not is_marker(symbol)]
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    return GeneVocabulary(*(tuple(column[i] for i in kept) for column in columns))


@pytest.mark.parametrize("symbol", MARKERS.split())
def test_receptor_genes_and_blood_markers_are_markers(symbol: str) -> None:
    assert is_marker(symbol)


@pytest.mark.parametrize("symbol", OTHERS.split())
def test_other_genes_of_like_names_are_not(symbol: str) -> None:
    assert not is_marker(symbol)


def test_losses_are_named_with_their_share_of_the_counts() -> None:
    bundled = GeneVocabulary.bundled()
    trac = bundled.ids[bundled.symbols.index("TRAC")]
    file = names("TP53", "GAPDH", "IGKC", f"{trac}.3", "NOGENE", "LYZ", "IGHM")
    gene_map = GeneResolver(without_markers()).resolve(matrix(np.ones((1, 7)), index=file))
    totals = np.array([600, 300, 30, 50, 20, 0, 0])
    assert lost_markers(gene_map, totals) == {"TRAC": 50, "IGKC": 30}
    said = lost_markers_warning(gene_map, totals)
    assert said is not None
    assert "lacks 2 markers of cell types that are counted here: TRAC 5.00%, IGKC 3.00%;" in said
    assert said.endswith("8.00% of all counts are lost with them")
    assert lost_markers_warning(gene_map, np.array([600, 300, 0, 0, 20, 0, 0])) is None


def test_variable_segments_matter_from_a_thousandth_of_the_counts() -> None:
    gene_map = GeneResolver(without_markers()).resolve(
        matrix(np.ones((1, 3)), index=names("TP53", "GAPDH", "IGHV3-23"))
    )
    assert lost_markers_warning(gene_map, np.array([9000, 1000, 9])) is None
    assert lost_markers_warning(gene_map, np.array([9000, 1000, 11])) is not None
