"""Commands on cells tell how many of them the model was trained on.

Covers also `sclong_ds/embedding/opening.py`.
"""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from exported import named_genes, write_model
from scipy.sparse import csr_matrix

from sclong_ds.__main__ import main
from sclong_ds.exported.training_cells import TrainingCells, short_digests

N_GENES = 60
GENES = named_genes(N_GENES)


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["perturb", "genes", "perturb-bench"])
def test_commands_on_cells_say_how_many_the_model_was_trained_on(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = csr_matrix(np.random.default_rng(0).poisson(2.0, (60, N_GENES)))
    known = TrainingCells(
        digests=np.sort(short_digests(counts[:7])), complete=True, datasets=("made",)
    )
    model = write_model(tmp_path, GENES, seed=0, training_cells=known)
    guides = ["control"] * 20 + [symbol for symbol in GENES.symbols[:4] for _ in range(10)]
    cells = anndata.AnnData(
        counts.astype(np.float32),
        obs=pd.DataFrame({"guide": guides}, index=[f"c{i}" for i in range(60)]),
        var=pd.DataFrame(index=list(GENES.ids)),
    )
    cells.write_h5ad(tmp_path / "cells.h5ad")
    more = {
        "perturb": ["--genes", GENES.ids[1], "--mode", "delete", "--null", "5", "--out", "a.tsv"],
        "genes": ["--out", "a.h5ad"],
        "perturb-bench": ["--perturbation", "guide", "--control", "control", "--min-cells", "5",
                          "--encoded-cells", "2", "--out", "a.tsv"],
    }[command]  # fmt: skip
    more[-1] = str(tmp_path / more[-1])
    words = [command, str(model), str(tmp_path / "cells.h5ad"), "--min-genes-mapped", "1"]
    assert main([*words, "--device", "cpu", *more]) == 0, capsys.readouterr().err
    assert "7 of 60 cells were in training" in capsys.readouterr().out.splitlines()
