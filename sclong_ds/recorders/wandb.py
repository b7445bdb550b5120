"""Weights & Biases: offline, in `RUN_DIR/wandb`, unless WANDB_MODE says otherwise.

Offline nothing leaves the machine: `wandb sync RUN_DIR/wandb/offline-run-*` sends the runs later;
those of one run folder have one id, so that W&B joins the starts of a run. With WANDB_MODE=online
the library sends in a process of its own. Every metric is drawn over `step`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sclong_ds.recorders.recorder import About, Ending, Row


class WeightsAndBiases:
    """Writes one run of W&B.

    Args:
        about: The run.
    """

    def __init__(self, about: About) -> None:
        import wandb

        self._library: Any = wandb
        self._run: Any = wandb.init(
            dir=str(about.run_dir),
            mode=os.environ.get("WANDB_MODE", "offline"),
            id=about.run_id,
            resume="allow",
            name=about.name,
            project=about.group,
            config={**about.params, "tags": dict(about.tags)},
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, rows: Sequence[Row]) -> None:
        """Log rows; each is one call.

        Args:
            rows: See `Recorder`.
        """
        for row in rows:
            values = {k: math.nan if v is None else v for k, v in row.items() if k != "time"}
            self._run.log({**values, "_timestamp": row["time"]})

    def picture(self, step: int, path: Path) -> None:
        """Log a picture.

        Args:
            step: Optimizer step.
            path: A PNG file.
        """
        self._run.log({path.stem: self._library.Image(str(path)), "step": step})

    def artifact(self, path: Path) -> None:
        """Keep a file with the run, below the name of its folder: W&B has a config.yaml of its own.

        Args:
            path: A file of the run folder.
        """
        self._run.save(str(path), base_path=str(path.parent.parent), policy="now")

    def finish(self, ending: Ending) -> None:
        """End the run of this start.

        Args:
            ending: FAILED marks it as failed.
        """
        self._run.finish(exit_code=1 if ending == "FAILED" else 0)
