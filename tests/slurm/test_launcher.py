"""The other way to launch, as docs/operate/job.md shows: a `deepspeed` launcher a node, no ssh."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_metrics

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--config sclong_tiny model.top_seq_len=64 model.large_encoder.depth=1 run.max_steps=2 "
    "engine.train_batch_size=2 run.validation_cells=4 tracking.enabled=false"
)


def test_one_launcher_per_node_trains_as_readme_says(
    slurm: Any, small_corpus: Path, small_graph: Path, tmp_path: Path
) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/operate/job.md").read_text(), re.DOTALL)
    (block,) = (b for b in blocks if "--no_ssh" in b)
    run_dir = tmp_path / "run"
    inputs = f"run.dir={run_dir} data.corpus={small_corpus} model.gene_graph={small_graph}"
    changes = {
        "slots=8": "slots=1",
        "> hosts": f"> {tmp_path}/hosts",
        "--hostfile hosts": f"--hostfile {tmp_path}/hosts",
        "--config sclong_1b run.dir=RUN data.corpus=CORPUS model.gene_graph=GRAPH": (
            f"{SMALL} {inputs}"
        ),
    }
    for old, new in changes.items():
        assert block.count(old) == 1, old
        block = block.replace(old, new)
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nset -e\nsource slurm/env.sh\n{block}")
    log = f"--output={slurm.folder}/jobs/%x-%j.out"
    options = ("--nodes=2", "--ntasks-per-node=2", log)  # as for the job script
    job = slurm.wait(slurm.command("sbatch", "--parsable", *options, str(script)))
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert [row["step"] for row in read_metrics(run_dir) if "train/loss" in row] == [1, 2]
    assert [e["world_size"] for e in read_events(run_dir) if e["event"] == "start"] == [2]
