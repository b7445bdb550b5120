"""The byte code, the cell store and the corpus folder.

Covers also `sclong_ds/corpus/byte_code.py`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_cells import make_corpus
from scipy import sparse

from sclong_ds.corpus.byte_code import PackedCells, decode, decode_genes, encode
from sclong_ds.corpus.catalogue import FORMAT_VERSION, read_catalogue
from sclong_ds.corpus.cell_store import CellStore
from sclong_ds.corpus.cell_writer import CellWriter
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.location import Location

BOUNDARIES = [1, 2, 254, 255, 256, 257, 511, 512, 65_535, 65_536, 2**24 - 1, 2**24, 2**32 - 1]


def random_counts(seed: int, n_cells: int = 200, n_genes: int = 2_000) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    matrix = sparse.random(n_cells, n_genes, density=0.05, format="csr", random_state=rng)
    matrix.data = rng.choice([1] * 40 + BOUNDARIES, size=matrix.nnz)
    matrix.sort_indices()
    return matrix


def assert_same(found: sparse.csr_matrix, expected: sparse.csr_matrix) -> None:
    expected = sparse.csr_matrix(expected)
    expected.eliminate_zeros()
    assert found.shape == expected.shape
    assert found.data.dtype == np.uint32
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data.astype(np.int64), expected.data)


def write_store(path: Path, matrix: sparse.csr_matrix, *, block: int = 37, **options: int) -> None:
    options = {"chunk_entries": 1024, "chunks_per_shard": 4} | options
    with CellWriter(path, n_genes=matrix.shape[1], **options) as writer:  # type: ignore[arg-type]
        for start in range(0, matrix.shape[0], block):
            rows = np.arange(start, min(start + block, matrix.shape[0]))
            writer.append(matrix[rows], source={"source_row": 10 * rows})


@st.composite
def matrices(draw: st.DrawFn) -> sparse.csr_matrix:
    n_genes = draw(st.integers(1, 1200))
    value = st.sampled_from(BOUNDARIES) | st.integers(1, 2**32 - 1)
    cell = st.dictionaries(st.integers(0, n_genes - 1), value, max_size=8)
    cells = draw(st.lists(cell, max_size=6))
    indices = [gene for genes in cells for gene in sorted(genes)]
    data = [genes[gene] for genes in cells for gene in sorted(genes)]
    indptr = np.cumsum([0, *(len(genes) for genes in cells)])
    shape = (len(cells), n_genes)
    return sparse.csr_matrix((np.array(data, np.int64), np.array(indices, int), indptr), shape)


@settings(max_examples=80, deadline=None)
@given(matrices())
def test_encoding_is_lossless(matrix: sparse.csr_matrix) -> None:
    packed = encode(matrix)
    assert_same(decode(packed.gap, packed.count, packed.row_entries, matrix.shape[1]), matrix)
    indptr, genes = decode_genes(packed, matrix.shape[1])
    np.testing.assert_array_equal(indptr, matrix.indptr)
    np.testing.assert_array_equal(genes, matrix.indices)
    np.testing.assert_array_equal(packed.row_nnz, np.diff(matrix.indptr))
    np.testing.assert_array_equal(packed.row_total, np.asarray(matrix.sum(axis=1)).ravel())


def test_encoding_of_a_known_cell() -> None:
    counts = np.array([5, 256, 0x01020304])
    packed = encode(
        sparse.csr_matrix((counts, np.array([3, 258, 1000]), np.array([0, 3])), (1, 2000))
    )
    # From gene 3 to 258 with low byte 0: the bytes of a stepping stone, told apart by what follows.
    assert list(zip(packed.gap.tolist(), packed.count.tolist(), strict=True)) == [
        (4, 5), (255, 0), (0, 1), (255, 0), (255, 0), (232, 4), (0, 3), (0, 2), (0, 1),
    ]  # fmt: skip


def test_stored_zeros_are_skipped() -> None:
    matrix = sparse.csr_matrix(
        (np.array([0, 4, 0]), np.array([1, 5, 7]), np.array([0, 2, 3])), (2, 9)
    )
    packed = encode(matrix)
    np.testing.assert_array_equal(packed.row_nnz, [1, 0])
    assert_same(decode(packed.gap, packed.count, packed.row_entries, 9), matrix)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_counts_of_every_type_give_the_same_bytes(dtype: type, index_dtype: type) -> None:
    matrix = random_counts(4)
    matrix.data = np.minimum(matrix.data, min(np.iinfo(dtype).max, 2**32 - 1))
    expected = encode(matrix)
    matrix.data = matrix.data.astype(dtype)
    matrix.indices, matrix.indptr = (x.astype(index_dtype) for x in (matrix.indices, matrix.indptr))
    found = encode(matrix)
    for name in ("gap", "count", "row_entries", "row_nnz", "row_total"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype


@pytest.mark.parametrize(
    ("data", "indices", "message"),
    [
        ([1, 2**32], [0, 1], "allowed are 0 to 4294967295"),
        ([1, -1], [0, 1], "counts from -1"),
        ([1.0, 2.0], [0, 1], "stored as integers"),
        ([1, 2], [1, 0], "row 0: column indices are not increasing"),
        ([1, 2], [1, 1], "row 0: column indices are not increasing"),
    ],
)
def test_encode_refuses(data: list[float], indices: list[int], message: str) -> None:
    matrix = sparse.csr_matrix((np.array(data), np.array(indices), np.array([0, 2])), (1, 4))
    with pytest.raises(ValueError, match=message):
        encode(matrix)


@pytest.mark.parametrize(
    ("gap", "count", "entries", "message"),
    [
        ([0], [1], [1], "begins with a continued count"),
        ([1, 0], [1, 1], [1, 1], "begins with a continued count"),
        ([1, 0, 0, 0, 0], [1] * 5, [5], "more than four bytes"),
        ([9, 9], [1, 1], [2], "gene index 17, the corpus has 10"),
        ([1, 1], [1, 1], [3], "for 3 entries"),
    ],
)
def test_decode_refuses(gap: list[int], count: list[int], entries: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(np.array(gap, np.uint8), np.array(count, np.uint8), np.array(entries), 10)


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_store_returns_rows_in_the_order_asked(tmp_path: Path, codec: str) -> None:
    matrix = random_counts(1)
    write_store(tmp_path / "cells.zarr", matrix, codec=codec)
    store = CellStore(tmp_path / "cells.zarr")
    assert (len(store), store.n_genes, store.n_values) == (200, 2_000, matrix.nnz)
    indices = np.random.default_rng(0).integers(0, 200, 300)
    assert_same(store.rows(indices), matrix[indices])
    assert_same(store.rows([]), matrix[:0])
    assert_same(pickle.loads(pickle.dumps(store)).rows([5, 1]), matrix[[5, 1]])
    np.testing.assert_array_equal(store.row_total, np.asarray(matrix.sum(axis=1)).ravel())
    np.testing.assert_array_equal(store.row_nnz, np.diff(matrix.indptr))
    np.testing.assert_array_equal(store.table("source_row"), 10 * np.arange(200))
    assert store.tables == ("source_row",)


def test_chunks_hold_whole_cells(tmp_path: Path) -> None:
    matrix = random_counts(2)
    write_store(tmp_path / "cells.zarr", matrix)
    store = CellStore(tmp_path / "cells.zarr")
    assert store.chunk_rows[0] == 0
    assert store.chunk_rows[-1] == 200
    assert np.all(np.diff(store.chunk_rows) > 0)
    parts = [store.read_chunk(chunk) for chunk in range(len(store.chunk_rows) - 1)]
    assert len(parts) > 8  # several shards
    assert_same(sparse.vstack(parts, format="csr"), matrix)
    # No chunk could have taken the first cell of the next one.
    entries = np.add.reduceat(store.row_entries.astype(int), store.chunk_rows[:-1])
    following = store.row_entries[store.chunk_rows[1:-1]]
    assert np.all(entries <= 1024)
    assert np.all(entries[:-1] + following > 1024)


def test_end_chunk_starts_a_new_one(tmp_path: Path) -> None:
    matrix = random_counts(3, n_cells=6)
    with CellWriter(tmp_path / "cells.zarr", n_genes=2_000) as writer:
        writer.end_chunk()
        writer.append(matrix[:2])
        writer.end_chunk()
        writer.end_chunk()
        writer.append(matrix[2:])
    store = CellStore(tmp_path / "cells.zarr")
    np.testing.assert_array_equal(store.chunk_rows, [0, 2, 6])
    assert_same(store.rows(range(6)), matrix)


def test_cells_without_counts_and_empty_stores(tmp_path: Path) -> None:
    write_store(tmp_path / "zeros.zarr", sparse.csr_matrix((3, 50), dtype=np.int64))
    store = CellStore(tmp_path / "zeros.zarr")
    assert store.rows([2, 0]).nnz == 0
    np.testing.assert_array_equal(store.chunk_rows, [0, 3])
    write_store(tmp_path / "empty.zarr", sparse.csr_matrix((0, 50), dtype=np.int64))
    assert len(CellStore(tmp_path / "empty.zarr")) == 0


def read_documented(path: Path, c: int) -> sparse.csr_array:
    """Read chunk c with the lines in the docstring of cell_store, without any code of ours."""
    group = zarr.open_group(path, mode="r")
    first, last = group["chunk_rows"][c : c + 2]
    n, size = group["row_entries"][first:last].astype(int), group.attrs["chunk_entries"]
    cell = np.repeat(np.arange(first, last), n)
    gap = group["gap"][c * size : c * size + n.sum()].astype(int)
    count = group["count"][c * size : c * size + n.sum()].astype(int)
    ends = np.cumsum(gap)
    gene = ends - np.repeat(np.concatenate(([0], ends))[np.cumsum(n) - n], n) - 1
    order = np.arange(len(gap)) - np.maximum.accumulate(np.where(gap > 0, np.arange(len(gap)), 0))
    X = scipy.sparse.coo_array((count << 8 * order, (cell - first, gene))).tocsr()
    X.eliminate_zeros()
    return X


def test_documented_reader_reads_every_chunk(tmp_path: Path) -> None:
    import sclong_ds.corpus.cell_store

    matrix = random_counts(4)
    write_store(tmp_path / "cells.zarr", matrix)
    rows = CellStore(tmp_path / "cells.zarr").chunk_rows
    for chunk in range(len(rows) - 1):
        found = read_documented(tmp_path / "cells.zarr", chunk).toarray()
        expected = matrix[rows[chunk] : rows[chunk + 1]].toarray()
        np.testing.assert_array_equal(found, expected[: found.shape[0], : found.shape[1]])
        assert found.sum() == expected.sum()
    # The docstring shows these very lines.
    source = Path(__file__).read_text().split('mode="r")\n')[1].split("    return X")[0]
    assert source in str(sclong_ds.corpus.cell_store.__doc__)


def test_file_sizes(tmp_path: Path) -> None:
    """Counts of one byte take two bytes and a little; compressed, about one."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 27_875) ** 0.7
    popularity = rng.permutation(popularity / popularity.sum())
    draws = [rng.choice(27_874, size=3_000, p=popularity) for _ in range(150)]
    rows = np.repeat(np.arange(150), 3_000)
    ones = np.ones(len(rows), np.int64)
    matrix = sparse.coo_matrix((ones, (rows, np.concatenate(draws))), (150, 27_874)).tocsr()
    for codec, most in (("zstd", 1.25), ("none", 2.3)):
        path = tmp_path / f"{codec}.zarr"
        write_store(path, matrix, codec=codec, chunk_entries=2**16)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert size / matrix.nnz < most


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_many_open_stores_keep_few_files_open(tmp_path: Path) -> None:
    write_store(tmp_path / "cells.zarr", random_counts(13, n_cells=20))
    before = len(list(Path("/proc/self/fd").iterdir()))
    stores = [CellStore(tmp_path / "cells.zarr") for _ in range(30)]
    assert all(len(store.row_total) == len(store.row_entries) == 20 for store in stores)
    assert all(store.read_chunk(0).nnz for store in stores)
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 10


