"""Which matrix is taken for the counts, what is said of the others, and when none is taken."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts.candidates import choose_counts, restorable
from data_prep.ledger.ledger import MatrixFinding
from data_prep.source.source import Matrix, UnusableError

N_CELLS, N_GENES = 60, 300
NAMES = np.array([f"G{i}" for i in range(N_GENES)], dtype=object)
RNG = np.random.default_rng(11)
COUNTS = RNG.negative_binomial(1, RNG.uniform(0.1, 0.9, N_GENES), (N_CELLS, N_GENES))
LOGGED = np.log1p(1e4 * COUNTS / COUNTS.sum(axis=1, keepdims=True))


def matrix(
    values: np.ndarray, name: str = "X", *, genes: np.ndarray = NAMES, rows: int = 25
) -> Matrix:
    stored = sparse.csr_matrix(values)

    def blocks() -> Iterator[sparse.csr_matrix]:
        return (stored[first : first + rows] for first in range(0, stored.shape[0], rows))

    return Matrix(name=name, shape=values.shape, gene_columns={"index": genes}, blocks=blocks)


def read(matrices: list[Matrix], wanted: str = "auto") -> np.ndarray:
    return sparse.vstack(list(choose_counts(matrices, wanted).matrix.blocks())).toarray()


def test_two_that_disagree_are_refused_with_both_totals_and_the_cure() -> None:
    capped, findings = np.minimum(COUNTS, 6), list[MatrixFinding]()
    both = [matrix(LOGGED), matrix(capped, "raw.X"), matrix(COUNTS, "layers/counts")]
    with pytest.raises(UnusableError) as error:
        choose_counts(both, "auto", findings)
    totals = [int(values[:25].sum()) for values in (capped, COUNTS)]
    for part in (
        f"raw.X (total {totals[0]} in the 25 cells looked at, largest value 6)",
        f"layers/counts (total {totals[1]} in the 25 cells",
        f"differ in {np.count_nonzero((capped != COUNTS)[:25])} values",
        "write counts = raw.X or counts = layers/counts",
    ):
        assert part in str(error.value)
    # What each one is goes to the ledger all the same.
    assert [(f["name"], f["looks"][:6], f["cells"]) for f in findings] == [
        ("X", "is log", 25),
        ("raw.X", "counts", 25),
        ("layers/counts", "counts", 25),
    ]
    assert [f["total"] for f in findings[1:]] == totals
    for name, values in (("raw.X", capped), ("layers/counts", COUNTS)):
        np.testing.assert_array_equal(read(both, name), values)


def test_a_disagreement_in_a_later_block_is_found_while_reading() -> None:
    late = COUNTS.copy()
    late[50, 3] += 1
    both = [matrix(COUNTS, "raw.X", rows=20), matrix(late, "layers/counts", rows=17)]
    chosen = choose_counts(both)
    assert chosen.matrix.name == "raw.X"
    message = r"raw\.X and layers/counts both .*differ in 1 values in cells 40 to 59 .*write counts"
    with pytest.raises(UnusableError, match=message):
        list(chosen.matrix.blocks())
    late[50] = 0.5
    for other in (late, np.where(np.arange(N_CELLS)[:, None] < 45, COUNTS, LOGGED)):
        chosen = choose_counts([both[0], matrix(other, "layers/counts", rows=17)])
        with pytest.raises(UnusableError, match="layers/counts"):
            list(chosen.matrix.blocks())


def test_equal_matrices_and_subsets_of_genes_are_no_conflict() -> None:
    order = np.random.default_rng(2).permutation(N_GENES)
    few = order[:40]
    others = [
        matrix(COUNTS, "layers/counts", rows=7),
        matrix(COUNTS[:, few].astype(np.float32), genes=NAMES[few], rows=7),
        matrix(COUNTS[:, order], genes=NAMES[order]),
        matrix(np.hstack([COUNTS, COUNTS[:, :1]]), genes=np.append(NAMES, "more")),
    ]
    for other in others:
        pair = [matrix(COUNTS, "raw.X"), other]
        chosen = choose_counts(pair)
        largest = max(pair, key=lambda found: found.shape[1])
        assert chosen.matrix.name == largest.name
        assert chosen.reason.startswith("holds the same counts as")
        assert read(pair).sum() == sum(block.sum() for block in largest.blocks())
    # Two orders of the same values are told apart by the names of the genes.
    with pytest.raises(UnusableError, match="both look like raw counts"):
        choose_counts([matrix(COUNTS, "raw.X"), matrix(COUNTS[:, order])])


def test_other_names_for_the_same_genes_are_compared_through_any_column() -> None:
    ids = np.array([f"ENSG{i:011d}" for i in range(N_GENES)], dtype=object)
    raw = matrix(COUNTS, "raw.X", genes=ids)
    raw.gene_columns["symbols"] = NAMES  # type: ignore[index]
    assert choose_counts([matrix(COUNTS), raw]).matrix.name == "raw.X"
    with pytest.raises(UnusableError, match="both look like raw counts"):
        choose_counts([matrix(COUNTS + 1), raw])
    strangers = matrix(COUNTS + 1, genes=np.array([f"x{i}" for i in range(N_GENES)], dtype=object))
    (warning,) = choose_counts([strangers, raw]).warnings
    assert "raw.X and X name no gene alike and could not be compared" in warning


def test_counts_of_few_genes_are_reported_with_what_is_lost() -> None:
    few = [matrix(LOGGED[:, :40], genes=NAMES[:40]), matrix(LOGGED, "raw.X")]
    few.append(matrix(COUNTS[:, :40], "layers/counts", genes=NAMES[:40]))
    chosen = choose_counts(few)
    assert chosen.matrix.name == "layers/counts"
    (warning,) = chosen.warnings
    assert "layers/counts has 40 genes, raw.X 300: the other 260 genes are lost" in warning
    assert "write counts = invert_log1p:raw.X to restore them (scaled to 10000)" in warning
    assert not choose_counts([matrix(LOGGED), matrix(COUNTS, "raw.X")]).warnings
    assert restorable([matrix(COUNTS)]) == ""


def test_spliced_counts_alone_are_reported_and_parts_can_be_added() -> None:
    spliced = COUNTS // 2
    parts = [
        matrix(spliced, "layers/spliced"),
        matrix(COUNTS - spliced, "layers/unspliced", rows=9),
    ]
    (warning,) = choose_counts([matrix(spliced), *parts]).warnings
    assert "X equals layers/spliced, which is only a part of the counts" in warning
    both = "layers/spliced+layers/unspliced"
    assert f"write counts = {both} for all of them" in warning
    chosen = choose_counts([matrix(spliced), *parts], both)
    assert chosen.matrix.name == both
    np.testing.assert_array_equal(read([matrix(spliced), *parts], both), COUNTS)
    with pytest.raises(
        UnusableError, match=f"hold parts of the counts: write counts = .*{both[-9:]}"
    ):
        choose_counts([matrix(LOGGED), *parts])
    assert not choose_counts([matrix(COUNTS), *parts]).warnings


def test_sums_of_small_types_and_of_many_matrices_are_exact() -> None:
    byte = np.full((4, 3), 200, dtype=np.uint8)
    layers = [matrix(byte, f"layers/{i}", genes=NAMES[:3], rows=i + 1) for i in range(4)]
    wanted = "+".join(layer.name for layer in layers)
    np.testing.assert_array_equal(read(layers, wanted), np.full((4, 3), 800))
    with pytest.raises(ValueError, match=r"no matrix 'raw\.X'; the file holds layers/0"):
        choose_counts(layers, f"{wanted}+raw.X")
    other = matrix(byte, "raw.X", genes=NAMES[[0, 2, 1]])
    with pytest.raises(ValueError, match="only matrices of the same cells and genes are added"):
        choose_counts([*layers, other], "layers/0+raw.X")
    odd = [matrix(byte, "layers/a+layers/b", genes=NAMES[:3])]
    assert choose_counts(odd, "layers/a+layers/b").matrix.name == "layers/a+layers/b"
    halves = [layers[0], matrix(byte / 400, "layers/half", genes=NAMES[:3])]
    with pytest.raises(UnusableError, match="layers/half "):
        read(halves, "layers/0+layers/half")


def test_layers_of_other_names_do_not_decide_but_are_reported() -> None:
    other = matrix(COUNTS + np.roll(COUNTS, 1, axis=1), "layers/denoised")
    chosen = choose_counts([matrix(COUNTS), other])
    assert chosen.matrix.name == "X"
    (warning,) = chosen.warnings
    assert "layers/denoised (total" in warning
    assert "write counts = layers/denoised" in warning
    assert not choose_counts([matrix(COUNTS), matrix(COUNTS, "layers/copy")]).warnings
    broken, findings = np.full(COUNTS.shape, np.nan), list[MatrixFinding]()
    assert choose_counts([matrix(COUNTS), matrix(broken, "layers/nan")], "X", findings).matrix
    assert (findings[1]["total"], findings[1]["looks"][:5]) == (None, "holds")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.minimum(COUNTS, 4), "holds its largest value 4 .* may have been capped"),
        (np.minimum(COUNTS**3, 255).astype(np.uint8), "255 .*the largest number of its type"),
        (np.random.default_rng(3).poisson(1.0, (30, 2000)), "no value above . in cells .* bins or"),
    ],
)
def test_odd_largest_values_are_reported(values: np.ndarray, message: str) -> None:
    (warning,) = choose_counts([matrix(values)]).warnings
    assert re.search(message, warning)


def test_a_layer_stored_gene_by_gene_is_not_read_for_its_looks() -> None:
    def blocks() -> Iterator[sparse.csr_matrix]:
        raise AssertionError("a pass over all values")

    layer = Matrix(
        name="layers/scaled",
        shape=COUNTS.shape,
        gene_columns={"index": NAMES},
        blocks=blocks,
        by_gene=True,
    )
    findings = list[MatrixFinding]()
    assert choose_counts([matrix(COUNTS), layer], "auto", findings).matrix.name == "X"
    assert "not looked at" in findings[1]["looks"]


def test_blocks_that_were_looked_at_are_not_read_again() -> None:
    values, passes = COUNTS[:20], list[int]()

    def blocks() -> Iterator[sparse.csr_matrix]:
        passes.append(0)
        for first in range(0, len(values), 5):
            passes[-1] += 1
            yield sparse.csr_matrix(values[first : first + 5] * (first > 0))

    matrix = Matrix(name="X", shape=values.shape, gene_columns={}, blocks=blocks)
    chosen = choose_counts([matrix]).matrix
    # The first block is empty and proves nothing.
    assert passes == [2]
    first, second = (sparse.vstack(list(chosen.blocks())) for _ in range(2))
    assert passes == [4, 4]
    assert (first != second).nnz == 0
    np.testing.assert_array_equal(first.toarray()[5:], values[5:])


@pytest.mark.parametrize("late", [0, 40])
def test_layers_whose_names_differ_in_case_are_compared(late: int) -> None:
    other = COUNTS.copy()
    other[late:] += np.roll(COUNTS[late:], 1, axis=1)
    layers = [matrix(COUNTS, "layers/Counts"), matrix(other, "layers/counts")]
    with pytest.raises(UnusableError, match=r"layers/Counts .*layers/counts"):
        read([matrix(LOGGED), *layers])
    np.testing.assert_array_equal(read([matrix(COUNTS, "layers/COUNTS"), layers[0]]), COUNTS)
    np.testing.assert_array_equal(read(layers, "layers/counts"), other)
    spliced = [matrix(COUNTS, "layers/Spliced"), matrix(COUNTS, "layers/spliced")]
    warnings = choose_counts([matrix(COUNTS), *spliced]).warnings
    assert all(f"X equals layers/{name}," in str(warnings) for name in ("Spliced", "spliced"))
