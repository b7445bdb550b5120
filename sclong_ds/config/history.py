"""Keys that configurations of earlier versions lack, and the value that they had in effect.

A configuration that a run folder or a checkpoint of an earlier version holds opens in every later
one. Keys that a person leaves out get the same value.
"""

from __future__ import annotations

from typing import Any

LATER_KEYS: dict[str, dict[str, Any]] = {"data": {"unmeasured": "zero"}}
"""By section, keys that came after the first version."""


def add_later_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys that came later.

    Args:
        tree: Sections as read from YAML; what is no mapping stays as it is.
    """
    return tree | {
        section: LATER_KEYS[section] | tree[section]
        for section in LATER_KEYS
        if isinstance(tree.get(section), dict)
    }
