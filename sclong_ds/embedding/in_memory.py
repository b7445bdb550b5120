"""Cells and a model in Python: `embed`, `align`, and `predict` what a fine-tuned model learnt.

    model = sclong_ds.load_model("MODEL_DIR")
    adata.obsm["X_sclong"] = sclong_ds.embed(model, adata)
    adata.obs = adata.obs.join(sclong_ds.predict("FINETUNED/model", adata))

The rules are those of `python -m sclong_ds embed`: raw counts, human genes by
Ensembl id or symbol, in X, raw or a layer; what is refused there is refused here, with the same
reason. Nothing is written, and the caller's AnnData stays as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
from anndata import AnnData
from pandas import DataFrame, concat
from pandas.api.types import is_numeric_dtype
from scipy.sparse import csr_matrix, vstack

from data_prep.genes.harmonize import MIN_GENES_MAPPED, MIN_SHARE_MAPPED
from data_prep.manifest.input_options import input_dataset
from sclong_ds.command_line import HUB, WEB
from sclong_ds.corpus.transform import scale_of
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


class Reading(TypedDict, total=False):
    """How cells are read; keywords of `embed`, `predict`, `evaluate` and `align`, all optional."""

    min_genes_mapped: int
    """Fewest genes of the model that the input must have."""
    min_share_mapped: float
    """Smallest share (0 to 1) of the input's genes that the model must know."""
    counts: str
    """Where the raw counts are: X, raw.X, layers/NAME; `auto` finds them."""
    gene_column: str
    """Column of `var` with the gene names; `auto`: the best one."""
    id_type: str
    """What the genes are named by: ensembl, symbol; `auto` looks at them."""
    gene_list: Path | None
    """File with the names of the genes where the cells have none."""
    genome: str
    """The genome to read where the cells are of several."""


def embed(
    model: ScLong, cells: CellSource, *, batch_size: int = 8, **reading: Unpack[Reading]
) -> np.ndarray:
    """Return the embeddings of cells, a row for each, in their order.

    Args:
        model: From `load_model`.
        cells: Raw counts of n cells: AnnData, a DataFrame with genes as columns, or a path.
        batch_size: Cells at a time; changes memory and speed, not the result (beyond rounding).
        **reading: How they are read: see `Reading`.

    Returns:
        (n, W) float32, C for each part of the model's recipe or its number of principal directions,
        to be kept in `adata.obsm`; zero for a cell without counts of the model's genes.

    Raises:
        FileNotFoundError: No such path.
        ValueError: Not counts of known human genes, or a wrong batch size.
    """
    with opened_cells(model, cells, (), reading) as opened:
        parts = [np.zeros((0, embedding_width(model)), dtype=np.float32)]
        for _, block, measured in opened.placed_blocks():
            parts.append(
                embed_counts(model, block.counts, batch_size=batch_size, measured=measured)
            )
        return np.concatenate(parts)


def align(cells: CellSource, model: ScLong, **reading: Unpack[Reading]) -> AnnData:
    """Return cells in the gene order of a model: what `model`, `model.encode` and others read.

        aligned = sclong_ds.align(adata, model)
        x = torch.from_numpy(aligned[:8].layers["model_input"].toarray())
        unknown = None
        if model.transform.unmeasured == "mask":
            unknown = ~torch.from_numpy(aligned.var["measured"].to_numpy()).expand(len(x), -1)
        vectors = model.encode(x, unmeasured=unknown, genes=["CD3E", "CD19"])

    `embed` does the same: a model trained with `data.unmeasured=mask` must be told which genes were
    not measured, any other reads them as zeros. `measured` is of the whole input: where its cells
    come from several gene lists (a file that `embed` wrote, a corpus) it is true of a gene that any
    list has; for a model that masks, align the cells of each list on their own. A corpus that
    records no lists gives no such column.

    Args:
        cells: As for `embed`.
        model: From `load_model`.
        **reading: How they are read: see `Reading`.

    Returns:
        (n, G) AnnData, a row for each cell in its order: X the raw counts, layers["model_input"]
        the values that the model reads, both sparse; `obs` of the input; `var` symbol, class, and
        whether the input measures the gene.

    Raises:
        FileNotFoundError: No such path.
        ValueError: Not counts of known human genes.
    """
    with opened_cells(model, cells, (), reading) as opened:
        blocks = [block.counts for block in opened.blocks()]
        counts = vstack([csr_matrix((0, model.n_genes)), *blocks]).tocsr()
        measured = opened.measured
        # Of cells in memory as it is: it may hold columns that no file can.
        obs = cells.obs.copy() if isinstance(cells, AnnData) else opened.obs
    values = counts.astype(np.float32)
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.repeat(scale_of(totals, model.transform.target_sum), np.diff(counts.indptr))
    values.data = np.log1p(counts.data * scale).astype(np.float32)
    var = DataFrame(
        {"symbol": model.genes.symbols, "class": model.genes.classes}, index=list(model.genes.ids)
    )
    if measured is not None:
        var["measured"] = measured.table.any(axis=0)
    return AnnData(
        counts.astype(np.float32), obs=obs, var=plain_columns(var), layers={"model_input": values}
    )


