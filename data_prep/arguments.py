"""Types and options that several commands of the data preparation take."""

from __future__ import annotations

import argparse
import math
import re
from contextlib import suppress

from sclong_ds.command_line import local_path, whole
from sclong_ds.corpus.genes import GeneVocabulary

SPLIT_BY = ("auto", "dataset", "donor", "cell")
"""What a split holds out as a whole."""
NEAR_RULES = ("primary", "drop", "keep")
"""Which near duplicates finalize leaves out (`data_prep.corpus.near.near_duplicates`)."""
DEFAULT_VALIDATION_FRACTION = 0.05


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
        help="gene vocabulary (default: that of a folder begun before, or the bundled one)",
    )


def chosen_genes(args: argparse.Namespace) -> GeneVocabulary:
    """Return the vocabulary that `--genes` names, or the bundled one.

    Args:
        args: Parsed arguments.
    """
    return GeneVocabulary.read(args.genes) if args.genes else GeneVocabulary.bundled()


def add_codec(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add `--codec`.

    Args:
        parser: Of the command.
        default: None: as before, zstd at first.
    """
    parser.add_argument(
        "--codec",
        choices=("zstd", "none"),
        default=default,
        help=f"compression of the cells (default: {default or 'as before, zstd at first'}; none is "
        "twice as large)",
    )


def add_tasks(parser: argparse.ArgumentParser, task: str) -> None:
    """Add `--task` and `--tasks`, which `check_tasks` compares, and `usage_error`.

    Args:
        parser: Of the command.
        task: What `--task` says.
    """
    parser.add_argument("--task", type=whole(0), metavar="N", help=task)
    parser.add_argument("--tasks", type=whole(1), metavar="N", help="number of tasks (with --task)")
    parser.set_defaults(usage_error=parser.error)


def check_tasks(args: argparse.Namespace) -> None:
    """Refuse a task that none of the tasks is.

    Args:
        args: Parsed arguments of a command with `add_tasks`.
    """
    if (args.task is None) != (args.tasks is None):
        args.usage_error("--task and --tasks go together")
    if args.task is not None and args.task >= args.tasks:
        allowed = f"with --tasks {args.tasks} it is 0 to {args.tasks - 1}"
        args.usage_error(f"--task {args.task}: {allowed}")


def byte_count(text: str) -> int:
    """Return an argument as a number of bytes: 500, 2e9, 50MB, 1.5TB or 16GiB.

    Args:
        text: The argument.

    Raises:
        argparse.ArgumentTypeError: It is anything else.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgtp]?)(i?)b?)?\s*", text.lower())
    number = math.nan
    if found:
        unit = (1024 if found[3] else 1000) ** " kmgtp".index(found[2] or " ")
        with suppress(ValueError):
            number = float(found[1]) * unit
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, must be bytes such as 5e11, 500GB or 2TiB")
    return round(number)
