"""Annotations are read one by one; sizes are bounded; texts are repaired and counted."""

import numpy as np
import pandas as pd
import pytest

from data_prep.source.source import MAX_CELLS, MAX_FEATURES, Annotations, check_size, repaired_texts


def table(read: list[str]) -> Annotations:
    def good() -> pd.Series:
        read.append("good")
        return pd.Series([1, 2, 3])

    def bad() -> pd.Series:
        read.append("bad")
        raise ValueError("odd")

    return Annotations(3, {"good": good, "bad": bad})


def test_only_what_is_asked_for_is_read() -> None:
    read: list[str] = []
    obs = table(read)
    assert obs.columns == ["good", "bad"]
    assert len(obs) == 3
    assert not read
    frame, notes = obs.frame(["good"])
    assert read == ["good"]
    assert frame["good"].tolist() == [1, 2, 3]
    assert not notes
    with pytest.raises(ValueError, match="no cell annotation 'other'; the file has good, bad"):
        obs["other"]


def test_an_unreadable_column_is_noted_unless_it_is_required() -> None:
    obs = table([])
    frame, notes = obs.frame()
    assert list(frame.columns) == ["good"]
    assert notes == {"obs/bad": "odd"}
    with pytest.raises(ValueError, match="odd"):
        obs.frame(required=["bad"])


def test_sizes_that_no_dataset_has() -> None:
    check_size(MAX_CELLS, MAX_FEATURES)
    for sizes in ((MAX_CELLS + 1, 1), (1, MAX_FEATURES + 1), (-1, 1)):
        with pytest.raises(ValueError, match="the file claims"):
            check_size(*sizes)


def test_bytes_that_are_no_text_are_replaced_and_counted() -> None:
    values = [b"T\xff cell", b"B cell", "Zürich".encode()]
    texts = np.array([value.decode("utf-8", "surrogateescape") for value in values], dtype=object)
    found, number = repaired_texts(texts)
    assert found.tolist() == ["T\ufffd cell", "B cell", "Zürich"]
    assert number == 1
    assert texts[0] == "T\udcff cell"
