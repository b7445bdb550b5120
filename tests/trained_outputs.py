"""What a trained model makes of some cells, from the run itself and from its exported model."""

from __future__ import annotations

import subprocess
import sys

from launching import ROOT, environment, run_module

OUTPUTS = """
import sys
import torch
from sclong_ds.job import failures; from sclong_ds import pretrain
from sclong_ds.training.saving import Saver

begin, save, runs = pretrain.begin, Saver.save, []

def begin_and_keep(*args):
    runs.append(begin(*args))
    return runs[0]

def save_and_show(saver, state, *, must):
    save(saver, state, must=must)
    opened = runs[0].opened
    n_genes = opened.cells.corpus.n_genes
    x = torch.rand(3, n_genes, generator=torch.Generator().manual_seed(0)) * 4
    x *= x > 2
    opened.engine.eval()
    with torch.no_grad():
        seen = opened.engine(x, (x > 3) & (x < 3.5))
    if must and opened.ranks.rank == 0:
        kind = next(opened.engine.parameters()).dtype
        torch.save((x, seen, kind), sys.argv[1])
    opened.engine.train()

pretrain.begin, Saver.save = begin_and_keep, save_and_show
failures.run_to_end(lambda: pretrain.main(sys.argv[2:]))
"""
"""Trains, and writes what the trained model makes of three cells."""


LOADED = """
import sys
import torch
import sclong_ds

x, expected, kind = torch.load(sys.argv[1])
with torch.no_grad():
    found = sclong_ds.load_model(sys.argv[2]).to(kind)(x, (x > 3) & (x < 3.5))
assert torch.equal(found, expected), f"{(found - expected).abs().max()} apart"
"""


def assert_export_is_the_trained_model(run_dir, outputs):
    """The exported model gives the same bits; after a training in bf16, once it is in bf16 too."""
    out = run_dir.with_name(f"{run_dir.name}_exported")
    run_module("sclong_ds", "export", run_dir, "--out", out)
    command = [sys.executable, "-c", LOADED, outputs, out]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True)
