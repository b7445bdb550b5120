"""The trackers that `tracking.also` may name, and whether their libraries are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

from sclong_ds.recorders.csv_file import CsvFile
from sclong_ds.recorders.recorder import About, Recorder
from sclong_ds.recorders.tensorboard import TensorBoard
from sclong_ds.recorders.wandb import WeightsAndBiases

RECORDERS: dict[str, Callable[[About], Recorder]] = {
    "csv": CsvFile,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""By the name in `tracking.also`."""
_LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_libraries(names: Iterable[str]) -> None:
    """Make sure that the libraries of trackers are there; they are not imported.

    Args:
        names: From `tracking.also`.

    Raises:
        ValueError: One is missing.
    """
    for name in names:
        library = _LIBRARIES.get(name)
        if library is not None and importlib.util.find_spec(library) is None:
            raise ValueError(
                f"tracking.also names {name}, whose library is not installed: pip install "
                f"{library}, or leave it out"
            )
