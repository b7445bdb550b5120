"""Readers: every format gives the same matrix; what is broken is refused with its reason.

Covers also `data_prep/readers/arrays.py`.
"""

import sys
from pathlib import Path
from types import ModuleType

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from reader_inputs import (
    CELLS,
    COUNTS,
    GENES,
    N_CELLS,
    N_GENES,
    opened,
    table,
    table_text,
    values,
    write_loom,
    write_mtx,
    write_tenx_v3,
)
from scipy import sparse

from data_prep.convert.source_identity import source_hash
from data_prep.counts.proof import exact_counts
from data_prep.readers import arrays as readers_arrays
from data_prep.readers import gather as readers_gather
from data_prep.readers import npz as readers_npz
from data_prep.readers import text as readers_text
from data_prep.readers.gather import gathered
from data_prep.readers.open import detect_format, open_source
from data_prep.source import source
from data_prep.source.source import (
    READERS,
    Annotations,
    Matrix,
    Reading,
    Source,
    UnusableError,
)
from data_prep.staging.chosen_cells import unwanted_cells
from data_prep.verify.plain_arrays import plain_loom


@pytest.mark.thorough
@pytest.mark.parametrize(
    "matrix",
    [
        COUNTS,
        COUNTS.astype(np.float64),
        sparse.csr_matrix(COUNTS),
        sparse.csc_matrix(COUNTS.astype(np.float32)),
    ],
    ids=["dense", "dense64", "csr", "csc"],
)
@pytest.mark.parametrize("kind", ["h5ad", "zarr 2", "zarr 3"])
@pytest.mark.filterwarnings(
    "ignore:Writing zarr v2 data", "ignore:zarr v3 autosharding", "ignore:Consolidated metadata"
)
def test_anndata_of_every_storage(tmp_path: Path, matrix: object, kind: str) -> None:
    path = tmp_path / "cells"
    adata = table(matrix)
    if kind == "h5ad":
        adata.write_h5ad(path)
    else:
        with anndata.settings.override(zarr_write_format=int(kind[-1])):
            adata.write_zarr(path)
    found = opened(path)
    assert found.format == kind.split()[0]
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == CELLS
    assert found.obs["donor"].tolist() == ["a", "b", "a", "b", "a", "b", "a"]
    assert found.matrices[0].gene_columns["index"].tolist() == GENES
    assert found.matrices[0].gene_columns["name"][2] == "n2"


def repeated(path: Path, dtype: str, parts: tuple[float, float]) -> Path:
    """Write 5 cells of 4 genes, each value in two parts, in a container of any kind."""
    values = np.tile(np.array(parts, dtype=dtype), 20)
    lines, others = np.repeat(np.arange(5), 8), np.tile(np.repeat(np.arange(4), 2), 5)
    csr = sparse.csr_matrix((values, others, np.arange(0, 41, 8)), shape=(5, 4))
    order = np.lexsort((lines, others))
    csc = sparse.csc_matrix((values, lines[order], np.arange(0, 41, 10)), shape=(5, 4))
    csc.data = values
    matrix = csc if "csc" in path.name else csr
    names = GENES[:4]
    if "mtx" in path.name:
        path.mkdir()
        kind = "integer" if "int" in dtype else "real"
        rows = zip(others + 1, lines + 1, values, strict=True)
        text = "".join(f"{gene} {cell} {value}\n" for gene, cell, value in rows)
        (path / "matrix.mtx").write_text(
            f"%%MatrixMarket matrix coordinate {kind} general\n4 5 40\n{text}"
        )
        (path / "genes.tsv").write_text("".join(f"{name}\t{name}\n" for name in names))
        (path / "barcodes.tsv").write_text("".join(f"{name}\n" for name in CELLS[:5]))
    elif path.suffix == ".npz":
        sparse.save_npz(path, matrix)
        (path.parent / "genes.txt").write_text("".join(f"{name}\n" for name in names))
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as root:
            for name in ("data", "indices", "indptr"):
                root[f"GRCh38/{name}"] = getattr(csr, name)
            root["GRCh38/shape"], root["GRCh38/genes"] = [4, 5], np.array(names, dtype="S")
            root["GRCh38/barcodes"] = np.array(CELLS[:5], dtype="S")
    else:
        obs, var = pd.DataFrame(index=CELLS[:5]), pd.DataFrame(index=names)
        adata = anndata.AnnData(matrix, obs=obs, var=var)
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["csr.h5ad", "csc.h5ad", "csr.zarr", "csc.zarr", "csr.npz", "csc.npz", "v2.h5", "mtx"]
)
@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        ("uint8", (100, 200)),
        ("int16", (20_000, 20_000)),
        ("int32", (2**31 - 1, 2**30)),
        ("float32", (2**24, 3)),
        ("float64", (1, 2)),
    ],
)
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data", "ignore:Consolidated metadata")
def test_values_of_one_place_are_added_as_whole_numbers(
    tmp_path: Path, name: str, dtype: str, parts: tuple[int, int]
) -> None:
    [matrix] = opened(repeated(tmp_path / name, dtype, parts)).matrices
    found = sparse.vstack([exact_counts(block, where="X") for block in matrix.blocks()])
    np.testing.assert_array_equal(found.toarray(), np.full((5, 4), sum(parts)))


