"""Arguments of `python -m sclong_ds export`.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from sclong_ds.command_line import local_path, new_folder, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds export`."""
    parser.add_argument(
        "checkpoint", type=local_path, metavar="CHECKPOINT_DIR", help="a checkpoint or a run folder"
    )
    parser.add_argument(
        "--out", type=new_folder, required=True, metavar="MODEL_DIR", help="folder to make"
    )
    parser.add_argument(
        "--no-training-cells",
        action="store_true",
        help="leave out the digests of the training cells, for which all of them are read: nobody "
        "can tell from the folder whether a cell was in training (validation cells and those of "
        "--recipe-cells are read nevertheless)",
    )
    parser.add_argument(
        "--recipe-cells",
        type=whole(0),
        default=256,
        metavar="N",
        help="training and validation cells each, on which the recipe of an embedding is chosen "
        "(default %(default)s; on a CPU less for a large model); 0: the mean over expressed genes",
    )
    parser.add_argument(
        "--principal-directions",
        type=whole(0),
        default=0,
        metavar="N",
        help="embed by all values along N principal directions of training cells, such as 256: for "
        "cells of other tissues, for which validation cells do not choose; an error where the "
        "run's corpus does not give them (default: the best of all candidates)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where these cells are embedded"
    )
