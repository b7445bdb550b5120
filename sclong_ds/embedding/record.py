"""What an embedding says about itself in `uns`: the model and the cells that it was made from.

Used by `sclong_ds.embedding.embed`; reads the model's manifest and hashes the input.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.convert.source_identity import source_hash
from sclong_ds.corpus.corpus import Corpus
from sclong_ds.embedding.cells import Cells
from sclong_ds.exported.manifest import model_digest, weights_hash
from sclong_ds.exported.training_cells import TrainingCells
from sclong_ds.model.sclong import ScLong

_NOT_OPTIONS = {"model_dir", "input", "out", "command"}


def record_of(model: ScLong, model_dir: Path) -> dict[str, Any]:
    """Return what names a model; the digest is empty for a folder without a manifest.

    Args:
        model: From `load_model`.
        model_dir: Its folder.
    """
    return {
        "model_dir": str(model_dir.resolve()),
        "model_digest": model_digest(model_dir) or "",
        "weights_sha256": weights_hash(model_dir),
        "genes_hash": model.genes.hash,
        "transform": asdict(model.transform),
        "pooling": model.recipe.text(),
    }


def made_by(record: object, *, model: ScLong, model_dir: Path) -> bool:
    """Return whether a stored record names this model: all that shapes an embedding is the same.

    Args:
        record: What a file holds in the place of `record_of`; anything.
        model: The model.
        model_dir: Its folder.
    """
    if not isinstance(record, Mapping):
        return False
    own = record_of(model, model_dir)
    names = {"weights_sha256", "genes_hash", "pooling"}
    # Weights alone do not tell models apart: transform, graph and random features differ as well.
    # A folder of version 2 has no digest.
    if own["model_digest"] and record.get("model_digest"):
        names.add("model_digest")
    return all(str(record.get(name)) == own[name] for name in names)


def input_record(cells: Cells) -> dict[str, Any]:
    """Return how an input was read, which cells were left out and what looks wrong.

    Args:
        cells: From `open_cells`.
    """
    return {
        "read": dict(cells.facts),
        "cells_left_out": dict(cells.left_out),
        "warnings": np.array(cells.warnings, dtype=str),
    }


def training_record(known: TrainingCells | None) -> dict[str, Any]:
    """Return what is known of the cells that the model was trained on.

    Args:
        known: Of the model; None: nothing.
    """
    if known is None:
        return {"training_cells": {"known": False}}
    datasets = np.array(known.datasets, dtype=str)
    return {"training_cells": {"known": True, "complete": known.complete, "datasets": datasets}}


def origin_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the path, hash and options of an input.

    The hash is that of the corpus, or the one that `data_prep convert` records of a source.

    Args:
        args: Arguments of `python -m sclong_ds embed`.
    """
    path: Path = args.input
    is_corpus = (path / "corpus.json").is_file()
    input_hash = Corpus(path).hash if is_corpus else source_hash(path, gene_list=args.gene_list)
    return {
        "input": str(path.resolve()),
        "input_hash": input_hash,
        "options": {k: str(v) for k, v in vars(args).items() if k not in _NOT_OPTIONS},
    }
