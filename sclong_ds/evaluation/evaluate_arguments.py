"""Arguments of `python -m sclong_ds evaluate`.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from sclong_ds.command_line import new_folder
from sclong_ds.embedding.embed_arguments import add_input_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds evaluate`."""
    add_input_arguments(parser)
    parser.add_argument(
        "--label", required=True, metavar="KEY", help="obs column with the cell types"
    )
    parser.add_argument(
        "--batch", metavar="KEY", help="obs column with the batches; adds the batch scores"
    )
    parser.add_argument(
        "--group",
        metavar="KEY",
        help="obs column with donors, datasets or batches: each is predicted from the others, and "
        "intervals are over them (default: 5 folds of cells)",
    )
    parser.add_argument(
        "--train-batch",
        nargs="+",
        metavar="NAME",
        help="batches whose labels predict those of --test-batch; adds the transfer scores",
    )
    parser.add_argument(
        "--test-batch", nargs="+", metavar="NAME", help="batches that --train-batch predicts"
    )
    parser.add_argument(
        "--out", type=new_folder, required=True, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of folds, resamples, k-means, untrained weights and t-SNE (default %(default)s)",
    )
