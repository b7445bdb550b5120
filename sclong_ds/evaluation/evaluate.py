"""Zero-shot scores of a model's cell embeddings, beside those of rows that any model must beat.

    python -m sclong_ds evaluate MODEL_DIR INPUT --label KEY [--batch KEY] [--group KEY]
        [--train-batch NAME ... --test-batch NAME ...] --out DIR

Reads what `python -m sclong_ds embed` reads; INPUT may also be a file that `embed` wrote, whose
embeddings are taken over if they are those of MODEL_DIR. Writes DIR/scores.json, DIR/scores.tsv
and DIR/tsne.png. Nothing is fine-tuned: labels only score. Every representation gets the same
cells, folds, resamples and distances (Euclidean): the model (`sclong`) and the rows of
`sclong_ds.evaluation.ladder`; `sclong_ds.evaluation.scores` describes scores and intervals, and
`sclong_ds.evaluation.scib` those of scib-metrics, added where it is installed.
The first line of the output is the verdict, the strongest row comes first in the table.

`majority_accuracy` is what always naming the most common label would reach. Of cells with the same
counts only the first is scored. With --group, labels that only one group has are left out: no other
group can teach them.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from anndata.io import read_elem
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from data_prep.readers.open import h5ad_beside_counts
from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.embed import KEY
from sclong_ds.embedding.opening import cells_of, model_of
from sclong_ds.embedding.record import made_by
from sclong_ds.embedding.stored import UNS_KEY
from sclong_ds.evaluation.ladder import NO_CONTEXT
from sclong_ds.evaluation.representations import embed_scored, representations
from sclong_ds.evaluation.scib import add_scib_scores
from sclong_ds.evaluation.scored_cells import ScoredCells, choose_cells, layout_of, sizes_of
from sclong_ds.evaluation.scores import (
    Scores,
    fewer_neighbours,
    neighbours_of,
    sample_cells,
    score,
)
from sclong_ds.evaluation.verdict import (
    interval_table,
    intervals_of,
    score_table,
    shown_table,
    verdict,
)
from sclong_ds.exported.manifest import weights_hash
from sclong_ds.exported.recipe_file import JudgedCells, read_judged
from sclong_ds.exported.training_cells import (
    TrainingCells,
    are_among,
    read_training_cells,
    share_in_training,
)
from sclong_ds.files.atomic import make_folder, write_atomic
from sclong_ds.model.sclong import ScLong
from sclong_ds.page.words import counted

_MAX_DRAWN_CELLS = 3000
_MAX_LEGEND = 30

_log = logging.getLogger(__name__)


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
    check_options(args)
    model = model_of(args)
    stored = stored_embedding(args.input, model=model, model_dir=args.model_dir)
    cells = cells_of(args, model)
    scored = choose_cells(cells, label=args.label, batch=args.batch, group=args.group)
    layout = layout_of(scored, args)
    make_folder(args.out)
    if stored is None:
        embedded = embed_scored(model, scored, batch_size=args.batch_size, what="embed")
    else:
        embedded = stored[cells.rows[scored.rows]]
    points = representations(
        model, scored, embedded=embedded, batch_size=args.batch_size, seed=args.seed
    )
    scores = {name: score(x, layout) for name, x in points.items()}
    missing = add_scib_scores(scores, points, layout)
    table, intervals = score_table(scores), interval_table(scores)
    judged = ["knn_accuracy"] + ["transfer_accuracy"] * (layout.train is not None)
    lines = [f"sclong, {verdict(scores, name=name, no_context=NO_CONTEXT)}" for name in judged]
    known = read_training_cells(args.model_dir)
    n_known = 0 if known is None else int(known.hold(scored.counts).sum())
    recipe_facts, warning = _recipe_leak(read_judged(args.model_dir), scored)
    leaks = [share_in_training(known, n_known, len(scored.rows)), *warning]
    write_atomic(args.out / "tsne.png", draw(points, scored, seed=args.seed))
    written = table.join(intervals)
    write_atomic(args.out / "scores.tsv", written.to_csv(sep="\t").encode())
    report: dict[str, object] = {"verdict": lines, "training_cells": _leak_facts(known, n_known)}
    report |= {"recipe_cells": recipe_facts, "neighbours": neighbours_of(layout)}
    report |= _facts(args, cells, scored) | _score_facts(scores, table)
    write_atomic(args.out / "scores.json", (json.dumps(report, indent=1) + "\n").encode())
    print(
        "\n".join(
            [*lines, *fewer_neighbours(layout), *leaks, *([] if missing is None else [missing])]
        )
    )
    print(
        f"{counted(len(scored.rows), 'cell')}, "
        f"{counted(len(sizes_of(scored.labels)), 'label')} of {args.label}"
    )
    print(shown_table(scores, table).to_string(na_rep="-"))
    print(f"written to {args.out}")
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: Which, and what to change.
    """
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or more")
    if bool(args.train_batch) != bool(args.test_batch):
        raise ValueError("--train-batch and --test-batch go together; give both or none")
    if args.train_batch and not args.batch:
        raise ValueError("--train-batch names values of a column; name it with --batch")
    both = set(args.train_batch or ()) & set(args.test_batch or ())
    if both:
        raise ValueError(f"{min(both)}: in --train-batch and in --test-batch; leave it out of one")


