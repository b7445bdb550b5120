"""Strict YAML for frozen dataclasses: no unknown, missing or doubled key, no silent conversion.

`section_from_dict` makes a dataclass from a mapping: every field must be there, unknown keys are
errors with a suggestion, types are exact (3 is a valid float, 1e5 an int, true is neither).
`to_yaml` writes what it accepts. Reads YAML text, writes nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import yaml

from sclong_ds.files.atomic import read_file


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration (or one section) as plain dicts, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """Return the configuration (or one section) as YAML that the loader accepts."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)


def section_from_dict(cls: type, tree: Mapping[str, Any], where: str) -> Any:
    """Build one section (say ModelConfig from an exported model's config.yaml) with all checks.

    Args:
        cls: The section's dataclass.
        tree: Its keys and values.
        where: File name for error messages.
    """
    return _build(cls, dict(tree), where, "")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; duplicate keys are an error.

    Args:
        path: The file.

    Raises:
        ValueError: Not UTF-8, not YAML, or no mapping; the message names the file.
    """
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    return parse_yaml(text, str(path))


class _Dumper(yaml.SafeDumper):
    """YAML writer whose floats are always read back as floats (1e-08 would be read as a string)."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", _plain_number(value))


_MOST = 2**63 - 1
_POWER_OF_TEN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]{1,3}")
_Dumper.add_representer(float, _represent_float)


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML keeps the last one silently.

    Whole numbers are decimal: YAML 1.1 reads 1:30 as 90 and 010 as 8, which is text here.
    """


_DECIMAL = {
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DECIMAL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _DECIMAL.items():
    _UniqueKeyLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise ValueError(
                f"line {key_node.start_mark.line + 1}: a key is a {type(key).__name__}; write text"
            )
        if key in mapping:
            raise ValueError(f"line {key_node.start_mark.line + 1}: key '{key}' is given twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Read a YAML mapping from text; duplicate keys are an error.

    Args:
        text: The YAML.
        name: File name for error messages.
    """
    try:
        tree = _load(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def parse_value(text: str) -> Any:
    """Read one YAML value, say of a command-line override.

    Raises:
        ValueError: Not YAML.
    """
    try:
        return _load(text)
    except ValueError:
        raise ValueError(f"'{text[:100]}' is not a YAML value") from None


def _load(text: str) -> Any:
    """Return what YAML text holds.

    Raises:
        ValueError: Not YAML, a key given twice, or nested too deeply.
    """
    try:
        # _UniqueKeyLoader is a SafeLoader: it builds plain containers and scalars only.
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        # What PyYAML's constructors raise of a tag that does not fit its value: !!timestamp x
        raise ValueError(f"not valid YAML: {error}") from None


def unknown_key(name: str, allowed: Iterable[str]) -> str:
    """Return the message about a key that is not allowed: the nearest one, or all."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(allowed)}"
    return f"{name}: unknown key ({hint})"


def _build(cls: type, tree: Any, where: str, prefix: str) -> Any:
    """Build a dataclass from a mapping; every key present, none unknown, every type exact."""
    if not isinstance(tree, dict):
        raise ValueError(
            f"{where}: {prefix.rstrip('.') or 'file'}: expected a mapping, got {_show(tree)}"
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ValueError(f"{where}: {prefix}{unknown_key(str(key), hints)}")
    missing = [key for key in hints if key not in tree]
    if missing:
        raise ValueError(
            f"{where}: missing {', '.join(prefix + m for m in missing)}; "
            f"a configuration is complete: `python -m sclong_ds config PRESET` writes all keys"
        )
    values = {}
    for key, hint in hints.items():
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), tree[key], where, f"{name}.")
        else:
            values[key] = _convert(tree[key], hint, f"{where}: {name}")
    return cls(**values)


def _power_of_ten(text: str, hint: type) -> int | float | str:
    """Return the number of 1e-4 or 1.5e3, which YAML 1.1 reads as text.

    Args:
        text: The number.
        hint: float, or int for a whole number, such as 1e5.

    Returns:
        The number, exactly as written; the text where it is no whole number, or one of more than
        64 bits, and must be one.
    """
    number = Decimal(text)
    if hint is float:
        return float(number)
    if number.adjusted() >= len(str(_MOST)):
        return text
    return int(number) if number == number.to_integral_value() else text


def _whole_power_of_ten(value: Any) -> bool:
    """Tell whether a value is text such as 1e5 that stands for a whole number."""
    text = isinstance(value, str) and _POWER_OF_TEN.fullmatch(value) is not None
    return text and isinstance(_power_of_ten(value, int), int)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Check one value against its annotation; exact types, except that 3 is a valid float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise ValueError(f"{name}: got {_show(value)}, allowed: {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if int in args and float in args:
            whole = type(value) is int or _whole_power_of_ten(value)
            return _convert(value, int if whole else float, name)
        return _convert(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple and args[1:] == (...,):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: expected a list, got {_show(value)}")
        return tuple(_convert(v, args[0], f"{name}[{i}]") for i, v in enumerate(value))
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ValueError(f"{name}: expected a list of {len(args)} values, got {_show(value)}")
        return tuple(
            _convert(v, a, f"{name}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected a mapping, got {_show(value)}")
        return {
            _convert(k, args[0], f"{name} key"): _convert(v, args[1], f"{name}.{k}")
            for k, v in value.items()
        }
    if hint in (int, float) and isinstance(value, str) and _POWER_OF_TEN.fullmatch(value):
        value = _power_of_ten(value, hint)
    if hint in (int, float) and type(value) is int and abs(value) > _MOST:
        raise ValueError(
            f"{name}: got a number of {value.bit_length()} bits, allowed: 64 with its sign"
        )
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}: expected {hint.__name__}, got {_show(value)}")
    if hint is str and "\0" in value:
        raise ValueError(f"{name}: holds a NUL character, which no text or path may")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def _plain_number(number: float) -> str:
    text = repr(number)
    return text if "." in text or "e" not in text else text.replace("e", ".0e")


def _show(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted keys, `model.large_encoder.depth`.

    Args:
        tree: The mapping.
        prefix: Its own key, of a section its name.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def flat_texts(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return `flat` with values as texts to be shown; null for None."""
    return {k: "null" if v is None else str(v) for k, v in flat(tree, prefix).items()}


def override(key: str, value: Any) -> str:
    """Return a setting as a command line writes it: `key=null`, `key=true`, `key=text`."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
