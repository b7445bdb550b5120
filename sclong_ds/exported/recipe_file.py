"""The recipe of a model's embeddings as files of its folder.

    MODEL_DIR/embedding.json   parts and scaling, how they were chosen: criterion, cells, candidates
    MODEL_DIR/embedding.npz    centres (parts, C) and maps (parts, C, C), float32, of the parts;
                               control_centres, control_maps of the same without context;
                               directions (blocks, G, C), float16, if parts read them (version 2):
                               the first n_directions of embedding.json, behind them zeros;
                               judged (n,) uint64, digests of the cells that it was judged on

Folders without them (earlier versions, imported models, an export far from its corpus) embed by the
mean over the expressed genes. `sclong_ds.exported.choose_recipe` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sclong_ds.exported.manifest import CURE
from sclong_ds.files.npz import read_npz
from sclong_ds.files.sealed_json import read_object
from sclong_ds.files.versions import refuse_later
from sclong_ds.model.pooling import MEAN, PRINCIPAL, Recipe, stored_parts

RECIPE, STATISTICS = "embedding.json", "embedding.npz"
_FORMAT, _VERSION, _NEWEST = "sclong_ds-embedding-recipe", 1, 2


@dataclass(frozen=True, slots=True)
class ChosenRecipe:
    """A recipe, what it is to be compared with, and why it was chosen."""

    recipe: Recipe
    control: Recipe
    """The same weights and scaling of the gene vectors alone: an embedding without context."""
    facts: Mapping[str, Any]
    """How it was chosen; plain JSON."""
    judged: NDArray[np.uint64]
    """(n,) digests of the cells that candidates were judged on, ascending."""


@dataclass(frozen=True, slots=True)
class JudgedCells:
    """The cells that the candidates for a recipe were judged on."""

    digests: NDArray[np.uint64]
    """(n,) ascending."""
    criterion: str
    """What they were judged by."""


def write_recipe(folder: Path, chosen: ChosenRecipe) -> None:
    """Write the recipe's files into a model folder that has no manifest yet.

    Args:
        folder: The folder.
        chosen: The recipe; those of both recipes with statistics are kept.
    """
    content = {"format": _FORMAT, "version": _VERSION, "scaling": chosen.recipe.scaling}
    arrays: dict[str, Any] = {"judged": chosen.judged.astype("<u8")}
    if chosen.recipe.directions is not None:
        # Earlier programs would take the parts that read them for damage.
        content |= {"version": _NEWEST, "n_directions": chosen.recipe.n_directions}
        arrays["directions"] = chosen.recipe.directions.numpy().astype("<f2")
    for prefix, recipe in (("", chosen.recipe), ("control_", chosen.control)):
        content[f"{prefix}parts"] = [list(part) for part in recipe.parts]
        if recipe.centres is not None and recipe.maps is not None:
            arrays[f"{prefix}centres"] = recipe.centres.numpy().astype("<f4")
            arrays[f"{prefix}maps"] = recipe.maps.numpy().astype("<f4")
    content |= {"text": chosen.recipe.text(), "chosen": dict(chosen.facts)}
    (folder / RECIPE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    np.savez(folder / STATISTICS, **arrays)


def read_recipe(folder: Path, *, base_dim: int, n_genes: int) -> Recipe:
    """Return the recipe of a model folder; the mean over the expressed genes if it has none.

    Args:
        folder: MODEL_DIR.
        base_dim: The model's base width C.
        n_genes: The model's genes G.

    Raises:
        FileNotFoundError: One of its two files is missing.
        LaterVersionError: A later version wrote it.
        ValueError: A damaged file.
    """
    return _read(folder, base_dim, n_genes, "") or MEAN


def read_control(folder: Path, *, base_dim: int, n_genes: int) -> Recipe | None:
    """Return the recipe without context; arguments and errors as `read_recipe`."""
    return _read(folder, base_dim, n_genes, "control_")


def read_judged(folder: Path) -> JudgedCells | None:
    """Return the cells that a folder's recipe was judged on; None: it has none or does not tell.

    Args:
        folder: MODEL_DIR, whose recipe `read_recipe` reads.

    Raises:
        ValueError: A damaged file.
    """
    if not (folder / RECIPE).exists():
        return None
    digests = read_npz(folder / STATISTICS, cure=CURE).get("judged")
    if digests is None:
        return None
    chosen = read_object(folder / RECIPE).get("chosen")
    if digests.ndim != 1 or not isinstance(chosen, dict):
        raise ValueError(f"{folder / STATISTICS}: damaged (no digests of judged cells); {CURE}")
    return JudgedCells(digests, str(chosen.get("criterion")))


def _read(folder: Path, base_dim: int, n_genes: int, prefix: str) -> Recipe | None:
    path = folder / RECIPE
    if not path.exists():
        return None
    content = read_object(path)
    if content.get("format") == _FORMAT:
        refuse_later(content.get("version"), newest=_NEWEST, what=_FORMAT, where=path)
    version = content.get("version")
    if content.get("format") != _FORMAT or version not in (_VERSION, _NEWEST):
        raise ValueError(f"{path}: damaged (no {_FORMAT} of version 1 or {_NEWEST}); {CURE}")
    try:
        parts, scaling = stored_parts(content[f"{prefix}parts"]), str(content["scaling"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); {CURE}") from None
    if not parts:
        raise ValueError(f"{path}: damaged (no parts); {CURE}")
    if scaling == "none":
        return Recipe(parts)
    arrays = read_npz(folder / STATISTICS, cure=CURE)
    sizes = {"centres": (len(parts), base_dim), "maps": (len(parts), base_dim, base_dim)}
    found = {}
    for name, shape in sizes.items():
        array = arrays.get(f"{prefix}{name}")
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise ValueError(
                f"{folder / STATISTICS}: damaged ({prefix}{name} must be finite and {shape}); "
                f"{CURE}"
            )
        found[name] = torch.from_numpy(array.astype(np.float32))
    own = Recipe(parts, scaling, found["centres"], found["maps"])
    if all(part.layer != PRINCIPAL for part in parts):
        return own
    array, shape = arrays.get("directions"), (len(parts), n_genes, base_dim)
    if array is None or array.shape != shape or not np.isfinite(array).all():
        where = folder / STATISTICS
        raise ValueError(f"{where}: damaged (directions must be finite and {shape}); {CURE}")
    n = content.get("n_directions", len(parts) * base_dim)
    if not isinstance(n, int) or -(-n // base_dim) != len(parts):
        raise ValueError(f"{path}: damaged (n_directions {n} of {len(parts)} parts); {CURE}")
    directions = torch.from_numpy(array.astype(np.float32))
    return replace(own, directions=directions, n_directions=n)
