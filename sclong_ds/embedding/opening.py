"""What a command on a model and cells begins with: `embed` and `evaluate` open both alike."""

from __future__ import annotations

import argparse

import torch

from data_prep.manifest.input_options import input_dataset
from sclong_ds.embedding.cells import Cells, open_cells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.model.sclong import ScLong


def model_of(args: argparse.Namespace) -> ScLong:
    """Return the model that a command line names, on the device that it names.

    Args:
        args: With the arguments of `add_input_arguments`.

    Raises:
        FileNotFoundError: No such model.
        ValueError: A damaged model, or a device that is not there.
    """
    return load_model(args.model_dir, device=choose_device(args.device))


def cells_of(args: argparse.Namespace, model: ScLong) -> Cells:
    """Return the cells that a command line names, in the gene order of the model.

    Args:
        args: With the arguments of `add_input_arguments`.
        model: From `model_of`.

    Raises:
        FileNotFoundError: No such input.
        ValueError: Not raw counts of known human genes, or a wrong option.
    """
    return open_cells(
        args.input,
        genes=model.genes,
        split=args.split,
        min_genes=args.min_genes_mapped,
        min_share=args.min_share_mapped,
        dataset=input_dataset(args.input, args),
    )


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
