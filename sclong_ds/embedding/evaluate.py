"""Zero-shot scores of a model's cell embeddings against baselines that need no model.

    python -m sclong_ds evaluate MODEL_DIR INPUT --label KEY [--batch KEY] --out DIR

Reads what `python -m sclong_ds embed` reads; INPUT may also be a file that `embed` wrote, whose
embeddings are taken over if they are those of MODEL_DIR. Writes DIR/scores.json, DIR/scores.tsv
and DIR/tsne.png. Nothing is fine-tuned: labels only score. Every representation gets the same
cells, the same folds and the same distances (Euclidean):

| representation | what |
|---|---|
| sclong | embedding of the model |
| pca | 50 principal components of log1p-normalised counts, all genes |
| hvg_pca | the same over the 2,000 genes of highest variance |

| score | what, best value |
|---|---|
| knn_accuracy, knn_macro_f1 | label from the 15 nearest cells, 5 folds; 1 |
| kmeans_ari, kmeans_nmi | k-means with as many clusters as labels against the labels; 1 |
| label_asw | (1 + mean silhouette of the labels) / 2; 1 |
| batch_asw | mean over labels of 1 - |silhouette of the batches|; 1 |
| batch_mixing | entropy of the batches among the 15 nearest cells / entropy over all cells; 1 |

`majority_accuracy` is what always naming the most common label would reach. Source of the
silhouette scales: scIB, https://doi.org/10.1038/s41592-021-01336-8; of the entropy of mixing:
https://doi.org/10.1038/nbt.4091
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import matplotlib
import numpy as np
import pandas as pd
from anndata.io import read_elem
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.sparse import csr_matrix, vstack
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    silhouette_samples,
)
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from data_prep.manifest.input_options import input_dataset
from data_prep.readers.open import detect_format
from sclong_ds.corpus.transform import log1p_normalise
from sclong_ds.embedding.cells import Cells, open_cells
from sclong_ds.embedding.embed import (
    KEY,
    choose_device,
    embed_counts,
)
from sclong_ds.embedding.record import made_by
from sclong_ds.embedding.stored import UNS_KEY
from sclong_ds.exported.manifest import weights_hash
from sclong_ds.exported.model_dir import load_model
from sclong_ds.files.atomic import write_atomic
from sclong_ds.model.sclong import ScLong
from sclong_ds.progress import count_progress

FOLDS = 5
MIN_CELLS_PER_LABEL = FOLDS
"""Labels with fewer cells are left out: every fold needs one of each."""
NEIGHBOURS = 15
COMPONENTS = 50
VARIABLE_GENES = 2000
_MAX_SILHOUETTE_CELLS = 10_000  # quadratic in the cells
_MAX_DRAWN_CELLS = 3000
_MAX_LEGEND = 30
_BLOCK_CELLS = 512

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCells:
    """The cells that are scored: they have a label that is not too rare, and counts.

    Shapes: n cells, G genes.
    """

    rows: np.ndarray
    """(n,) positions in the input."""
    counts: csr_matrix
    """(n, G) raw counts."""
    labels: np.ndarray
    """(n,) str."""
    batches: np.ndarray | None
    """(n,) str, or None when no batch column was named."""
    left_out: Mapping[str, int]
    """Cells of the input that are not scored, by reason."""
    rare_labels: Mapping[str, int]
    """Labels left out for having fewer than MIN_CELLS_PER_LABEL cells, and their cells."""


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds evaluate`.

    Args:
        args: Parsed arguments of `add_arguments`.

    Returns:
        0.

    Raises:
        FileNotFoundError: No such model or input.
        ValueError: No such column, too few labels or batches, or an input that `embed` refuses too.
    """
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or more")
    model = load_model(args.model_dir, device=choose_device(args.device))
    stored = stored_embedding(args.input, model=model, model_dir=args.model_dir)
    cells = open_cells(
        args.input,
        genes=model.genes,
        split=args.split,
        min_genes=args.min_genes_mapped,
        min_share=args.min_share_mapped,
        dataset=input_dataset(args.input, args),
    )
    scored = choose_cells(cells, label=args.label, batch=args.batch)
    if stored is None:
        with count_progress("embed", len(scored.rows), "cells") as on_cells:
            embedded = embed_counts(
                model,
                scored.counts,
                batch_size=args.batch_size,
                on_cells=on_cells,
                measured=None if cells.measured is None else cells.measured.of(scored.rows),
            )
    else:
        embedded = stored[cells.rows[scored.rows]]
    points = represent(embedded, scored, target_sum=model.transform.target_sum, seed=args.seed)
    scores = {name: score(x, scored, seed=args.seed) for name, x in points.items()}
    table = score_table(scores)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "tsne.png", draw(points, scored, seed=args.seed))
    write_atomic(args.out / "scores.tsv", table.to_csv(sep="\t").encode())
    report = _facts(args, cells, scored) | {"scores": scores}
    write_atomic(args.out / "scores.json", (json.dumps(report, indent=1) + "\n").encode())
    print(f"{len(scored.rows)} cells, {len(_sizes(scored.labels))} labels of {args.label}")
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))
    print(f"written to {args.out}")
    return 0


