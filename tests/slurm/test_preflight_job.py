"""pretrain.sh names the node that preflight finds bad, and can continue without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

# In front of python: spoils node n2 for everything but the training, which it only announces.
SITE = """#!/bin/bash
if [[ $* == *sclong_ds.pretrain* ]]; then echo "trained on $SLURMD_NODENAME"; exit 0; fi
if [[ $SLURMD_NODENAME == n2 ]]; then
  export PYTHONPATH={other}:$PYTHONPATH
  set -- "${{@/{graph}/{graph}.gone}}"
fi
exec {python} "${{@:2}}"
"""


def test_a_bad_node_is_named_and_the_job_comes_back_without_it(slurm: Any, tmp_path: Path) -> None:
    metadata = tmp_path / "other" / "deepspeed-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1\n")
    site, run_dir, graph = tmp_path / "site", tmp_path / "run", tmp_path / "graph.npz"
    graph.write_bytes(b"the check reads it, and does not look into it")
    site.write_text(SITE.format(other=tmp_path / "other", graph=graph.name, python=sys.executable))
    site.chmod(0o755)
    job = slurm.wait(
        slurm.sbatch(
            "pretrain.sh", "--config", "sclong_tiny", f"run.dir={run_dir}",
            f"model.gene_graph={graph}", options=("--nodes=1-2",),
            env={"SCLONG_CONTAINER": str(site), "SCLONG_EXCLUDE_BAD": "1"},
        )
    )  # fmt: skip
    assert job.log.count("start 2:") == 1, job.log
    first, second = job.log.split("start 2:")
    errors = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, job.log
    assert all(line.startswith("error: n2: ") for line in errors)
    assert f"{graph.name}.gone" in errors[0]
    assert "deepspeed is 0.1, elsewhere " in errors[1]
    assert "trained on" not in first
    assert f"job {job.id} is queued again without n2" in first
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.log
    assert "n1, 1 x 1 ranks" in second
    assert "trained on n1" in second
    assert json.loads((run_dir / "preflight.json").read_text())["ok"]
