"""Write scores, predictions and the model of a fine-tuning; rank 0 does.

Shapes: N cells, K classes.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sclong_ds.embedding.cells import Cells
from sclong_ds.evaluation.scored_cells import sizes_of
from sclong_ds.exported.training_cells import TrainingCells
from sclong_ds.files.atomic import write_atomic
from sclong_ds.finetune.fit import Fitted
from sclong_ds.finetune.scored.compare import Outcome
from sclong_ds.finetune.scored.table import numbers_of, shown_rows, verdict
from sclong_ds.finetune.setting import Setting
from sclong_ds.finetune.trainee import Trainee
from sclong_ds.finetune.written.model import write_model
from sclong_ds.finetune.written.page import REPORT, page
from sclong_ds.finetune.written.predictions import write_predictions
from sclong_ds.page.words import counted


def write_results(
    setting: Setting,
    outcome: Outcome,
    last: Fitted,
    trainee: Trainee,
    cells: Cells,
    *,
    args: argparse.Namespace,
    leak: str,
    known: TrainingCells | None,
    embedded: NDArray[np.float32],
) -> list[str]:
    """Write everything; returns the lines to print.

    Args:
        setting: Of the fits.
        outcome: The comparison.
        last: The fit of all groups.
        trainee: Its weights.
        cells: The input.
        args: Arguments of the command.
        leak: The sentence on cells that were in training.
        known: Training cells of the model; None: not known.
        embedded: (N, W) embedding by the model before fine-tuning.
    """
    examples = setting.examples
    line = verdict(outcome.rows)
    shown = shown_rows(outcome.rows)
    table = numbers_of(outcome.rows)
    write_atomic(setting.out / "scores.tsv", table.to_csv(sep="\t").encode())
    facts: dict[str, Any] = {
        "verdict": line, "training_cells": leak, "mode": setting.options.mode,
        "label": args.label, "group": args.group, "classes": list(examples.classes),
        "n_cells": int(examples.used.sum()), "left_out": dict(examples.left_out),
        "groups": sizes_of(examples.groups[examples.used]),
        "folds": examples.n_folds, **outcome.facts,
        "scores": json.loads(table.to_json(orient="index")),
    }  # fmt: skip
    write_atomic(setting.out / "scores.json", (json.dumps(facts, indent=1) + "\n").encode())
    n_groups = len(facts["groups"])
    head = write_model(
        setting, outcome, last, trainee, facts=facts, known=known, name=args.input.name
    )
    write_predictions(
        setting, outcome, last, head, cells, embedded=embedded, with_counts=not args.no_counts,
        batch_size=args.batch_size,
    )  # fmt: skip
    write_atomic(setting.out / REPORT, page(setting, outcome, facts, shown).encode())
    return [
        line,
        f"{counted(facts['n_cells'], 'cell')} of {n_groups} groups of {args.group}, "
        f"{examples.n_folds} folds, "
        f"{counted(args.seeds, 'seed')}",
        shown.to_string(),
        f"written to {setting.out}: report.html, predictions.h5ad, model",
    ]
