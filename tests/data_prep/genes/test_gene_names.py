"""Gene names of any kind reach their column; other species are named; nothing is guessed."""

import numpy as np
import pytest
from gene_matrices import GENES, matrix, names
from scipy import sparse

from data_prep.genes.gene_names import GeneResolver, resolver_of
from data_prep.genes.settlement import KINDS
from data_prep.source.source import UnusableError
from sclong_ds.corpus.genes import GeneVocabulary

TP53, GAPDH = GENES.index["ENSG00000141510"], GENES.index["ENSG00000111640"]


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return GeneResolver(GENES)


def test_ids_versions_symbols_and_aliases_mean_the_same_gene(resolver: GeneResolver) -> None:
    found = resolver.columns(
        names(
            "ENSG00000141510",
            "ENSG00000141510.18",
            "TP53",
            " TP53 ",
            "GRCh38_ENSG00000141510",
            "hg19_TP53",
            "ENSG00000111640_PAR_Y",
            "ENSGR0000111640.2",
        )
    )
    assert found.tolist() == [TP53] * 6 + [GAPDH] * 2
    assert resolver.columns(names("LFS1")).tolist() == [TP53]


def test_unknown_ambiguous_and_differently_written_names_are_not_guessed(
    resolver: GeneResolver,
) -> None:
    # GARS and SARS are names of several genes; case matters because names differ by case alone.
    unknown = names("tp53", "NOTAGENE", "", "GARS", "SARS", "ENSG99999999999", "1-Mar", "nan")
    assert resolver.columns(unknown).tolist() == [-1] * len(unknown)


def test_a_current_symbol_comes_before_an_alias(resolver: GeneResolver) -> None:
    found = resolver.columns(names(*GENES.symbols))
    np.testing.assert_array_equal(found, np.arange(len(GENES)))


def test_a_plain_list_of_ids_borrows_the_bundled_symbols() -> None:
    ids = ("ENSG00000111640", "ENSG00000141510")
    small = GeneResolver(GeneVocabulary(ids, ids, ("unknown", "unknown")))
    assert small.columns(names("LFS1", "GAPDH", "TSPAN6")).tolist() == [1, 0, -1]
    assert small.columns(names("TP53", "TBCE", "TBCE.1")).tolist() == [1, -1, -1]


def test_columns_of_one_gene_are_summed_and_unknown_ones_dropped(resolver: GeneResolver) -> None:
    counts = np.array([[1, 2, 3, 4, 0], [0, 0, 7, 0, 9]])
    labels = names("TP53", "ENSG00000141510.1", "what", "TP53", "GAPDH")
    gene_map = resolver.resolve(matrix(counts, index=labels))
    found = gene_map.apply(sparse.csr_matrix(counts))
    assert found.shape == (2, len(GENES))
    assert found[0, TP53] == 7
    assert found[1, GAPDH] == 9
    assert found.sum() == 16
    assert found.has_sorted_indices
    assert gene_map.n_mapped == 2


def test_the_column_that_reaches_most_genes_is_taken(resolver: GeneResolver) -> None:
    counts = np.ones((2, 3), dtype=int)
    labels = names("chr1", "chr1", "chr2")
    by_symbol = matrix(
        counts, index=names("a", "b", "c"), chrom=labels, name_of=names("TP53", "GAPDH", "x")
    )
    assert resolver.resolve(by_symbol).column == "name_of"
    assert resolver.resolve(by_symbol, "index").column == "index"
    with pytest.raises(
        ValueError, match="no gene column 'nope'; the file has index, chrom, name_of"
    ):
        resolver.resolve(by_symbol, "nope")


def test_ids_are_preferred_to_symbols_that_reach_as_many_genes(resolver: GeneResolver) -> None:
    counts = np.ones((1, 2), dtype=int)
    both = matrix(
        counts, index=names("TP53", "GAPDH"), gene_ids=names(GENES.ids[TP53], GENES.ids[GAPDH])
    )
    assert resolver.resolve(both).column == "gene_ids"


