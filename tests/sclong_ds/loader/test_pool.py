import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, random_array

from sclong_ds.corpus.byte_code import MAX_COUNT, decode, encode
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.loader import pool as decoding
from sclong_ds.loader.pool import CellPool, gather_packed, to_csr, to_dense, to_dense_norm

G = 1500
COUNTS = st.one_of(
    st.integers(1, 4),
    st.sampled_from([255, 256, 512, 65535, 65536, 2**24 + 1, 2**24, MAX_COUNT, MAX_COUNT - 128]),
    st.integers(1, MAX_COUNT),
)
# Dense stretches, gaps of exactly 255 and 256, and the last gene.
GENES = st.one_of(st.integers(0, 40), st.integers(0, 5).map(lambda k: 255 * k), st.just(G - 1),
                  st.integers(0, G - 1))  # fmt: skip
CELLS = st.dictionaries(GENES, COUNTS, max_size=30)


def matrix_of(cells: list[dict[int, int]]) -> csr_matrix:
    rows = [sorted(cell.items()) for cell in cells]
    return csr_matrix(
        (
            np.array([count for row in rows for _, count in row], np.uint32),
            np.array([gene for row in rows for gene, _ in row], np.int32),
            np.cumsum([0, *(len(row) for row in rows)]),
        ),
        shape=(len(rows), G),
    )


def pool_of(matrix: csr_matrix, *, seed: int = 0) -> CellPool:
    """The cells in any order, with bytes of no cell before, between and behind them."""
    packed, rng = encode(matrix), np.random.default_rng(seed)
    entries = packed.row_entries.astype(np.int64)
    ends = np.cumsum(entries)
    start, place = np.zeros(len(entries), np.int64), 3
    gap = rng.integers(0, 256, len(packed.gap) + 3 * len(entries) + 6, dtype=np.uint8)
    count = rng.integers(0, 256, len(gap), dtype=np.uint8)
    for cell in rng.permutation(len(entries)):
        source = slice(ends[cell] - entries[cell], ends[cell])
        start[cell], target = place, slice(place, place + entries[cell])
        gap[target], count[target] = packed.gap[source], packed.count[source]
        place = target.stop + int(rng.integers(4))
    return CellPool(gap, count, start, packed.row_entries, packed.row_nnz, packed.row_total)


def chosen(pool: CellPool, cells: np.ndarray) -> CellPool:
    """The same bytes, of which a batch wants these cells."""
    tables = (pool.start, pool.entries, pool.nnz, pool.total)
    return CellPool(pool.gap, pool.count, *(table[cells] for table in tables))


def raw_pool(gap: list[int], count: list[int], *, nnz: int = 1) -> CellPool:
    """One cell, with a plain entry before and behind it."""
    return CellPool(
        np.array([1, *gap, 1], np.uint8),
        np.array([1, *count, 1], np.uint8),
        np.array([1]),
        np.array([len(gap)], np.uint32),
        np.array([nnz], np.uint32),
        np.array([1]),
    )


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def check_all(matrix: csr_matrix, cells: np.ndarray, *, seed: int = 0) -> None:
    """All four outputs against the matrix that was encoded."""
    pool, wanted = chosen(pool_of(matrix, seed=seed), cells), matrix[cells]
    packed = gather_packed(pool)
    decoded = decode(packed.gap, packed.count, packed.row_entries, matrix.shape[1])
    for result, dtype in (
        (decoded, np.uint32),
        (to_csr(pool, n_genes=matrix.shape[1], dtype=np.uint32), np.uint32),
        (to_csr(pool, n_genes=matrix.shape[1]), np.float32),
    ):
        result.check_format(full_check=True)
        assert result.shape == wanted.shape
        assert result.has_canonical_format
        same(result.indptr, wanted.indptr.astype(np.int32))
        same(result.indices, wanted.indices.astype(np.int32))
        same(result.data, wanted.data.astype(dtype))
    same(packed.row_nnz, np.diff(wanted.indptr).astype(np.uint32))
    same(packed.row_total, np.asarray(wanted.sum(axis=1, dtype=np.int64)).ravel())
    out = np.full(wanted.shape, np.nan, np.float32)
    assert to_dense(pool, out=out) is out
    same(out, wanted.toarray().astype(np.float32))
    out[:] = np.nan
    assert to_dense_norm(pool, target_sum=1e4, out=out) is out
    same(out, log1p_normalise(wanted, target_sum=1e4))


