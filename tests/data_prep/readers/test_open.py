"""Readers: every format gives the same matrix; what is broken is refused with its reason.

Covers also `data_prep/readers/arrays.py`, `data_prep/readers/text.py`.
"""

import gzip
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

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

N_CELLS, N_GENES = 7, 11
COUNTS = np.random.default_rng(3).poisson(0.7, (N_CELLS, N_GENES)).astype(np.int32)
CELLS = [f"cell{i}" for i in range(N_CELLS)]
GENES = [f"G{i}" for i in range(N_GENES)]


def gene_share(names: np.ndarray) -> float:
    return float(np.mean([str(name).startswith("G") for name in names]))


def opened(path: Path, **options: str) -> Source:
    return open_source(path, gene_share=gene_share, **options)


def values(found: Source, name: str = "X") -> np.ndarray:
    matrix = next(matrix for matrix in found.matrices if matrix.name == name)
    return sparse.vstack(list(matrix.blocks())).toarray()


def table(matrix: object = COUNTS) -> anndata.AnnData:
    var = pd.DataFrame({"name": [f"n{i}" for i in range(N_GENES)]}, index=GENES)
    obs = pd.DataFrame({"donor": ["a", "b", "a", "b", "a", "b", "a"]}, index=CELLS)
    obs["donor"] = obs["donor"].astype("category")
    return anndata.AnnData(matrix, obs=obs, var=var)


def write_tenx_v3(path: Path, genomes: list[str], types: list[str]) -> Path:
    packed = sparse.csr_matrix(COUNTS)
    with h5py.File(path, "w") as root:
        group = root.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(packed, name)
        group["shape"], group["barcodes"] = [N_GENES, N_CELLS], np.array(CELLS, dtype="S")
        for name, column in (("id", GENES), ("name", GENES), ("genome", genomes)):
            group[f"features/{name}"] = np.array(column, dtype="S")
        group["features/feature_type"] = np.array(types, dtype="S")
    return path


def write_mtx(folder: Path, *, version: int, packed: bool = False, prefix: str = "") -> Path:
    folder.mkdir()
    io.mmwrite(folder / "m.mtx", sparse.coo_matrix(COUNTS.T), field="integer", symmetry="general")
    tail = "\tGene Expression" if version == 3 else ""
    parts = {
        "matrix.mtx": (folder / "m.mtx").read_text(),
        "barcodes.tsv": "".join(f"{name}\n" for name in CELLS),
        ("features.tsv" if version == 3 else "genes.tsv"): "".join(
            f"{name}\t{name}{tail}\n" for name in GENES
        ),
    }
    (folder / "m.mtx").unlink()
    for name, text in parts.items():
        data = gzip.compress(text.encode()) if packed else text.encode()
        (folder / f"{prefix}{name}{'.gz' if packed else ''}").write_bytes(data)
    return folder


def write_loom(path: Path) -> Path:
    with h5py.File(path, "w") as root:
        root["matrix"] = COUNTS.T
        root["layers/spliced"] = COUNTS.T + 1
        root["row_attrs/Gene"] = GENES
        root["row_attrs/length"] = np.arange(N_GENES)
        root["row_attrs/map/x"], root["col_attrs/map/x"] = 1, 1
        root["col_attrs/CellID"] = CELLS
        root["col_attrs/donor"] = [f"d{i % 2}" for i in range(N_CELLS)]
    return path


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


@pytest.mark.parametrize(("version", "packed"), [(2, False), (3, True), (3, False)])
def test_matrix_market_folders(tmp_path: Path, version: int, packed: bool) -> None:
    found = opened(write_mtx(tmp_path / "mtx", version=version, packed=packed))
    assert found.format == "10x_mtx"
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == CELLS


