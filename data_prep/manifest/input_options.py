"""Options of one input on a command line: the columns of a manifest that say how to read a file.

`embed` and `evaluate` take them by the same names, with the same values and defaults, and read
through the same code (`harmonize.py`, `outcome.py`). One thing differs: a corpus wants good cells
and has default thresholds, an embedding wants a row for every cell and has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.counts.option import parse_counts
from data_prep.genes.spelling import ID_TYPES
from data_prep.manifest.manifest import COLUMNS, Dataset
from data_prep.source.source import FORMATS
from sclong_ds.command_line import local_path, whole

INPUT_COLUMNS = (
    "format",
    "counts",
    "gene_column",
    "id_type",
    "gene_list",
    "genome",
    "min_genes",
    "min_counts",
)
"""Columns of `manifest.COLUMNS` that are options of one input."""
_METAVARS = {
    "format": "FORMAT",
    "counts": "MATRIX",
    "gene_column": "NAME",
    "id_type": "TYPE",
    "gene_list": "FILE",
    "genome": "NAME",
    "min_genes": "N",
    "min_counts": "N",
}
_OWN_TEXT = {
    "min_genes": "leave out cells with fewer expressed genes of the model (default: keep every "
    "cell; unfiltered barcodes are then refused)",
    "min_counts": "leave out cells with fewer counts on them (default: keep every cell)",
}


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each of INPUT_COLUMNS.

    Args:
        parser: Of the command.
    """
    types: Mapping[str, Any] = {
        "counts": _counts,
        "gene_list": local_path,
        "min_genes": whole(1),
        "min_counts": whole(1),
    }
    choices = {"format": ("auto", *FORMATS), "id_type": ID_TYPES}
    group = parser.add_argument_group("how to read INPUT (as in the manifest of data_prep)")
    for name in INPUT_COLUMNS:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=types.get(name, str),
            choices=choices.get(name),
            default=Dataset.__dataclass_fields__[name].default,
            metavar=_METAVARS[name],
            help=_OWN_TEXT.get(name, COLUMNS[name]).replace("%", "%%"),
        )


def input_dataset(path: Path, args: argparse.Namespace | None = None) -> Dataset:
    """Return one input as a line of a manifest.

    Args:
        path: The input.
        args: Parsed arguments of `add_input_options`; None takes the defaults.
    """
    options = {} if args is None else {name: getattr(args, name) for name in INPUT_COLUMNS}
    return Dataset(dataset_id="input", path=path, organism="auto", **options)


def given_options(dataset: Dataset) -> dict[str, Any]:
    """Return the options of an input that are not the defaults, by their flags.

    Args:
        dataset: From `input_dataset`.
    """
    return {
        f"--{name.replace('_', '-')}": getattr(dataset, name)
        for name in INPUT_COLUMNS
        if getattr(dataset, name) != Dataset.__dataclass_fields__[name].default
    }


def _counts(text: str) -> str:
    try:
        return parse_counts(text).text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
