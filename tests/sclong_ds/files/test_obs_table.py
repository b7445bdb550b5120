import gzip

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclong_ds.files.obs_table import read_obs, write_obs

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.thorough
@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), max_size=20))
def test_any_text_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("obs") / "a.parquet"
    frame = pd.DataFrame(rows, columns=["barcode", "cell\ttype"], dtype=object)
    write_obs(path, frame)
    found = read_obs(path)
    assert list(found.columns) == list(frame.columns)
    assert found.to_numpy().tolist() == frame.to_numpy().tolist()


def test_long_text_and_chosen_columns(tmp_path):
    text = "a\r\n\0\u2028" * 100_000
    frame = pd.DataFrame({"barcode": [text, ""], "donor": ["NA", "nan"], "note": ["", "\ufeff"]})
    write_obs(tmp_path / "a.parquet", frame)
    assert read_obs(tmp_path / "a.parquet").barcode.tolist() == [text, ""]
    found = read_obs(tmp_path / "a.parquet", columns=["donor", "none", "barcode"])
    assert list(found.columns) == ["barcode", "donor"]
    assert found.donor.tolist() == ["NA", "nan"]
    assert len(read_obs(tmp_path / "a.parquet", columns=[])) == 2


def test_same_frame_same_bytes(tmp_path):
    frame = pd.DataFrame({"barcode": list("abc"), "donor": ["x", "y", "x"]})
    write_obs(tmp_path / "a.parquet", frame)
    write_obs(tmp_path / "b.parquet", frame.copy())
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize("value", [None, float("nan"), 3, "\ud800"])
def test_what_is_no_text_is_refused(tmp_path, value):
    frame = pd.DataFrame({"barcode": ["a", value]}, dtype=object)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'barcode'"):
        write_obs(tmp_path / "a.parquet", frame)
    assert not list(tmp_path.iterdir())


def test_tables_of_version_1(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"barcode\tdonor\nA-1\tNA\n\t\n"))
    assert read_obs(path).to_numpy().tolist() == [["A-1", "NA"], ["", ""]]
    assert list(read_obs(path, columns=["donor"]).columns) == ["donor"]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.parquet: no such file"):
        read_obs(tmp_path / "a.parquet")
    write_obs(tmp_path / "a.parquet", pd.DataFrame({"barcode": ["a" * 1000, "b"]}))
    data = (tmp_path / "a.parquet").read_bytes()
    for cut in (0, 3, len(data) // 2, len(data) - 1):
        (tmp_path / "a.parquet").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"a\.parquet: damaged"):
            read_obs(tmp_path / "a.parquet")