def test_a_matrix_file_with_a_sample_name_in_front(tmp_path: Path) -> None:
    folder = write_mtx(tmp_path / "mtx", version=3, packed=True, prefix="GSM1_")
    other = write_mtx(tmp_path / "other", version=3, packed=True, prefix="GSM2_")
    for file in other.iterdir():
        file.rename(folder / file.name)
    with pytest.raises(ValueError, match="2 matrix files"):
        opened(folder)
    path = folder / "GSM1_matrix.mtx.gz"
    np.testing.assert_array_equal(values(opened(path)), COUNTS)
    before = source_hash(path)
    (folder / "GSM2_barcodes.tsv.gz").unlink()
    assert source_hash(path) == before


def test_loom(tmp_path: Path) -> None:
    found = opened(write_loom(tmp_path / "a.loom"))
    assert found.format == "loom"
    np.testing.assert_array_equal(values(found), COUNTS)
    np.testing.assert_array_equal(values(found, "layers/spliced"), COUNTS + 1)
    assert found.barcodes.tolist() == CELLS
    assert set(found.matrices[0].gene_columns) == {"Gene"}
    assert found.obs["donor"].tolist() == ["d0", "d1"] * 3 + ["d0"]


def table_text(separator: str, *, genes_in_rows: bool, corner: bool = True) -> str:
    rows, columns, data = (GENES, CELLS, COUNTS.T) if genes_in_rows else (CELLS, GENES, COUNTS)
    lines = [([""] if corner else []) + columns]
    lines += [[row, *map(str, line)] for row, line in zip(rows, data, strict=True)]
    return "".join(separator.join(line) + "\n" for line in lines)


@pytest.mark.parametrize("genes_in_rows", [True, False])
@pytest.mark.parametrize("corner", [True, False], ids=["named corner", "as R writes it"])
@pytest.mark.parametrize("format", ["csv", "tsv"])
@pytest.mark.parametrize("packed", [True, False])
def test_tables(
    tmp_path: Path, genes_in_rows: bool, corner: bool, format: str, packed: bool
) -> None:
    separator = readers_text.SEPARATORS[format]
    data = table_text(separator, genes_in_rows=genes_in_rows, corner=corner).encode()
    path = tmp_path / f"table.{format}"
    path.write_bytes(gzip.compress(data) if packed else data)
    found = opened(path)
    assert found.format == format
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == CELLS
    assert found.matrices[0].gene_columns["index"].tolist() == GENES


def write_frame(path: Path, frame: pd.DataFrame, **options: object) -> Path:
    frame.to_csv(path, **options)
    return path


FRAME = pd.DataFrame(COUNTS, index=CELLS, columns=GENES)


@pytest.mark.parametrize("corner", [None, "index", "Cell_ID", "Unnamed: 0"])
def test_numbers_may_name_cells(tmp_path: Path, corner: str | None) -> None:
    frame = FRAME.reset_index(drop=True)
    found = opened(write_frame(tmp_path / "a.csv", frame, index_label=corner))
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.barcodes.tolist() == [str(i) for i in range(N_CELLS)]


def test_a_table_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the first column 'G0' looks like a gene, not cell names"):
        opened(write_frame(tmp_path / "a.csv", FRAME, index=False))
    with pytest.raises(ValueError, match="the first line begins with the gene 'G0'"):
        opened(write_frame(tmp_path / "b.tsv", FRAME.T, header=False, sep="\t"))


@pytest.mark.parametrize("name", ["n_counts", "nCount_RNA", "percent.mt", "Length", "Entrez ID"])
@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_annotations_among_the_counts_are_refused(
    tmp_path: Path, name: str, genes_in_rows: bool
) -> None:
    frame = (FRAME.T if genes_in_rows else FRAME).copy()
    frame.insert(2, name, 5)
    with pytest.raises(ValueError, match=f"the column '{name}' is no cell or gene"):
        opened(write_frame(tmp_path / "a.csv", frame))
    with pytest.raises(ValueError, match=f"the row '{name}' is no cell or gene"):
        opened(write_frame(tmp_path / "b.csv", frame.T))


