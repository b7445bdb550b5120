"""A run folder that a report is made of."""

from pathlib import Path

import numpy as np
import pytest
from report_pages import NASTY

from sclong_ds.report import curves as plots
from sclong_ds.report.figures import prediction_density_figure
from sclong_ds.run_folder.files import RunFolder, update_run_json


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 30 steps that was stopped after step 12, and resumed at step 10 an hour later."""
    folder = tmp_path / "trial"
    clock = 1_700_000_000.0
    monkeypatch.setattr("sclong_ds.run_folder.files.time.time", lambda: clock)
    for first, last, name in ((1, 12, "start"), (11, 30, "resume")):
        with RunFolder(folder) as files:
            files.append_event(name, step=first - 1, world_size=2, note=NASTY)
            for step in range(first, last + 1):
                clock += 2.0
                figures = {"train/loss": 30.0 / step, "train/lr": 1e-3, "train/grad_norm": 1.0}
                speed = {"perf/cells_per_s": 2.5, "perf/step_time_s": 2.0, "mem/peak_gib": 1.5}
                files.append_metrics(step, {**figures, **speed, "cells_seen": 4 * step})
                if step % 10 == 0:
                    bins = {"val/mse/bin_0": 0.25, "val/baseline_mse/bin_0": 0.5}
                    scores = {"val/mse": 12.0 / step, "val/baseline_mse": 0.8, "val/pearson": 0.7}
                    files.append_metrics(step, {**scores, **bins, "cells_seen": 4 * step})
        clock += 3600.0
    (folder / "config.yaml").write_text(f"model: '{NASTY}'\n")
    (folder / "ds_config.json").write_text('{"zero_optimization": {"stage": 3}}')
    pictures = folder / "plots" / "step_00000020"
    pictures.mkdir(parents=True)
    figure = prediction_density_figure(np.arange(9.0), np.arange(9.0))
    (pictures / "predicted_vs_true.png").write_bytes(plots.png_bytes(figure))
    update_run_json(
        folder,
        status="FINISHED",
        restarts=1,
        commit="0123456789abcdef",
        created="2023-11-14T22:13:20+00:00",
        environment={"host": NASTY, "python": "3.11.7"},
        summary={
            "n_cells_train": 372,
            "n_genes": 27874,
            "parameters": {"gene_encoder": 1000, "decoder": 234},
            "expression_bins": ["low", "high"],
            "note": NASTY,
        },
    )
    return folder
