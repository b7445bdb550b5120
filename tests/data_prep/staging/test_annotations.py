"""Annotations of cells become text by one rule, exactly or counted."""

import datetime

import numpy as np
import pandas as pd
import pytest

from data_prep.manifest.manifest import Dataset
from data_prep.staging.annotations import annotation_table, as_text, kept_columns

NASTY = ["cr\rx", "crlf\r\nx", "\u2028", "nul\0a", "nul\0b", "x" * 200_000, "\ufeffbom", "NA", " "]


def text(values: object, dtype: object = None) -> list[str]:
    found, repaired = as_text(pd.Series(values, dtype=dtype))  # type: ignore[call-overload]
    assert repaired == 0
    return found.tolist()


@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_any_text_stays_as_it_is(dtype: object) -> None:
    # pandas takes two categories for one that differ only after a NUL.
    values = [value for value in NASTY if dtype != "category" or value != "nul\0b"]
    assert text(values, dtype) == values
    assert text(["a", None, "b"], dtype) == ["a", "", "b"]


def test_numbers_times_and_missing_values_by_one_rule() -> None:
    assert text([1, 2]) == ["1", "2"]
    assert text([1, None], "Int64") == ["1", ""]
    assert text(np.array([255], np.uint8)) == ["255"]
    assert text([True, False]) == ["True", "False"]
    assert text([True, None], "boolean") == ["True", ""]
    assert text([0.1, np.nan, 3.0, 1e-7]) == ["0.1", "", "3.0", "1e-07"]
    assert text(np.array([0.1, 2.0], np.float32)) == ["0.1", "2.0"]
    assert text([0.1, None], "Float32") == ["0.1", ""]
    assert text(pd.to_datetime(["2024-01-31", None])) == ["2024-01-31 00:00:00", ""]
    assert text([datetime.date(2024, 1, 31), pd.NaT], object) == ["2024-01-31", ""]
    assert text([2, 10, None], "category") == ["2", "10", ""]
    assert text(pd.Categorical.from_codes([1, -1], categories=[7, 8])) == ["8", ""]
    assert text([1, True, "1", 1.0, None, b"\xc3\xa9"], object) == [
        "1",
        "True",
        "1",
        "1.0",
        "",
        "\u00e9",
    ]
    assert text([]) == []


@pytest.mark.parametrize("dtype", [object, "category"])
def test_what_utf_8_cannot_hold_is_repaired_and_counted(dtype: str) -> None:
    # One such text only: pandas takes several categories of them for one.
    values = pd.Series(["a", "b\ud800", "b\ud800", "c"], dtype=object).astype(dtype)
    found, repaired = as_text(values)
    assert found.tolist() == ["a", "b\ufffd", "b\ufffd", "c"]
    assert repaired == 2
    assert as_text(pd.Series(["\udcffc", "\ud800"]))[0].tolist() == ["\ufffdc", "\ufffd"]
    assert as_text(pd.Series([b"\xff", b"a"], dtype=object))[1] == 1


def test_table_of_chosen_columns_with_fixed_names() -> None:
    obs = pd.DataFrame({"who": ["p", "q"], "age\udc80": [1, 2], "barcode": ["x", "y"]})
    dataset = Dataset(dataset_id="a", path="a", obs_columns="*", donor_column="who")  # type: ignore[arg-type]
    columns = kept_columns(obs, dataset)
    table, repaired = annotation_table(np.array(["c\ud800", "c"], object), obs, columns)
    assert table.to_dict("list") == {
        "barcode": ["c\ufffd", "c"],
        "who": ["p", "q"],
        "age\ufffd": ["1", "2"],
        "donor": ["p", "q"],
    }
    assert repaired == 1


def test_columns_that_cannot_be_told_apart() -> None:
    obs = pd.DataFrame([[1, 2, 3]], columns=["a", "a", "b\ud800"])
    dataset = Dataset(dataset_id="a", path="a", obs_columns="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 cell annotations 'a'"):
        kept_columns(obs, dataset)
    names = dict.fromkeys(("x\ud800", "x\ufffd"), "b\ud800")
    with pytest.raises(ValueError, match="two cell annotations 'x\ufffd'"):
        annotation_table(np.array(["c"], object), obs, names)
