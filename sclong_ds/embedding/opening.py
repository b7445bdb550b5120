"""What a command on a model and cells begins with: all open both alike, and read them alike."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from data_prep.manifest.input_options import input_dataset
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import Cells, open_cells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.hub.hub import model_folder
from sclong_ds.model.sclong import ScLong


def model_of(args: argparse.Namespace) -> ScLong:
    """Return the model that a command line names, on the device that it names.

    Args:
        args: With the arguments of `add_input_arguments`; `model_dir` becomes the folder where an
            address was given.

    Raises:
        FileNotFoundError: No such model.
        ValueError: A damaged model, or a device that is not there.
    """
    args.model_dir = model_folder(args.model_dir)
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


def model_inputs(
    model: ScLong, cells: Cells, *, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
    """Yield the model's input (B, G) of all cells, what is unmeasured (B, G) or None, and where.

    Args:
        model: From `load_model`.
        cells: From `open_cells`, in the model's gene order.
        batch_size: Cells at a time.

    Raises:
        ValueError: The model needs to know what was measured, and the input does not say.
    """
    device = next(model.parameters()).device
    masks, done = model.transform.unmeasured == "mask", 0
    if masks and cells.measured is None:
        raise ValueError(
            "the model was trained with data.unmeasured=mask: it needs to know which genes the "
            "input measures, which this corpus does not record; give the source files"
        )
    for block in cells.blocks():
        for start in range(0, block.counts.shape[0], batch_size):
            part = block.counts[start : start + batch_size]
            values = log1p_normalise(part, target_sum=model.transform.target_sum)
            place = slice(done, done + part.shape[0])
            hidden = None
            if masks and cells.measured is not None:
                hidden = torch.from_numpy(cells.measured.of(place).unmeasured()).to(device)
            yield torch.from_numpy(values).to(device), hidden, place
            done = place.stop


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