@pytest.mark.parametrize("name", ["csr.h5ad", "csc.h5ad", "csc.npz", "mtx"])
def test_two_halves_are_no_count(tmp_path: Path, name: str) -> None:
    [matrix] = opened(repeated(tmp_path / name, "float32", (0.5, 0.5))).matrices
    block = next(iter(matrix.blocks()))
    with pytest.raises(UnusableError, match=r"first fraction 0\.5"):
        exact_counts(block, where="X")


@pytest.mark.parametrize("stored", ["<f2", ">f2", ">u2", ">i8", ">f4"])
def test_dense_values_of_any_width_and_byte_order(tmp_path: Path, stored: str) -> None:
    path = tmp_path / "cells.h5ad"
    table(COUNTS).write_h5ad(path)
    with h5py.File(path, "r+") as root:
        kept = dict(root["X"].attrs)
        del root["X"]
        root.create_dataset("X", data=COUNTS.astype(stored)).attrs.update(kept)
        assert root["X"].dtype == stored
    np.testing.assert_array_equal(values(opened(path)), COUNTS.astype(stored))


def test_raw_and_layers_have_their_own_genes(tmp_path: Path) -> None:
    adata = table()
    adata.raw = table()
    adata = adata[:, :4].copy()
    adata.layers["counts"] = adata.X * 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = opened(tmp_path / "a.h5ad")
    assert [matrix.name for matrix in found.matrices] == ["X", "raw.X", "layers/counts"]
    np.testing.assert_array_equal(values(found, "raw.X"), COUNTS)
    assert found.matrices[1].gene_columns["index"].tolist() == GENES
    np.testing.assert_array_equal(values(found, "layers/counts"), COUNTS[:, :4] * 2)


