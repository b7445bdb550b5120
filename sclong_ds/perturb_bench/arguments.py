"""Arguments of `python -m sclong_ds perturb-bench`: `--help` needs no library."""

from __future__ import annotations

import argparse

from sclong_ds.command_line import new_file, whole
from sclong_ds.embedding.embed_arguments import add_input_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds perturb-bench`."""
    add_input_arguments(parser)
    add = parser.add_argument
    add(
        "--perturbation",
        required=True,
        metavar="KEY",
        help="obs column with the perturbed genes of each cell, symbols or Ensembl ids",
    )
    add("--control", required=True, metavar="NAME", help="value of the column of unperturbed cells")
    add(
        "--separator",
        default="+",
        metavar="TEXT",
        help="between genes that are perturbed together; a part equal to --control is ignored "
        "(default %(default)s)",
    )
    add(
        "--mode",
        choices=("delete", "overexpress"),
        default="delete",
        help="what the perturbation does to its genes: the model reads control cells with them "
        "changed so (default %(default)s)",
    )
    add("--out", type=new_file, required=True, metavar="FILE", help="new .tsv table of scores")
    add(
        "--folds",
        type=whole(2),
        default=5,
        metavar="N",
        help="folds of perturbations: each is predicted from the others (default %(default)s)",
    )
    add(
        "--min-cells",
        type=whole(2),
        default=10,
        metavar="N",
        help="leave out perturbations of fewer cells; of controls twice as many are needed "
        "(default %(default)s)",
    )
    add(
        "--encoded-cells",
        type=whole(1),
        default=32,
        metavar="N",
        help="control cells that the model reads, each with every gene changed "
        "(default %(default)s)",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="of all chance (default %(default)s)")
