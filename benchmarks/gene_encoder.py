"""Share of the gene encoder in a training step on a CPU.

    python -m benchmarks.gene_encoder [--preset NAME] [--cells N] [--rounds N]

The gene vectors depend on the parameters alone. The model computes them once per micro-batch; once
per optimizer step would do. This prints the CPU-seconds of the gene encoder, forward and backward,
and of a whole micro-batch, on one thread: what that would save at most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_model import random_cells, random_graph
from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.model.sclong import ScLong


def cpu_seconds(work: Callable[[], None], rounds: int) -> float:
    """Return the least CPU-seconds of a call, after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="sclong_100m")
    parser.add_argument("--cells", type=int, default=1, help="cells of a micro-batch")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n_genes = len(GeneVocabulary.bundled())
    config = load_config(args.preset).model
    graph = random_graph(n_genes)
    net = ScLong(config, n_genes=n_genes, graph=graph, output_mean=1.0)
    x, positions, hidden = random_cells(args.cells, n_genes, "cpu")
    true = x.gather(1, positions)

    def gene_encoder() -> None:
        genes = net.gene_encoder()
        genes.backward(torch.ones_like(genes))

    def micro_batch() -> None:
        (net(x, hidden, positions=positions) - true).square().mean().backward()

    part, whole = (cpu_seconds(work, args.rounds) for work in (gene_encoder, micro_batch))
    print(f"{args.preset}, {graph[0].shape[1]:,} edges, micro-batch of {args.cells}: gene encoder")
    print(f"{part:.3f} of {whole:.2f} CPU-seconds, {part / whole:.2%}")


if __name__ == "__main__":
    main()
