"""Digests of the parts are kept, and read only where they fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from grown_corpora import grown

import data_prep.corpus.growth.digests as digests_module
from sclong_ds.corpus.corpus import Corpus


@pytest.mark.thorough
def test_the_digests_of_parts_are_kept_and_read_in_pieces(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "CELLS_OF_UNIT", 50)
    folder = grown(made, tmp_path / "grown", ["ab", "d"])
    shape = np.load(folder / "parts" / "000000.digests.npy").shape
    assert shape == (160, 2)
    grown(made, folder, ["c"])
    info = next(d for d in Corpus(folder).datasets if d.dataset_id == "c")
    assert info.duplicates_dropped == 9 + 3


@pytest.mark.parametrize("shape", [(159, 2), (161, 2), (160, 3)])
def test_kept_digests_of_another_number_of_cells_are_refused(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    np.save(tmp_path / "kept.npy", np.zeros(shape, np.uint64))
    for start in (0, 100):
        unit = digests_module.DigestUnit(
            first=start, n_cells=60, kept=tmp_path / "kept.npy", start=start, n_kept=160
        )
        with pytest.raises(ValueError, match=r"kept\.npy.*160 staged cells"):
            digests_module.read_kept(unit)
