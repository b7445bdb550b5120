"""`slurm`: write the batch scripts for Slurm into a folder, ready for this environment.

    python -m sclong_ds slurm FOLDER

Writes FOLDER/slurm/*.sh; FOLDER is then the project's root in their words: submit from it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sclong_ds.command_line import new_folder
from sclong_ds.files.atomic import write_atomic
from sclong_ds.files.places import place_of

_VENV = 'default_venv="$root/.venv"'
_WORDS = {
    "by default the one `make setup` creates. Where": "by default the one that wrote this. Where",
    " (make setup creates it)": "",
    "`root`, the checkout;": "`root`, the folder above;",
}
"""What env.sh says of a checkout, and what holds where it was written by this command."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder."""
    parser.add_argument("folder", type=new_folder, metavar="DIR", help="gets a folder slurm/")


def run(args: argparse.Namespace) -> int:
    """Write the scripts and print what to do with them."""
    written = write_scripts(args.folder)
    print(f"{written}: edit env.sh for your cluster, then submit from {written.parent}")
    return 0


def write_scripts(folder: Path) -> Path:
    """Write the batch scripts; their python is that of this environment.

    Args:
        folder: Gets a folder `slurm`.

    Returns:
        That folder.

    Raises:
        ValueError: It exists already; sites edit its env.sh.
    """
    target = folder.resolve() / "slurm"
    if target.exists():
        raise ValueError(f"{target} exists; move it away, or name another folder")
    shutil.copytree(place_of("slurm"), target, ignore=shutil.ignore_patterns("__pycache__"))
    env = target / "env.sh"
    text = env.read_text(encoding="utf-8")
    if _VENV not in text:
        raise ValueError(f"{env} does not name the environment as `{_VENV}`")
    text = text.replace(_VENV, f'default_venv="{sys.prefix}"')
    for of_checkout, written in _WORDS.items():
        text = text.replace(of_checkout, written)
    write_atomic(env, text.encode())
    return target
