"""Resumes runs one after the other in one process, which saves the imports of all but the first:

python tests/resume_each.py CORPUS STEPS RUN_DIR...
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from sclong_ds import pretrain


def main() -> int:
    """Resume every run up to a step; returns the number of runs that did not get there."""
    corpus, steps, *run_dirs = sys.argv[1:]
    # DeepSpeed cannot join a second process group in one process: the runs share the first.
    dist.destroy_process_group = lambda: None
    failed = 0
    for run_dir in run_dirs:
        failed += 0 != pretrain.main(
            [
                "--config",
                f"{run_dir}/config.yaml",
                f"run.dir={run_dir}",
                f"run.max_steps={steps}",
                f"data.corpus={corpus}",
                f"model.gene_graph={run_dir}/gene_graph.npz",
            ]
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
