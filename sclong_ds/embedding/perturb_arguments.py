"""Arguments of `python -m sclong_ds perturb`, apart from its work: `--help` needs no library."""

from __future__ import annotations

import argparse

from sclong_ds.command_line import new_file, whole
from sclong_ds.embedding.embed_arguments import add_input_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds perturb`."""
    add_input_arguments(parser)
    parser.add_argument(
        "--genes",
        required=True,
        metavar="GENES",
        help="what to perturb, symbols or Ensembl ids: sets divided by ';', the genes of a set, "
        "perturbed together, by ','",
    )
    parser.add_argument(
        "--mode",
        required=True,
        metavar="MODE",
        help="delete (value 0), set:X (X in the model's input, log1p of normalised counts) or "
        "overexpress (the highest value of the cell)",
    )
    parser.add_argument(
        "--out",
        type=new_file,
        required=True,
        metavar="FILE",
        help="new .h5ad or .tsv file for the effects",
    )
    parser.add_argument(
        "--null",
        type=whole(1),
        default=100,
        metavar="N",
        help="random sets of like expression to compare with (default %(default)s)",
    )
    parser.add_argument(
        "--towards",
        metavar="KEY=VALUE",
        help="state to move to, such as disease=normal: cells whose obs column KEY is VALUE; the "
        "other cells are perturbed",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="of the null (default %(default)s)"
    )
