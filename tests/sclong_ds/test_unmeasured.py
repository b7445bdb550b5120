"""Real runs on datasets of which one names half of the genes: unknown genes stay out of training.

It covers what `sclong_ds/objective/measured.py` is for; its parts are tested where they are.
"""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from conftest import RESOURCES
from launching import run_module, train
from safetensors.numpy import load_file

from sclong_ds.corpus.corpus import Corpus
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.run_folder.rows import read_metrics

pytestmark = pytest.mark.distributed
GENES, STEPS = 300, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 cells with all genes and 60 with every other gene; 40 of all genes to validate."""
    folder = tmp_path_factory.mktemp("panel")
    cells = anndata.read_h5ad(RESOURCES / "demo" / "immune_a.h5ad")
    bundled = GeneVocabulary.bundled()
    known = [n for n in dict.fromkeys(cells.var_names) if n in set(bundled.symbols)]
    totals = np.asarray(cells[:, known].X.sum(axis=0)).ravel()
    chosen = {known[i] for i in np.argsort(-totals)[:GENES]}
    keep = [i for i, symbol in enumerate(bundled.symbols) if symbol in chosen]
    columns = (bundled.ids, bundled.symbols, bundled.classes)
    genes = GeneVocabulary(*(tuple(column[i] for i in keep) for column in columns))
    genes.write(folder / "genes.tsv")
    parts = {"full": (0, 60, 1), "panel": (60, 120, 2), "held_out": (120, 160, 2)}
    rows = ["dataset_id\tpath"]
    for name, (start, stop, every) in parts.items():
        part = cells[start:stop, list(genes.symbols[::every])]
        part.write_h5ad(folder / f"{name}.h5ad")
        rows.append(f"{name}\t{folder / name}.h5ad")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    run_module("data_prep", "convert", folder / "manifest.tsv", "--out", folder / "corpus",
               "--genes", folder / "genes.tsv", "--min-genes-mapped", 100)  # fmt: skip
    run_module("data_prep", "finalize", folder / "corpus", "--validation-datasets", "held_out")
    return folder / "corpus"


def run(corpus: Path, folder: Path, **changes: object) -> list[dict[str, float]]:
    """Train, and return the rows of metrics."""
    settings = {
        "run.dir": folder, "data.corpus": corpus, "model.gene_encoder": "embedding",
        "model.gene_graph": "null", "model.top_seq_len": 64, "run.max_steps": STEPS,
        "run.validate_every_n_steps": 2, "run.validation_cells": 40,
        "checkpoint.every_n_steps": 2, "optim.decay_steps": 1000, "tracking.enabled": "false",
        "engine.train_batch_size": 4,
        "tracking.picture_cells": "null", "objective.zero_mask_prob": 0.1,
    } | changes  # fmt: skip
    args = [f"{key}={value}" for key, value in settings.items()]
    train(
        ["-m", "sclong_ds.pretrain", "--config", "sclong_tiny", *args],
        n_ranks=1,
        log=folder.with_suffix(".log"),
    )
    return read_metrics(folder)


def figures(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def test_unknown_genes_are_neither_read_nor_targets(corpus: Path, tmp_path: Path) -> None:
    names = {d.dataset_id: row for row, d in enumerate(Corpus(corpus).datasets)}
    measured = Corpus(corpus).measured_genes
    assert measured is not None
    assert measured.sum(axis=1)[[names[n] for n in ("full", "panel", "held_out")]].tolist() == [
        GENES, GENES // 2, GENES // 2,
    ]  # fmt: skip
    changes = {"data.unmeasured": "mask"}
    straight = run(corpus, tmp_path / "straight", **changes)
    zero = run(corpus, tmp_path / "zero", **changes | {"data.unmeasured": "zero"})
    losses = figures(straight, "train/loss")
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    assert losses != figures(zero, "train/loss")
    # A tenth of the zero genes are targets: of a panel, of the genes that it names alone.
    assert figures(straight, "train/n_targets")[0] < figures(zero, "train/n_targets")[0]
    assert figures(straight, "val/n_values/zeros")[0] < figures(zero, "val/n_values/zeros")[0]
    # Stopped in the middle, it continues bit for bit.
    run(corpus, tmp_path / "parts", **changes | {"run.max_steps": 2})
    parts = run(corpus, tmp_path / "parts", **changes)
    assert figures(parts, "train/loss") == losses
    assert figures(parts, "val/mse")[-1] == figures(straight, "val/mse")[-1]
    models = []
    for name in ("straight", "parts"):
        out = tmp_path / f"model_{name}"
        run_module("sclong_ds", "export", tmp_path / name, "--out", out)
        models.append(load_file(out / "model.safetensors"))
        assert "unmeasured: mask" in (out / "config.yaml").read_text()
    assert all(np.array_equal(models[0][key], models[1][key]) for key in models[0])


def test_routing_of_expressed_genes_leaves_unknown_ones_with_the_zeros(
    corpus: Path, tmp_path: Path
) -> None:
    # On a CPU the numbers of routed genes are compared with the cells'. Pictures read them too.
    changes = {"model.routing": "expressed", "tracking.picture_cells": 8, "run.max_steps": 2}
    rows = run(corpus, tmp_path / "run", **changes, **{"data.unmeasured": "mask"})
    assert np.isfinite(figures(rows, "train/loss")).all()
    assert np.isfinite(figures(rows, "val/mse")).all()
    assert (tmp_path / "run" / "plots" / "cells.png").is_file()


def test_a_run_cannot_change_what_unmeasured_genes_are(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", **{"run.max_steps": 2})
    with pytest.raises(RuntimeError, match=r"data\.unmeasured: 'zero' -> 'mask'"):
        run(corpus, tmp_path / "run", **{"data.unmeasured": "mask"})
    saved = (tmp_path / "run" / "config.yaml").read_text()
    # A run folder of an earlier version, which had no such key, continues.
    (tmp_path / "run" / "config.yaml").write_text(saved.replace("  unmeasured: zero\n", ""))
    assert len(figures(run(corpus, tmp_path / "run"), "train/loss")) == STEPS
