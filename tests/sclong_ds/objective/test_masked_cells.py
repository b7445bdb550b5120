"""Cells with their targets are the same from the loader's threads and from validation's reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sclong_ds.config.load import load_config
from sclong_ds.corpus.cell_store import DamagedChunk
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.objective.masked_cells import MaskedCells


def cells_of(corpus: Path, *settings: str) -> MaskedCells:
    config = load_config("sclong_tiny", settings)
    return MaskedCells(
        weights=None,
        corpus=Corpus(corpus), data=config.data, objective=config.objective, model=config.model,
        seed=0, device=torch.device("cpu"), measured=None,
    )  # fmt: skip


def test_read_cells_have_their_values_and_targets_among_them(small_corpus: Path) -> None:
    cells, rows = cells_of(small_corpus), np.array([3, 0, 7])
    batch, problem = cells.read(rows)
    assert batch is not None
    assert problem is None
    counts = cells.corpus.rows(rows).toarray()
    np.testing.assert_array_equal(cells.counts(batch).numpy(), counts)
    values = log1p_normalise(cells.corpus.rows(rows), target_sum=cells.data.target_sum)
    np.testing.assert_allclose(cells.values(batch).numpy(), values, rtol=1e-6)
    masked = cells.to_device(batch, cells.prepare(batch))
    np.testing.assert_allclose(masked.x.numpy(), values, rtol=1e-6)
    true = torch.from_numpy(values).gather(1, masked.positions)
    torch.testing.assert_close(masked.true[masked.valid].float(), true[masked.valid])
    again = cells.to_device(batch, cells.prepare(batch))
    assert torch.equal(masked.positions, again.positions)
    other = dataclasses.replace(cells, seed=1)
    assert not torch.equal(masked.hidden, other.to_device(batch, other.prepare(batch)).hidden)


@pytest.mark.parametrize(("on_damage", "read"), [("stop", False), ("skip", True)])
def test_damaged_cells_are_without_counts_or_a_problem(
    small_corpus: Path, monkeypatch: pytest.MonkeyPatch, on_damage: str, read: bool
) -> None:
    def damaged(*_: object) -> None:
        raise DamagedChunk("cut", chunk=2, path="gap/c/0", first_cell=0, last_cell=9)

    monkeypatch.setattr(Corpus, "packed_rows", damaged)
    cells = cells_of(small_corpus, f"data.on_damage={on_damage}")
    batch, problem = cells.read(np.arange(4))
    if read:
        assert batch is not None
        assert not cells.counts(batch).any()
        assert not cells.to_device(batch, cells.prepare(batch)).valid.any()
    else:
        assert batch is None
        assert str(problem).startswith("gap/c/0: chunk 2 (cells 0 to 9) is damaged: cut")
