"""A small exported model with random weights, for what is done with a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import PerformerConfig
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import Transform
from sclong_ds.exported.head import FittedHead
from sclong_ds.exported.model_dir import write_model_dir
from sclong_ds.exported.recipe_file import ChosenRecipe
from sclong_ds.exported.training_cells import TrainingCells
from sclong_ds.model.sclong import ScLong


def named_genes(count: int) -> GeneVocabulary:
    """Return the first genes of the bundled table that have a symbol of their own."""
    bundled = GeneVocabulary.bundled()
    named = [i for i, gene in enumerate(bundled.ids) if bundled.symbols[i] != gene][:count]
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    return GeneVocabulary(*(tuple(column[i] for i in named) for column in columns))


def write_model(
    folder: Path,
    genes: GeneVocabulary,
    *,
    seed: int,
    unmeasured: Literal["zero", "mask"] = "zero",
    training_cells: TrainingCells | None = None,
    chosen: ChosenRecipe | None = None,
    head: FittedHead | None = None,
) -> Path:
    """Export a small model with random weights."""
    genes.write(folder / "genes.tsv")
    stack = PerformerConfig(depth=1, heads=2, dim_head=4, nb_features=8, ff_mult=2, attention=None)
    config = dataclasses.replace(
        load_config("sclong_tiny").model,
        base_dim=8,
        large_dim=16,
        top_seq_len=16,
        gene_encoder="embedding",
        large_encoder=stack,
        mini_encoder=stack,
        decoder=stack,
    )
    torch.manual_seed(seed)
    model = ScLong(config, n_genes=len(genes), graph=None, output_mean=np.zeros(len(genes)))
    write_model_dir(
        folder / "exported",
        weights=model.state_dict(),
        model=config,
        transform=Transform(name="log1p_total", target_sum=1.0e4, unmeasured=unmeasured),
        genes=folder / "genes.tsv",
        graph=None,
        features=None,
        choose=None if chosen is None else lambda _: chosen,
        provenance={"step": 0}
        | ({} if training_cells is None else {"training_cells": training_cells.facts()}),
        training_cells=training_cells,
        head=head,
    )
    return folder / "exported"
