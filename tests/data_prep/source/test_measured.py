"""Measured genes are read as they were staged, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.source.measured import MEASURED, pack, read_measured


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_are_read_as_they_were_packed(tmp_path_factory, genes: list[bool]) -> None:
    folder: Path = tmp_path_factory.mktemp("staged")
    np.save(folder / MEASURED, pack(np.array(genes)))
    assert read_measured(folder, len(genes)).tolist() == genes


def test_bits_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / MEASURED, pack(np.ones(16, bool)))
    with pytest.raises(ValueError, match=r"uint8\(2,\) instead of uint8\(3,\); convert"):
        read_measured(tmp_path, 17)
