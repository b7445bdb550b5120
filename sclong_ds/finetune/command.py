"""Fine-tune an exported model on labelled cells: `python -m sclong_ds finetune`.

    python -m sclong_ds finetune MODEL_DIR INPUT --label cell_type --group donor --out DIR
        [--mode frozen|head|lora|all] [--regress] [--folds K] [--seeds N] [key=value ...]
    deepspeed --num_gpus 4 --module sclong_ds finetune MODEL_DIR INPUT ...

Groups (donors, datasets) are divided into folds. For each seed and fold one fit learns from the
other groups, except those of the next fold, which stop it early and calibrate it; it predicts the
groups of its own fold, which it has not seen. A last fit learns from all groups for the median
number of steps: that is the model that is written. Starting again on the same DIR continues.

Reads what `embed` reads. Writes into DIR: scores.tsv, scores.json, report.html, predictions.h5ad
(obs: predictions of the held-out fits), model/ (for `embed`, `evaluate`, `finetune`), and the files
of a run folder (config.yaml, metrics.jsonl, events.jsonl). Exit status as `sclong_ds.pretrain`.
"""

from __future__ import annotations

import argparse
import os

from sclong_ds.finetune.sections import read_sections


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds finetune`.

    Args:
        args: Parsed arguments of `add_arguments`.

    Returns:
        0: done; 1, 71 or 75 as `sclong_ds.pretrain`.
    """
    sections = read_sections(args)
    if args.device != "auto":
        # DeepSpeed looks for a device when it is imported.
        os.environ["DS_ACCELERATOR"] = args.device
    from sclong_ds.finetune.story import execute

    return execute(args, sections)