@pytest.mark.parametrize("block", [12, 2**20])
def test_a_column_of_sums_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(source, "BLOCK_ENTRIES", block)
    frame = pd.concat([FRAME] * 5)
    frame.index = [f"cell{i}" for i in range(len(frame))]
    frame["all of it"] = frame.sum(axis=1)
    with pytest.raises(ValueError, match="column 13 is the sum of all others"):
        values(opened(write_frame(tmp_path / "a.csv", frame)))
    frame.iloc[-1, -1] += 1
    assert values(opened(write_frame(tmp_path / "b.csv", frame))).shape == (35, 12)


@pytest.mark.parametrize("end", ["0", "7.0", "0.0"])
def test_a_last_line_break_may_be_missing_behind_a_whole_number(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f",G0,G1\ncell0,12,3\ncell1,4,{end}")
    assert values(opened(path)).tolist() == [[12, 3], [4, float(end)]]


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


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def break_truncated_h5ad(folder: Path) -> Path:
    table().write_h5ad(folder / "a.h5ad")
    cut(folder / "a.h5ad", 0.6)
    return folder / "a.h5ad"


def break_text_named_h5ad(folder: Path) -> Path:
    (folder / "a.h5ad").write_text(table_text("\t", genes_in_rows=True))
    return folder / "a.h5ad"


