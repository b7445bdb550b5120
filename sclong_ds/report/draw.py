"""Draw the pictures of a run's validations: `python -m sclong_ds.report.draw RUN_DIR`.

A training run starts it beside itself (`sclong_ds.tracking.tracker`), so that drawing costs no
training time and no memory of a rank. Takes each `plots/step_N.npz` in turn and writes
`plots/step_N/*.png`, whole or not at all; the newest pictures lie in `plots` too:

    predicted_vs_true   masked values, predicted against true, as a density
    expression_bins     MSE and Pearson per expression bin, the model beside the per-gene mean
    cells               UMAP of held-out cells' embeddings by dataset, label and expressed genes
    genes               similarity of the shown genes' encodings, and the attention among them
    gradient_norms      norm of the gradient by part of the model, and spikes and skipped steps
    ranks               time and memory of each rank

What a validation has no data for has no picture. Then report.html of the run folder is written
(`sclong_ds.report.report`).
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sclong_ds.command_line import local_path
from sclong_ds.files.atomic import write_atomic
from sclong_ds.report import curves as plots
from sclong_ds.report import figures as validation_plots
from sclong_ds.report.figures import bin_error_figure, bin_numbers, prediction_density_figure
from sclong_ds.report.report import write_report
from sclong_ds.run_folder.files import METRICS_FILE, PLOTS_DIR, REPORT_FILE, read_run_json
from sclong_ds.run_folder.metric_names import MSE
from sclong_ds.run_folder.pending_pictures import pending, seal_pictures, show, take_data
from sclong_ds.run_folder.record import read_run
from sclong_ds.run_folder.rows import read_metrics

log = logging.getLogger(__name__)

_UMAP_CELLS = 15
"""Fewest cells for UMAP; below, its neighbours are all cells, and a projection says as much."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what waits, also what comes meanwhile; return 1 if a part was damaged, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.report.draw", description="Draw the pictures that wait in a run."
    )
    parser.add_argument("run_dir", type=local_path, metavar="RUN_DIR", help="run folder")
    run_dir = parser.parse_args(argv).run_dir
    if not run_dir.is_dir():
        parser.error(f"{run_dir}: no such run folder")
    status = 0
    while waiting := pending(run_dir):
        try:
            draw(run_dir, waiting[0])
        except ValueError as error:
            log.error("%s", error)
            status = 1
    write_report([read_run(run_dir)], run_dir / REPORT_FILE)
    return status


def draw(run_dir: Path, file: Path) -> Path:
    """Draw one validation and return the folder of its pictures.

    Args:
        run_dir: Run folder.
        file: A file of `pending`.
    """
    step = int(file.stem.removeprefix("step_"))
    taken, data = take_data(file)
    folder = run_dir / PLOTS_DIR / file.stem
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    rows = read_metrics(run_dir) if (run_dir / METRICS_FILE).is_file() else []
    labels = (read_run_json(run_dir).get("summary") or {}).get("expression_bins")
    for name, figure in validation_figures(data, rows, step=step, bin_labels=labels):
        write_atomic(partial / f"{name}.png", plots.png_bytes(figure))
    seal_pictures(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    show(run_dir, folder)
    taken.unlink()
    return folder


def validation_figures(
    data: Mapping[str, NDArray[Any]],
    rows: Sequence[Mapping[str, float]],
    *,
    step: int,
    bin_labels: Sequence[str] | None,
) -> Iterator[tuple[str, Figure]]:
    """Yield name and figure of every picture that there is data for.

    Args:
        data: Arrays that `sclong_ds.training.pictured` has collected.
        rows: Metric rows of the run.
        step: Step of the validation.
        bin_labels: Name of every expression bin.
    """
    predicted, true = data["predicted_true"]
    if len(true):
        yield "predicted_vs_true", prediction_density_figure(predicted, true)
    scored = [row for row in rows if row["step"] == step and MSE in row]
    if scored and bin_numbers(scored[-1]):
        yield "expression_bins", bin_error_figure(scored[-1], labels=bin_labels)
    if "embedding" in data:
        yield from _cells(data)
    if "gene_encodings" in data:
        yield (
            "genes",
            validation_plots.gene_figure(
                data["gene_encodings"], data.get("gene_attention"), data["gene_symbols"]
            ),
        )
    until = [row for row in rows if row["step"] <= step and "train/grad_norm" in row]
    if until:
        yield "gradient_norms", validation_plots.gradient_figure(until)
    if "rank_times" in data:
        yield "ranks", validation_plots.rank_figure(data["rank_times"])


def _cells(data: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Figure]]:
    kept = data["n_expressed"] > 0  # a cell without counts has no embedding
    if kept.sum() < 3:
        return
    points, method = project(data["embedding"][kept])
    groups = {}
    if "dataset" in data:
        groups["dataset"] = data["dataset"][kept]
    if "label" in data:
        groups[str(data["label_name"])] = data["label"][kept]
    yield (
        "cells",
        validation_plots.cell_figure(
            points, groups, n_expressed=data["n_expressed"][kept], method=method
        ),
    )


def project(embedding: NDArray[np.float32]) -> tuple[NDArray[np.float64], str]:
    """Return points (n, 2) in the plane, and how they were found: UMAP, or PCA of few cells.

    The same embeddings give the same points.

    Args:
        embedding: (n, C), at least 3 cells.
    """
    centred = embedding.astype(np.float64) - embedding.mean(axis=0, dtype=np.float64)
    if len(centred) < _UMAP_CELLS or not np.ptp(centred):
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        return left[:, :2] * sizes[:2], "PCA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorflow is missing, one thread: neither matters here
        from umap import UMAP

        model = UMAP(n_neighbors=min(_UMAP_CELLS, len(centred) - 1), random_state=0)
        return np.asarray(model.fit_transform(centred), dtype=np.float64), "UMAP"


if __name__ == "__main__":
    sys.exit(main())
