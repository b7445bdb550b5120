"""Types and options that several commands of the data preparation take."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sclong_ds.command_line import local_path
from sclong_ds.corpus.genes import GeneVocabulary


def whole(least: int) -> Callable[[str], int]:
    """Return a type of argument: a whole number.

    Args:
        least: The smallest that is allowed.
    """

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least} on")
        return int(text)

    return parse


def share(text: str) -> float:
    """Return an argument as a number between 0 and 1.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1")
    return value


def positive(text: str) -> float:
    """Return an argument as a finite number above 0.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`.

    Args:
        parser: Of the command.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_genes(parser: argparse.ArgumentParser) -> None:
    """Add `--genes`, which `chosen_genes` reads.

    Args:
        parser: Of the command.
    """
    parser.add_argument(
        "--genes",
        type=local_path,
        metavar="FILE",
        help="gene vocabulary (default: the bundled one)",
    )


def chosen_genes(args: argparse.Namespace) -> GeneVocabulary:
    """Return the vocabulary that `--genes` names, or the bundled one.

    Args:
        args: Parsed arguments.
    """
    return GeneVocabulary.read(args.genes) if args.genes else GeneVocabulary.bundled()


def add_codec(parser: argparse.ArgumentParser) -> None:
    """Add `--codec`.

    Args:
        parser: Of the command.
    """
    parser.add_argument(
        "--codec",
        choices=("zstd", "none"),
        default="zstd",
        help="compression of the cells (default: zstd; none is twice as large)",
    )