def stored_embedding(path: Path, *, model: ScLong, model_dir: Path) -> np.ndarray | None:
    """Return the embeddings that a file holds if this model made them, else None.

    Args:
        path: The input of `evaluate`.
        model: The model.
        model_dir: Its folder.

    Returns:
        (n, C) float32 for all cells of the file, or None.

    Raises:
        ValueError: The embeddings are there, but not the counts that the baselines need.
    """
    if not path.is_file() or detect_format(path) != "h5ad":
        return None
    with h5py.File(path) as file:
        if f"obsm/{KEY}" not in file or f"uns/{UNS_KEY}" not in file:
            return None
        if not made_by(read_elem(file[f"uns/{UNS_KEY}"]), model=model, model_dir=model_dir):
            _log.info("%s holds embeddings of another model; embedding anew", path)
            return None
        if "X" not in file:
            raise ValueError(
                f"{path} holds no counts, which the baselines need: "
                "embed without --no-counts, or name the source file"
            )
        return np.asarray(file[f"obsm/{KEY}"][:], dtype=np.float32)


def choose_cells(cells: Cells, *, label: str, batch: str | None) -> ScoredCells:
    """Read the counts of the cells that can be scored.

    Args:
        cells: From `open_cells`.
        label: obs column with the labels.
        batch: obs column with the batches, or None.

    Raises:
        ValueError: No such column; fewer than two labels (or batches) with cells.
    """
    labels = _column(cells.obs, label, option="--label")
    batches = None if batch is None else _column(cells.obs, batch, option="--batch")
    usable = labels != ""
    left_out = {"no label": int((~usable).sum())}
    if batches is not None:
        left_out["no batch"] = int((usable & (batches == "")).sum())
        usable &= batches != ""
    counts = vstack([block.counts for block in cells.blocks()], format="csr")
    without = usable & (np.diff(counts.indptr) == 0)
    left_out["no counts of the model's genes"] = int(without.sum())
    usable &= ~without
    rare = {name: n for name, n in _sizes(labels[usable]).items() if n < MIN_CELLS_PER_LABEL}
    left_out[f"label with fewer than {MIN_CELLS_PER_LABEL} cells"] = sum(rare.values())
    usable &= ~np.isin(labels, np.array(list(rare), dtype=str))
    rows = np.flatnonzero(usable)
    n_labels = len(np.unique(labels[rows]))
    if n_labels < 2:
        raise ValueError(
            f"--label {label}: {n_labels} labels have {MIN_CELLS_PER_LABEL} cells or more, 2 are "
            f"needed; cells left out: {_sentence(left_out)}"
        )
    if batches is not None and len(np.unique(batches[rows])) < 2:
        raise ValueError(f"--batch {batch}: all scored cells are of one batch; leave --batch out")
    if sum(left_out.values()):
        _log.warning("cells left out: %s", _sentence(left_out))
    return ScoredCells(
        rows=rows,
        counts=counts[rows],
        labels=labels[rows],
        batches=None if batches is None else batches[rows],
        left_out=left_out,
        rare_labels=rare,
    )


def represent(
    embedded: np.ndarray, cells: ScoredCells, *, target_sum: float, seed: int
) -> dict[str, np.ndarray]:
    """Return the representations that are scored, by name: that of the model, and the baselines.

    Args:
        embedded: (n, C) embeddings of the cells.
        cells: The cells.
        target_sum: Of the model's transform.
        seed: Of the eigensolver's start.
    """
    values = normalise(cells.counts, target_sum=target_sum)
    return {"sclong": embedded} | baselines(values, seed=seed)