def stored_embedding(path: Path, *, model: ScLong, model_dir: Path) -> np.ndarray | None:
    """Return the embeddings that a file holds if this model made them, else None.

    Args:
        path: The input of `evaluate`.
        model: The model.
        model_dir: Its folder.

    Returns:
        (n, W) float32 for all cells of the file, or None.

    Raises:
        ValueError: The embeddings are there, but not the counts that the baselines need.
        OSError: The disk or server failed.
    """
    with h5ad_beside_counts(path) as file:
        if file is None or f"obsm/{KEY}" not in file or f"uns/{UNS_KEY}" not in file:
            return None
        if not made_by(read_elem(file[f"uns/{UNS_KEY}"]), model=model, model_dir=model_dir):
            _log.info("%s holds embeddings of another model; embedding again", path)
            return None
        if "X" not in file:
            raise ValueError(
                "it holds no counts, which the baselines need: "
                "embed without --no-counts, or name the source file"
            )
        return np.asarray(file[f"obsm/{KEY}"][:], dtype=np.float32)


def _score_facts(scores: Mapping[str, Scores], table: pd.DataFrame) -> dict[str, object]:
    """Return what scores.json records of the scores, the strongest row first."""
    order = [str(name) for name in table.index]
    return {
        "scores": {name: scores[name].values for name in order},
        "intervals": {name: intervals_of(scores[name]) for name in order},
    }


def draw(points: Mapping[str, np.ndarray], cells: ScoredCells, *, seed: int) -> bytes:
    """Draw the t-SNE of the model's embedding beside that of the PCA baseline.

    Args:
        points: Representations; sclong and pca are drawn.
        cells: The cells; at most 3,000 are drawn.
        seed: Of the choice of cells and the t-SNE.

    Returns:
        A PNG: a row coloured by label, and one by batch where there are batches.
    """
    sample = sample_cells(len(cells.labels), _MAX_DRAWN_CELLS, seed)
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


def _leak_facts(known: TrainingCells | None, n_known: int) -> dict[str, object]:
    """Return what scores.json records of cells that the model was trained on."""
    if known is None:
        return {"known": False}
    facts = {"known": True, "n_cells_in_training": n_known}
    return facts | {"complete": known.complete, "datasets": list(known.datasets)}


def _recipe_leak(
    judged: JudgedCells | None, scored: ScoredCells
) -> tuple[dict[str, object], list[str]]:
    """Return what scores.json records of cells that the recipe was chosen by, and a sentence."""
    if judged is None:
        return {"known": False}, []
    found = int(are_among(judged.digests, scored.counts).sum())
    sentence = (
        f"the embedding's recipe was chosen by the {judged.criterion} of {found} of these "
        f"{len(scored.rows)} cells; score cells that had no part in it"
    )
    facts = {"known": True, "n_cells_judged": found, "criterion": judged.criterion}
    return facts, [sentence] if found else []


def _facts(args: argparse.Namespace, cells: Cells, scored: ScoredCells) -> dict[str, object]:
    """Return what scores.json records besides the scores."""
    labels = sizes_of(scored.labels)
    return {
        "model_dir": str(args.model_dir.resolve()),
        "weights_sha256": weights_hash(args.model_dir),
        "input": str(args.input.resolve()),
        "split": args.split,
        "label": args.label,
        "batch": args.batch,
        "group": args.group,
        "train_batch": args.train_batch,
        "test_batch": args.test_batch,
        "seed": args.seed,
        "n_cells": len(scored.rows),
        "left_out": dict(cells.left_out) | dict(scored.left_out),
        "read": dict(cells.facts),
        "warnings": list(cells.warnings),
        "rare_labels": dict(scored.rare_labels),
        "labels": labels,
        "batches": None if scored.batches is None else sizes_of(scored.batches),
        "groups": None if scored.groups is None else sizes_of(scored.groups),
        "majority_accuracy": max(labels.values()) / len(scored.rows),
    }
