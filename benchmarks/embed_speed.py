"""Cells embedded per CPU second: all genes read, as first built, beside the recipe of today.

    python -m benchmarks.embed_speed CELLS [--cells 64]

Both models have random weights and the width of `sclong_tiny` over the bundled genes; both embed
the same cells of CELLS, any file that `embed` reads, in this process. The baseline reads all genes
(`model.zero_genes=null`, `model.routing=top`); the other reads the expressed ones and some zeros.
Prints the cells a second of CPU time of each, best of two passes, and their ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from scipy.sparse import csr_matrix

from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import Transform
from sclong_ds.embedding.cells import open_cells
from sclong_ds.embedding.embed import embed_counts
from sclong_ds.model.sclong import ScLong

MODELS = {
    "all genes": ["model.zero_genes=null", "model.routing=top"],
    "expressed genes and some zeros": ["model.zero_genes=256", "model.routing=expressed"],
}
PLAIN = ["model.gene_encoder=embedding", "model.gene_graph=null", "model.cell_vector=none"]
BATCH = 8


def main() -> int:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("input", type=Path, metavar="CELLS")
    parser.add_argument("--cells", type=int, default=64, metavar="N", help="how many are embedded")
    args = parser.parse_args()
    genes = GeneVocabulary.bundled()
    block = next(iter(open_cells(args.input, genes=genes).blocks()))
    counts = block.counts[: args.cells]
    found = [speed(overrides, genes, counts) for overrides in MODELS.values()]
    for name, cells in zip(MODELS, found, strict=True):
        sys.stdout.write(f"{name}: {cells:.1f} cells per CPU second\n")
    sys.stdout.write(f"ratio: {found[1] / found[0]:.2f}\n")
    return 0


def speed(overrides: list[str], genes: GeneVocabulary, counts: csr_matrix) -> float:
    """Return the cells embedded per second of CPU time, the better of two passes.

    Args:
        overrides: Settings of the model.
        genes: Its genes.
        counts: (n, G) raw counts.
    """
    torch.manual_seed(0)
    config = load_config("sclong_tiny", [*PLAIN, "model.cell_offset=none", *overrides]).model
    model = ScLong(config, n_genes=len(genes), graph=None).eval()
    model.transform = Transform(name="log1p_total", target_sum=1e4)
    taken = []
    for _ in range(2):
        started = time.process_time()
        embed_counts(model, counts, batch_size=BATCH)
        taken.append(time.process_time() - started)
    return counts.shape[0] / min(taken)


if __name__ == "__main__":
    sys.exit(main())
