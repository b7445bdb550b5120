"""Argument types and parsing shared by all commands; standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line; overrides may stand before, between and behind the options.

    argparse itself takes one group of positional arguments and calls later ones unrecognized.

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
    return args


def local_path(text: str) -> Path:
    """Return a path of the command line; a URL would become a folder named `s3:`.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is a URL.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: must be a path on this machine, not a URL")
    return Path(text)


def positive(text: str) -> int:
    """Return a whole number of 1 or more.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be a whole number of 1 or more")
    return int(text)


def share(text: str) -> float:
    """Return a number from 0 to 1; argparse reports what is no number.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is out of range.
    """
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be a number from 0 to 1")
    return value


def positive_share(text: str) -> float:
    """Return a number above 0 and at most 1.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is out of range.
    """
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"got {text}, must be above 0 and at most 1")
    return value
