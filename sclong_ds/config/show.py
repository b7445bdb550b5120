"""Write a complete configuration file, to be edited.

    python -m sclong_ds config sclong_1gpu run.max_steps=5000 > mine.yaml

Reads a preset or a file; writes its YAML, with the overrides in it, to stdout.
"""

from __future__ import annotations

import argparse
import sys

from sclong_ds.config.history import VERSION
from sclong_ds.config.load import load_config
from sclong_ds.config.strict_yaml import to_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds config`."""
    add = parser.add_argument
    add("config", metavar="FILE|PRESET", help="complete YAML or name of a preset")
    add("overrides", nargs="*", metavar="key=value", help="for instance run.max_steps=100")


def run(args: argparse.Namespace) -> int:
    """Write the configuration and return the exit status.

    Raises:
        FileNotFoundError: No such preset or file.
        ValueError: A wrong key or value.
    """
    config = load_config(args.config, args.overrides)
    sys.stdout.write(f"version: {VERSION}\n{to_yaml(config)}")
    return 0
