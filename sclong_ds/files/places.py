"""Where the folders lie that belong to the project and are no modules."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def is_installed() -> bool:
    """Return whether this is an installed package and not a checkout of the repository."""
    return (_PACKAGE / "data_prep").is_dir()


def place_of(name: str) -> Path:
    """Return the folder `data_prep`, `ds_configs` or `slurm`.

    They lie beside `sclong_ds` in the repository and inside it where it is installed.

    Args:
        name: One of these.
    """
    return (_PACKAGE if is_installed() else _PACKAGE.parent) / name
