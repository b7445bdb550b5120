"""Types and options that several commands of the data preparation take."""

from __future__ import annotations

import argparse

from sclong_ds.command_line import local_path
from sclong_ds.corpus.genes import GeneVocabulary

SPLIT_BY = ("auto", "dataset", "donor", "cell")
"""What a split holds out as a whole."""
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
