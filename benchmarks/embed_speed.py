"""Cells embedded per CPU second: all genes read, as first built and today, and the recipe of today.

    python -m benchmarks.embed_speed CELLS [--cells 64] [--graph graph.npz]

The models have random weights and the width of `sclong_tiny` over the bundled genes; all embed the
same cells of CELLS, any file that `embed` reads, in this process, in turn. Two read all genes
(`model.zero_genes=null`, `model.routing=top`): `as first built` computes the last layer of all
genes, for 8 cells together, and the gene vectors again for each 8. The third model reads the
expressed genes and some zeros. Prints the cells a second of CPU time and of wall time of each, best
of the passes, their ratios, and how far the embeddings of the first two are apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from sclong_ds.config.load import load_config
from sclong_ds.corpus.gene_graph import read_gene_graph
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.corpus.transform import Transform
from sclong_ds.embedding.cells import open_cells
from sclong_ds.embedding.embed import embed_counts
from sclong_ds.model.counts_input import model_input
from sclong_ds.model.pooling import pool_parts
from sclong_ds.model.sclong import ScLong

ALL_GENES = ["model.zero_genes=null", "model.routing=top"]
EXPRESSED = ["model.zero_genes=256", "model.routing=expressed"]
PLAIN = ["model.cell_vector=none", "model.cell_offset=none"]
BATCH, PASSES = 8, 3
Embed = Callable[[ScLong, csr_matrix], np.ndarray]


def main() -> int:
    """Measure all and print the ratios."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("input", type=Path, metavar="CELLS")
    parser.add_argument("--cells", type=int, default=64, metavar="N", help="how many are embedded")
    parser.add_argument("--graph", type=Path, metavar="FILE", help="gene graph (default: none)")
    args = parser.parse_args()
    genes = GeneVocabulary.bundled()
    counts = next(iter(open_cells(args.input, genes=genes).blocks())).counts[: args.cells]
    models = [made_model(overrides, genes, args.graph) for overrides in (ALL_GENES, EXPRESSED)]
    rows: dict[str, tuple[Embed, ScLong]] = {
        "all genes, as first built": (as_first_built, models[0]),
        "all genes": (today, models[0]),
        "expressed genes and some zeros": (today, models[1]),
    }
    taken = {name: [(inf, inf)] for name in rows}
    found: dict[str, np.ndarray] = {}
    for _ in range(PASSES):
        for name, (embed, model) in rows.items():
            cpu, wall = time.process_time(), time.perf_counter()
            found[name] = embed(model, counts)
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    first = None
    for name, passes in taken.items():
        cpu_s, wall_s = (min(some) for some in zip(*passes, strict=True))
        first = first or cpu_s
        sys.stdout.write(
            f"{name}: {counts.shape[0] / cpu_s:.1f} cells per CPU second, "
            f"{counts.shape[0] / wall_s:.1f} a second, ratio {first / cpu_s:.2f}\n"
        )
    before, now = (found[name] for name in list(rows)[:2])
    apart = np.abs(before - now).max() / np.abs(before).max()
    sys.stdout.write(f"largest difference of the first two: {apart:.1e} of the largest value\n")
    return 0


def made_model(overrides: list[str], genes: GeneVocabulary, graph: Path | None) -> ScLong:
    """Return a model of random weights.

    Args:
        overrides: Settings of the model.
        genes: Its genes.
        graph: Gene graph of these genes, or None.
    """
    kind = "graph" if graph else "embedding"
    settings = [*PLAIN, f"model.gene_encoder={kind}", *overrides]
    config = load_config("sclong_tiny", settings).model
    torch.manual_seed(0)
    own = None if graph is None else read_gene_graph(graph, genes_hash=genes.hash)
    model = ScLong(config, n_genes=len(genes), graph=own).eval()
    model.transform = Transform(name="log1p_total", target_sum=1e4)
    return model


def today(model: ScLong, counts: csr_matrix) -> np.ndarray:
    """Return the embeddings (n, W) as `embed` makes them."""
    return embed_counts(model, counts, batch_size=BATCH)


def as_first_built(model: ScLong, counts: csr_matrix) -> np.ndarray:
    """Return them from the vectors of all genes, of BATCH cells at a time."""
    (part,) = model.recipe.parts
    found = []
    for start in range(0, counts.shape[0], BATCH):
        some, device = counts[start : start + BATCH], torch.device("cpu")
        x, _ = model_input(some, target_sum=1e4, unmeasured=None, device=device)
        with torch.inference_mode():
            vectors = model.encode(x, genes="all")
            found.append(pool_parts({part.layer: vectors}, x, [part])[0].numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(main())
