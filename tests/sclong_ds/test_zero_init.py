"""Under ZeRO-3 no process holds the whole model while it is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PORT, ROOT, environment

from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.planning.costs import parameter_counts

pytestmark = pytest.mark.distributed
RANKS = 2


def instantiate(folder: Path, *overrides: str) -> list[dict[str, int]]:
    """Build sclong_1b on two ranks and return the memory figures of each."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(RANKS),
        "--master_port", str(PORT), "--no_local_rank",
        str(ROOT / "tests" / "instantiate_partitioned.py"), str(folder), "sclong_1b", *overrides,
    ]  # fmt: skip
    # Every tensor of 1 MB or more gets pages of its own and gives them back when it is freed: what
    # is measured is what the process holds, not the holes that glibc's heap keeps (0.9 GB here).
    own_pages = environment() | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        command, cwd=ROOT, env=own_pages, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads((folder / f"rank_{i}.json").read_text()) for i in range(RANKS)]


def test_no_rank_holds_the_published_model_while_it_is_built(tmp_path):
    overrides = ("model.gene_encoder=embedding", "engine.precision=fp32")
    ranks = instantiate(tmp_path, *overrides)
    model = load_config("sclong_1b", overrides).model
    parameters = sum(parameter_counts(model, len(GeneVocabulary.bundled())).values())
    for rank in ranks:
        assert rank["parameters"] == parameters
        assert rank["model_bytes"] == 4 * parameters
        # Its half of the model, and for a moment one parameter whole: 0.51 of the model.
        took = rank["peak_bytes"] - rank["before_bytes"]
        assert rank["held_bytes"] <= took < 0.55 * rank["model_bytes"]