def break_no_barcodes(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    (path / "barcodes.tsv").unlink()
    return path


def break_cut_gzip(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3, packed=True)
    cut(path / "matrix.mtx.gz", 0.5)
    return path


def break_cut_matrix(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    lines = (path / "matrix.mtx").read_text().splitlines()
    (path / "matrix.mtx").write_text("\n".join(lines[:-3]) + "\n")
    return path


def break_one_barcode_more(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    with (path / "barcodes.tsv").open("a") as file:
        file.write("cell7\n")
    return path


def break_word_in_matrix(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    lines = (path / "matrix.mtx").read_text().splitlines()
    lines[-1] = "1 1 many"
    (path / "matrix.mtx").write_text("\n".join(lines) + "\n")
    return path


def break_last_digit(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    os.truncate(path / "matrix.mtx", (path / "matrix.mtx").stat().st_size - 1)
    return path


def break_fields_of_features(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    os.truncate(path / "features.tsv", (path / "features.tsv").stat().st_size - 20)
    return path


def break_feature_type(folder: Path) -> Path:
    types = ["Gene Expression"] * (N_GENES - 1) + ["Gene Exprassion"]
    return write_tenx_v3(folder / "a.h5", ["GRCh38"] * N_GENES, types)


def break_tenx_sizes(folder: Path) -> Path:
    types = ["Gene Expression"] * (N_GENES - 1) + ["Peaks"]
    path = write_tenx_v3(folder / "a.h5", ["GRCh38"] * N_GENES, types)
    with h5py.File(path, "r+") as root:
        root["matrix/shape"][0] = N_GENES - 1
    return path


def break_header_without_a_comma(folder: Path) -> Path:
    text = table_text(",", genes_in_rows=False)
    (folder / "a.csv").write_text(text.replace(",G1,", ",G1.", 1))
    return folder / "a.csv"


def break_zarr_chunk(folder: Path) -> Path:
    with anndata.settings.override(zarr_write_format=2):
        table(sparse.csr_matrix(COUNTS)).write_zarr(folder / "a.zarr")
    (folder / "a.zarr/X/indices/0").unlink()
    return folder / "a.zarr"


def break_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("counts.csv", table_text(",", genes_in_rows=True))
    return folder / "a.zip"


def break_ragged(folder: Path) -> Path:
    lines = table_text(",", genes_in_rows=False).splitlines()
    lines[3] = lines[3].rsplit(",", 3)[0]
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    return folder / "a.csv"


def break_word_in_table(folder: Path) -> Path:
    lines = table_text(",", genes_in_rows=False).splitlines()
    lines[4] = lines[4][:-1] + "x"
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    return folder / "a.csv"


def break_last_number(folder: Path) -> Path:
    (folder / "a.csv").write_text(",G0,G1\ncell0,12,3\ncell1,4,120\n")
    os.truncate(folder / "a.csv", (folder / "a.csv").stat().st_size - 1)
    return folder / "a.csv"


def break_carriage_returns(folder: Path) -> Path:
    text = table_text(",", genes_in_rows=True)
    (folder / "a.csv").write_bytes(text.replace("\n", "\r").encode())
    return folder / "a.csv"


def break_second_names(folder: Path) -> Path:
    (folder / "a.csv").write_text("id,name,cell0\nG0,N0,1\nG1,N1,2\n")
    return folder / "a.csv"


def break_header_only(folder: Path) -> Path:
    (folder / "a.csv").write_text(table_text(",", genes_in_rows=False).splitlines()[0] + "\n")
    return folder / "a.csv"


def break_other_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as root:
        root["weights"] = np.zeros(3)
    return folder / "a.h5"


def break_packed_h5ad(folder: Path) -> Path:
    table().write_h5ad(folder / "a.h5ad")
    (folder / "a.h5ad.gz").write_bytes(gzip.compress((folder / "a.h5ad").read_bytes()))
    return folder / "a.h5ad.gz"


def break_wrong_pointers(folder: Path) -> Path:
    table(sparse.csr_matrix(COUNTS)).write_h5ad(folder / "a.h5ad")
    with h5py.File(folder / "a.h5ad", "r+") as root:
        root["X/indptr"][-1] = 10_000
    return folder / "a.h5ad"


def break_column_numbers(folder: Path) -> Path:
    table(sparse.csr_matrix(COUNTS)).write_h5ad(folder / "a.h5ad")
    with h5py.File(folder / "a.h5ad", "r+") as root:
        root["X/indices"][0] = N_GENES
    return folder / "a.h5ad"


def break_wrapped_pointers(folder: Path) -> Path:
    table(sparse.csr_matrix(COUNTS)).write_h5ad(folder / "a.h5ad")
    with h5py.File(folder / "a.h5ad", "r+") as root:
        stored = root["X/indptr"][:].astype(np.int64)
        stored[4:] -= 2**32
        del root["X/indptr"]
        root["X/indptr"] = stored
    return folder / "a.h5ad"


def break_saturated_pointers(folder: Path) -> Path:
    table(sparse.csr_matrix(COUNTS)).write_h5ad(folder / "a.h5ad")
    with h5py.File(folder / "a.h5ad", "r+") as root:
        root["X/indptr"][...] = np.minimum(root["X/indptr"][:], root["X/indptr"][4])
    return folder / "a.h5ad"


def break_shape(folder: Path) -> Path:
    table(sparse.csr_matrix(COUNTS)).write_h5ad(folder / "a.h5ad")
    with h5py.File(folder / "a.h5ad", "r+") as root:
        root["X"].attrs["shape"] = [10**12, N_GENES]
    return folder / "a.h5ad"


def break_molecules(folder: Path) -> Path:
    with h5py.File(folder / "molecule_info.h5", "w") as root:
        for name in ("barcode_idx", "count", "feature_idx", "gem_group", "umi"):
            root[name] = np.zeros(3, np.int64)
    return folder / "molecule_info.h5"


def break_unwritten_loom(folder: Path) -> Path:
    with h5py.File(folder / "a.loom", "w") as root:
        root.create_dataset("matrix", shape=(2, 10**8), dtype="f4", chunks=(2, 1024))
        root["row_attrs/Gene"] = GENES[:2]
        root.create_group("col_attrs")
    return folder / "a.loom"


def break_endless_loom(folder: Path) -> Path:
    with h5py.File(folder / "a.loom", "w") as root:
        root.create_dataset("matrix", shape=(2, 2 * 10**9), dtype="f4", chunks=(2, 1024))
        root["row_attrs/Gene"] = GENES[:2]
        root.create_group("col_attrs")
    return folder / "a.loom"


def break_announced_values(folder: Path) -> Path:
    path = write_mtx(folder / "mtx", version=3)
    text = (path / "matrix.mtx").read_text()
    number = str(np.count_nonzero(COUNTS))
    (path / "matrix.mtx").write_text(text.replace(f" {number}\n", f" {10**15}\n", 1))
    return path


def break_endless_line(folder: Path) -> Path:
    with gzip.open(folder / "a.csv.gz", "wb") as file:
        file.write(b"x,")
        for _ in range(80):
            file.write(b"1," * 2**19)
    return folder / "a.csv.gz"


def break_utf16(folder: Path) -> Path:
    (folder / "a.csv").write_bytes(table_text(",", genes_in_rows=False).encode("utf-16"))
    return folder / "a.csv"


def break_image(folder: Path) -> Path:
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    return folder / "a.png"


def break_empty_file(folder: Path) -> Path:
    (folder / "a.csv").touch()
    return folder / "a.csv"


def break_empty_folder(folder: Path) -> Path:
    (folder / "a").mkdir()
    return folder / "a"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (break_truncated_h5ad, "damaged HDF5 file, most likely cut short"),
        (break_text_named_h5ad, "ends in .h5ad, but the content is text"),
        (break_no_barcodes, "no barcodes: expected one of barcodes.tsv"),
        (break_cut_gzip, "cut short"),
        (break_cut_matrix, "announces .* values and holds"),
        (break_one_barcode_more, "11 features and 8 barcodes"),
        (break_word_in_matrix, "not a number|invalid"),
        (break_last_digit, "does not end in a line break"),
        (break_fields_of_features, "line 11 has 2 fields, the first 3"),
        (break_feature_type, "a feature is of type 'Gene Exprassion'"),
        (break_tenx_sizes, "the matrix has 10 genes .* but 11 genes"),
        (break_header_without_a_comma, "line 2 has 12 fields, expected 11"),
        pytest.param(
            break_zarr_chunk,
            "X/indices: 1 of 1 chunks are missing",
            marks=pytest.mark.filterwarnings("ignore:Writing zarr v2 data"),
        ),
        (break_zip, "a zip file with counts.csv; unpack it first"),
        (break_ragged, "line 4 has 9 fields, expected 12"),
        (break_word_in_table, "line 5, field 12 is 'x', not a number"),
        (break_header_only, "0 rows"),
        (break_last_number, "last number may be cut short.* echo >> a.csv"),
        (break_carriage_returns, "lines end in carriage returns alone"),
        (break_second_names, "field 2 is 'N0', not a number; only the first column may hold names"),
        (break_other_hdf5, "an HDF5 file with weights"),
        (break_packed_h5ad, "gunzip it first"),
        (break_wrong_pointers, "index pointers do not fit"),
        (break_column_numbers, "indices"),
        (break_wrapped_pointers, "wrapped around, as 32-bit numbers do; write .* 64-bit"),
        (break_saturated_pointers, "the last 4 are all .* reached its largest value"),
        (break_shape, "claims 1000000000000 cells"),
        (break_molecules, "a molecule_info.h5 of Cell Ranger.*filtered_feature_bc_matrix.h5"),
        (break_unwritten_loom, "matrix claims 200000000 values in .* of which 0 were written"),
        (break_endless_loom, "claims 2000000000 cells"),
        (break_announced_values, "announces 1000000000000000 values and holds .* at most"),
        (break_endless_line, "holds a line of more than 67108864 bytes"),
        (break_utf16, "text in UTF-16; iconv -f utf-16 -t utf-8 a.csv"),
        (break_image, "neither HDF5 nor text"),
        (break_empty_file, "the file is empty"),
        (break_empty_folder, "a folder with nothing"),
    ],
)
def test_broken_inputs_are_one_clear_error(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        values(opened(path))
    assert not isinstance(error.value, UnusableError)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


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
