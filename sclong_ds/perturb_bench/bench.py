"""Predict what unseen perturbations do, with a model and with simple predictors.

    python -m sclong_ds perturb-bench MODEL_DIR INPUT --perturbation KEY --control NAME
        --out scores.tsv

INPUT holds control and perturbed cells; obs column KEY names the perturbed genes of each cell
(several with `+` between them). Perturbations are divided into folds; the effect of those of a
fold, the mean of their cells less that of the controls, is predicted from the others; truth and
predictors have a half of the controls each. Writes
scores.tsv (means and bounds of 95% over perturbations, the strongest simple predictor first) and
scores.perturbations.tsv (each perturbation). The definitions: `sclong_ds.perturb_bench.metrics`
and `sclong_ds.perturb_bench.predictors`.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

from sclong_ds.embedding.opening import cells_of, known_from_training, model_of
from sclong_ds.files.atomic import make_folder, write_atomic
from sclong_ds.model.sclong import ScLong
from sclong_ds.page.words import counted
from sclong_ds.perturb_bench.metrics import METRICS, effect_scores, summary, worded
from sclong_ds.perturb_bench.predictors import SIMPLE, Encodings, encode_targets, predictors
from sclong_ds.perturb_bench.screen import Screen, folds_of, read_screen
from sclong_ds.progress import count_progress


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds perturb-bench`.

    Args:
        args: Parsed arguments of `add_arguments`.

    Returns:
        0.

    Raises:
        FileNotFoundError: No such model or input.
        ValueError: A wrong option, no such column or value, or too few perturbations.
    """
    if args.out.suffix != ".tsv":
        raise ValueError(f"--out {args.out}: the name must end in .tsv")
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists; choose another name, or remove it")
    model = model_of(args)
    cells = cells_of(args, model)
    screen = read_screen(
        cells, model.genes, key=args.perturbation, control=args.control, seed=args.seed,
        separator=args.separator, min_cells=args.min_cells, target_sum=model.transform.target_sum,
    )  # fmt: skip
    make_folder(args.out.parent)
    measured = None if cells.measured is None else cells.measured.of(screen.control_rows)
    encodings = encode_targets(
        model, screen, measured=measured, n_cells=args.encoded_cells, mode=args.mode,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    scores = bench_scores(screen, encodings, folds=args.folds, seed=args.seed)
    table = summary(scores, simple=SIMPLE, seed=args.seed)
    _write(args, table, scores)
    print(known_from_training(args.model_dir, cells))
    print(_headline(screen, model))
    print(_shown(table).to_string())
    print(worded(table, simple=SIMPLE))
    return 0


def bench_scores(
    screen: Screen, encodings: Encodings, *, folds: int, seed: int
) -> dict[str, pd.DataFrame]:
    """Return the scores of each predictor, every perturbation predicted from those of other folds.

    Args:
        screen: The screen.
        encodings: From `encode_targets`.
        folds: How many.
        seed: Of the folds and of what predictors draw.
    """
    fold = folds_of(len(screen.names), folds=folds, seed=seed)
    made = predictors(screen, encodings, seed=seed)
    predicted = {name: np.zeros_like(screen.deltas) for name in made}
    with count_progress("predict", len(made) * (int(fold.max()) + 1), "fits") as on_fits:
        for number in range(int(fold.max()) + 1):
            train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            for name, predict in made.items():
                predicted[name][test] = predict(train, test)
                on_fits(1)
    return {name: effect_scores(screen, found) for name, found in predicted.items()}


def _write(args: argparse.Namespace, table: pd.DataFrame, scores: dict[str, pd.DataFrame]) -> None:
    each = pd.concat(scores, names=["predictor", "perturbation"])
    path = args.out.with_suffix(".perturbations.tsv")
    write_atomic(path, each.to_csv(sep="\t", float_format="%.6g").encode())
    write_atomic(args.out, table.to_csv(sep="\t", float_format="%.6g").encode())


def _headline(screen: Screen, model: ScLong) -> str:
    several = sum(len(genes) > 1 for genes in screen.targets)
    return (
        f"{counted(len(screen.names), 'perturbation')} ({several} of several genes), "
        f"{counted(screen.controls.shape[0], 'control cell')} to learn from, the others "
        "for the truth, "
        f"{model.n_genes} genes; median {np.median(screen.n_changed):.0f} genes changed"
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    shown = {name: [_bounds(row, name) for _, row in table.iterrows()] for name in METRICS}
    return pd.DataFrame(shown, index=table.index)


def _bounds(row: pd.Series, name: str) -> str:
    """Return a score with its bounds, or that no perturbation has it."""
    if np.isnan(row[name]):
        return "none"
    return f"{row[name]:z.3f} [{row[f'{name}_low']:z.3f}, {row[f'{name}_high']:z.3f}]"
