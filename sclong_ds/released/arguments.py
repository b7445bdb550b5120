"""Arguments of `python -m sclong_ds import-reference`.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from sclong_ds.command_line import local_path, new_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds import-reference`."""
    for name, metavar, text in (
        ("--checkpoint", "FILE", "checkpoint of the released code"),
        ("--hyper-params", "FILE", "its pickled constructor arguments"),
        ("--genes", "FILE", "its genes in input order, one name a line, or a gene table"),
    ):
        parser.add_argument(name, type=local_path, required=True, metavar=metavar, help=text)
    parser.add_argument(
        "--out", type=new_folder, required=True, metavar="MODEL_DIR", help="folder to make"
    )
    parser.add_argument(
        "--gene-graph",
        type=local_path,
        metavar="FILE",
        help="graph of `python -m data_prep gene-graph --genes X.txt` to use instead of the one in "
        "the constructor arguments",
    )
    parser.add_argument(
        "--target-sum",
        metavar="N",
        type=float,
        default=1.0e4,
        help="counts of a cell after scaling, before log1p (default: %(default)g)",
    )
