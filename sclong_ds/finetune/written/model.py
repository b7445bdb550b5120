"""Write the model of a fine-tuning: a folder that `embed`, `evaluate` and `finetune` take.

LoRA is merged into the weights. Where weights have changed, the embedding's recipe gets centres and
scales of the fine-tuning's own cells.

Shapes: N cells, F features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sclong_ds.embedding.embed import pooled_counts
from sclong_ds.exported.described.changed import kept_recipe
from sclong_ds.exported.head import FittedHead
from sclong_ds.exported.manifest import model_digest
from sclong_ds.exported.model_dir import load_model, write_derived
from sclong_ds.exported.recipe_file import ChosenRecipe
from sclong_ds.exported.training_cells import TrainingCells, short_digests
from sclong_ds.files.atomic import read_file
from sclong_ds.finetune.fit import Fitted
from sclong_ds.finetune.scored.calibration import fit_reference
from sclong_ds.finetune.scored.compare import Outcome
from sclong_ds.finetune.setting import Setting
from sclong_ds.finetune.trainee import Trainee, merged_weights
from sclong_ds.model.pooling import Recipe, scaling_maps
from sclong_ds.model.sclong import ScLong

MODEL = "model"
_RECIPE_CELLS = 256


def write_model(
    setting: Setting,
    outcome: Outcome,
    last: Fitted,
    trainee: Trainee,
    *,
    facts: Mapping[str, Any],
    known: TrainingCells | None,
    name: str,
) -> FittedHead:
    """Write DIR/model; returns its head. One that an earlier start wrote is replaced.

    Args:
        setting: Of the fits.
        outcome: The comparison.
        last: The fit of all groups.
        trainee: Its weights.
        facts: Content of scores.json.
        known: Training cells of the model before fine-tuning; None: not known.
        name: Of the input, for the record.
    """
    source, out = setting.model_dir, setting.out / MODEL
    shutil.rmtree(out, ignore_errors=True)
    base = load_model(source)
    weights = base.state_dict() if trainee.model is None else merged_weights(trainee.model)
    head = fitted_head(setting, outcome, last, trainee, facts)
    cells = training_cells(setting, known, name)
    provenance = json.loads(read_file(source / "provenance.json"))
    provenance |= {"training_cells": cells.facts(), "finetuned": _record(setting, facts)}
    changed = trainee.model is not None
    if changed:
        provenance.pop("validation", None)
    write_derived(
        out,
        base,
        source,
        weights=weights,
        provenance=provenance,
        training_cells=cells,
        choose=lambda model: _recipe(setting, source, base, model if changed else None),
        head=head,
    )
    return head


def fitted_head(
    setting: Setting,
    outcome: Outcome,
    last: Fitted,
    trainee: Trainee,
    facts: Mapping[str, Any],
) -> FittedHead:
    """Return the head of the last fit with how it judges and where its training cells lie."""
    examples = setting.examples
    offset, spread = setting.scale(np.flatnonzero(examples.used))
    codes = np.zeros(len(last.reference), np.int64)
    if examples.classes:
        codes = examples.target[last.reference_rows].astype(np.int64)
    return FittedHead(
        head=trainee.head.eval().float().cpu(),
        label=str(facts["label"]),
        classes=examples.classes,
        offset=offset,
        spread=spread,
        judgement=outcome.judgement,
        reference=fit_reference(last.reference, codes, examples.width),
        facts=_record(setting, facts),
    )


def training_cells(setting: Setting, known: TrainingCells | None, name: str) -> TrainingCells:
    """Return the cells that the model has seen now."""
    used = np.flatnonzero(setting.examples.used)
    digests = np.unique(short_digests(setting.examples.counts[used]))
    if known is None:
        return TrainingCells(digests=digests, datasets=(name,), complete=False)
    return replace(
        known,
        digests=np.union1d(known.digests, digests),
        datasets=tuple(sorted({*known.datasets, name})),
    )


def _record(setting: Setting, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model tells of its fine-tuning."""
    names = ("label", "group", "mode", "n_cells", "folds", "classes", "verdict")
    return {name: facts[name] for name in names} | {
        "options": {k: v for k, v in asdict(setting.options).items() if k != "stacks"},
        "from_model": model_digest(setting.model_dir),
    }


def _recipe(
    setting: Setting, source: Path, base: ScLong, changed: ScLong | None
) -> ChosenRecipe | None:
    """Return the recipe of the model before; of changed weights, with statistics of their own."""
    found = kept_recipe(base, source)
    if changed is None or found is None:
        return found
    return replace(
        found,
        recipe=_fitted(setting, changed, found.recipe),
        control=_fitted(setting, changed, found.control),
    )


def _fitted(setting: Setting, model: ScLong, recipe: Recipe) -> Recipe:
    """Return a recipe with centres and maps of some training cells by a model."""
    if recipe.scaling == "none":
        return recipe
    used: NDArray[np.int64] = np.flatnonzero(setting.examples.used)
    rows = np.random.default_rng(0).permutation(used)[:_RECIPE_CELLS]
    measured = setting.examples.measured
    pooled = pooled_counts(
        model, setting.examples.counts[rows], recipe.parts, batch_size=setting.batch,
        measured=None if measured is None else measured.of(rows), directions=recipe.directions,
    )  # fmt: skip
    parts = torch.from_numpy(pooled).chunk(len(recipe.parts), dim=1)
    centres, maps = scaling_maps(parts, recipe.scaling)
    return replace(recipe, centres=centres, maps=maps)
