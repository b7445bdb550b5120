"""Argument types: what they take, and that they name what they got and what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from sclong_ds import __version__
from sclong_ds.__main__ import main as sclong
from sclong_ds.command_line import local_path, positive, positive_share, share, whole


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (whole(0), "0", 0), (whole(1), "12", 12), (share, "0", 0.0), (share, "1", 1.0),
        (positive_share, "0.5", 0.5), (positive, "1e-3", 1e-3), (local_path, "a:b", Path("a:b")),
    ],
)  # fmt: skip
def test_values_in_range_are_taken(kind: Callable[[str], object], text: str, value: object) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "texts", "allowed"),
    [
        (whole(0), ("-1", "1.0", "x", "", "²"), "a whole number of 0 or more"),
        (whole(1), ("0", "1e3"), "a whole number of 1 or more"),
        (share, ("-0.1", "1.1", "nan", "x"), "a number from 0 to 1"),
        (positive_share, ("0", "1.1", "nan", ""), "above 0 and at most 1"),
        (positive, ("0", "-1", "inf", "nan", "many"), "a number above 0"),
        (local_path, ("s3://bucket/x",), "a path on this machine"),
    ],
)
def test_others_are_refused_with_what_is_allowed(
    kind: Callable[[str], object], texts: tuple[str, ...], allowed: str
) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=allowed) as error:
            kind(text)
        assert text in str(error.value)


@pytest.mark.parametrize("main", [sclong, data_prep])
def test_each_program_says_its_version(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == [__version__]
