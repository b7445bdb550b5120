"""Arguments of `python -m sclong_ds report`.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sclong_ds.command_line import new_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds report`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_DIR_OR_RUN_ID",
        help="run folder, or a run's id; several, or a sweep's folder: they are compared",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=new_file,
        default=Path("report.html"),
        help="page to write (default: %(default)s)",
    )
