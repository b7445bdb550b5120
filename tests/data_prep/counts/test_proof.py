"""Counts: whole numbers are proven, everything else is told for what it is."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import sparse

from data_prep.counts.candidates import choose_counts
from data_prep.counts.proof import MAX_COUNT, exact_counts
from data_prep.source.source import Matrix, UnusableError


def chosen(matrices: Sequence[Matrix], wanted: str = "auto") -> str:
    return choose_counts(matrices, wanted).matrix.name


def matrix(values: np.ndarray, name: str = "X", *, block_rows: int = 1000) -> Matrix:
    rows = sparse.csr_matrix(values)
    return Matrix(
        name=name,
        shape=values.shape,
        gene_columns={},
        blocks=lambda: (
            rows[start : start + block_rows] for start in range(0, len(values), block_rows)
        ),
    )


def counts_table() -> np.ndarray:
    return np.random.default_rng(5).poisson(1.0, (20, 30)).astype(np.float64) + np.eye(20, 30)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.float16, np.float32])
def test_values_of_one_place_add_up_beyond_their_type(dtype: type) -> None:
    repeated = sparse.csr_matrix(
        (np.full(3, 100, dtype), [4, 1, 4], [0, 3, 3]), shape=(2, 5)
    )  # 200 is too much for int8
    many = sparse.csr_matrix((np.full(3000, 100, dtype), np.zeros(3000, int), [0, 3000]), (1, 1))
    found = exact_counts(repeated, where="X")
    assert (found.indices.tolist(), found.data.tolist()) == ([1, 4], [100, 200])
    assert exact_counts(many, where="X").toarray().tolist() == [[300_000]]
    assert repeated.nnz == 3  # the block belongs to the reader


def test_values_of_one_place_are_proven_one_by_one_and_together() -> None:
    halves = sparse.csr_matrix(([0.5, 0.5], [0, 0], [0, 2]), shape=(1, 1))
    with pytest.raises(UnusableError, match=r"first fraction 0\.5"):
        exact_counts(halves, where="X")
    for parts in ([2**31, 2**31], [MAX_COUNT, 1], [3 * 2**30, 2**30]):
        block = sparse.csr_matrix((np.array(parts, np.uint32), [0, 0], [0, 2]), shape=(1, 1))
        with pytest.raises(
            ValueError, match=r"one cell and gene that add up to 4294967296; .*2\^32"
        ):
            exact_counts(block, where="X")


COUNTS = counts_table()
SCALED = COUNTS / COUNTS.sum(axis=1, keepdims=True)
FACTORS = np.linspace(10, 300, 20)[:, None] / 3
LENGTHS = np.random.default_rng(6).uniform(0.5, 9, 30)
"""Gene lengths in kilobases."""
RATES = COUNTS / LENGTHS


@pytest.mark.parametrize(
    ("message", "values"),
    [
        (r"is log1p of cells scaled to 10000,", np.log1p(1e4 * SCALED)),
        (r"is log1p of cells scaled to 1,", np.log1p(SCALED)),
        (r"is log2\(1 \+ x\) of cells scaled to 1e\+06,", np.log2(1 + 1e6 * SCALED)),
        (r"is log10\(1 \+ x\) of cells scaled to 10000,", np.log10(1 + 1e4 * SCALED)),
        (r"is log1p of raw counts,", np.log1p(COUNTS)),
        (r"is log2\(1 \+ x\) of raw counts,", np.log2(1 + COUNTS)),
        (r"is log1p of counts scaled by a factor per cell", np.log1p(COUNTS * FACTORS)),
        (r"looks log-transformed,", np.log1p(RATES * FACTORS)),
        (r"is CPM ", 1e6 * SCALED),
        (r"is TPM ", 1e6 * RATES / RATES.sum(axis=1, keepdims=True)),
        (r"is normalised to about 1e\+04 a cell,", 1e4 * SCALED),
        (r"is normalised to about 1 a cell,", SCALED),
        (r"is counts scaled by a factor per cell", COUNTS * FACTORS),
        (r"holds fractions .*FPKM", RATES * FACTORS),
        (r"looks scaled,", (COUNTS - COUNTS.mean(axis=0)) / COUNTS.std(axis=0)),
        (r"holds true/false,", COUNTS > 0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_counts_is_told_apart(message: str, values: np.ndarray, dtype: type) -> None:
    kept = values if values.dtype == bool else values.astype(dtype)
    with pytest.raises(UnusableError, match=f"X {message}"):
        exact_counts(sparse.csr_matrix(kept), where="X")


_SOME = np.random.default_rng(12)
DEEP = np.minimum(_SOME.poisson(_SOME.gamma(0.6, 1.5, 600), (60, 600)), 12)
HALVED = np.where(_SOME.random(DEEP.shape) < 0.02, 0.5 * DEEP, DEEP)
LESSENED = np.where(_SOME.random(DEEP.shape) < 0.03, 0.7 * DEEP, DEEP)
CAPPED = np.where((DEEP > 0) & (np.arange(600) == 7), 20, LESSENED)


@pytest.mark.parametrize("values", [HALVED, LESSENED, CAPPED])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_with_a_few_fractions_are_estimated_counts(values: np.ndarray, dtype: type) -> None:
    message = r"X holds estimated counts \([1-4]\.\d% of the values are not whole\).*round:X"
    with pytest.raises(UnusableError, match=message):
        exact_counts(sparse.csr_matrix(values.astype(dtype)), where="X")


def test_floats_too_large_to_be_exact_are_refused() -> None:
    assert exact_counts(sparse.csr_matrix(np.float32([[2**24]])), where="X")[0, 0] == 2**24
    with pytest.raises(ValueError, match=r"16777218 as float32.*the count may have been rounded"):
        exact_counts(sparse.csr_matrix(np.float32([[2**24 + 2]])), where="X")


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
    assert chosen([x, raw], "auto") == "raw.X"
    assert chosen([x, layer], "auto") == "layers/counts"
    assert chosen([matrix(counts), matrix(logged, "raw.X")], "auto") == "X"
    assert chosen([matrix(counts), raw], "X") == "X"
    with pytest.raises(ValueError, match=r"no matrix 'layers/umi'; the file holds X, raw.X"):
        choose_counts([x, raw], "layers/umi")


def test_no_counts_anywhere_names_every_matrix() -> None:
    logged = np.log2(1 + counts_table())
    with pytest.raises(UnusableError, match=r"no raw counts: raw\.X is log2.*; X looks scaled"):
        choose_counts([matrix(logged - 1), matrix(logged, "raw.X")], "auto")


def test_layer_names_are_read_in_any_case_and_others_only_hinted_at() -> None:
    logged, counts = np.log2(1 + counts_table()), counts_table()
    assert chosen([matrix(logged), matrix(counts, "layers/UMI")], "auto") == "layers/UMI"
    spliced = matrix(counts, "layers/spliced")
    with pytest.raises(UnusableError, match="whole numbers are in layers/spliced: if they are"):
        choose_counts([matrix(logged), spliced], "auto")
    with pytest.raises(UnusableError, match=r"neither raw\.X nor X.*layers/spliced"):
        choose_counts([spliced], "auto")
    assert chosen([matrix(logged), spliced], "layers/spliced") == "layers/spliced"


MANY = (
    np.random.default_rng(7)
    .poisson(np.random.default_rng(8).uniform(0.1, 3, (40, 1)) * np.full((40, 600), 1.0))
    .astype(np.float64)
)
ROUNDED = np.rint(1e4 * MANY / MANY.sum(axis=1, keepdims=True))
_RARE = np.random.default_rng(3)
FEW = _RARE.poisson(_RARE.uniform(0.1, 1, (40, 1)) * _RARE.gamma(0.3, 1, (1, 2400)))
SPREAD = np.rint(4e3 * FEW / FEW.sum(axis=1, keepdims=True))
"""Values so small that rounding moves the totals by 4 %, with no 1 among them."""


def test_rounded_tpm_of_a_few_bulk_samples_is_taken_only_by_name() -> None:
    rng = np.random.default_rng(5)
    bulk = rng.negative_binomial(3, 3 / (3 + np.exp(rng.normal(2, 2, (3, 2000)))))
    per_length = bulk / np.exp(rng.normal(7, 0.7, 2000))
    tpm = np.rint(1e6 * per_length / per_length.sum(axis=1, keepdims=True))
    with pytest.raises(UnusableError, match="X looks like TPM or CPM, rounded, not counts"):
        choose_counts([matrix(tpm)], "auto")
    assert chosen([matrix(tpm)], "X") == "X"
    assert chosen([matrix(bulk)], "auto") == "X"
    # Counts that were subsampled to a million each are counts.
    shares = rng.dirichlet(np.ones(2000))
    assert chosen([matrix(rng.multinomial(1_000_000, shares, 3))], "auto") == "X"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ROUNDED,
            r"X looks normalised and rounded, not counts .*write counts = X in .*\(--counts\)",
        ),
        (SPREAD, "X looks normalised and rounded, not counts"),
        (np.rint(np.log1p(1e4 * FEW / FEW.sum(axis=1, keepdims=True))), "X looks like rounded log"),
        ((MANY > 0).astype(int), r"X holds no other value than 1 \(detected / not detected\)"),
    ],
)
def test_whole_numbers_that_are_no_counts_are_taken_only_by_name(
    values: np.ndarray, message: str
) -> None:
    with pytest.raises(UnusableError, match=message):
        choose_counts([matrix(values)], "auto")
    for counts in (MANY, FEW):
        if counts.shape == values.shape:
            both = [matrix(values), matrix(counts, "raw.X")]
            assert chosen(both, "auto") == "raw.X"
            both = [matrix(counts), matrix(values, "raw.X")]
            assert chosen(both, "auto") == "X"
    assert chosen([matrix(values)], "X") == "X"
    assert chosen([matrix(values[:19])], "auto") == "X"


def test_simulated_counts_of_equal_depth_are_counts() -> None:
    rng = np.random.default_rng(4)
    for values in (rng.poisson(1.0, (50, 2000)), rng.integers(0, 50, (40, 60))):
        assert chosen([matrix(values)], "auto") == "X"


def test_counts_sampled_down_to_one_total_are_counts() -> None:
    down = np.random.default_rng(9).multinomial(500, np.full(600, 1 / 600), size=40)
    assert chosen([matrix(down)], "auto") == "X"
    down[:5, :] = np.minimum(down[:5, :], 1)
    assert chosen([matrix(down)], "auto") == "X"


def test_negative_zeros_and_cells_of_huge_totals_are_counts() -> None:
    zeros = sparse.csr_matrix((np.array([-0.0, 2.0]), [0, 1], [0, 2]), shape=(1, 3))
    found = exact_counts(zeros, where="X")
    assert (found.nnz, found.toarray().tolist()) == (1, [[0, 2, 0]])
    deep = exact_counts(sparse.csr_matrix(np.full((1, 3), MAX_COUNT)), where="X")
    assert int(deep.sum()) == 3 * MAX_COUNT


def test_empty_cells_in_front_prove_nothing() -> None:
    counts, logged = counts_table(), np.log2(1 + counts_table())
    counts[:4], logged[:4] = 0, 0
    raw, x = matrix(logged, "raw.X", block_rows=2), matrix(counts, block_rows=2)
    assert chosen([x, raw], "auto") == "X"
    with pytest.raises(ValueError, match="X holds no counts: all 20 cells are empty") as error:
        choose_counts([matrix(counts * 0, block_rows=2)], "auto")
    assert not isinstance(error.value, UnusableError)
