from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from no_sync import NoHostSync
from scipy.sparse import csr_matrix

from sclong_ds.corpus.byte_code import MAX_COUNT, PackedCells, encode
from sclong_ds.loader.pool import CellPool, to_dense, to_dense_norm
from sclong_ds.objective.batch import unpack

DEMO = Path(__file__).parents[3] / "data_prep" / "resources" / "demo" / "immune_a.h5ad"
G = 800
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CELLS = st.lists(
    st.dictionaries(
        st.one_of(st.integers(0, 20), st.sampled_from([254, 255, 256, 510, G - 1])),
        st.one_of(
            st.integers(1, 3),
            st.sampled_from([255, 256, 65536, 2**24 + 1, 3 * 2**24 + 1, MAX_COUNT]),
            st.integers(1, MAX_COUNT),
        ),
        max_size=20,
    ),
    max_size=6,
)


def packed(cells: list[dict[int, int]]) -> PackedCells:
    rows = [sorted(cell.items()) for cell in cells]
    data = np.array([count for row in rows for _, count in row], np.uint32)
    indices = np.array([gene for row in rows for gene, _ in row], np.int32)
    indptr = np.cumsum([0, *(len(row) for row in rows)])
    return encode(csr_matrix((data, indices, indptr), shape=(len(rows), G)))


def demo_cells() -> tuple[PackedCells, int]:
    counts = csr_matrix(anndata.read_h5ad(DEMO).X)
    return encode(csr_matrix(counts, dtype=np.int32)), counts.shape[1]


def check(cells: PackedCells, n_genes: int, device: str = "cpu") -> None:
    """Compare with the kernels of the CPU, bit for bit."""
    entries = cells.row_entries
    start = np.cumsum(entries, dtype=np.int64) - entries
    pool = CellPool(cells.gap, cells.count, start, entries, cells.row_nnz, cells.row_total)
    out = np.empty((len(entries), n_genes), np.float32)
    x = unpack(cells, n_genes=n_genes, target_sum=None, device=device)
    assert (x.dtype, x.device.type) == (torch.float32, device)
    assert x.is_contiguous()
    np.testing.assert_array_equal(x.cpu().numpy(), to_dense(pool, out=out))
    x = unpack(cells, n_genes=n_genes, target_sum=1e4, device=device)
    expected = to_dense_norm(pool, target_sum=1e4, out=out)
    np.testing.assert_array_equal(x.cpu().numpy(), expected)


@pytest.mark.thorough
@given(CELLS)
@example([])
@example([{}, {}])
@example([{0: 256}, {}, {510: MAX_COUNT, 799: 65536}, {}])
@settings(max_examples=150, deadline=None)
def test_equal_to_the_kernels(cells):
    check(packed(cells), G)


def test_equal_to_the_kernels_for_real_cells():
    check(*demo_cells())


@pytest.mark.gpu
@needs_gpu
def test_equal_to_the_kernels_on_a_gpu():
    check(*demo_cells(), device="cuda")
    check(packed([{0: 256}, {}, {510: MAX_COUNT, 799: 65536}, {}]), G, device="cuda")
    check(packed([]), G, device="cuda")


def test_arrays_may_be_read_only_parts_of_one_block_and_are_free_afterwards():
    cells = packed([{3: 1, 700: 300}, {5: 70000}])
    names = PackedCells.__dataclass_fields__
    block = np.concatenate([getattr(cells, name).view(np.uint8) for name in reversed(names)])
    parts, place = {}, 0
    for name in reversed(names):
        array = getattr(cells, name)
        parts[name] = block[place : place + array.nbytes].view(array.dtype)
        parts[name].setflags(write=False)
        place += array.nbytes
    x = unpack(PackedCells(**parts), n_genes=G, target_sum=None, device="cpu")
    block[:] = 77
    assert (x[[0, 0, 1], [3, 700, 5]] == torch.tensor([1.0, 300.0, 70000.0])).all()
    assert torch.count_nonzero(x) == 3


def test_arrays_that_do_not_fit():
    cells = packed([{3: 1, 700: 300}, {5: 70000}])
    with pytest.raises(ValueError, match="for cells of 8 entries"):
        unpack(replace(cells, gap=cells.gap[:-1]), n_genes=G, target_sum=None, device="cpu")


def test_a_gene_that_does_not_exist_is_an_error():
    with pytest.raises(IndexError, match="out of bounds"):
        unpack(packed([{3: 1}, {700: 1}]), n_genes=700, target_sum=None, device="cpu")


@pytest.mark.parametrize("target_sum", [None, 1e4])
def test_no_operation_waits_for_the_device(target_sum):
    cells, n_genes = demo_cells()
    with NoHostSync():
        unpack(cells, n_genes=n_genes, target_sum=target_sum, device="cpu")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: x.long().repeat_interleave(x.long()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
    ],
)
def test_waiting_would_be_noticed(wait):
    with pytest.raises(AssertionError), NoHostSync():
        wait(torch.ones(3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("target_sum", [None, 1e4])
def test_no_operation_waits_for_a_gpu(target_sum):
    cells, n_genes = demo_cells()
    torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        unpack(cells, n_genes=n_genes, target_sum=target_sum, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