MOUSE = ["Gapdh", "Actb", "Gm1234", "mt-Nd1", "0610009B22Rik", "Cd3e", "Tspan6"]
RAT = ["Gapdh", "Actb", "RGD1311517", "Mt-nd1", "LOC100360087", "Cd3e", "Tspan6"]
ZEBRAFISH = ["gapdh", "actb1", "si:dkey-1", "zgc:12345", "cd3e", "tspan6", "tp53"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (names(*(f"ENSMUSG{i:011d}" for i in range(4))), "4 of 4 gene ids are mouse ids"),
        (names("TP53", "GAPDH", "mm10___ENSMUSG00000000001"), "mouse ids"),
        (names("GRCh38_TP53", "GRCh38_GAPDH", "mm10_Gapdh", "mm10_Actb"), "mouse ids"),
        (
            names("GRCh38---TP53", "GRCh38.p13_CD4", "mm10---Cd4", "GRCm38.p6_Cd8a"),
            "2 of 4 .*mouse",
        ),
        (names("HUMAN_TP53", "MOUSE_Gapdh", "Gapdh|ENSMUSG00000057666"), "2 of 3 .* mouse ids"),
        (names(*(f"ENSRNOG{i:011d}" for i in range(4))), "rat ids"),
        (names(*(f"ENSDARG{i:011d}.3" for i in range(4))), "zebrafish ids"),
        (names(*(f"ENSMMUG{i:011d}" for i in range(4)), "TP53"), "macaque ids"),
        (names(*(f"FBgn{i:07d}" for i in range(4))), "fruit fly ids"),
        (names("WBGene00000001", "WBGene00000002"), "Caenorhabditis elegans ids"),
        (names("AT1G01010", "ATMG00010"), "Arabidopsis ids"),
        (names("YAL001C", "YBR002W"), "yeast ids"),
        (names(*(f"ENSXXXG{i:011d}" for i in range(4))), "species ENSXXX ids"),
        (names(*MOUSE), r"4 of 7 gene symbols are mouse symbols \(such as Gapdh\)"),
        (names(*RAT), "gene symbols are rat symbols"),
        (names("Gapdh", "Actb", "Cd3e"), "mouse or rat symbols"),
        (names(*ZEBRAFISH), "zebrafish symbols"),
        (names(*GENES.symbols[:20], *MOUSE), "are mouse symbols"),
        (names("0", "1", "2"), "plain numbers"),
    ],
)
def test_other_species_and_numbers_are_named(
    resolver: GeneResolver, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(UnusableError, match=message):
        resolver.resolve(matrix(np.ones((1, len(labels)), dtype=int), index=labels))


def test_human_names_are_no_other_species(resolver: GeneResolver) -> None:
    few_mouse = names(*GENES.symbols[:100], "Gapdh", "mm10_Actb", "eGFP", "tdTomato")
    for labels in (names(*GENES.symbols), names(*GENES.ids), few_mouse):
        assert resolver.resolve(matrix(np.ones((1, 1)), index=labels)).column == "index"


def test_names_are_counted_by_how_they_are_resolved(resolver: GeneResolver) -> None:
    labels = names("ENSG00000141510.2", "TP53", "GAPDH", "LFS1", "GARS", "SARS", "SEPT2", "what")
    labels = np.append(labels, ["ENSG99999999999", "7A5", "1-Mar", "SARS2"]).astype(object)
    assert resolver.kinds(labels) == dict(zip(KINDS, (1, 3, 1, 1, 1, 2, 1, 2), strict=True))
    assert resolver.resolve(matrix(np.ones((1, 12)), index=labels)).kinds == resolver.kinds(labels)


def test_only_columns_of_the_id_type_are_chosen_from(resolver: GeneResolver) -> None:
    counts = np.ones((1, 3), dtype=int)
    both = matrix(
        counts,
        symbol=names("TP53", "GAPDH", "TSPAN6"),
        gene_id=names(GENES.ids[TP53], GENES.ids[GAPDH], "ENSG99999999999"),
    )
    assert resolver.resolve(both, id_type="ensembl").column == "gene_id"
    assert resolver.resolve(both, id_type="symbol").column == "symbol"
    with pytest.raises(ValueError, match=r"no gene column is of the id_type ensembl.*symbol \(sym"):
        resolver.resolve(both, "symbol", id_type="ensembl")


def test_genes_are_told_from_cells_in_any_species(resolver: GeneResolver) -> None:
    assert resolver.share(names(*MOUSE[:2], "ENSMUSG00000000001", "TP53")) == 1
    assert resolver.share(names("AAACCTGA-1", "cell7", "sample_3", "")) == 0


def test_mouse_ids_are_seen_in_any_column(resolver: GeneResolver) -> None:
    labels = names(*(f"ENSMUSG{i:011d}" for i in range(2)))
    with pytest.raises(UnusableError, match="mouse"):
        resolver.resolve(matrix(np.ones((1, 2)), index=names("TP53", "GAPDH"), gene_ids=labels))


def test_genes_that_a_file_names_are_measured_whatever_their_counts(resolver: GeneResolver) -> None:
    labels = names("hg19_TP53", "GAPDH", "LFS1", "what")
    gene_map = resolver.resolve(matrix(np.zeros((1, 4), dtype=int), index=labels))
    assert gene_map.measured.shape == (len(GENES),)
    assert np.flatnonzero(gene_map.measured).tolist() == sorted([TP53, GAPDH])
    assert gene_map.repairs == {"genome": 1}
    assert gene_map.read.tolist() == ["TP53", "GAPDH", "LFS1", "what"]


def test_missing_names_and_numbers_are_no_aliases(resolver: GeneResolver) -> None:
    # NaN is an alias of SCN11A and 14.1 one of IGLL1: in a gene table both stand for something else
    missing = names("NaN", "nan", "14.1", "", "NA", "None")
    assert resolver.columns(missing).tolist() == [-1] * len(missing)


MOUSE_IDS = tuple(f"ENSMUSG{number:011d}" for number in range(1, 301))
MOUSE_GENES = GeneVocabulary(
    MOUSE_IDS, ("Trp53", "Gapdh", *MOUSE_IDS[2:]), ("protein_coding",) * len(MOUSE_IDS)
)


def test_a_vocabulary_of_another_species_takes_that_species_and_refuses_others() -> None:
    mouse = GeneResolver(MOUSE_GENES)
    assert mouse.species == "mouse"
    labels = names(f"{MOUSE_IDS[0]}.7", "mm10___Gapdh", "ensmusg00000000003", "Gapdh-1", "Gapdh")
    assert mouse.columns(labels).tolist() == [0, 1, 2, 1, 1]
    # No human alias and no human symbol means a gene of it.
    assert mouse.columns(names("TP53", "GAPDH", "LFS1", "SEPT2")).tolist() == [-1] * 4
    human = matrix(np.ones((1, 3)), index=names(*GENES.ids[:3]))
    with pytest.raises(UnusableError, match=r"3 of 3 gene ids are human ids .*vocabulary is mouse"):
        mouse.resolve(human)
    rat = matrix(np.ones((1, 3)), index=names(*(f"ENSRNOG{i:011d}" for i in range(3))))
    with pytest.raises(UnusableError, match=r"are rat ids .*the vocabulary is mouse"):
        mouse.resolve(rat)


def test_a_vocabulary_is_of_one_species() -> None:
    ids = (*MOUSE_IDS[:3], *GENES.ids[:2])
    with pytest.raises(ValueError, match="3 ids of mouse and 2 of human; a vocabulary is of one"):
        GeneResolver(GeneVocabulary(ids, ids, ("unknown",) * 5))
    made_up = ("gene1", "gene2")
    assert GeneResolver(GeneVocabulary(made_up, made_up, ("unknown",) * 2)).species == "human"


def test_the_resolver_of_the_bundled_genes_is_made_once() -> None:
    bundled = GeneVocabulary.bundled()
    again = GeneVocabulary(bundled.ids, bundled.symbols, bundled.classes)
    assert resolver_of(again) is resolver_of(bundled)
    renamed = GeneVocabulary(bundled.ids, ("X", *bundled.symbols[1:]), bundled.classes)
    other = resolver_of(renamed)
    assert other is not resolver_of(bundled)
    assert other.columns(np.array(["X"], dtype=object)).tolist() == [0]