@pytest.mark.thorough
@given(
    cells=st.lists(CELLS, min_size=1, max_size=8),
    batch=st.lists(st.integers(0, 7), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
@example(cells=[{}, {0: 256, 255: 1, 1499: MAX_COUNT}], batch=[1, 0, 1], seed=0)
@settings(max_examples=150, deadline=None)
def test_every_output_is_the_cells_that_were_encoded(cells, batch, seed):
    check_all(matrix_of(cells), np.array([c % len(cells) for c in batch], np.int64), seed=seed)


def test_many_cells():
    rng = np.random.default_rng(0)
    matrix = csr_matrix(random_array((300, G), density=0.1, rng=rng, data_sampler=lambda size: (
        rng.zipf(1.3, size).clip(max=MAX_COUNT))), dtype=np.uint32)  # fmt: skip
    matrix.sort_indices()
    check_all(matrix, rng.integers(0, 300, 500))


DAMAGED = {
    "begins with a continuation": ([0, 2], [5, 1], 1),
    "count of five bytes": ([2, 0, 0, 0, 0], [1, 1, 1, 1, 1], 1),
    "gene behind the last": ([255, 255], [1, 1], 2),
    "continued gene behind the last": ([255, 255, 0], [1, 0, 1], 2),
}


@pytest.mark.parametrize(("gap", "count", "nnz"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_bytes(gap, count, nnz):
    pool, n_genes = raw_pool(gap, count, nnz=nnz), 300
    with pytest.raises(ValueError, match="damaged cells"):
        decode(np.array(gap, np.uint8), np.array(count, np.uint8), np.array([len(gap)]), n_genes)
    out = np.zeros((1, n_genes), np.float32)
    for call in (
        lambda: to_csr(pool, n_genes=n_genes),
        lambda: to_dense(pool, out=out),
        lambda: to_dense_norm(pool, target_sum=1e4, out=out),
    ):
        with pytest.raises(ValueError, match=r"damaged cell 0 .* of 300 genes"):
            call()


@pytest.mark.parametrize("nnz", [0, 1, 3, 7])
def test_csr_needs_the_number_of_values_that_the_table_says(nnz):
    pool = raw_pool([1, 1, 0], [1, 0, 1], nnz=nnz)
    with pytest.raises(ValueError, match=f"not a cell with {nnz} values"):
        to_csr(pool, n_genes=9)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_bytes_make_a_kernel_write_outside(data):
    """Any bytes give cells or an error; what lies behind the buffers stays as it was."""
    size, n_genes, guard = 24, 40, 16
    gap, count = (
        np.array(data.draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 5, 200, 255]),
                                    min_size=size, max_size=size)), np.uint8)
        for _ in range(2)
    )  # fmt: skip
    start = np.array(data.draw(st.lists(st.integers(0, size), min_size=4, max_size=4)))
    entries = np.array([data.draw(st.integers(0, size - s)) for s in start], np.uint32)
    nnz = np.array(data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4)), np.uint32)
    pool = CellPool(gap, count, start, entries, nnz, np.ones(4, np.int64))
    n_values = int(nnz.sum())
    for whole, call in (
        (np.full(4 * n_genes + 2 * guard, 7, np.float32), to_dense),
        (np.full(4 * n_genes + 2 * guard, 7, np.float32),
         lambda *a, out: to_dense_norm(*a, target_sum=1.0, out=out)),
        (np.full(n_values + 2 * guard, 7, np.float32), lambda *a, out: to_csr(
            *a, n_genes=n_genes, out=(np.empty(n_values, np.int32), out))),
        (np.full(n_values + 2 * guard, 7, np.int32), lambda *a, out: to_csr(
            *a, n_genes=n_genes, out=(out, np.empty(n_values, np.float32)))),
    ):  # fmt: skip
        out = whole[guard:-guard]
        try:
            call(pool, out=out.reshape(4, n_genes) if len(out) == 4 * n_genes else out)
        except ValueError as error:
            assert "damaged cell" in str(error)  # noqa: PT017
        assert (whole[:guard] == 7).all()
        assert (whole[-guard:] == 7).all()


@pytest.mark.parametrize(("start", "entries"), [(-1, 2), (2, 3), (2**63 - 1, 2), (0, 2**20)])
def test_a_cell_outside_the_buffers(start, entries):
    pool = replace(
        raw_pool([1, 1], [1, 1], nnz=2),
        start=np.array([start]), entries=np.array([entries], np.uint32),
    )  # fmt: skip
    out, room = np.zeros((1, 9), np.float32), np.empty(2**20, np.uint8)
    for call in (
        lambda: gather_packed(pool, out=(room, room)),
        lambda: to_csr(pool, n_genes=9),
        lambda: to_dense(pool, out=out),
        lambda: to_dense_norm(pool, target_sum=1.0, out=out),
    ):
        with pytest.raises(ValueError, match="damaged cell 0 of the batch"):
            call()


def test_the_error_names_the_cell():
    good = pool_of(matrix_of([{1: 1}, {2: 2}, {3: 3}]))
    start = good.start.copy()
    start[1] = 10_000
    pool = chosen(replace(good, start=start), np.array([0, 2, 1]))
    with pytest.raises(ValueError, match=r"damaged cell 2 of the batch"):
        to_csr(pool, n_genes=G)


def test_no_cells():
    pool = chosen(pool_of(matrix_of([{1: 1}])), np.empty(0, np.int64))
    assert len(gather_packed(pool).gap) == 0
    assert to_csr(pool, n_genes=G).shape == (0, G)
    assert to_dense(pool, out=np.empty((0, G), np.float32)).shape == (0, G)


