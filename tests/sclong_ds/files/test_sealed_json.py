"""Sealed JSON: what was written comes back, anything else is an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sclong_ds.files.sealed_json import (
    checksum_of,
    read_object,
    read_sealed,
    read_sound,
    write_sealed,
)

CONTENT = {"b": [1, 2.5, None], "a": {"é": "text"}}


def test_the_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    checksum = write_sealed(tmp_path / "x.json", CONTENT)
    assert read_sealed(tmp_path / "x.json") == CONTENT | {"checksum": checksum}
    again = json.dumps(CONTENT | {"checksum": checksum}, sort_keys=True)
    (tmp_path / "y.json").write_text(again)
    assert read_sealed(tmp_path / "y.json")["checksum"] == checksum_of(CONTENT) == checksum


@given(bit=st.integers(0, 10**6))
def test_a_flipped_bit_gives_an_error_or_the_same_content(tmp_path_factory, bit: int) -> None:
    path = tmp_path_factory.mktemp("seal") / "x.json"
    write_sealed(path, CONTENT)
    whole = read_sealed(path)
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
        assert read_sealed(path) == whole
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"a": NaN, "checksum": ""}']
)
def test_what_is_no_sealed_file_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_sealed(path)
    if text == b"{}":
        assert read_object(path) == {}


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff", b'{"checksum": "0"}', "folder"])
def test_a_file_that_a_run_can_do_without_never_stops_it(
    tmp_path: Path, content: bytes | str | None
) -> None:
    file = tmp_path / "x.json"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    assert read_sound(file) == {}