@pytest.mark.parametrize("fault", ["raise", "columns", "table", "type"])
def test_failed_writing_leaves_nothing(tmp_path: Path, fault: str) -> None:
    matrix = random_counts(5, n_cells=4)

    def write() -> None:
        with CellWriter(tmp_path / "cells.zarr", n_genes=2_000) as writer:
            writer.append(matrix, source={"a": np.arange(4)})
            if fault == "columns":
                writer.append(matrix[:, :10])
            if fault == "table":
                writer.append(matrix, source={"b": np.arange(4)})
            if fault == "type":
                writer.append(matrix, source={"a": np.arange(4) / 2})
            raise ValueError("stop")

    with pytest.raises(ValueError, match=r"stop|genes|row column"):
        write()
    assert not list(tmp_path.iterdir())


def test_writer_refuses(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        CellWriter(tmp_path / "there", n_genes=5)
    with pytest.raises(ValueError, match="allowed are zstd and none"):
        CellWriter(tmp_path / "x", n_genes=5, codec="gzip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        CellWriter(tmp_path / "x", n_genes=0)
    with pytest.raises(ValueError, match="raise chunk_entries"):
        write_store(tmp_path / "x", random_counts(0, n_cells=2), chunk_entries=16)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_store_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no cell store"):
        CellStore(tmp_path)
    write_store(tmp_path / "cells.zarr", random_counts(6, n_cells=5))
    store = CellStore(tmp_path / "cells.zarr")
    for wrong in (5, -1):
        with pytest.raises(IndexError, match="there are cells 0 to 4"):
            store.rows([0, wrong])
    for wrong_type in ([0.5], [[1]], np.array([True, False])):
        with pytest.raises(ValueError, match="list of whole numbers"):
            store.rows(wrong_type)
    with pytest.raises(ValueError, match=r"there are chunk_rows, .*source_row"):
        store.table("barcode")
    group = zarr.open_group(tmp_path / "cells.zarr", mode="r+")
    group.attrs["version"] = 99
    with pytest.raises(ValueError, match=r"later version of sclong_ds .* version 99,"):
        CellStore(tmp_path / "cells.zarr")


def test_cells_are_chosen_alike_in_all_ways(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", n_train=9)
    cells = corpus.rows(np.arange(9)).toarray()
    np.testing.assert_array_equal(corpus.rows(slice(-2, None)).toarray(), cells[-2:])
    np.testing.assert_array_equal(corpus.rows(range(2, 4)).toarray(), cells[2:4])
    for place in (0, 8, -1, -9, np.int32(3)):
        np.testing.assert_array_equal(corpus[place].toarray()[0], cells[place])
    for place in (9, -10):
        with pytest.raises(IndexError, match=f"cell {place}: there are cells 0 to 8"):
            corpus[place]
    for way in (corpus.rows, corpus.packed_rows, corpus.obs):
        with pytest.raises(IndexError, match="cell -1: there are cells 0 to 8; a slice counts"):
            way([0, -1])
        with pytest.raises(ValueError, match="give a list of whole numbers, or a slice"):
            way([0.5])
    with pytest.raises(ValueError, match=r"slice\(None\) for all"):
        corpus.rows(None)


def test_packed_cells_can_be_moved_between_stores(tmp_path: Path) -> None:
    matrix = random_counts(8)
    write_store(tmp_path / "a.zarr", matrix)
    store = CellStore(tmp_path / "a.zarr")
    with CellWriter(tmp_path / "b.zarr", n_genes=2_000, chunk_entries=2_000) as writer:
        for chunk in range(len(store.chunk_rows) - 1):
            packed = store.read_packed(chunk)
            assert isinstance(packed, PackedCells)
            writer.append_packed(packed)
    assert_same(CellStore(tmp_path / "b.zarr").rows(range(200)), matrix)


def test_same_cells_same_bytes(tmp_path: Path) -> None:
    matrix = random_counts(9)
    write_store(tmp_path / "a.zarr", matrix, block=37)
    write_store(tmp_path / "b.zarr", matrix, block=200)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")


def test_corpus_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; run: python -m data_prep"):
        Corpus(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="not finalized; run: python -m data_prep finalize"):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text('{"format": "sclong_ds-corpus", "version": 7}')
    with pytest.raises(ValueError, match=r"later version of sclong_ds .* version 7,"):
        Corpus(tmp_path)
    for text in ("{", "[1]", "\x00"):
        (tmp_path / "corpus.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            Corpus(tmp_path)


GOLDEN = Path(__file__).parents[2] / "golden"


def test_every_version_of_the_format_has_a_corpus_that_it_wrote() -> None:
    written = {read_catalogue(Location(path))["version"] for path in GOLDEN.glob("corpus_*")}
    assert written == set(range(1, FORMAT_VERSION + 1)), "see tests/golden/README.md"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_corpus_of_every_version_opens_and_reads_the_same(version: int) -> None:
    folder = GOLDEN / f"corpus_version_{version}"
    expected = json.loads((folder / "expected.json").read_bytes())
    corpus = pickle.loads(pickle.dumps(Corpus(folder)))
    n_cells = len(corpus)
    assert corpus.hash == expected["hash"]
    assert {name: [b.start, b.stop] for name, b in corpus.splits.items()} == expected["splits"]
    assert corpus.genes.hash == expected["genes_hash"]
    counts = corpus.rows(np.arange(n_cells))
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(counts, name), expected["counts"][name])
    for name, found in (
        ("datasets", corpus.row_dataset),
        ("source_row", corpus.row_source),
        ("row_total", corpus.row_total),
        ("row_nnz", corpus.row_nnz),
    ):
        np.testing.assert_array_equal(found, expected[name])
    assert corpus.obs(np.arange(n_cells)).to_dict("list") == expected["obs"]
    assert int(corpus.gene_stats.total_counts.sum()) == expected["total_counts_sum"]
    assert corpus.gene_stats.mean_expressed_all == expected["mean_expressed_all"]
    if version >= 4:
        names = [name for name in expected["obs"] if name in corpus.columns]
        assert {"cell_type", "cell_type_ontology_term_id", "donor_id"} <= set(names)
        texts = corpus.obs(np.arange(n_cells), columns=names).astype(str)
        assert texts.to_dict("list") == {name: expected["obs"][name] for name in names}
