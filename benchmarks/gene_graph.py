"""Time and memory of the gene graph, against a loop over pairs of term sets.

    python -m benchmarks.gene_graph [--genes N] [--json OUT]

Reads the bundled Gene Ontology. Builds the graph of all bundled genes once with
`data_prep.graph.jaccard.jaccard_graph`; then the graph of N of the annotated genes with it and with
the loop (both directions of every pair by Python's set operations), compares the edges, and prints
the ratio of CPU times. The loop grows with the square of the genes: its time for all genes is that
of N times (all / N) squared.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import write_result
from data_prep.graph.gene_ontology import (
    GENE_TABLE,
    GO_FOLDER,
    match_genes,
    read_annotations,
    read_gene_keys,
    read_ontology,
)
from data_prep.graph.jaccard import NEIGHBOURS, THRESHOLD, jaccard_graph

Edges = dict[tuple[int, int], np.float32]


def by_pairs(sets: list[set[str]]) -> Edges:
    """Return the same edges by comparing every pair of sets."""
    edges: Edges = {}
    for target, wanted in enumerate(sets):
        scored = []
        for source, terms in enumerate(sets):
            score = len(terms & wanted) / len(terms | wanted)
            if score > THRESHOLD:
                scored.append((-score, source))
        for score, source in sorted(scored)[: NEIGHBOURS + 1]:
            edges[source, target] = np.float32(-score)
    return edges


def by_blocks(sets: list[set[str]]) -> Edges:
    """Return the edges of `jaccard_graph`."""
    graph = jaccard_graph(sets)
    pairs = map(tuple, graph.edge_index.T.tolist())
    return dict(zip(pairs, graph.edge_weight, strict=True))


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=2000, help="genes of the comparison")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    def read() -> list[set[str]]:
        ontology = read_ontology(GO_FOLDER / "go-basic.obo.gz")
        annotations = read_annotations(
            GO_FOLDER / "gene2go.gz", ontology=ontology, evidence_exclude=("ND",)
        )
        return match_genes(annotations, read_gene_keys(GENE_TABLE))[0]

    read_s, terms = cpu_s(read)
    all_s, graph = cpu_s(lambda: jaccard_graph(terms))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    annotated = [t for t in terms if t]
    some = annotated[:: max(1, len(annotated) // args.genes)][: args.genes]
    ours_s, ours = cpu_s(lambda: by_blocks(some))
    loop_s, loop = cpu_s(lambda: by_pairs(some))
    assert ours == loop, "the two ways give different edges"
    figures = {
        "genes": len(terms),
        "annotated": len(annotated),
        "edges": len(graph.edge_weight),
        "read_cpu_s": read_s,
        "graph_cpu_s": all_s,
        "peak_mib": peak,
        "compared_genes": len(some),
        "compared_ours_cpu_s": ours_s,
        "compared_loop_cpu_s": loop_s,
        "ratio": loop_s / ours_s,
        "loop_all_genes_cpu_s": loop_s * (len(annotated) / len(some)) ** 2,
    }
    figures["ratio_all_genes"] = figures["loop_all_genes_cpu_s"] / all_s
    for name, value in figures.items():
        print(f"{name:24} {value:,.2f}" if isinstance(value, float) else f"{name:24} {value:,}")
    if args.json:
        write_result(args.json, "gene_graph", figures)


if __name__ == "__main__":
    main()
