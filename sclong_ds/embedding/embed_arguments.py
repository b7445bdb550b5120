"""Arguments of `python -m sclong_ds embed`, and those that `evaluate` and `perturb` share.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from data_prep.genes.cover import MIN_GENES_MAPPED, MIN_SHARE_MAPPED
from data_prep.manifest.input_options import add_input_options
from sclong_ds.command_line import local_path, model_place, new_file, share, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds embed`."""
    add_input_arguments(parser)
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--no-counts", action="store_true", help="leave the counts (X) out of the file"
    )
    parser.add_argument(
        "--jobs",
        type=whole(1),
        default=1,
        metavar="N",
        help="processes that embed, on as many GPUs or sharing the CPU (default %(default)s)",
    )


def add_input_arguments(parser: argparse.ArgumentParser, *, input_needed: bool = True) -> None:
    """Add what commands on a model and cells share: both of them, and how to run.

    Args:
        parser: Of the command.
        input_needed: Whether the command needs cells.
    """
    parser.add_argument(
        "model_dir",
        type=model_place,
        metavar="MODEL_DIR",
        help="exported model: a folder, hf://ORG/NAME or https://...",
    )
    parser.add_argument(
        "input",
        type=local_path,
        nargs=None if input_needed else "?",
        metavar="INPUT",
        help="raw counts (h5ad, AnnData zarr, 10x h5 or mtx, loom, csv, tsv) or a finalized corpus",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="only this split of a corpus (train, validation, test)"
    )
    parser.add_argument(
        "--batch-size",
        type=whole(1),
        default=8,
        metavar="N",
        help="cells at a time (default %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one",
    )
    parser.add_argument(
        "--min-genes-mapped",
        type=whole(1),
        default=MIN_GENES_MAPPED,
        metavar="N",
        help="refuse inputs with fewer genes of the model (default %(default)s)",
    )
    parser.add_argument(
        "--min-share-mapped",
        type=share,
        default=MIN_SHARE_MAPPED,
        metavar="SHARE",
        help="refuse inputs of whose genes a smaller share is in the model (default %(default)s)",
    )
    add_input_options(parser)
