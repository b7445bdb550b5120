"""Argument types and parsing shared by all commands; standard library only."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
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