def normalise(counts: csr_matrix, *, target_sum: float) -> csr_matrix:
    """Return the model's transform of counts (n, G), log1p of scaled counts, as float32 CSR."""
    parts = [
        counts[start : start + _BLOCK_CELLS] for start in range(0, counts.shape[0], _BLOCK_CELLS)
    ]
    return vstack(
        [csr_matrix(log1p_normalise(part, target_sum=target_sum)) for part in parts], format="csr"
    )


def baselines(values: csr_matrix, *, seed: int) -> dict[str, np.ndarray]:
    """Return the representations that need no model.

    Args:
        values: (n, G) log1p-normalised counts.
        seed: Of the eigensolver's start.

    Returns:
        (n, at most COMPONENTS) float32 by name: pca, hvg_pca.
    """
    mean = np.asarray(values.mean(axis=0)).ravel()
    variance = np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2
    variable = np.sort(np.argsort(-variance, kind="stable")[:VARIABLE_GENES])
    return {"pca": _pca(values, seed), "hvg_pca": _pca(values[:, variable], seed)}


def score(x: np.ndarray, cells: ScoredCells, *, seed: int) -> dict[str, float | None]:
    """Return all scores of one representation.

    Args:
        x: (n, width) the representation.
        cells: The cells.
        seed: Of folds, k-means and the sample of large inputs.

    Returns:
        Score by name; None where it is undefined (no label has two batches).
    """
    scores = label_scores(x, cells.labels, seed=seed)
    if cells.batches is not None:
        scores |= batch_scores(x, cells.labels, cells.batches, seed=seed)
    return scores


def label_scores(x: np.ndarray, labels: np.ndarray, *, seed: int) -> dict[str, float | None]:
    """Return how well the labels can be read from a representation.

    Args:
        x: (n, width).
        labels: (n,) at least FOLDS cells of each.
        seed: Of folds, k-means and the sample.
    """
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    smallest = min(len(train) for train, _ in folds.split(x, labels))
    classifier = KNeighborsClassifier(min(NEIGHBOURS, smallest))
    predicted = cross_val_predict(classifier, x, labels, cv=folds)
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(x)
    sample = _sample(len(x), _MAX_SILHOUETTE_CELLS, seed)
    return {
        "knn_accuracy": float(accuracy_score(labels, predicted)),
        "knn_macro_f1": float(f1_score(labels, predicted, average="macro")),
        "kmeans_ari": float(adjusted_rand_score(labels, clusters)),
        "kmeans_nmi": float(normalized_mutual_info_score(labels, clusters)),
        "label_asw": float((1 + silhouette_samples(x[sample], labels[sample]).mean()) / 2),
    }


def batch_scores(
    x: np.ndarray, labels: np.ndarray, batches: np.ndarray, *, seed: int
) -> dict[str, float | None]:
    """Return how well batches mix in a representation.

    Args:
        x: (n, width).
        labels: (n,) labels: batches are compared among cells of the same label.
        batches: (n,) at least two different ones.
        seed: Of the sample.
    """
    sample = _sample(len(x), _MAX_SILHOUETTE_CELLS, seed)
    widths = []
    for label in np.unique(labels[sample]):
        here = sample[labels[sample] == label]
        # A silhouette needs two groups, and one group with two cells.
        if 2 <= len(np.unique(batches[here])) < len(here):
            widths.append(1 - np.abs(silhouette_samples(x[here], batches[here])).mean())
    names, codes = np.unique(batches, return_inverse=True)
    neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(x) - 1)).fit(x)
    near = codes[neighbours.kneighbors(return_distance=False)]
    shares = np.stack([(near == code).mean(axis=1) for code in range(len(names))], axis=1)
    overall = np.bincount(codes) / len(codes)
    return {
        "batch_asw": float(np.mean(widths)) if widths else None,
        "batch_mixing": float(_entropy(shares).mean() / _entropy(overall[None])[0]),
    }


def score_table(scores: Mapping[str, Mapping[str, float | None]]) -> pd.DataFrame:
    """Return scores as a table, a row per representation; undefined scores are NaN."""
    table = pd.DataFrame.from_dict(dict(scores), orient="index").astype(float)
    return table.rename_axis("representation")


