"""What a command on a model and cells begins with: all open both alike, and read them alike."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from data_prep.manifest.input_options import input_dataset
from sclong_ds.command_line import check_whole
from sclong_ds.embedding.cells import Cells, open_cells
from sclong_ds.exported.model_dir import load_model
from sclong_ds.exported.training_cells import read_training_cells, share_in_training
from sclong_ds.hub.hub import model_folder
from sclong_ds.model.counts_input import model_input
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes

CPU_TOKENS = 2**15
"""Genes of all cells of a batch on a CPU, at most: more of them leave its caches. A model of 27,874
genes of width 32 takes 1.5 times the CPU time in batches of 8 (`python -m
benchmarks.embed_speed`)."""


def model_of(args: argparse.Namespace, *, device: torch.device | None = None) -> ScLong:
    """Return the model that a command line names.

    Args:
        args: With the arguments of `add_input_arguments`; `model_dir` becomes the folder where an
            address was given.
        device: Where to put it; None: on the device that the command line names.

    Raises:
        FileNotFoundError: No such model.
        ValueError: A damaged model, or a device that is not there.
    """
    args.model_dir = model_folder(args.model_dir)
    return load_model(args.model_dir, device=device or choose_device(args.device))


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


def known_from_training(model_dir: Path, cells: Cells) -> str:
    """Return the sentence on how many cells a model was trained on, for which they are read once.

    Args:
        model_dir: Folder of the model.
        cells: From `cells_of`.
    """
    known, n = read_training_cells(model_dir), 0
    if known is not None:
        n = sum(int(known.hold(block.counts).sum()) for block in cells.blocks())
    return share_in_training(known, n, len(cells.obs))


def model_inputs(
    model: ScLong, cells: Cells, *, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
    """Yield the model's input (B, G) of all cells, what is unmeasured (B, G) or None, and where.

    Args:
        model: From `load_model`.
        cells: From `open_cells`, in the model's gene order.
        batch_size: Cells at a time.

    Raises:
        ValueError: As `count_inputs`.
    """
    for place, block, measured in cells.placed_blocks():
        batches = count_inputs(model, block.counts, batch_size=batch_size, measured=measured)
        for part, x, unmeasured in batches:
            first = place.start + part.start
            yield x, unmeasured, slice(first, first + len(x))


def count_inputs(
    model: ScLong, counts: csr_matrix, *, batch_size: int, measured: MeasuredGenes | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield batches of cells: their rows, values (B, G), and genes that were not measured.

    Args:
        model: From `load_model`, with its `transform`.
        counts: (n, G) raw counts in the model's gene order.
        batch_size: Cells at a time, at most: `cells_of_a_batch`.
        measured: Genes that the inputs of the n cells name.

    Raises:
        ValueError: Another number of genes than the model's, a wrong batch size, or the model needs
            to know what was measured and `measured` is None.
    """
    if counts.shape[1] != model.n_genes:
        raise ValueError(f"got counts of {counts.shape[1]} genes, the model has {model.n_genes}")
    masks = model.transform.unmeasured == "mask"
    if masks and measured is None:
        raise ValueError(
            "the model was trained with data.unmeasured=mask: it needs to know which genes the "
            "input measures, which a corpus of version 1 does not record; embed the source files, "
            "or finalize the corpus again"
        )
    device = next(model.parameters()).device
    batch_size = cells_of_a_batch(model, batch_size, device)
    for start in range(0, counts.shape[0], batch_size):
        part = slice(start, start + batch_size)
        unknown = measured.of(part).unmeasured() if masks and measured is not None else None
        x, unmeasured = model_input(
            counts[part], target_sum=model.transform.target_sum, unmeasured=unknown, device=device
        )
        yield part, x, unmeasured


def cells_of_a_batch(model: ScLong, batch_size: int, device: torch.device) -> int:
    """Return how many cells are computed at a time: on a CPU fewer of a model that reads all genes.

    Args:
        model: The model.
        batch_size: Cells at a time, at most.
        device: Where they are computed.

    Raises:
        ValueError: `batch_size` is no whole number of 1 or more.
    """
    check_whole("batch_size", batch_size, least=1)
    if device.type == "cpu" and model.config.zero_genes is None:
        return min(batch_size, max(1, CPU_TOKENS // model.n_genes))
    return batch_size


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