def test_anndata_before_version_0_7(tmp_path: Path) -> None:
    packed = sparse.csr_matrix(COUNTS)
    names = [(name.encode(),) for name in GENES]
    with h5py.File(tmp_path / "old.h5ad", "w") as root:
        root["X"] = COUNTS.astype(np.float32)
        root["var"] = np.array(names, dtype=[("index", "S8")])
        root["obs"] = np.array([(name.encode(), 1) for name in CELLS], dtype="S8,i4")
        root["raw.var"] = np.array(names, dtype=[("index", "S8")])
        group = root.create_group("raw.X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", COUNTS.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(packed, name)
    found = opened(tmp_path / "old.h5ad")
    assert found.barcodes.tolist() == CELLS
    np.testing.assert_array_equal(values(found, "X"), COUNTS)
    np.testing.assert_array_equal(values(found, "raw.X"), COUNTS)


def test_tenx_version_3_keeps_the_genes_only(tmp_path: Path) -> None:
    types = ["Gene Expression"] * (N_GENES - 2) + ["Antibody Capture", "Gene Expression"]
    found = opened(write_tenx_v3(tmp_path / "a.h5", ["GRCh38"] * N_GENES, types))
    keep = [i for i in range(N_GENES) if i != N_GENES - 2]
    assert found.format == "10x_h5"
    np.testing.assert_array_equal(values(found), COUNTS[:, keep])
    assert found.matrices[0].gene_columns["id"].tolist() == [GENES[i] for i in keep]


def test_tenx_version_3_with_two_genomes_asks(tmp_path: Path) -> None:
    genomes = ["GRCh38"] * 5 + ["mm10"] * (N_GENES - 5)
    path = write_tenx_v3(tmp_path / "a.h5", genomes, ["Gene Expression"] * N_GENES)
    with pytest.raises(UnusableError, match=r"several genomes \(GRCh38, mm10\)"):
        opened(path)
    np.testing.assert_array_equal(values(opened(path, genome="GRCh38")), COUNTS[:, :5])
    with pytest.raises(ValueError, match="no genome 'hg19'"):
        opened(path, genome="hg19")


def test_tenx_version_2_takes_the_human_genome(tmp_path: Path) -> None:
    packed = sparse.csr_matrix(COUNTS)
    with h5py.File(tmp_path / "a.h5", "w") as root:
        for genome in ("hg19", "mm10"):
            group = root.create_group(genome)
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(packed, name)
            group["shape"], group["barcodes"] = [N_GENES, N_CELLS], np.array(CELLS, dtype="S")
            group["genes"] = np.array([f"{genome}{name}" for name in GENES], dtype="S")
    found = opened(tmp_path / "a.h5")
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.matrices[0].gene_columns["genes"][0] == "hg19G0"
    assert opened(tmp_path / "a.h5", genome="mm10").matrices[0].gene_columns["genes"][0] == "mm10G0"


def test_loom(tmp_path: Path) -> None:
    found = opened(write_loom(tmp_path / "a.loom"))
    assert found.format == "loom"
    np.testing.assert_array_equal(values(found), COUNTS)
    np.testing.assert_array_equal(values(found, "layers/spliced"), COUNTS + 1)
    assert found.barcodes.tolist() == CELLS
    assert set(found.matrices[0].gene_columns) == {"Gene"}
    assert found.obs["donor"].tolist() == ["d0", "d1"] * 3 + ["d0"]


@pytest.mark.parametrize("columns", ["list", "column", "two columns"])
def test_loom_attributes_that_stand_as_columns(tmp_path: Path, columns: str) -> None:
    path = write_loom(tmp_path / "a.loom")
    with h5py.File(path, "r+") as root:
        for name, values in (("Gene", GENES), ("Alias", GENES), ("kind", GENES)):
            root.require_group("row_attrs").pop(name, None)
            wide = [[value] * 2 for value in values] if name == "kind" else [[v] for v in values]
            root[f"row_attrs/{name}"] = wide
        del root["col_attrs/CellID"]
        root["col_attrs/CellID"] = [[name] for name in CELLS]
        primary = np.arange(N_CELLS) < 3
        root["col_attrs/is_primary_data"] = {
            "list": primary,
            "column": primary[:, None],
            "two columns": np.stack([primary, primary], axis=1),
        }[columns]
    found = opened(path)
    assert found.barcodes.tolist() == CELLS
    assert found.matrices[0].gene_columns["Alias"].tolist() == GENES
    assert found.notes["row_attrs/kind"] == "it is no list with one value a gene"
    assert "map is no list with one value a cell" in found.obs.frame()[1]["obs/map"]
    if columns == "two columns":
        with pytest.raises(ValueError, match="is_primary_data is no list with one value a cell"):
            unwanted_cells(found.obs, "")
        return
    (dropped,) = unwanted_cells(found.obs, "")[0].values()
    assert dropped.tolist() == (~primary).tolist()
    plain = plain_loom(path, rows=[1, 4], matrices=["X"], columns=["is_primary_data"])
    assert plain.barcodes == {1: CELLS[1], 4: CELLS[4]}
    assert plain.features["Gene"] == GENES
    assert [row["is_primary_data"] for row in plain.annotations.values()] == ["True", "False"]


def test_small_blocks_give_the_same_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(sparse.csr_matrix(COUNTS)).write_h5ad(tmp_path / "csr.h5ad")
    table(sparse.csc_matrix(COUNTS)).write_h5ad(tmp_path / "csc.h5ad")
    table().write_h5ad(tmp_path / "dense.h5ad")
    write_mtx(tmp_path / "mtx", version=3)
    (tmp_path / "t.csv").write_text(table_text(",", genes_in_rows=True))
    for module in (source, readers_arrays, readers_npz, readers_text):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 12)
    monkeypatch.setattr(readers_gather, "RUN_ENTRIES", 15)
    monkeypatch.setattr(readers_gather, "BUCKET_ENTRIES", 15)
    monkeypatch.setattr(readers_arrays, "DENSE_ELEMENTS", 25)
    for name in ("csr.h5ad", "csc.h5ad", "dense.h5ad", "mtx", "t.csv"):
        found = opened(tmp_path / name)
        assert len(list(found.matrices[0].blocks())) > 1, name
        np.testing.assert_array_equal(values(found), COUNTS, err_msg=name)