def predict(
    model: str | Path,
    cells: CellSource,
    *,
    batch_size: int = 8,
    device: str = "auto",
    **reading: Unpack[Reading],
) -> DataFrame:
    """Return what a fine-tuned model predicts of cells, a row for each, in their order.

    Args:
        model: The folder `model` that `finetune` wrote, or its address.
        cells: As for `embed`.
        batch_size: As for `embed`.
        device: auto, cpu or cuda.
        **reading: How they are read: see `Reading`.

    Returns:
        The columns that `embed` adds to `obs`: `predicted_LABEL`, of labels
        `predicted_LABEL_probability`, of numbers `predicted_LABEL_error`, and
        `predicted_LABEL_unknown`; the index holds the names of the cells.

    Raises:
        FileNotFoundError: No such model or path.
        ValueError: A model that was not fine-tuned, a device that is not there, or what `embed`
            refuses.
    """
    if not isinstance(model, str | Path):
        raise ValueError(
            f"got {type(model).__name__}; give the folder of the model, or its address: "
            "what predicts lies there beside the weights"
        )
    folder = model_folder(model if str(model).startswith((HUB, *WEB)) else Path(model))
    head = read_head(folder)
    if head is None:
        raise ValueError(f"{folder} predicts nothing: give the folder model/ that `finetune` wrote")
    loaded = load_model(folder, device=choose_device("auto") if device == "auto" else device)
    with opened_cells(loaded, cells, (), reading) as opened:
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
    reading: Reading,
) -> Iterator[Cells]:
    """Open cells as the commands do, for as long as the context lasts.

    Args:
        model: Whose genes are read.
        cells: Raw counts.
        columns: Annotations to keep of cells that are in memory.
        reading: How to read them.

    Raises:
        TypeError: A name that is not in `Reading`.
        ValueError: No model, or no cells.
    """
    if not isinstance(model, ScLong):
        raise ValueError(
            f"got {type(model).__name__} as the model; give what sclong_ds.load_model returns"
        )
    unknown = sorted(reading.keys() - Reading.__annotations__.keys())
    if unknown:
        allowed = ", ".join(Reading.__annotations__)
        raise TypeError(f"{unknown[0]}: no such keyword; how cells are read: {allowed}")
    how: dict[str, Any] = dict(reading)
    min_genes = how.pop("min_genes_mapped", MIN_GENES_MAPPED)
    min_share = how.pop("min_share_mapped", MIN_SHARE_MAPPED)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(cells, str | Path):
            path = Path(cells)
        elif not len(cells):
            raise ValueError(f"got 0 cells ({type(cells).__name__}); give one or more")
        else:
            # Through a file, so that the one reader of h5ad decides what counts and genes are.
            path = Path(folder) / "cells.h5ad"
            _counts_and_genes(cells, columns).write_h5ad(path)
        yield open_cells(
            path,
            genes=model.genes,
            min_genes=min_genes,
            min_share=min_share,
            dataset=replace(input_dataset(path), **how),
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
