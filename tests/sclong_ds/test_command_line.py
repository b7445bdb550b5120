"""Argument types: what they take, and that they name what they got and what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep import __main__ as data_prep_program
from data_prep.__main__ import main as data_prep
from sclong_ds import __main__ as sclong_program
from sclong_ds import __version__
from sclong_ds.__main__ import main as sclong
from sclong_ds.command_line import (
    local_path,
    new_file,
    new_folder,
    positive,
    positive_share,
    share,
    whole,
)


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


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for kind, text, said in (
        (new_file, tmp_path, "is a folder; name a file, such as"),
        (new_file, tmp_path / "file" / "below" / "out", f"{tmp_path / 'file'} is a file"),
        (new_folder, tmp_path / "file", "is a file; name a folder"),
        (new_folder, tmp_path / "file" / "below", f"{tmp_path / 'file'} is a file"),
        (new_folder, "hf://org/name", "a path on this machine"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(str(text))
        assert str(text) in str(error.value)
        assert said in str(error.value)
    for taken in ("out", "file", "new/below/out"):
        assert new_file(str(tmp_path / taken)) == tmp_path / taken
    for taken in (".", "new/below"):
        assert new_folder(str(tmp_path / taken)) == tmp_path / taken


@pytest.mark.parametrize("kind", [new_file, new_folder])
def test_a_folder_without_permission_is_named(
    kind: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As for anybody but root, who may write everywhere.
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match=f"{tmp_path} may not be written to"):
        kind(str(tmp_path / "new" / "out"))


@pytest.mark.parametrize("program", [sclong_program, data_prep_program])
def test_every_command_looks_at_its_out_first(program: Any) -> None:
    found = 0
    for name in program.COMMANDS:
        (commands,) = (
            action for action in program.parser([name])._actions
            if isinstance(action, argparse._SubParsersAction)
        )  # fmt: skip
        for action in commands.choices[name]._actions:
            if "--out" in action.option_strings:
                assert action.type in (new_file, new_folder), name
                found += 1
    assert found > 5


@pytest.mark.parametrize("main", [sclong, data_prep])
def test_each_program_says_its_version(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == [__version__]


@pytest.mark.parametrize(
    "command", ["config sclong_tiny", "plan --config sclong_tiny --nodes 1 --gpus-per-node 1"]
)
def test_of_a_key_twice_on_a_command_line_the_last_counts_and_that_is_said(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command.split(), "data.corpus=unused", "run.dir=unused"]
    sclong([*words, "run.max_steps=3", "run.seed=1", "run.max_steps=4"])
    twice = capsys.readouterr()
    said = "run.max_steps=3 and run.max_steps=4: the same key twice; the last one counts"
    assert said in twice.err
    sclong([*words, "run.seed=1", "run.max_steps=4"])
    once = capsys.readouterr()
    assert once.out == twice.out
    assert said not in once.err
