"""Embed cells from Python, or predict what a fine-tuned model learnt: `embed`, `predict`.

    model = sclong_ds.load_model("MODEL_DIR")
    adata.obsm["X_sclong"] = sclong_ds.embed(model, adata)
    adata.obs = adata.obs.join(sclong_ds.predict("FINETUNED/model", adata))

The rules are those of `python -m sclong_ds embed`: raw counts, human genes by
Ensembl id or symbol, in X, raw or a layer; what is refused there is refused here, with the same
reason. Nothing is written, and the caller's AnnData stays as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from anndata import AnnData
from pandas import DataFrame, concat
from pandas.api.types import is_numeric_dtype
from scipy.sparse import csr_matrix

from data_prep.genes.harmonize import MIN_GENES_MAPPED, MIN_SHARE_MAPPED
from data_prep.manifest.input_options import input_dataset
from sclong_ds.command_line import HUB, WEB
from sclong_ds.embedding.cells import Cells, open_cells
from sclong_ds.embedding.embed import (
    embed_and_predict,
    embed_counts,
    embedding_width,
    plain_columns,
)
from sclong_ds.embedding.opening import choose_device
from sclong_ds.exported.head import read_head
from sclong_ds.exported.model_dir import load_model
from sclong_ds.hub.hub import model_folder
from sclong_ds.model.sclong import ScLong

CellSource: TypeAlias = AnnData | DataFrame | str | Path
"""Raw counts: AnnData, a DataFrame of cells by genes, or the path of what `embed` reads."""


def embed(
    model: ScLong,
    cells: CellSource,
    *,
    batch_size: int = 8,
    min_genes_mapped: int = MIN_GENES_MAPPED,
    min_share_mapped: float = MIN_SHARE_MAPPED,
    counts: str = "auto",
    gene_column: str = "auto",
    id_type: str = "auto",
    gene_list: Path | None = None,
    genome: str = "auto",
) -> np.ndarray:
    """Return the embeddings of cells, a row for each, in their order.

    Args:
        model: From `load_model`.
        cells: Raw counts of n cells: AnnData, a DataFrame with genes as columns, or a path.
        batch_size: Cells at a time; changes memory and speed, not the result (beyond rounding).
        min_genes_mapped: Fewest genes of the model that the input must have.
        min_share_mapped: Smallest share (0 to 1) of the input's genes that the model must know.
        counts: Where the raw counts are: X, raw.X, layers/NAME; `auto` finds them.
        gene_column: Column of `var` with the gene names; `auto`: the best one.
        id_type: What the genes are named by: ensembl, symbol; `auto` looks at them.
        gene_list: File with the names of the genes where `cells` holds none.
        genome: The genome to read where `cells` holds several.

    Returns:
        (n, W) float32, C for each part of the model's recipe, to be kept in `adata.obsm`; zero for
        a cell without counts of the model's genes.

    Raises:
        FileNotFoundError: No such path.
        ValueError: Not counts of known human genes.
    """
    how = {
        "counts": counts,
        "gene_column": gene_column,
        "id_type": id_type,
        "gene_list": gene_list,
        "genome": genome,
    }
    with opened_cells(model, cells, (), min_genes_mapped, min_share_mapped, how) as opened:
        parts = [np.zeros((0, embedding_width(model)), dtype=np.float32)]
        for _, block, measured in opened.placed_blocks():
            parts.append(
                embed_counts(model, block.counts, batch_size=batch_size, measured=measured)
            )
        return np.concatenate(parts)


def predict(
    model: str | Path,
    cells: CellSource,
    *,
    batch_size: int = 8,
    device: str = "auto",
    min_genes_mapped: int = MIN_GENES_MAPPED,
    min_share_mapped: float = MIN_SHARE_MAPPED,
    counts: str = "auto",
    gene_column: str = "auto",
    id_type: str = "auto",
    gene_list: Path | None = None,
    genome: str = "auto",
) -> DataFrame:
    """Return what a fine-tuned model predicts of cells, a row for each, in their order.

    Args:
        model: The folder `model` that `finetune` wrote, or its address.
        cells: As for `embed`.
        batch_size: As for `embed`.
        device: auto, cpu or cuda.
        min_genes_mapped: As for `embed`, like all that follow.
        min_share_mapped: Smallest share (0 to 1) of the input's genes that the model must know.
        counts: Where the raw counts are.
        gene_column: Column of `var` with the gene names.
        id_type: What the genes are named by.
        gene_list: File with the names of the genes where `cells` holds none.
        genome: The genome to read where `cells` holds several.

    Returns:
        The columns that `embed` adds to `obs`: `predicted_LABEL`, of labels
        `predicted_LABEL_probability`, of numbers `predicted_LABEL_error`, and
        `predicted_LABEL_unknown`; the index holds the names of the cells.

    Raises:
        FileNotFoundError: No such model or path.
        ValueError: A model that was not fine-tuned, or what `embed` refuses.
    """
    folder = model_folder(model if str(model).startswith((HUB, *WEB)) else Path(model))
    head = read_head(folder)
    if head is None:
        raise ValueError(f"{folder} predicts nothing: give the folder model/ that `finetune` wrote")
    loaded = load_model(folder, device=choose_device(device))
    how: dict[str, Any] = {"counts": counts, "gene_column": gene_column, "id_type": id_type}
    how |= {"gene_list": gene_list, "genome": genome}
    with opened_cells(loaded, cells, (), min_genes_mapped, min_share_mapped, how) as opened:
        parts = []
        for place, block, measured in opened.placed_blocks():
            _, columns = embed_and_predict(
                loaded, block.counts, head, batch_size=batch_size, measured=measured
            )
            parts.append(DataFrame(columns, index=opened.obs.index[place]))
        return concat(parts)


@contextmanager
def opened_cells(
    model: ScLong,
    cells: CellSource,
    columns: tuple[str, ...] | list[str],
    min_genes: int,
    min_share: float,
    how: Mapping[str, Any] | None = None,
) -> Iterator[Cells]:
    """Open cells as the commands do, for as long as the context lasts.

    Args:
        model: Whose genes are read.
        cells: Raw counts.
        columns: Annotations to keep of cells that are in memory.
        min_genes: Fewest genes of the model that the input must have.
        min_share: Smallest share of the input's genes that the model must know.
        how: How to read them, columns of a manifest; None takes the defaults.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cells, str | Path):
            path = Path(cells)
        else:
            # Through a file, so that the one reader of h5ad decides what counts and genes are.
            path = Path(folder) / "cells.h5ad"
            _counts_and_genes(cells, columns).write_h5ad(path)
        yield open_cells(
            path,
            genes=model.genes,
            min_genes=min_genes,
            min_share=min_share,
            dataset=replace(input_dataset(path), **(how or {})),
        )


