"""Arguments of `python -m sclong_ds plan`.

They lie apart from its work, whose libraries take seconds to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from sclong_ds.command_line import local_path, positive, positive_share, whole
from sclong_ds.planning.devices import DEVICES

SCLONG_CELLS = 48_024_242
"""Cells of the scLong corpus: an epoch when neither --cells nor data.corpus says otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds plan`."""
    add = parser.add_argument
    add("--config", required=True, metavar="FILE|PRESET", help="complete YAML or name of a preset")
    add("--nodes", required=True, type=whole(1), metavar="N", help="number of nodes")
    add("--gpus-per-node", required=True, type=whole(1), metavar="N", help="ranks on each node")
    add(
        "--device",
        metavar="NAME",
        default="h100",
        help=f"{', '.join(DEVICES)} or cpu (default: %(default)s)",
    )
    add(
        "--mfu",
        metavar="SHARE",
        default=0.4,
        type=positive_share,
        help="share of the peak that a rank reaches while it computes (default: %(default)s)",
    )
    add(
        "--network-gbit",
        default=400.0,
        type=positive,
        metavar="GBIT",
        help="to the other nodes, Gbit/s of a node in one direction (default: %(default)s)",
    )
    add(
        "--cells",
        metavar="N",
        type=whole(1),
        help=f"cells of an epoch (default: those of data.corpus, else {SCLONG_CELLS})",
    )
    add(
        "--loader",
        type=local_path,
        metavar="FILE",
        help="what `bench-loader --json` measured on a node: is reading fast enough?",
    )
    add("--verbose", action="store_true", help="also tables of parts and of all ZeRO stages")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    add("overrides", nargs="*", metavar="key=value", help="as in training: engine.ds_config=zero1")
