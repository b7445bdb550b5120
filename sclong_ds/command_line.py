"""Argument types, parsing and missing packages, as all commands need; standard library only."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path

HUB = "hf://"
WEB = ("https://", "http://")
"""Beginnings of the addresses of models that lie elsewhere."""
EXTRAS = {
    "train": ("deepspeed", "ninja", "numba", "umap", "sklearn", "matplotlib", "pyarrow"),
    "prep": ("goatools", "hdf5plugin", "matplotlib", "pyarrow"),
    "track": ("mlflow", "pynvml"),
    "evaluate": ("sklearn", "matplotlib"),
    "gpu": ("triton",),
    "hub": ("huggingface_hub",),
}
"""Extra of the package to the modules that it brings; embedding needs none of them."""


def missing_package(error: ModuleNotFoundError, prefer: str = "train") -> str | None:
    """Return one line for a package that an extra brings; None for another.

    Args:
        error: What an import raised.
        prefer: The extra to name where several bring the package.
    """
    name = (error.name or "").partition(".")[0]
    holding = [extra for extra, modules in EXTRAS.items() if name in modules]
    if not holding:
        return None
    extra = prefer if prefer in holding else holding[0]
    return f"{name} is not installed: pip install 'sclong_ds[{extra}]'"


def need(*modules: str, extra: str) -> None:
    """Make sure that packages are there before work begins, in processes of its own perhaps.

    Args:
        modules: Top-level modules; they are looked for, not imported.
        extra: The extra that brings them.

    Raises:
        ModuleNotFoundError: One is missing; the text is one line that names the extra.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            line = missing_package(ModuleNotFoundError(name=name), extra)
            raise ModuleNotFoundError(line, name=name)


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line; overrides may stand before, between and behind the options.

    argparse itself takes one group of positional arguments and calls later ones unrecognized. Where
    overrides give a key twice, the last counts, and a line on standard error says so.

    Args:
        parser: Has a positional argument `overrides` of any number, perhaps in a subcommand.
        argv: The arguments; None: those of the process.
    """
    args, rest = parser.parse_known_args(argv)
    if rest:
        settings = all("=" in item and not item.startswith("-") for item in rest)
        if not (settings and hasattr(args, "overrides")):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides = [*args.overrides, *rest]
    twice = repeated(getattr(args, "overrides", ()))
    if twice:
        sys.stderr.write(f"{' and '.join(twice)}: the same key twice; the last one counts\n")
    return args


def repeated(overrides: Sequence[str]) -> list[str]:
    """Return those overrides whose key is the first that is there more than once; else none.

    Args:
        overrides: `section.key=value` words.
    """
    keys = [word.partition("=")[0].strip() for word in overrides]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    return [word for word, key in zip(overrides, keys, strict=True) if key == twice]


def add_example(command: argparse.ArgumentParser, words: str) -> None:
    """Put an example at the end of a command's help.

    Args:
        command: Has its arguments and perhaps an epilog.
        words: Arguments of the command.
    """
    example = f"example:\n  {command.prog} {words}".replace("%", "%%")
    command.epilog = f"{command.epilog.rstrip()}\n\n{example}" if command.epilog else example


def check_whole(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """Return an argument of a call from Python that must be a whole number.

    Raises:
        ValueError: It is none, or less than `least` or more than `most`.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} {value!r}: must be a whole number {allowed}")
    return int(value)  # type: ignore[call-overload]


def check_positive(name: str, value: object) -> float:
    """Return an argument of a call from Python that must be a finite number above 0.

    Raises:
        ValueError: It is not.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name} {value!r}: must be a finite number above 0")
    return float(value)  # type: ignore[arg-type]


def local_path(text: str) -> Path:
    """Return a path of the command line; a URL would become a folder named `s3:`.

    `~/` is the user's folder: behind `--out=` no shell puts it in.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is a URL.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: must be a path on this machine, not a URL")
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


def new_file(text: str) -> Path:
    """Return the path of a file to write, which can be written: said before the work and not after.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is a folder or a URL, or cannot be made where it is to lie.
    """
    path = local_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file, such as {path / 'out'}")
    _check_place(path)
    return path


def new_folder(text: str) -> Path:
    """Return the path of a folder to make or to add to, which can be written to.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is a file or a URL, or cannot be made where it is to lie.
    """
    path = local_path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    _check_place(path / "content")
    return path


def _check_place(path: Path) -> None:
    """Refuse a path below what is no folder, or is one that nothing can be written to."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{path} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be made: {above} may not be written to")


def model_place(text: str) -> Path | str:
    """Return an argument as a folder, or as the address of a model on the hub or a web server.

    Args:
        text: The argument.
    """
    return text if text.startswith((HUB, *WEB)) else local_path(text)


def whole(least: int) -> Callable[[str], int]:
    """Return a type of argument: a whole number.

    Args:
        least: The smallest that is allowed.
    """

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"got {text}, must be a whole number of {least} or more"
            )
        return int(text)

    return parse


def share(text: str) -> float:
    """Return an argument as a number from 0 to 1.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is anything else.
    """
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be a number from 0 to 1")
    return value


def positive_share(text: str) -> float:
    """Return an argument as a number above 0 and at most 1.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is anything else.
    """
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be above 0 and at most 1")
    return value


def positive(text: str) -> float:
    """Return an argument as a finite number above 0.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is anything else.
    """
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, must be a number above 0")
    return value


def _number(text: str) -> float:
    """Return a number; NaN, which no range allows, for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
