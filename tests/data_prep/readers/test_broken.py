"""Broken inputs of every format: one error that names the file and what is wrong."""

import gzip
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from reader_inputs import (
    COUNTS,
    GENES,
    N_GENES,
    opened,
    table,
    table_text,
    values,
    write_mtx,
    write_tenx_v3,
)
from scipy import sparse

from data_prep.source.source import (
    UnusableError,
)


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


def break_semicolons(folder: Path) -> Path:
    (folder / "a.csv").write_text(table_text(";", genes_in_rows=False))
    return folder / "a.csv"


def break_blanks(folder: Path) -> Path:
    lines = table_text(" ", genes_in_rows=True).splitlines()
    lines[0] = lines[0].split(" ", 1)[1]
    (folder / "a.txt").write_text("\n".join(lines) + "\n")
    return folder / "a.txt"


def break_prose(folder: Path) -> Path:
    (folder / "a.txt").write_text("These are the counts\nof all cells that we have measured\n")
    return folder / "a.txt"


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
        (break_semicolons, r"separated by semicolons; save .* with commas \(csv\) or tabs \(tsv\)"),
        (break_blanks, r"separated by blanks; save .* with commas \(csv\) or tabs \(tsv\)"),
        (break_prose, "neither tabs nor commas; expected a table with a header line"),
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
