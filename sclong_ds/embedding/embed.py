"""Cell embeddings from an exported model: raw counts in any format in, AnnData out.

    python -m sclong_ds embed MODEL_DIR INPUT --out OUT.h5ad [--batch-size N] [--jobs N]

Reads MODEL_DIR (`python -m sclong_ds export`) and INPUT: any file or folder that `data_prep` reads,
under the same rules (raw counts, human genes, refused with the reason otherwise) and with the
options of a manifest (--counts, --gene-column, ...), or a finalized corpus folder. Writes OUT.h5ad
with the same cells in the same order: `obsm["X_sclong"]`, the harmonised counts in `X`, the
annotation of the input with `n_genes_mapped` and `n_counts_mapped` in `obs`, and how it was made in
`uns["sclong"]`. Every cell has its row; only --min-genes and --min-counts leave cells out, which
`uns` and the last line of the output count. Memory holds one block of cells.

The embedding of a cell is made by the recipe that its model carries (`sclong_ds.model.pooling`),
chosen on validation cells when it was exported; `uns` names it. Models without one take the mean
of a cell's contextual representations (`ScLong.encode`) over the genes it expresses. A cell without
a count of a gene of the model has nothing to average: its row is zero, and a warning gives their
number.

Shapes: B cells, G genes, W width of the embedding: C, the base width, for each part of the recipe,
or the recipe's number of principal directions.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from anndata.io import sparse_dataset, write_elem
from scipy.sparse import csr_matrix
from torch import Tensor

from sclong_ds.corpus.byte_code import MAX_COUNT
from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.opening import (
    cells_of,
    cells_of_a_batch,
    choose_device,
    count_inputs,
    model_of,
)
from sclong_ds.embedding.processes.workers import Workers, started_workers
from sclong_ds.embedding.record import input_record, origin_of, record_of, training_record
from sclong_ds.embedding.stored import UNS_KEY, measured_column, measured_record
from sclong_ds.exported.head import FittedHead, read_head
from sclong_ds.exported.training_cells import (
    TrainingCells,
    read_training_cells,
    share_in_training,
)
from sclong_ds.files.hdf5_file import new_hdf5
from sclong_ds.model.pooling import Part
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.measured import MeasuredGenes
from sclong_ds.page.words import counted
from sclong_ds.progress import count_progress

KEY = "X_sclong"
"""Name of the embedding in obsm."""
# HDF5 guesses tiny chunks for arrays that start empty; level 1 packs counts nearly as well as 9.
_STORAGE = {"chunks": (2**17,), "compression": "gzip", "compression_opts": 1}
_FEW_GENES = 0.5
_Columns = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of an input reached the model, and how much of the model was reached."""

    n_cells: int
    n_cells_without_counts: int
    """Cells without a count of a gene of the model; their embedding is zero."""
    n_cells_in_training: int
    """Cells that the model was trained on; 0 where that is not known."""
    n_genes_input: int
    n_genes_mapped: int
    n_genes_model: int
    counts_kept: float
    """Share of the input's counts that fell on genes of the model; 0 if it has none."""


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds embed`.

    Args:
        args: Parsed arguments of `add_arguments`.

    Returns:
        0.

    Raises:
        FileNotFoundError: No such model or input.
        ValueError: An input that is not counts of known human genes, or a wrong option.
    """
    check_out(args.out, input=args.input)
    device, alone = choose_device(args.device), args.jobs == 1
    # Processes hold models of their own: this one's takes no GPU's memory beside them.
    model = model_of(args, device=device if alone else torch.device("cpu"))
    cells = cells_of(args, model)
    training_cells = read_training_cells(args.model_dir)
    started = (
        nullcontext()
        if alone
        else started_workers(embed_and_features, args.model_dir, device=device, n=args.jobs)
    )
    with started as workers:
        coverage = embed_to_file(
            model,
            cells,
            out=args.out,
            model_dir=args.model_dir,
            batch_size=args.batch_size,
            with_counts=not args.no_counts,
            origin=origin_of(args),
            training_cells=training_cells,
            head=read_head(args.model_dir),
            workers=workers,
        )
    print(share_in_training(training_cells, coverage.n_cells_in_training, coverage.n_cells))
    print(
        f"{args.out}: {counted(coverage.n_cells, 'cell')}, {KEY} of width "
        f"{embedding_width(model)}; "
        f"{coverage.n_genes_mapped} of the model's {coverage.n_genes_model} genes, "
        f"{coverage.counts_kept:.1%} of the counts{_left_out(cells)}"
    )
    return 0


def embedding_width(model: ScLong) -> int:
    """Return the width W of a model's embeddings."""
    return model.recipe.width(model.config.base_dim)


def embed_counts(
    model: ScLong,
    counts: csr_matrix,
    *,
    batch_size: int = 8,
    on_cells: Callable[[int], None] | None = None,
    measured: MeasuredGenes | None = None,
) -> np.ndarray:
    """Return the embeddings of cells.

    Args:
        model: From `load_model`, with its `transform`.
        counts: (n, G) raw counts in the model's gene order, without stored zeros.
        batch_size: Cells at a time; changes memory and speed, not the result (beyond rounding).
        on_cells: Called with the number of cells of each finished batch.
        measured: Genes that the inputs of the n cells name. Read by models that were trained with
            data.unmeasured=mask, and needed by them; others take all other genes for zeros.

    Returns:
        (n, W) float32; zero for a cell without counts.

    Raises:
        ValueError: Another number of genes than the model's, or measured genes are needed.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "on_cells": on_cells, "measured": measured}
    return _rows(model, counts, embedding_width(model), model.embed, **how)


def pooled_counts(
    model: ScLong,
    counts: csr_matrix,
    parts: Sequence[Part],
    *,
    batch_size: int = 8,
    on_cells: Callable[[int], None] | None = None,
    measured: MeasuredGenes | None = None,
    directions: torch.Tensor | None = None,
) -> np.ndarray:
    """Return weighted means of the genes' vectors of cells, the parts one behind the other.

    Args:
        model: As in `embed_counts`, which names the errors too.
        counts: As in `embed_counts`.
        parts: P of them.
        batch_size: As in `embed_counts`.
        on_cells: As in `embed_counts`.
        measured: As in `embed_counts`.
        directions: As in `ScLong.pooled`.

    Returns:
        (n, P * C) float32; zero for a cell without counts.
    """

    def of_batch(x: Tensor, *, unmeasured: Tensor | None) -> Tensor:
        return torch.cat(
            model.pooled(x, parts, unmeasured=unmeasured, directions=directions), dim=1
        )

    how: dict[str, Any] = {"batch_size": batch_size, "on_cells": on_cells, "measured": measured}
    return _rows(model, counts, len(parts) * model.config.base_dim, of_batch, **how)


def embed_and_features(
    model: ScLong,
    counts: csr_matrix,
    head: FittedHead | None,
    *,
    batch_size: int = 8,
    on_cells: Callable[[int], None] | None = None,
    measured: MeasuredGenes | None = None,
) -> np.ndarray:
    """Return embeddings and behind them the features that a head reads, from one pass.

    Args:
        model: As in `embed_counts`, which names the errors too.
        counts: As in `embed_counts`.
        head: The head; None reads nothing.
        batch_size: As in `embed_counts`.
        on_cells: As in `embed_counts`.
        measured: As in `embed_counts`.

    Returns:
        (n, W + F) float32.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "on_cells": on_cells, "measured": measured}
    if head is None:
        return embed_counts(model, counts, **how)
    read, own = head.head.shape.parts, model.recipe.parts
    parts = tuple(dict.fromkeys((*read, *own)))

    def of_batch(x: Tensor, *, unmeasured: Tensor | None) -> Tensor:
        found = model.pooled(x, parts, unmeasured=unmeasured)
        pooled = dict(zip(parts, found, strict=True))
        embedded = model.recipe.apply([pooled[part] for part in own])
        return torch.cat([embedded, *(pooled[part] for part in read)], dim=1)

    width = embedding_width(model)
    rows = _rows(model, counts, width + len(read) * model.config.base_dim, of_batch, **how)
    rows[np.diff(counts.indptr) == 0, :width] = 0.0
    return rows


def _rows(
    model: ScLong,
    counts: csr_matrix,
    width: int,
    of_batch: Callable[..., Tensor],
    *,
    batch_size: int,
    on_cells: Callable[[int], None] | None,
    measured: MeasuredGenes | None,
) -> np.ndarray:
    """Return rows (n, width) float32 that `of_batch` makes of x (B, G) and its `unmeasured`."""
    rows = np.zeros((counts.shape[0], width), dtype=np.float32)
    batches = count_inputs(model, counts, batch_size=batch_size, measured=measured)
    with torch.inference_mode(), model.gene_encoder.kept():
        for part, x, unmeasured in batches:
            rows[part] = of_batch(x, unmeasured=unmeasured).float().cpu().numpy()
            if on_cells is not None:
                on_cells(len(x))
    return rows


def embed_and_predict(
    model: ScLong,
    counts: csr_matrix,
    head: FittedHead | None,
    *,
    batch_size: int = 8,
    on_cells: Callable[[int], None] | None = None,
    measured: MeasuredGenes | None = None,
    workers: Workers | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return embeddings (n, W) and the columns of obs that a head predicts, from one pass.

    Args:
        model: As in `embed_counts`, which names the errors too.
        counts: As in `embed_counts`.
        head: The head; None predicts nothing.
        batch_size: As in `embed_counts`.
        on_cells: As in `embed_counts`.
        measured: As in `embed_counts`.
        workers: Processes of `embed_and_features` with the same model and head; None: this one
            computes.
    """
    how: dict[str, Any] = {"on_cells": on_cells, "measured": measured}
    if workers is None or not counts.shape[0]:
        rows = embed_and_features(model, counts, head, batch_size=batch_size, **how)
    else:
        size = cells_of_a_batch(model, batch_size, workers.device)
        rows = workers.each(counts, batch_size=size, **how)
    if head is None:
        return rows, {}
    # Of all cells at once whoever made the rows: products of other shapes have other bits.
    width = embedding_width(model)
    columns = head.columns(rows[:, width:])
    columns[f"predicted_{head.label}_unknown"] |= np.diff(counts.indptr) == 0
    return rows[:, :width], columns


def recipe_rows(model: ScLong, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the embeddings (n, W) by a model's recipe of its parts, each (n, C)."""
    device = next(model.parameters()).device
    given = [torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts]
    with torch.inference_mode():
        return np.array(model.recipe.apply(given).float().cpu().numpy())


def _joined(blocks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the columns of consecutive cells as one."""
    names = blocks[0] if blocks else {}
    return {name: np.concatenate([block[name] for block in blocks]) for name in names}


def embed_to_file(
    model: ScLong,
    cells: Cells,
    *,
    out: Path,
    model_dir: Path,
    batch_size: int,
    with_counts: bool,
    origin: dict[str, Any] | None = None,
    training_cells: TrainingCells | None = None,
    head: FittedHead | None = None,
    workers: Workers | None = None,
) -> Coverage:
    """Embed all cells of an input and write the h5ad; it appears whole or not at all.

    Args:
        model: From `load_model`.
        cells: From `open_cells`, with the genes of the model.
        out: File to write; replaced if it exists.
        model_dir: Where the model is, for the record.
        batch_size: Cells at a time.
        with_counts: Whether to write the counts as X.
        origin: What the cells are, for the record.
        training_cells: What the model was trained on; None: not known.
        head: Adds its predictions to obs; None: nothing was fine-tuned on the model.
        workers: Processes that hold the same model and head; None: this one computes.

    Returns:
        What was embedded.

    Raises:
        ValueError: Values that are not counts, found while reading.
    """
    n_cells, done, n_input_counts, n_known, predicted = len(cells.obs), 0, 0, 0, list[_Columns]()
    n_genes_mapped, n_counts = np.zeros(n_cells, dtype=np.int32), np.zeros(n_cells, dtype=np.int64)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_hdf5(out) as (file, written), count_progress("embed", n_cells, "cells") as on_cells:
        embedded = _begin_anndata(file, n_cells, model, with_counts=with_counts)
        for part, block, measured in cells.placed_blocks():
            n_genes_mapped[part] = np.diff(block.counts.indptr)
            n_counts[part] = np.asarray(block.counts.sum(axis=1)).ravel()
            embedded[part], columns = embed_and_predict(
                model, block.counts, head, batch_size=batch_size, on_cells=on_cells,
                measured=measured, workers=workers)  # fmt: skip
            predicted.append(columns)
            if with_counts:
                sparse_dataset(file["X"]).append(_as_uint32(block.counts))
            written.check()
            n_known += 0 if training_cells is None else int(training_cells.hold(block.counts).sum())
            done, n_input_counts = part.stop, n_input_counts + block.n_input_counts
        if done != n_cells:
            raise ValueError(f"the input lists {n_cells} cells, but its matrix holds {done}")
        coverage = _coverage(cells, n_counts, n_input_counts, n_known, n_genes=model.n_genes)
        mapped = {"n_genes_mapped": n_genes_mapped, "n_counts_mapped": n_counts}
        obs = cells.obs.assign(**mapped, **measured_column(cells.measured), **_joined(predicted))
        write_elem(file, "obs", plain_columns(obs))
        record = record_of(model, model_dir) | _record_of_cells(cells, coverage, training_cells)
        write_elem(file, "uns", {UNS_KEY: record | (origin or {})})
    _warn(coverage, masks=model.transform.unmeasured == "mask")
    return coverage


def _record_of_cells(
    cells: Cells, coverage: Coverage, training_cells: TrainingCells | None
) -> dict[str, Any]:
    """Return the record of the cells: how they were read, and what is known of them."""
    record = {"coverage": asdict(coverage)} | training_record(training_cells)
    return record | input_record(cells) | measured_record(cells.measured)


def _coverage(
    cells: Cells, n_counts: np.ndarray, n_input_counts: int, n_known: int, *, n_genes: int
) -> Coverage:
    return Coverage(
        n_cells=len(n_counts),
        n_cells_without_counts=int((n_counts == 0).sum()),
        n_cells_in_training=n_known,
        n_genes_input=cells.n_genes_input,
        n_genes_mapped=cells.n_genes_mapped,
        n_genes_model=n_genes,
        counts_kept=float(n_counts.sum() / max(n_input_counts, 1)),
    )


def check_out(out: Path, *, input: Path) -> None:
    """Refuse an output that is no h5ad, or that would write over the input.

    Raises:
        ValueError: A wrong name or place.
    """
    if out.suffix != ".h5ad":
        raise ValueError(f"--out {out}: the name must end in .h5ad")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    target, source = out.resolve(), input.resolve()
    if target == source or (source.is_dir() and source in target.parents):
        raise ValueError(f"--out {out} would write over the input {input}; choose another place")


def _begin_anndata(
    file: h5py.File, n_cells: int, model: ScLong, *, with_counts: bool
) -> h5py.Dataset:
    """Write the skeleton of an AnnData file; return its room for the embeddings."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsm", "obsp", "varm", "varp"):
        write_elem(file, name, {})
    genes = model.genes
    var = pd.DataFrame({"symbol": genes.symbols, "class": genes.classes}, index=list(genes.ids))
    write_elem(file, "var", plain_columns(var))
    if with_counts:
        nothing = csr_matrix((0, len(genes)), dtype=np.uint32)
        # 64 bits from the start: `append` cannot widen the row pointers later.
        write_elem(file, "X", nothing, dataset_kwargs=_STORAGE | {"indptr_dtype": np.int64})
    embedded = file["obsm"].create_dataset(
        KEY, shape=(n_cells, embedding_width(model)), dtype=np.float32
    )
    embedded.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return embedded


def _left_out(cells: Cells) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in cells.left_out.items())
    return f"; cells left out: {reasons}" if reasons else ""


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose text columns are categories, as AnnData stores them.

    Columns of mixed types, which old files and text formats bring along, become text.
    """
    columns = {
        name: values.astype(object).where(values.isna(), values.astype(str)).astype("category")
        for name, values in table.items()
        if values.dtype == object or isinstance(values.dtype, pd.StringDtype)
    }
    return table.assign(**columns)


def _as_uint32(counts: csr_matrix) -> csr_matrix:
    if counts.nnz and counts.data.max() > MAX_COUNT:
        raise ValueError(
            f"a gene of a cell has {counts.data.max()} counts; counts must be below 2^32"
        )
    return counts.astype(np.uint32)


def _warn(coverage: Coverage, *, masks: bool) -> None:
    if coverage.n_cells_without_counts:
        _log.warning(
            "%d of %s without a count of any gene of the model: the embedding is zero there",
            coverage.n_cells_without_counts,
            counted(coverage.n_cells, "cell"),
        )
    if coverage.n_genes_mapped < _FEW_GENES * coverage.n_genes_model:
        _log.warning(
            "the input has %d of the model's %d genes; the others are read as %s",
            coverage.n_genes_mapped,
            coverage.n_genes_model,
            "unknown" if masks else "not expressed",
        )
