"""Genes and counts: ids of any kind reach their column; what is not counts is told apart."""

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts import MAX_COUNT, choose_matrix, exact_counts
from data_prep.harmonize import GeneResolver, check_cover, harmonize, largest_losses
from data_prep.source import Matrix, Source, UnusableError
from sclong_ds.genes import GeneVocabulary

GENES = GeneVocabulary.bundled()
TP53, GAPDH = GENES.index["ENSG00000141510"], GENES.index["ENSG00000111640"]


@pytest.fixture(scope="module")
def resolver() -> GeneResolver:
    return GeneResolver(GENES)


def names(*values: str) -> np.ndarray:
    return np.array(values, dtype=object)


def matrix(values: np.ndarray, name: str = "X", **columns: np.ndarray) -> Matrix:
    columns = columns or {"index": names(*GENES.ids[: values.shape[1]])}
    return Matrix(
        name=name,
        shape=values.shape,
        gene_columns=columns,
        blocks=lambda: iter([sparse.csr_matrix(values)]),
    )


def test_ids_versions_symbols_and_aliases_mean_the_same_gene(resolver: GeneResolver) -> None:
    found = resolver.columns(
        names(
            "ENSG00000141510",
            "ENSG00000141510.18",
            "TP53",
            " TP53 ",
            "GRCh38_ENSG00000141510",
            "hg19_TP53",
            "LFS1",
            "ENSG00000111640_PAR_Y",
        )
    )
    assert found.tolist() == [TP53] * 7 + [GAPDH]


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
    assert small.columns(names("TP53", "GAPDH", "TSPAN6", "LFS1")).tolist() == [1, 0, -1, 1]


def test_columns_of_one_gene_are_summed_and_unknown_ones_dropped(resolver: GeneResolver) -> None:
    counts = np.array([[1, 2, 3, 4, 0], [0, 0, 7, 0, 9]])
    labels = names("TP53", "ENSG00000141510.1", "what", "LFS1", "GAPDH")
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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (names(*(f"ENSMUSG{i:011d}" for i in range(4))), "mouse ids"),
        (names("TP53", "GAPDH", "mm10___ENSMUSG00000000001"), "mouse ids"),
        (names(*(f"FBgn{i:07d}" for i in range(4))), "fruit fly ids"),
        (names(*(f"ENSXXXG{i:011d}" for i in range(4))), "species ENSXXX ids"),
        (names("0", "1", "2"), "plain numbers"),
    ],
)
def test_other_species_and_numbers_are_named(
    resolver: GeneResolver, labels: np.ndarray, message: str
) -> None:
    with pytest.raises(UnusableError, match=message):
        resolver.resolve(matrix(np.ones((1, len(labels)), dtype=int), index=labels))


def test_mouse_ids_are_seen_in_any_column(resolver: GeneResolver) -> None:
    labels = names(*(f"ENSMUSG{i:011d}" for i in range(2)))
    with pytest.raises(UnusableError, match="mouse"):
        resolver.resolve(matrix(np.ones((1, 2)), index=names("TP53", "GAPDH"), gene_ids=labels))


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64, np.float32, np.float64])
def test_counts_of_every_type_are_exact(dtype: type) -> None:
    values = np.array([[0, 1, 255], [7, 0, 0]]).astype(dtype)
    found = exact_counts(sparse.csr_matrix(values), where="X")
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found.toarray(), values.astype(np.int64))


def test_float_noise_is_rounded_and_stored_zeros_vanish() -> None:
    noisy = sparse.csr_matrix((np.array([0.999999999999997, 0.0, 2.0000001]), [0, 1, 2], [0, 3]))
    found = exact_counts(noisy, where="X")
    assert found.data.tolist() == [1, 2]
    assert found.nnz == 2


def test_the_largest_count_is_kept_and_more_is_refused() -> None:
    assert exact_counts(sparse.csr_matrix([[MAX_COUNT]]), where="X")[0, 0] == 2**32 - 1
    for dtype in (np.int64, np.float64, np.uint64):
        with pytest.raises(ValueError, match=r"below 2\^32"):
            exact_counts(sparse.csr_matrix(np.array([[2**32]], dtype=dtype)), where="X")


def counts_table() -> np.ndarray:
    return np.random.default_rng(5).poisson(1.0, (20, 30)).astype(np.float64) + np.eye(20, 30)


def test_what_is_not_counts_is_told_apart() -> None:
    counts = counts_table()
    scaled = counts / counts.sum(axis=1, keepdims=True)
    cases = {
        "log1p of cells scaled to 10000": np.log1p(1e4 * scaled),
        "looks log-transformed": np.log2(1 + counts),
        "TPM or CPM": 1e6 * scaled,
        "normalised to about 1e\\+04": 1e4 * scaled,
        "holds fractions": counts * np.linspace(10, 300, 20)[:, None] / 3,
        "looks scaled": (counts - counts.mean(axis=0)) / counts.std(axis=0),
        "true/false": counts > 0,
    }
    for message, values in cases.items():
        with pytest.raises(UnusableError, match=message):
            exact_counts(sparse.csr_matrix(values), where="X")


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (-1, "negative"), (-0.5, "negative")],
)
def test_damaged_values_are_errors_not_exclusions(value: float, message: str) -> None:
    values = counts_table()
    values[3, 4] = value
    with pytest.raises(ValueError, match=message) as error:
        exact_counts(sparse.csr_matrix(values), where="X")
    assert not isinstance(error.value, UnusableError)
    if value == -1:
        with pytest.raises(ValueError, match="negative count -1"):
            exact_counts(sparse.csr_matrix(values.astype(int)), where="X")


def test_raw_counts_are_found_where_they_are() -> None:
    counts = counts_table()
    logged = np.log1p(counts)
    x, raw, layer = matrix(logged), matrix(counts, "raw.X"), matrix(counts, "layers/counts")
    assert choose_matrix([x, raw], "auto").name == "raw.X"
    assert choose_matrix([x, layer], "auto").name == "layers/counts"
    assert choose_matrix([matrix(counts), matrix(logged, "raw.X")], "auto").name == "X"
    assert choose_matrix([matrix(counts), raw], "X").name == "X"
    with pytest.raises(ValueError, match=r"no matrix 'layers/umi'; the file holds X, raw.X"):
        choose_matrix([x, raw], "layers/umi")


def test_no_counts_anywhere_names_every_matrix() -> None:
    logged = np.log2(1 + counts_table())
    with pytest.raises(UnusableError, match=r"raw\.X looks log.*; X looks scaled"):
        choose_matrix([matrix(logged - 1), matrix(logged, "raw.X")], "auto")


def test_a_source_without_cells_or_genes_is_refused(resolver: GeneResolver) -> None:
    for shape in ((0, 3), (3, 0)):
        empty = matrix(np.zeros(shape), index=names(*GENES.ids[: shape[1]]))
        source = Source(path=None, format="h5ad", barcodes=names(), obs=None, matrices=(empty,))
        with pytest.raises(ValueError, match="nothing to convert"):
            harmonize(source, resolver=resolver)


def test_blocks_come_out_in_vocabulary_order(resolver: GeneResolver) -> None:
    counts = counts_table()
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