def _counts_and_genes(cells: AnnData | DataFrame, columns: tuple[str, ...] | list[str]) -> AnnData:
    """Return counts, genes and some annotations of cells as AnnData with text names; a copy."""
    if isinstance(cells, AnnData):
        # What says something about counts and genes alone: the rest may hold what no file can.
        raw = None if cells.raw is None else {"X": cells.raw.X, "var": cells.raw.var.copy()}
        return AnnData(
            cells.X,
            obs=plain_columns(cells.obs[list(columns)]),
            var=cells.var.copy(),
            layers=dict(cells.layers),
            raw=raw,
        )
    if not isinstance(cells, DataFrame):
        raise ValueError(f"got {type(cells).__name__}; give AnnData, or a DataFrame of raw counts")
    other = [str(name) for name, kind in cells.dtypes.items() if not is_numeric_dtype(kind)]
    if other:
        shown = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
        raise ValueError(
            f"{len(other)} columns do not hold numbers ({shown}): give raw counts of genes alone, "
            f"as a numeric type"
        )
    table = cells.to_numpy()
    if table.dtype == object:  # pandas' own integers, or such columns beside others
        table = cells.to_numpy(np.float64, na_value=np.nan)
    return AnnData(
        csr_matrix(table),
        obs=DataFrame(index=cells.index.astype(str)),
        var=DataFrame(index=cells.columns.astype(str)),
    )
