"""Containers: locked, unclosed, compressed, zipped and nested ones; no claim is believed.

Covers also `data_prep/readers/anndata.py`, `data_prep/readers/hdf5.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import h5py
import hdf5plugin
import numpy as np
import pytest
import zarr
from scipy import sparse

from data_prep.readers import containers as readers_containers
from data_prep.readers.open import detect_format, h5ad_beside_counts, open_source
from data_prep.source.source import Source
from data_prep.verify.plain_arrays import plain_anndata

COUNTS = np.random.default_rng(5).poisson(0.8, (6, 5)).astype(np.float32)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2 data", "ignore:Consolidated metadata", "ignore:zarr v3 autosharding"
)


def cells() -> anndata.AnnData:
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS))
    adata.obs_names = [f"cell{number}" for number in range(6)]
    adata.var_names = [f"G{number}" for number in range(5)]
    return adata


def opened(path: Path) -> Source:
    return open_source(path, gene_share=lambda names: 1.0)


def values(source: Source, name: str = "X") -> np.ndarray:
    [matrix] = [matrix for matrix in source.matrices if matrix.name == name]
    return sparse.vstack(list(matrix.blocks())).toarray()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Path]:
    """A file that another process holds open for writing."""
    path = tmp_path / "a.h5ad"
    cells().write_h5ad(path)
    code = f"import h5py; f = h5py.File({str(path)!r}, 'r+'); print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield path
    process.kill()
    process.communicate()


def test_a_file_that_another_process_writes_is_read_and_noted(writer: Path) -> None:
    found = opened(writer)
    np.testing.assert_array_equal(values(found), COUNTS)
    assert found.notes == {"file": "open for writing in another process while it was read"}


def test_a_file_that_this_process_has_open(tmp_path: Path) -> None:
    cells().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad"):
        np.testing.assert_array_equal(values(opened(tmp_path / "a.h5ad")), COUNTS)


def test_a_file_that_was_not_closed_names_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    code = (
        f"import h5py, os; f = h5py.File({str(path)!r}, 'w', libver='latest'); "
        "f['obs'] = [1]; f.flush(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    with pytest.raises(ValueError, match=r"a\.h5ad: the file was not closed .* h5clear -s a\.h5ad"):
        opened(path)


@pytest.mark.parametrize(
    "options",
    [
        hdf5plugin.Zstd(),
        hdf5plugin.Blosc(),
        hdf5plugin.Blosc2(),
        hdf5plugin.Bitshuffle(),
        hdf5plugin.LZ4(),
        {"compression": "lzf"},
    ],
    ids=lambda options: type(options).__name__,
)
def test_filters_of_hdf5plugin(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "a.h5ad"
    cells().write_h5ad(path)
    with h5py.File(path, "r+") as root:
        for name in ("data", "indices"):
            stored = root["X"][name][:]
            del root["X"][name]
            root["X"].create_dataset(name, data=stored, chunks=(4,), **options)
    np.testing.assert_array_equal(values(opened(path)), COUNTS)


def test_a_filter_that_is_not_there_costs_its_matrix_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5ad"
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as root:
        stored = root["X/data"][:]
        del root["X/data"]
        root["X"].create_dataset("data", data=stored, chunks=(4,), **hdf5plugin.Zstd())
    available = h5py.h5z.filter_avail
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda n: n < 32015 and available(n))
    found = opened(path)
    np.testing.assert_array_equal(values(found, "layers/counts"), COUNTS)
    with pytest.raises(ValueError, match="X is compressed with HDF5 filter 32015: pip"):
        values(found)


def test_matrices_of_no_value_or_of_unknown_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    adata = cells()
    adata.layers["counts"], adata.layers["odd"] = adata.X.copy(), adata.X.copy()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as root:
        del root["X"]
        for name in ("X", "raw"):
            root[name] = h5py.Empty("f4")
            root[name].attrs["encoding-type"] = "null"
        root["layers/odd"].attrs["encoding-type"] = "coo_matrix"
    found = opened(path)
    assert [matrix.name for matrix in found.matrices] == ["layers/counts", "layers/odd"]
    assert found.notes == {"X": "nothing is stored (null)"}
    np.testing.assert_array_equal(values(found, "layers/counts"), COUNTS)
    with pytest.raises(ValueError, match="layers/odd is stored as 'coo'; supported"):
        values(found, "layers/odd")


def test_the_genes_of_mudata(tmp_path: Path) -> None:
    path = tmp_path / "a.h5mu"
    proteins = anndata.AnnData(np.ones((6, 2), np.float32))
    with h5py.File(path, "w") as root:
        root.attrs["encoding-type"] = "MuData"
        anndata.io.write_elem(root, "mod/rna", cells())
        anndata.io.write_elem(root, "mod/prot", proteins)
        anndata.io.write_elem(root, "obs", cells().obs)
        anndata.io.write_elem(root, "var", cells().var)
    found = opened(path)
    assert found.format == "h5ad"
    assert found.matrices[0].gene_columns["index"][0] == "G0"
    assert found.notes == {"mod/prot": "a modality that is not genes"}
    np.testing.assert_array_equal(values(found), COUNTS)
    with h5py.File(path, "r+") as root:
        root.move("mod/rna", "mod/atac")
    with pytest.raises(ValueError, match="MuData with the modalities atac, prot; expected one"):
        opened(path)


def test_the_table_of_spatialdata(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w")
    root.create_group("images")
    root.create_group("tables")
    anndata.io.write_elem(root, "tables/cells", cells())
    np.testing.assert_array_equal(values(opened(tmp_path / "a.zarr")), COUNTS)
    anndata.io.write_elem(root, "tables/spots", cells())
    with pytest.raises(ValueError, match="SpatialData with the tables cells, spots; expected one"):
        opened(tmp_path / "a.zarr")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("inside", [False, True])
def test_a_zipped_zarr_folder(tmp_path: Path, version: int, inside: bool) -> None:
    with anndata.settings.override(zarr_write_format=version):
        cells().write_zarr(tmp_path / "top/a.zarr")
    archive = shutil.make_archive(
        str(tmp_path / "packed"), "zip", tmp_path / ("top" if inside else "top/a.zarr")
    )
    assert detect_format(Path(archive)) == "zarr"
    np.testing.assert_array_equal(values(opened(Path(archive))), COUNTS)


def test_a_zip_member_that_claims_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zarr.json", "{}")
        packed.writestr("X/c/0", b"0" * 10**6)
    monkeypatch.setattr(readers_containers, "MAX_CHUNK_BYTES", 10**5)
    with pytest.raises(ValueError, match="X/c/0 claims 1000000 bytes; at most 100000 are read"):
        opened(tmp_path / "a.zip")


def attributes(name: str, **changed: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))

    return change


def deep(folder: Path) -> None:
    (folder / "X/.zattrs").write_text("[" * 100_000 + "]" * 100_000)


def huge(folder: Path) -> None:
    (folder / "X/.zattrs").write_text(json.dumps({"a": "x" * 100_000}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attributes("obs/_index/.zarray", shape=[2**40]), "claims 1099511627776 cells"),
        (attributes("X/indptr/.zarray", shape=[2**60]), "there are 1152921504606846976"),
        (attributes("X/data/.zarray", shape=[2**60]), "index pointers do not fit"),
        (attributes("X/data/.zarray", chunks=[2**60], shape=[2**60]), "stored in chunks of"),
        (attributes("X/.zattrs", shape=[2**60, 5]), "claims 1152921504606846976 cells"),
        (deep, "recursion"),
        (huge, r"X/\.zattrs holds 100009 bytes"),
    ],
)
def test_sizes_that_zarr_metadata_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(readers_containers, "MAX_METADATA_BYTES", 50_000)
    path = tmp_path / "a.zarr"
    with anndata.settings.override(zarr_write_format=2):
        cells().write_zarr(path)
    (path / ".zmetadata").unlink(missing_ok=True)
    if change is deep:
        monkeypatch.setattr(readers_containers, "MAX_METADATA_BYTES", 10**6)
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        values(opened(path))
    assert str(error.value).startswith("a.zarr: ")
    assert "\n" not in str(error.value)


def test_data_that_lie_in_another_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    cells().write_h5ad(tmp_path / "other.h5ad")
    cells().write_h5ad(path)
    with h5py.File(path, "r+") as root:
        del root["X"]
        root["X"] = h5py.ExternalLink("other.h5ad", "X")
    with pytest.raises(ValueError, match=r"a\.h5ad: X is a link to other\.h5ad, another file"):
        opened(path)
    for part, message in (("X/data", "data is a link"), ("var/_index", "_index is a link")):
        cells().write_h5ad(path)
        with h5py.File(path, "r+") as root:
            del root[part]
            root[part] = h5py.ExternalLink("other.h5ad", part)
        with pytest.raises(ValueError, match=message):
            values(opened(path))
    cells().write_h5ad(path)
    with h5py.File(path, "r+") as root:
        stored = root["X/data"][:]
        del root["X/data"]
        root["X"].create_dataset(
            "data", data=stored, external=[(str(tmp_path / "raw.bin"), 0, 4 * len(stored))]
        )
    with pytest.raises(ValueError, match="X/data lies in other files"):
        values(opened(path))


@pytest.mark.parametrize("error", [RuntimeError, KeyError, ValueError])
def test_a_disk_that_fails_beside_the_counts_is_named(tmp_path: Path, error: type) -> None:
    path = tmp_path / "a.h5ad"
    cells().write_h5ad(path)
    said = "Can't synchronously open (file read failed: errno = 5, error message = 'Input/output'"
    with pytest.raises(OSError, match="Input/output error") as caught, h5ad_beside_counts(path):
        raise error(said)
    assert (caught.value.errno, caught.value.filename) == (5, str(path))
    with pytest.raises(ValueError, match=r"^a\.h5ad: ") as wrong, h5ad_beside_counts(path):
        raise error("no such part")
    assert not isinstance(wrong.value, OSError)
    (tmp_path / "a.txt").write_text("x,G1\n")
    with h5ad_beside_counts(tmp_path / "a.txt") as file:
        assert file is None


def all_values(path: Path) -> list[list[np.ndarray]]:
    """Return the blocks of every matrix."""
    return [[block.toarray() for block in matrix.blocks()] for matrix in opened(path).matrices]


@pytest.mark.parametrize("part", ["X", "X/data", "var", "obs", "layers", "raw/X", "raw/var"])
def test_a_link_inside_of_the_file_may_not_lead_out_of_it(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.h5ad"
    made = cells()
    made.layers["more"] = made.X.copy()
    made.raw = made.copy()
    for name in ("other.h5ad", "a.h5ad"):
        made.write_h5ad(tmp_path / name)
    with h5py.File(path, "r+") as root:
        root.move(part, "moved")
        root[part] = h5py.SoftLink("/moved")
    assert all_values(path)
    with h5py.File(path, "r+") as root:
        del root[part]
        root["out"] = h5py.ExternalLink("other.h5ad", "/")
        root[part] = h5py.SoftLink(f"/out/{part}")
    with pytest.raises(ValueError, match=r"is a link that leads to other\.h5ad, another file"):
        all_values(path)


@pytest.mark.parametrize("version", [2, 3])
def test_what_fills_a_missing_chunk_is_no_count(tmp_path: Path, version: int) -> None:
    path = tmp_path / "a.zarr"
    with anndata.settings.override(zarr_write_format=version):
        cells().write_zarr(path)
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    shape = cells().shape
    for fill, lost in ((0, False), (3, True)):
        del root["X"]
        array = root.create_array("X", shape=shape, chunks=(2, 5), dtype="i4", fill_value=fill)
        array[:2] = 4
        zarr.consolidate_metadata(path)
        if lost:
            with pytest.raises(ValueError, match=r"X: .* chunks are missing"):
                opened(path)
        else:
            assert values(opened(path))[:2].sum() == 8 * shape[1]


def test_values_that_were_never_written(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    cells().write_h5ad(path)
    with h5py.File(path, "r+") as root:
        pointers = root["X/indptr"][:].astype(np.int64)
        pointers[-1] = 10**12
        for name in ("data", "indices", "indptr"):
            del root["X"][name]
        root["X/indptr"] = pointers
        for name in ("data", "indices"):
            root["X"].create_dataset(name, shape=(10**12,), dtype="i4", chunks=(2**16,))
    with pytest.raises(ValueError, match=r"X/data claims 1000000000000 values in .* of which 0"):
        values(opened(path))


@pytest.mark.parametrize("name", ["donor", "cell_type"])
def test_a_disk_that_fails_is_no_annotation_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """HDF5 hides the number in its text, in errors of several types."""
    table = cells()
    table.obs[name] = "a"
    table.write_h5ad(tmp_path / "x.h5ad")
    said = "Can't read data (file read failed: errno = 5, error message = 'Input/output error', x)"
    source = opened(tmp_path / "x.h5ad")
    for error in (OSError(said), KeyError(said), RuntimeError(said), OSError(5, "Input/output")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("data_prep.readers.columns.column_values", fail)
            with pytest.raises(OSError, match=r"\[Errno 5\] Input/output.*x\.h5ad"):
                source.obs.frame([name])
    damaged = OSError("Can't synchronously read data (inflate() failed)")
    assert readers_containers.failed_call(damaged) is None
    assert readers_containers.failed_call(NotADirectoryError(20, "Not a directory")) is None


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_what_was_written_after_the_consolidated_metadata_is_seen(
    tmp_path: Path, version: int, packed: bool
) -> None:
    path, adata = tmp_path / "a.zarr", cells()
    with anndata.settings.override(zarr_write_format=version):
        adata.write_zarr(path)
        zarr.consolidate_metadata(str(path))
        adata.var["feature_types"] = ["Gene Expression"] * 4 + ["Antibody Capture"]
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        anndata.io.write_elem(root, "var", adata.var)
    if packed:
        path = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", path))
    assert opened(path).matrices[0].gene_columns["index"].tolist() == ["G0", "G1", "G2", "G3"]
    plain = plain_anndata(path, rows=[0], matrices=["X"], columns=[])
    assert plain.features["feature_types"] == adata.var["feature_types"].tolist()