def test_results_are_views_of_larger_buffers():
    pool = chosen(pool_of(matrix_of([{1: 300, 700: 2}, {5: 1}])), np.array([1, 0]))
    bytes_ = np.zeros(99, np.uint8), np.zeros(99, np.uint8)
    packed = gather_packed(pool, out=bytes_)
    assert np.shares_memory(packed.gap, bytes_[0])
    assert np.shares_memory(packed.count, bytes_[1])
    elements = np.zeros(99, np.int32), np.zeros(99, np.uint32)
    matrix = to_csr(pool, n_genes=G, out=elements, dtype=np.uint32)
    assert np.shares_memory(matrix.indices, elements[0])
    assert np.shares_memory(matrix.data, elements[1])
    assert (matrix.toarray()[[0, 1, 1], [5, 1, 700]] == [1, 300, 2]).all()


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "buffer",
    [
        np.empty(1, np.uint8), np.empty(9, np.int8), np.empty((9, 9), np.uint8),
        np.empty(18, np.uint8)[::2], read_only(np.empty(9, np.uint8)),
    ],
    ids=["small", "type", "shape", "strided", "read-only"],
)  # fmt: skip
def test_unfit_buffers(buffer):
    pool, good = pool_of(matrix_of([{1: 1, 2: 2}])), np.empty(9, np.uint8)
    for out in ((buffer, good), (good, buffer)):
        with pytest.raises(ValueError, match="needed is uint8 of at least 2 elements"):
            gather_packed(pool, out=out)
    with pytest.raises(ValueError, match="buffer for data"):
        to_csr(pool, n_genes=G, out=(np.empty(9, np.int32), buffer))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, 9), np.float32), np.empty((1, 9)), np.empty(1, np.float32),
        np.empty((1, 18), np.float32)[:, ::2], read_only(np.empty((1, 9), np.float32)),
    ],
    ids=["shape", "type", "one axis", "strided", "read-only"],
)  # fmt: skip
def test_unfit_dense_buffers(out):
    pool = pool_of(matrix_of([{1: 1, 2: 2}]))
    with pytest.raises(ValueError, match=r"out .*(needed is|must be)"):
        to_dense(pool, out=out)
    with pytest.raises(ValueError, match=r"out .*(needed is|must be)"):
        to_dense_norm(pool, target_sum=1.0, out=out)


@pytest.mark.parametrize(
    "change",
    [
        {"gap": np.zeros(3, np.int8)}, {"nnz": np.zeros(2, np.uint32)},
        {"start": np.zeros(1, np.int32)}, {"gap": np.zeros(6, np.uint8)[::2]},
    ],
)  # fmt: skip
def test_a_pool_checks_its_arrays(change):
    with pytest.raises(ValueError, match=r"needed is|contiguous"):
        replace(raw_pool([1], [1]), **change)


def test_bytes_that_cannot_be_written_to():
    pool = pool_of(matrix_of([{1: 300}]))
    frozen = replace(pool, gap=read_only(pool.gap), count=read_only(pool.count))
    assert to_csr(frozen, n_genes=G)[0, 1] == 300


def test_the_gil_is_released():
    """Another thread runs while a call decodes; if that held the GIL, it would get one turn."""
    # Few large cells: numpy itself lets others run while it works on many.
    size, n_cells = 200_000, 300
    one = raw_pool([1] * size, [1] * size)
    pool = chosen(one, np.zeros(n_cells, np.int64))
    out = np.empty(n_cells * size, np.uint8), np.empty(n_cells * size, np.uint8)
    gather_packed(one)
    done, ticks = threading.Event(), []

    def tick() -> None:
        while not done.is_set():
            ticks.append(done.wait(1e-4))

    def ticks_during_a_call() -> int:
        before = len(ticks)
        gather_packed(pool, out=out)
        return len(ticks) - before

    ticker = threading.Thread(target=tick)
    ticker.start()
    went_on = any(ticks_during_a_call() > 5 for _ in range(50))
    done.set()
    ticker.join()
    assert went_on


def test_a_place_that_cannot_be_written_still_works(tmp_path: Path):
    """Neither the package's folder nor the user's can hold compiled code."""
    source = Path(decoding.__file__).parents[1]
    for name in ("__init__.py", "loader/__init__.py", "loader/pool.py",
                 "corpus/__init__.py", "corpus/byte_code.py", "corpus/transform.py"):  # fmt: skip
        file = tmp_path / "sclong_ds" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((source / name).read_bytes())
        if not name.startswith("__"):
            (file.parent / "__pycache__").touch()  # a file where the folder should be
    (tmp_path / "home").touch()
    script = (
        "import numpy as np; from sclong_ds.loader.pool import CellPool, gather_packed\n"
        "a, t = np.ones(1, np.uint8), np.ones(1, np.uint32)\n"
        "pool = CellPool(a, a, np.zeros(1, np.int64), t, t, np.ones(1, np.int64))\n"
        "print(gather_packed(pool).gap)"
    )
    home = str(tmp_path / "home")
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"HOME": home, "XDG_CACHE_HOME": home, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.stdout == "[1]\n", run.stderr