def draw(points: Mapping[str, np.ndarray], cells: ScoredCells, *, seed: int) -> bytes:
    """Draw the t-SNE of the model's embedding beside that of the PCA baseline.

    Args:
        points: Representations; sclong and pca are drawn.
        cells: The cells; at most 3,000 are drawn.
        seed: Of the choice of cells and the t-SNE.

    Returns:
        A PNG: a row coloured by label, and one by batch where there are batches.
    """
    sample = _sample(len(cells.labels), _MAX_DRAWN_CELLS, seed)
    maps = {
        name: TSNE(
            init="pca", perplexity=min(30.0, (len(sample) - 1) / 3), random_state=seed
        ).fit_transform(points[name][sample])
        for name in ("sclong", "pca")
    }
    colourings = {"label": cells.labels} | (
        {} if cells.batches is None else {"batch": cells.batches}
    )
    figure = Figure(figsize=(11, 4.5 * len(colourings)), layout="constrained")
    grid = figure.subplots(len(colourings), len(maps), squeeze=False)
    for row, (kind, values) in zip(grid, colourings.items(), strict=True):
        for axes, (name, xy) in zip(row, maps.items(), strict=True):
            _scatter(axes, xy, values[sample])
            axes.set_title(f"{name}, by {kind}")
        handles, names = row[-1].get_legend_handles_labels()
        shown = slice(0, _MAX_LEGEND)
        row[-1].legend(
            handles[shown],
            names[shown],
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            fontsize=8,
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _scatter(axes: Axes, xy: np.ndarray, values: np.ndarray) -> None:
    names = np.unique(values)
    # The palettes with few colours are the easier ones to tell apart.
    palette = next((n for n in (10, 20) if len(names) <= n), None)
    colours = matplotlib.colormaps[f"tab{palette}" if palette else "gist_rainbow"]
    for i, name in enumerate(names):
        here = values == name
        colour = colours(i if palette else i / len(names))
        axes.scatter(xy[here, 0], xy[here, 1], s=8, color=colour, label=str(name), linewidths=0)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")


def _column(obs: pd.DataFrame, name: str, *, option: str) -> np.ndarray:
    """Return an obs column as str, "" where the value is missing."""
    if name not in obs.columns:
        there = ", ".join(map(str, obs.columns)) or "none"
        raise ValueError(f"{option} {name}: the input has no such column; it has {there}")
    values = obs[name].astype(object)
    return values.where(values.notna(), "").astype(str).to_numpy(dtype=str)


def _facts(args: argparse.Namespace, cells: Cells, scored: ScoredCells) -> dict[str, object]:
    """Return what scores.json says besides the scores."""
    labels = _sizes(scored.labels)
    return {
        "model_dir": str(args.model_dir.resolve()),
        "weights_sha256": weights_hash(args.model_dir),
        "input": str(args.input.resolve()),
        "split": args.split,
        "label": args.label,
        "batch": args.batch,
        "seed": args.seed,
        "n_cells": len(scored.rows),
        "left_out": dict(cells.left_out) | dict(scored.left_out),
        "read": dict(cells.facts),
        "warnings": list(cells.warnings),
        "rare_labels": dict(scored.rare_labels),
        "labels": labels,
        "batches": None if scored.batches is None else _sizes(scored.batches),
        "majority_accuracy": max(labels.values()) / len(scored.rows),
    }


def _sentence(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{n} ({reason})" for reason, n in left_out.items() if n) or "none"


def _sizes(values: np.ndarray) -> dict[str, int]:
    names, sizes = np.unique(values, return_counts=True)
    return {str(name): int(size) for name, size in zip(names, sizes, strict=True)}


def _pca(values: csr_matrix, seed: int) -> np.ndarray:
    # ARPACK leaves the matrix sparse; it gives fewer components than the smaller side.
    n_components = min(COMPONENTS, min(values.shape) - 1)
    pca = PCA(n_components, svd_solver="arpack", random_state=seed)
    return pca.fit_transform(values.astype(np.float64)).astype(np.float32)


def _sample(n: int, limit: int, seed: int) -> np.ndarray:
    """Return all positions below n, or a random `limit` of them, ascending."""
    if n <= limit:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Return the entropy of each row of shares (rows sum to 1)."""
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
