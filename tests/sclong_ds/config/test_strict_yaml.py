"""Strict YAML: one line for whatever is wrong, and no surprising numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sclong_ds.config.strict_yaml import parse_value, parse_yaml, read_yaml, section_from_dict


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [a]\n: 1", "line 1: a key is a list; write text"),
        ("? {a: 1}\n: 1", "line 1: a key is a dict; write text"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("{a: " * 3000, "nested too deeply"),
        ("a:\n  b: 1\n  b: 2", "line 3: key 'b' is given twice"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("[1]", "expected a mapping"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_name_of_the_file(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=rf"{path}: not UTF-8 text"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["1:30", "190:20:30.15", "010", "08", "0x1f", "0b1", "1:30:00"])
def test_numbers_of_other_bases_are_text(text: str) -> None:
    assert parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-3", -3), ("+5", 5), ("1_000", 1000), ("1.5", 1.5), (".5", 0.5), ("1.", 1.0),
     ("-1.0e-8", -1e-8), ("1.0e+4", 1e4), (".inf", float("inf")), ("true", True), ("~", None)],
)  # fmt: skip
def test_decimal_numbers_are_numbers(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_a_path_with_nul_is_an_error() -> None:
    tree = parse_yaml('path: "a\\0b"', "x.yaml")
    section = dataclasses.make_dataclass("Section", [("path", str)])
    with pytest.raises(ValueError, match=r"x\.yaml: path: holds a NUL character"):
        section_from_dict(section, tree, "x.yaml")
