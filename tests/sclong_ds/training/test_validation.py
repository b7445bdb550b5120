"""What validation hands over is that of all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sclong_ds.objective.scores import MODEL
from sclong_ds.training import validation


def table(*true: float) -> dict[str, np.ndarray]:
    """Return the targets of a batch, the last of them shown, each predicted one too high."""
    values = np.array(true)
    return {"true": values, MODEL: values + 1, "hidden": np.arange(len(true)) < len(true) - 1}


def test_the_picture_of_predictions_has_the_hidden_values_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everyone = [[table(1.0, 2.0, 9.0)], [table(3.0, 9.0), table(4.0, 9.0)]]

    def gather(mine: Any, gathered: list[Any] | None, **_: Any) -> None:
        if gathered is not None:
            gathered[:] = everyone

    monkeypatch.setattr(validation.dist, "gather_object", gather)
    found = []
    for rank in range(2):
        ranks: Any = SimpleNamespace(rank=rank, world_size=2, control=None)
        tables = validation._of_all_ranks(ranks, everyone[rank])
        found.append(validation._predicted_true(tables))
    first, second = found
    assert first.tolist() == [[2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0]]
    assert second.shape == (2, 0)  # rank 0 alone hands pictures over
