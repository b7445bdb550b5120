"""Under ZeRO-3 no process holds the whole model while it is built."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
from launching import ROOT, environment
from small_runs import train

from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.planning.costs import parameter_counts

pytestmark = pytest.mark.distributed
RANKS = 2


def instantiate(folder: Path, *overrides: str) -> list[dict[str, int]]:
    """Build sclong_1b on two ranks and return the memory figures of each."""
    script = ROOT / "tests" / "instantiate_partitioned.py"
    # Every tensor of 1 MB or more gets pages of its own and gives them back when it is freed: what
    # is measured is what the process holds, not the holes that glibc's heap keeps (0.9 GB here).
    with mock.patch.dict(os.environ, environment() | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}):
        train([str(script), str(folder), "sclong_1b", *overrides], n_ranks=RANKS,
              log=folder / "log")  # fmt: skip
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
