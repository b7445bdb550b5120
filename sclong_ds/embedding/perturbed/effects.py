"""Mean effects of sets of genes beside those of their nulls: tests, and the table that is written.

Shapes: P named sets, N null sets of each, S of both, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import false_discovery_control

from sclong_ds.files.atomic import whole_file, write_atomic
from sclong_ds.model.sclong import ScLong

CELL = "cell_embedding"
"""Target of the rows about the cell's embedding in a table."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Mean shifts of S sets over their cells; NaN for a set that has none."""

    genes: np.ndarray
    """(S, G) float64, of each gene's representation."""
    cell: np.ndarray
    """(S,) float64, of the cell's embedding."""
    n_cells: np.ndarray
    """(S,) int64."""
    towards: np.ndarray | None = None
    """(S,) float64, share of the way to a goal; None without one."""


def tested(
    names: Sequence[str],
    sets: Sequence[Sequence[int]],
    effects: Effects,
    *,
    n_null: int,
    model: ScLong,
) -> AnnData:
    """Return the effects of the named sets beside their nulls.

    Args:
        names: Of the P named sets.
        sets: The P named sets, then the N null sets of each.
        effects: Of all of them.
        n_null: N.
        model: Whose genes they are.

    Returns:
        (P, G): X the shift of each gene; layers null_mean, p and q, where NaN stands for a gene of
        the set itself; obs the same of the embedding, with n_cells, and of the way to a goal. q is
        p after Benjamini-Hochberg: over the genes of a set, and over the sets for the embedding.
    """
    shape = (len(names), model.n_genes)
    layers = {name: np.full(shape, np.nan) for name in ("null_mean", "p", "q")}
    rows, ways = [], []
    for i, own in enumerate(sets[: len(names)]):
        of_null = slice(len(names) + i * n_null, len(names) + (i + 1) * n_null)
        null = effects.genes[of_null].copy()
        for row, one in zip(null, sets[of_null], strict=True):
            row[list(one)] = np.nan  # A gene moves by its own change, which is no effect.
        p = empirical_p(effects.genes[i], null)
        p[list(own)] = np.nan
        counted = ~np.isnan(p)
        layers["p"][i], layers["q"][i, counted] = p, false_discovery_control(p[counted])
        n = (~np.isnan(null)).sum(axis=0)
        layers["null_mean"][i] = np.nansum(null, axis=0) / np.where(n, n, np.nan)
        cell = effects.cell[of_null]
        of_cells = ~np.isnan(cell)
        p_cell = empirical_p(effects.cell[i : i + 1], cell[:, None])[0]
        rows.append((effects.n_cells[i], effects.cell[i], cell[of_cells].mean(), p_cell))
        if effects.towards is not None:
            way, null_way = effects.towards[i], effects.towards[of_null]
            p_way = empirical_p(np.array([way]), null_way[:, None])[0]
            ways.append((way, null_way[of_cells].mean(), p_way))
    obs = pd.DataFrame(rows, columns=["n_cells", "shift", "null_mean", "p"], index=list(names))
    obs["q"] = false_discovery_control(obs["p"])
    if ways:
        obs[["towards", "towards_null_mean", "towards_p"]] = ways
        obs["towards_q"] = false_discovery_control(obs["towards_p"])
    symbols = {"symbol": pd.Categorical(model.genes.symbols)}
    var = pd.DataFrame(symbols, index=list(model.genes.ids))
    return AnnData(effects.genes[: len(names)], obs=obs, var=var, layers=layers)


def empirical_p(effect: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return (1 + null effects as large) / (1 + null effects) for K effects.

    Args:
        effect: (K,).
        null: (N, K); NaN is left out.
    """
    as_large = (null >= effect).sum(axis=0)
    return (1.0 + as_large) / (1.0 + (~np.isnan(null)).sum(axis=0))


def write(table: AnnData, out: Path) -> None:
    """Write effects as h5ad, or as a table with a row for each set and target; atomic.

    Args:
        table: From `tested`.
        out: Ends in .h5ad or .tsv.
    """
    if out.suffix == ".h5ad":
        with whole_file(out) as partial:
            table.write_h5ad(partial)
        return
    parts = []
    for i, name in enumerate(table.obs_names):
        cell = {"target": CELL, "symbol": ""} | dict(table.obs.iloc[i].drop("n_cells"))
        genes = {
            "target": table.var_names,
            "symbol": list(table.var["symbol"]),
            "shift": table.X[i],
        }
        genes |= {key: table.layers[key][i] for key in ("null_mean", "p", "q")}
        part = pd.concat([pd.DataFrame([cell]), pd.DataFrame(genes)])
        part.insert(0, "n_cells", int(table.obs["n_cells"].iloc[i]))
        part.insert(0, "perturbed", name)
        parts.append(part)
    text = pd.concat(parts).to_csv(sep="\t", index=False, float_format="%.6g")
    write_atomic(out, text.encode())
