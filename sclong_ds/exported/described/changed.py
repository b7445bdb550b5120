"""Write a model that was loaded and perhaps changed: `sclong_ds.save_pretrained`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sclong_ds.exported.manifest import check_files, model_digest
from sclong_ds.exported.model_dir import (
    check_absent,
    load_model,
    write_derived,
)
from sclong_ds.exported.recipe_file import RECIPE, ChosenRecipe, read_judged
from sclong_ds.exported.training_cells import read_training_cells
from sclong_ds.files.atomic import partial_name, read_file, remove_partials_of, sync_tree
from sclong_ds.files.sealed_json import read_object
from sclong_ds.model.sclong import ScLong


def write_changed(model: ScLong, out: Path) -> None:
    """Write a model with its weights as they are now.

    Args:
        model: From `load_model`, changed or not.
        out: Folder to make.

    Raises:
        FileExistsError: It exists.
        FileNotFoundError: The folder that the model came from is gone.
        ValueError: A model that was not loaded, other modules than those that were loaded, or
            weights that are not finite.
    """
    source = model.folder
    if source is None:
        raise ValueError(
            "save_pretrained: the model was made by hand, without genes and transform; train it "
            "with sclong_ds.train and `python -m sclong_ds export`, or change one that was loaded"
        )
    check_absent(out)
    before = load_model(source).state_dict()
    now = {name: weight.detach().cpu().float() for name, weight in model.state_dict().items()}
    check_same_modules(before, now)
    if all(torch.equal(weight, now[name]) for name, weight in before.items()):
        copy_whole(source, out)
        return
    provenance = json.loads(read_file(source / "provenance.json"))
    for name in ("validation", "finetuned"):
        provenance.pop(name, None)
    provenance["weights_changed_after"] = model_digest(source)
    write_derived(
        out,
        model,
        source,
        weights=now,
        provenance=provenance,
        training_cells=read_training_cells(source),
        choose=lambda _: kept_recipe(model, source),
    )


def check_same_modules(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse a model whose modules were wrapped, replaced or made of another size.

    Args:
        before: State dict of the model as it was loaded.
        now: As it is.

    Raises:
        ValueError: A weight is missing, new or of another shape; the first is named.
    """
    for name in (*before, *(name for name in now if name not in before)):
        old, new = (
            f"the shape {tuple(weights[name].shape)}" if name in weights else "no such weight"
            for weights in (before, now)
        )
        if old != new:
            raise ValueError(
                f"save_pretrained: {name}: {new}, when it was loaded {old}. Merge adapters first "
                f"and keep modules of your own beside the model: a folder holds the architecture "
                f"that was loaded"
            )


def copy_whole(source: Path, out: Path) -> None:
    """Copy a model's folder, after a look at its files; the copy appears whole or not at all.

    Args:
        source: MODEL_DIR.
        out: Folder to make.
    """
    check_files(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_partials_of(out)
    partial = partial_name(out)
    try:
        shutil.copytree(source, partial)
        sync_tree(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def kept_recipe(model: ScLong, source: Path) -> ChosenRecipe | None:
    """Return the recipe that a folder carries; None: it has none.

    Args:
        model: From `load_model(source)`.
        source: MODEL_DIR.
    """
    if not (source / RECIPE).exists() or model.control is None:
        return None
    judged = read_judged(source)
    return ChosenRecipe(
        recipe=model.recipe,
        control=model.control,
        facts=read_object(source / RECIPE)["chosen"],
        judged=np.zeros(0, np.uint64) if judged is None else judged.digests,
    )
