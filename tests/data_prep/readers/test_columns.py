"""Columns of obs and var: every encoding of AnnData, each column by itself."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from data_prep.readers.columns import column_values, table_of
from data_prep.readers.open import open_source
from data_prep.source.source import Source
from data_prep.staging.annotations import as_text

N_CELLS = 6
pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2 data", "ignore:Consolidated metadata", "ignore:zarr v3 autosharding"
)


def opened(path: Path) -> Source:
    return open_source(path, gene_share=lambda names: 1.0)


def of_every_type() -> pd.DataFrame:
    names = ["T", "B", None, "T", "T", "B"]
    return pd.DataFrame(
        {
            "text": ["a", "b", "ü", "", "日本", "a" * 200],
            "kind": pd.Categorical(names),
            "order": pd.Categorical(["2", "1", "2", "1", "2", "1"], ["2", "1"], ordered=True),
            "year": pd.Categorical([2001, 2002, 2001, 2001, 2002, 2001]),
            "whole": np.arange(N_CELLS),
            "share": np.array([0.1, np.nan, 1, 2, 3, 4], np.float32),
            "yes": [True, False, True, True, False, False],
            "maybe": pd.array([1, None, 3, 4, None, 6], dtype="Int64"),
            "perhaps": pd.array([True, None, False, None, True, True], dtype="boolean"),
            "words": pd.array(["a", None, "b", "", None, "c"], dtype="string"),
        },
        index=[f"cell{number}" for number in range(N_CELLS)],
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["h5ad", "zarr 2", "zarr 3"])
def test_columns_of_every_type_are_those_that_anndata_reads(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind[:4]}"
    obs, var = of_every_type(), pd.DataFrame({"name": ["x", "y"]}, index=["A", "B"])
    adata = anndata.AnnData(np.ones((N_CELLS, 2), np.float32), obs=obs, var=var)
    with anndata.settings.override(
        zarr_write_format=3 if "3" in kind else 2, allow_write_nullable_strings=True
    ):
        if kind == "h5ad":
            adata.write_h5ad(path, convert_strings_to_categoricals=False)
        else:
            adata.write_zarr(path, convert_strings_to_categoricals=False)
    expected = (anndata.read_h5ad if kind == "h5ad" else anndata.read_zarr)(path).obs
    found = opened(path)
    assert found.obs.columns == list(obs.columns)
    assert found.barcodes.tolist() == list(obs.index)
    frame, notes = found.obs.frame()
    assert not notes
    for name in obs.columns:
        assert frame[name].isna().tolist() == expected[name].isna().tolist(), name
        values = frame[name].dropna().tolist()
        assert values == expected[name].dropna().tolist(), name
        assert as_text(frame[name])[0].tolist() == as_text(expected[name])[0].tolist(), name
    assert found.matrices[0].gene_columns["name"].tolist() == ["x", "y"]


def small(path: Path) -> Path:
    obs = pd.DataFrame({"donor": list("abcabc"), "age": range(6)}, index=list("uvwxyz"))
    adata = anndata.AnnData(np.ones((N_CELLS, 2), np.float32), obs=obs)
    adata.var_names = ["A", "B"]
    adata.write_h5ad(path, convert_strings_to_categoricals=False)
    return path


@pytest.mark.parametrize("table", ["obs", "var"])
def test_a_column_of_unknown_encoding_costs_itself_alone(tmp_path: Path, table: str) -> None:
    path = small(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as root:
        odd = root[table].create_group("odd")
        odd.attrs["encoding-type"], odd["x"] = "awkward-array", np.arange(6)
        order = [*root[table].attrs["column-order"], "odd", "gone"]
        root[table].attrs["column-order"] = np.array(order, dtype=object)
    found = opened(path)
    notes = dict(found.notes) | found.obs.frame()[1]
    assert found.obs["age"].tolist() == [0, 1, 2, 3, 4, 5]
    assert "'awkward-array', which is not read" in notes[f"{table}/odd"]
    assert "listed, but not there" in notes[f"{table}/gone"]
    if table == "obs":
        with pytest.raises(ValueError, match=r"a\.h5ad: the cell annotation 'odd' cannot be read"):
            found.obs["odd"]


def test_lengths_codes_and_repeated_categories(tmp_path: Path) -> None:
    path = small(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as root:
        obs = root["obs"]
        obs["short"] = np.arange(5)
        for name, codes in (("twice", [0, 1, 1, -1, 0, 0]), ("wrong", [0, 1, 2, 0, 0, 0])):
            obs[f"{name}/codes"] = np.array(codes, np.int8)
            obs[f"{name}/categories"] = ["T", "T"]
        obs.attrs["column-order"] = np.array(["short", "twice", "wrong"], dtype=object)
    frame, notes = opened(path).obs.frame()
    assert frame["twice"].tolist() == ["T", "T", "T", None, "T", "T"]
    assert "5 values for 6 rows" in notes["obs/short"]
    assert "a category code is out of range" in notes["obs/wrong"]


def test_categories_as_before_version_0_8(tmp_path: Path) -> None:
    path = small(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as root:
        obs = root["obs"]
        obs["__categories/kind"] = ["T", "B"]
        obs["kind"] = np.array([0, 1, -1, 0, 0, 1], np.int8)
        obs["kind"].attrs["categories"] = obs["__categories/kind"].ref
        obs.attrs["column-order"] = np.array(["kind"], dtype=object)
    found = opened(path)
    assert found.obs.columns == ["kind"]
    assert found.obs["kind"].astype(object).where(lambda v: v.notna(), None).tolist() == [
        *("T", "B", None),
        *("T", "T", "B"),
    ]


@pytest.mark.parametrize("place", ["uns", "raw.cat"])
def test_categories_as_before_version_0_7(tmp_path: Path, place: str) -> None:
    """Tables were arrays of records then, with codes whose names lie elsewhere."""
    text = h5py.string_dtype()
    with h5py.File(tmp_path / "a.h5ad", "w") as root:
        root["X"] = np.ones((3, 2), np.float32)
        obs = np.array(
            [(b"a", 1, 5), (b"b", -1, 6), (b"c", 0, 7)],
            [("index", "S1"), ("kind", "i1"), ("n", "i4")],
        )
        root["obs"] = obs
        var = np.array([(b"A", 1), (b"B", 0)], [("index", "S1"), ("feature_types", "i1")])
        root["var"] = root["raw.var"] = var
        root["raw.X"] = np.ones((3, 2), np.float32)
        root["uns/kind_categories"] = np.array(["B", "T"], dtype=text)
        # Of something else with more codes than names.
        root["uns/n_categories"] = np.array(["few"], dtype=text)
        for name in {"uns", place}:
            types = ["Antibody Capture", "Gene Expression"]
            root[f"{name}/feature_types_categories"] = np.array(types, dtype=text)
    found = opened(tmp_path / "a.h5ad")
    assert found.obs["kind"].astype(object).where(lambda v: v.notna(), None).tolist() == [
        "T",
        None,
        "B",
    ]
    assert found.obs["n"].tolist() == [5, 6, 7]
    assert {matrix.name for matrix in found.matrices} == {"X", "raw.X"}
    for matrix in found.matrices:
        assert matrix.gene_columns["index"].tolist() == ["A"]
        assert dict(matrix.left_out) == {"feature type Antibody Capture": 1}


def test_foreign_bytes_in_names_and_annotations(tmp_path: Path) -> None:
    path = small(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as root:
        for where, values in (
            ("obs/_index", [b"u\xff", b"v", b"w", b"x", b"y", b"z"]),
            ("obs/donor", [b"M\xfcller", b"b", b"c", b"a", b"b", b"c"]),
            ("var/_index", [b"A\xe9", b"B"]),
        ):
            del root[where]
            root[where] = np.array(values, dtype=h5py.string_dtype())
    found = opened(path)
    # What is kept of them is repaired and counted where it is written.
    assert found.barcodes[0] == "u\udcff"
    assert found.obs["donor"][0] == "M\udcfcller"
    assert found.matrices[0].gene_columns["index"].tolist() == ["A\ufffd", "B"]
    assert found.notes["X genes, index"].startswith("1 names are not UTF-8")


def test_names_that_were_never_written(tmp_path: Path) -> None:
    path = small(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as root:
        del root["obs/_index"]
        root["obs"].create_dataset("_index", shape=(10**8,), dtype="S8", chunks=(2**16,))
        with pytest.raises(ValueError, match="claims 100000000 values in 1526 chunks, of which 0"):
            table_of(root, "obs")
        del root["obs/_index"]
        root["obs"].create_dataset("_index", shape=(2 * 10**9,), dtype="S8", chunks=(2**16,))
        with pytest.raises(ValueError, match="claims 2000000000 cells"):
            table_of(root, "obs")
        with pytest.raises(ValueError, match="not there"):
            column_values(root["obs"], "nothing")