def test_entries_outside_the_matrix_are_refused() -> None:
    outside = (np.array([0]), np.array([5]), np.array([1]))
    with pytest.raises(ValueError, match="gene 5, but there are 5"):
        list(gathered(lambda: iter([outside]), shape=(3, 5), n_entries=1, scratch=None)())


def test_the_format_asked_for_must_be_the_one_found(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text(table_text("\t", genes_in_rows=True))
    assert detect_format(path) == "tsv"
    with pytest.raises(ValueError, match="the manifest states h5ad, the content is tsv"):
        opened(path, format="h5ad")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        opened(tmp_path / "a.h5ad")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        source_hash(tmp_path / "a.h5ad")


def test_the_source_hash_follows_the_content_not_the_place(tmp_path: Path) -> None:
    first = write_mtx(tmp_path / "one", version=3)
    second = write_mtx(tmp_path / "two", version=3)
    assert source_hash(first) == source_hash(second)
    (second / "barcodes.tsv").write_text("other\n" * N_CELLS)
    assert source_hash(first) != source_hash(second)


def test_a_reader_is_a_module_and_its_line_among_the_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format of one's own, told by its first bytes, is read without another change."""
    reader = ModuleType("reader_of_lists")

    def tell(path: Path, start: bytes | None) -> str | None:
        return "list" if start is not None and start.startswith(b"LIST\n") else None

    def open_format(path: Path, format: str, reading: Reading) -> Source:
        names = path.read_text().split()[1:]
        genes = np.array(names, dtype=object)
        matrix = Matrix(
            name="X", shape=(1, len(names)), gene_columns={"index": genes},
            blocks=lambda: iter([sparse.csr_matrix(np.ones((1, len(names)), dtype=np.int64))]),
        )  # fmt: skip
        return Source(path=path, format=format, barcodes=np.array(["c"], dtype=object),
                      obs=Annotations(1, {}), matrices=(matrix,))  # fmt: skip

    reader.tell, reader.open_format = tell, open_format  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reader_of_lists", reader)
    known = {"list": "reader_of_lists", **READERS}
    monkeypatch.setattr("data_prep.readers.open.READERS", known)
    (tmp_path / "cells.txt").write_bytes(b"LIST\nCD3E\nACTB\n")
    found = open_source(tmp_path / "cells.txt", gene_share=lambda names: 1.0)
    assert found.format == "list"
    (block,) = found.matrices[0].blocks()
    assert block.toarray().tolist() == [[1, 1]]
