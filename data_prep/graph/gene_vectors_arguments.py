"""Arguments of `python -m data_prep gene-vectors`.

They lie apart from its work, whose libraries take long to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from sclong_ds.command_line import new_file

MAX_CELLS = 20_000
"""Most training cells that are read."""
MIN_CELLS = 3
"""A gene in fewer cells gets zeros."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of `python -m data_prep gene-vectors`."""
    parser.add_argument("corpus", metavar="CORPUS", help="folder of a finalized corpus")
    parser.add_argument(
        "--out",
        type=new_file,
        metavar="FILE",
        required=True,
        help="vectors to write (.npy); a .json goes beside it",
    )
    parser.add_argument(
        "--dim",
        metavar="N",
        type=int,
        default=200,
        help="width, the model's base_dim (default: %(default)s)",
    )
    parser.add_argument(
        "--max-cells",
        metavar="N",
        type=int,
        default=MAX_CELLS,
        help="most training cells to read (default: %(default)s; time grows with it)",
    )
    parser.add_argument(
        "--min-cells",
        metavar="N",
        type=int,
        default=MIN_CELLS,
        help="genes in fewer cells get zeros (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of the random start (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
