"""Keys that saved files of earlier versions lack, and the values that mean what was done then.

The config.yaml of a run folder, a checkpoint or an exported model opens in every later version. It
carries the version of the keys that it was written with (`version`; in an exported model
`config_version`); files of versions 1 and 2 carry none. Whoever adds a key to a section of the
configuration, or to `Transform`, adds it here under the next number, with the value under which
everything stays as it was: with it old runs resume, and old models embed, unchanged.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from sclong_ds.config.strict_yaml import read_yaml
from sclong_ds.files.versions import refuse_later

LATER_KEYS: dict[int, dict[str, Any]] = {
    2: {"data.unmeasured": "zero", "transform.unmeasured": "zero"},
    3: {"model.cell_offset": "none", "model.zero_genes": None},
    4: {"run.accept_changes": False},
    5: {
        "model.favor_eps": 1e-4,
        "model.large_encoder.attention": None,
        "model.mini_encoder.attention": None,
        "model.decoder.attention": None,
    },
    6: {"model.cell_vector": "none"},
    7: {"tracking.also": []},
    8: {"data.order": "groups", "data.loader_memory": 512},
    9: {"data.cells_cache": 0},
    10: {"model.zero_head": False, "objective.loss": "mse"},
    11: {"run.profile": "trace"},
    12: {"data.grown": False},
    13: {"engine.linear_products": "precision"},
}
"""By version, the keys that came with it: `section.key`, `section.stack.key`, or a whole section
with all of its keys. `transform` is the section of an exported model."""

VERSION = max(LATER_KEYS)
"""Version of the keys that this program writes."""


def read_saved(path: Path) -> dict[str, Any]:
    """Return the sections of a configuration file, with the keys that came after it was written.

    Args:
        path: A config.yaml that training wrote, or a file or preset that a person wrote.

    Raises:
        ValueError: Not YAML, or written by a later version.
    """
    tree = read_yaml(path)
    version = tree.pop("version", 1)
    check_version(version, where=str(path))
    return complete(tree)


def check_version(version: object, *, where: str) -> None:
    """Refuse a configuration that a later version wrote.

    Args:
        version: What the file states.
        where: The file, for the message.

    Raises:
        ValueError: It is no version that this program reads.
    """
    if type(version) is not int or version < 1:
        raise ValueError(f"{where}: configuration version {version!r}; must be 1 to {VERSION}")
    refuse_later(version, newest=VERSION, what="configuration", where=where)


def complete(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys that it lacks because they came later.

    Args:
        tree: Sections by name; what is no mapping stays as it is.
    """
    tree = copy.deepcopy(tree)
    for keys in LATER_KEYS.values():
        for key, value in keys.items():
            *parents, name = key.split(".")
            node: Any = tree
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if isinstance(node, dict):
                node.setdefault(name, copy.deepcopy(value))
    return tree
