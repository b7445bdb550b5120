"""Numbers computed with the released scLong code: which file holds what (`tests/golden/README.md`).

A golden is an npz with a json of the same name beside it; the json says what kind it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "golden"
_TELLTALE = {"model": "constructor_kwargs", "graph": "n_jaccard_edges", "training": "sched_kwargs"}
"""Kind of golden: a key that only its json has."""

REPORT = pytest.StashKey[list[str]]()
"""Lines of the tables of errors, printed at the end of a test run."""


@dataclass(frozen=True)
class Golden:
    """One golden file."""

    path: Path
    about: dict[str, Any]

    def arrays(self) -> Any:
        """Return the arrays by name."""
        return np.load(self.path, allow_pickle=False)


def goldens(config: pytest.Config, kind: str) -> list[Golden]:
    """Return the goldens of one kind in `--golden-dir`.

    Args:
        config: pytest's configuration.
        kind: `model`, `graph` or `training` (schedule, masks, random features).

    Raises:
        pytest.UsageError: No goldens there, or one of no known kind.
    """
    folder = Path(config.getoption("--golden-dir") or FOLDER)
    found = []
    for path in sorted(folder.glob("*.npz")):
        if not path.with_suffix(".json").is_file():
            raise pytest.UsageError(f"{path}: no json of the same name beside it")
        golden = Golden(path, json.loads(path.with_suffix(".json").read_text()))
        if not set(_TELLTALE.values()) & set(golden.about):
            raise pytest.UsageError(f"{path}: its json has none of {sorted(_TELLTALE.values())}")
        found.append(golden)
    if not found:
        raise pytest.UsageError(f"--golden-dir {folder}: no npz there")
    return [golden for golden in found if _TELLTALE[kind] in golden.about]


def parametrize(metafunc: pytest.Metafunc, kind: str, *, argument: str = "golden") -> None:
    """Give a test's argument every golden of one kind."""
    found = goldens(metafunc.config, kind)
    metafunc.parametrize(argument, found, ids=[g.path.stem for g in found])
