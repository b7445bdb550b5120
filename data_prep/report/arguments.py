"""Arguments of `python -m data_prep report`.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from sclong_ds.command_line import local_path, new_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("corpus", type=local_path, metavar="CORPUS", help="corpus folder")
    parser.add_argument(
        "--out",
        type=new_file,
        required=True,
        metavar="FILE",
        help="page to write, such as qc.html",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON document"
    )
