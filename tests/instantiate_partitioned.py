"""Build a preset's model as training does and write what memory it took; one process per rank.

Started on each rank as `tests/instantiate_partitioned.py FOLDER PRESET [key=value ...]`; each rank
writes FOLDER/rank_N.json: the resident memory before the model was built, its peak, and the bytes
of the whole model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil

from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.engine.deepspeed_engine import build_partitioned, count_parameters, peak_memory_gib
from sclong_ds.engine.ds_config import resolve_ds_config
from sclong_ds.engine.ranks import join_process_group
from sclong_ds.job.failures import run_to_end
from sclong_ds.model.sclong import ScLong


def main(folder: str, preset: str, *overrides: str) -> int:
    """Build the model on this rank and write the figures."""
    config = load_config(preset, overrides)
    ranks = join_process_group(timeout_s=config.engine.timeout_s)
    ds_config = resolve_ds_config(config.engine, world_size=ranks.world_size)
    n_genes = len(GeneVocabulary.bundled())
    before = psutil.Process().memory_info().rss
    model = build_partitioned(
        lambda: ScLong(config.model, n_genes=n_genes, graph=None), seed=0, ds_config=ds_config
    )
    figures = {
        "before_bytes": before,
        "peak_bytes": round(peak_memory_gib(ranks.device) * 2**30),
        "held_bytes": sum(p.ds_tensor.nbytes for p in model.parameters()),
        "model_bytes": sum(p.ds_numel * p.element_size() for p in model.parameters()),
        "parameters": count_parameters(model),
    }
    (Path(folder) / f"rank_{ranks.rank}.json").write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    run_to_end(lambda: main(*sys.argv[1:]))
