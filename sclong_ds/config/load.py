"""Run configuration: a strict YAML loader and `key=value` overrides.

A run is described by one complete YAML file: every key must be there, unknown keys, duplicate keys
and wrong types are errors, and nothing is inherited. (Only keys that came after the first version
may be absent, `sclong_ds.config.history`: files of earlier versions open.) The presets of
`sclong_ds/config/presets/` are short: each has the keys in which it differs from its `base`, and
`python -m sclong_ds config PRESET` writes the whole. `load_config("sclong_tiny", [...])` reads a
preset, applies overrides such as `run.max_steps=10` and returns a `RunConfig`; `to_yaml` writes it
back. The configuration is never edited after it is loaded. Its keys are in
`sclong_ds.config.sections`, a section for each consuming module.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sclong_ds.command_line import parse_arguments
from sclong_ds.config.history import complete, read_saved
from sclong_ds.config.rules import check
from sclong_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PerformerConfig,
    RunConfig,
    RunSection,
    TrackingConfig,
)
from sclong_ds.config.strict_yaml import parse_value, read_yaml, section_from_dict, unknown_key

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PerformerConfig",
    "RunConfig",
    "RunSection",
    "TrackingConfig",
    "load_config",
    "parse_arguments",
    "preset_names",
]

PRESETS_DIR = Path(__file__).resolve().parent / "presets"
_RENAMED = {"sclong_tiny_recommended": "sclong_tiny", "sclong_100m_recommended": "sclong_100m"}
"""Presets of earlier versions, and what they are called now."""


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the project, sorted."""
    return sorted(p.stem for p in PRESETS_DIR.glob("*.yaml"))


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a preset or a YAML file, apply overrides and check everything.

    Args:
        source: Name of a preset (`sclong_tiny`) or path of a YAML file.
        overrides: `section.key=value` strings, or one. The value of a key that takes text is what
            stands there, quotes included, and null or ~ none; others are read as YAML. Of a key's
            that is there twice the last counts; the command line says so.

    Returns:
        The checked configuration.

    Raises:
        FileNotFoundError: No such preset or file.
        ValueError: Unknown, duplicate or missing key, wrong type, values that contradict each
            other, or a file of a later version.
    """
    path = PRESETS_DIR / f"{source}.yaml" if str(source) in preset_names() else Path(source)
    if not path.is_file():
        now = f"; it is {_RENAMED[str(source)]} now" if str(source) in _RENAMED else ""
        raise FileNotFoundError(
            f"--config {source}: no such preset or file{now}; presets are "
            f"{', '.join(preset_names())}"
        )
    tree = preset_tree(path.stem) if path.resolve().parent == PRESETS_DIR else _own_tree(path)
    for item in [overrides] if isinstance(overrides, str) else overrides:
        _apply_override(tree, item)
    _expand_home(tree)
    # An override may replace a whole stack by one that lacks the later keys, as files do.
    config = section_from_dict(RunConfig, complete(tree), path.name)
    check(config, path.name)
    return config


def _expand_home(tree: dict[str, Any]) -> None:
    """Put the user's folder for `~/` at the beginning of texts: behind `run.dir=` no shell does."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            tree[key] = os.path.expanduser(value)


def preset_tree(name: str) -> dict[str, Any]:
    """Return all sections of a preset: its own keys over those of its base.

    Args:
        name: The preset.
    """
    tree = read_yaml(PRESETS_DIR / f"{name}.yaml")
    base = tree.pop("base", None)
    return complete(tree if base is None else _over(preset_tree(base), tree))


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with the keys of another set in it, also in the mappings that it holds."""
    both = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _over(below[key], above[key])
    return both


def _own_tree(path: Path) -> dict[str, Any]:
    """Return the sections of a file that a person or a run wrote."""
    tree = read_saved(path)
    if "base" in tree:
        raise ValueError(
            f"{path.name}: base is for the presets of the program, whose values may change with "
            f"it; a file of your own has every key: `python -m sclong_ds config {tree['base']}` "
            f"writes them"
        )
    return tree


def _apply_override(tree: dict[str, Any], item: str) -> None:
    """Set one `section.key=value` in the raw tree; names are checked when the tree is built."""
    key, sep, text = item.partition("=")
    if not sep or not key or "." not in key:
        raise ValueError(
            f"override '{item}': write section.key=value, for instance run.max_steps=100"
        )
    *parents, last = key.strip().split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if not isinstance(child, dict):
            raise ValueError(f"override '{item}': {unknown_key(name, node)}")
        node = child
    if last not in node:
        raise ValueError(f"override '{item}': {unknown_key(last, node)}")
    if _field_is_text(parents, last) and text not in ("null", "~"):
        node[last] = text
        return
    try:
        node[last] = parse_value(text) if text else None
    except ValueError as error:
        raise ValueError(f"override '{item}': {error}") from None


def _field_is_text(parents: list[str], name: str) -> bool:
    """Tell whether a key takes text, so that paths such as 2024-01-01 or 007 stay text."""
    cls: Any = RunConfig
    for part in [*parents, name]:
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        cls = hints.get(part)
    return cls is str or cls == str | None
