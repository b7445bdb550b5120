"""The command line of a training, which the programs around it read as well."""

from __future__ import annotations

import argparse

EXAMPLE = "--config sclong_tiny run.dir=runs/a data.corpus=corpus model.gene_graph=graph.npz"
"""Words of a training."""


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration, the settings on top of it, and --dry-run.

    Args:
        parser: Of a training, or of a command that is given a training's words.
    """
    add = parser.add_argument
    add("--config", required=True, metavar="FILE|PRESET", help="complete YAML or name of a preset")
    add("--dry-run", action="store_true", help="check everything, build the model, do not train")
    add("overrides", nargs="*", metavar="key=value", help="for instance run.max_steps=100")
