"""Write a model that was loaded and perhaps changed: `sclong_ds.save_pretrained`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from sclong_ds.exported.manifest import check_files, model_digest
from sclong_ds.exported.model_dir import (
    FEATURES,
    GRAPH,
    check_absent,
    load_model,
    write_model_dir,
)
from sclong_ds.exported.recipe_file import RECIPE, ChosenRecipe, read_judged
from sclong_ds.exported.training_cells import read_training_cells
from sclong_ds.files.atomic import read_file
from sclong_ds.files.sealed_json import read_object
from sclong_ds.model.features_file import read_features
from sclong_ds.model.sclong import ScLong


def write_changed(model: ScLong, out: Path) -> None:
    """Write a model with its weights as they are now.

    Args:
        model: From `load_model`, changed or not.
        out: Folder to make.

    Raises:
        FileExistsError: It exists.
        FileNotFoundError: The folder that the model came from is gone.
        ValueError: A model that was not loaded, or weights that are not finite.
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
    if all(torch.equal(weight, now[name]) for name, weight in before.items()):
        check_files(source)
        shutil.copytree(source, out)
        return
    provenance = json.loads(read_file(source / "provenance.json"))
    for name in ("validation", "finetuned"):
        provenance.pop(name, None)
    provenance["weights_changed_after"] = model_digest(source)
    write_model_dir(
        out,
        weights=now,
        model=model.config,
        transform=model.transform,
        genes=source / "genes.tsv",
        graph=source / GRAPH if (source / GRAPH).is_file() else None,
        features=read_features(source / FEATURES) if (source / FEATURES).is_file() else None,
        provenance=provenance,
        training_cells=read_training_cells(source),
        choose=lambda _: kept_recipe(model, source),
    )


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
