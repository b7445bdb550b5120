"""Build the gene graph: two genes are linked when they share Gene Ontology terms.

    python -m data_prep gene-graph --out graph.npz                  bundled GO, bundled genes
    python -m data_prep gene-graph --genes CORPUS/genes.tsv --out graph.npz
    python -m data_prep gene-graph --obo F --associations F --genes F --out graph.npz

An edge source -> target carries the Jaccard index of the two genes' sets of GO terms. Edges at or
below the threshold are left out, and every target keeps its best `neighbours` + 1 sources (itself
is usually one of them); among equal scores the source that comes first in the vocabulary wins. A
target may thus lose its edge to itself when more than `neighbours` + 1 genes have exactly its
terms. Genes without terms have no edge.

Reads an OBO file, gene associations (gene2go or GAF) and a gene list. Writes OUT, whose keys
`sclong_ds.corpus.gene_graph` lists, and a picture of the degrees beside it (OUT with .png).
The same inputs give the same bytes.

Source: scLong, doi:10.1101/2024.11.09.622759, gene ontology graph.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.graph.gene_graph_arguments import NEIGHBOURS, THRESHOLD
from data_prep.graph.gene_ontology import (
    GENE_TABLE,
    GO_FOLDER,
    HUMAN,
    NAMESPACES,
    Annotations,
    GeneKeys,
    Ontology,
    Propagation,
    match_genes,
    read_annotations,
    read_gene_keys,
    read_ontology,
)
from data_prep.graph.jaccard import GeneGraph, degrees, jaccard_graph
from sclong_ds.corpus.gene_graph import write_gene_graph
from sclong_ds.files.atomic import file_sha256, write_atomic

logger = logging.getLogger(__name__)


def graph_counts(
    graph: GeneGraph, gene_terms: Sequence[Collection[str]], keys: GeneKeys
) -> dict[str, Any]:
    """Summarise coverage and degrees.

    Args:
        graph: Graph over the vocabulary.
        gene_terms: Terms of each gene.
        keys: The vocabulary.

    Returns:
        Plain numbers: genes with and without GO terms (also by class), edges, degrees. Edges of a
        gene to itself are not counted as degree.
    """
    with_go = np.array([bool(terms) for terms in gene_terms])
    source, target = graph.edge_index
    into, out_of = degrees(graph)
    by_class = {
        name: {"genes": int(member.sum()), "with_go": int((member & with_go).sum())}
        for name in sorted(set(keys.genes.classes))
        for member in [np.array([own == name for own in keys.genes.classes])]
    }
    return {
        "genes": graph.n_genes,
        "genes_with_go": int(with_go.sum()),
        "genes_without_go": int((~with_go).sum()),
        "by_class": by_class,
        "terms": len(set().union(*gene_terms)),
        "terms_per_gene_mean": float(np.mean([len(t) for t in gene_terms if t] or [0])),
        "edges": len(graph.edge_weight),
        "self_edges": int((source == target).sum()),
        "genes_without_neighbour": int(((into == 0) & (out_of == 0)).sum()),
        "in_degree_mean": float(into.mean()),
        "in_degree_max": int(into.max()),
        "out_degree_median": float(np.median(out_of)),
        "out_degree_max": int(out_of.max()),
        "weight_mean": float(graph.edge_weight.mean()) if len(graph.edge_weight) else 0.0,
    }


def plot_degrees(path: str | Path, graph: GeneGraph) -> None:
    """Draw how many genes have how many neighbours, to a PNG.

    Args:
        path: Target, replaced if it exists.
        graph: Graph to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    titles = ("in-degree: sources that a gene reads", "out-degree: genes that read it")
    for axes, degree, title in zip(panels, degrees(graph), titles, strict=True):
        top = int(degree.max()) + 1
        axes.hist(degree, bins=np.linspace(-0.5, top - 0.5, min(top, 60) + 1), color="#33658a")
        axes.set(
            yscale="log",
            title=title,
            xlabel="neighbours (the gene itself not counted)",
            ylabel="genes",
        )
    buffer = io.BytesIO()
    # Without this the file would carry matplotlib's version and differ between installations.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def build_gene_graph(
    *,
    out: str | Path,
    obo: str | Path = GO_FOLDER / "go-basic.obo.gz",
    associations: str | Path = GO_FOLDER / "gene2go.gz",
    genes: str | Path = GENE_TABLE,
    taxid: int = HUMAN,
    namespaces: Collection[str] = tuple(NAMESPACES.values()),
    evidence_exclude: Collection[str] = ("ND",),
    propagate: Propagation = "none",
    threshold: float = THRESHOLD,
    neighbours: int = NEIGHBOURS,
    hold_out: float = 0.0,
) -> dict[str, Any]:
    """Build the graph of a vocabulary from files and write it with its picture.

    Args:
        out: Target .npz.
        obo: go-basic.obo.
        associations: gene2go or GAF.
        genes: Gene table, a corpus' genes.tsv or a list of ids.
        taxid: NCBI taxonomy id of the associations to use.
        namespaces: GO branches to use: BP, MF, CC.
        evidence_exclude: Evidence codes to leave out.
        propagate: Add ancestors of each term: none, is_a or all relationships.
        threshold: Edges need a Jaccard index strictly above it.
        neighbours: Best sources kept per gene, besides itself.
        hold_out: Share of the terms that are left out, by the hash of their ids.

    Returns:
        A report: out, picture, settings, counts.

    Raises:
        FileNotFoundError: An input or the folder of `out` does not exist.
        ValueError: An input is not what it should be, or a setting is out of range.
    """
    out = Path(out)
    _check_out(out)
    _check_filters(namespaces, evidence_exclude)
    keys = read_gene_keys(genes)
    ontology = read_ontology(obo, propagate=propagate)
    filters: Any = {"namespaces": namespaces, "evidence_exclude": evidence_exclude}
    annotations = read_annotations(associations, ontology=ontology, taxid=taxid, **filters)
    terms, unmatched = match_genes(annotations, keys, hold_out=hold_out)
    logger.info("%d annotated genes, %d not in the gene list", len(annotations.terms), unmatched)
    graph = jaccard_graph(terms, threshold=threshold, neighbours=neighbours)
    settings = {
        "obo": _provenance(obo) | {"version": ontology.version},
        "associations": _provenance(associations) | {"format": annotations.format, "taxid": taxid},
        "namespaces": sorted(namespaces),
        "evidence_exclude": sorted(evidence_exclude),
        "propagate": propagate,
        "threshold": threshold,
        "neighbours": neighbours,
    } | ({"hold_out": hold_out} if hold_out else {})
    counts = graph_counts(graph, terms, keys) | _annotation_counts(annotations, ontology, unmatched)
    about: Any = {"genes_hash": keys.genes.hash, "settings": settings, "counts": counts}
    write_gene_graph(out, graph.edge_index, graph.edge_weight, n_genes=graph.n_genes, **about)
    plot_degrees(out.with_suffix(".png"), graph)
    return {"out": str(out), "picture": str(out.with_suffix(".png")), **about}


def _annotation_counts(
    annotations: Annotations, ontology: Ontology, unmatched: int
) -> dict[str, Any]:
    return {
        "association_rows": dict(annotations.counts),
        "annotated_ids": len(annotations.terms),
        "annotated_ids_not_in_gene_list": unmatched,
        "ontology_terms": len(ontology.namespace),
    }


def _provenance(path: str | Path) -> dict[str, str]:
    """Name an input and its content, not its folder: same inputs, same bytes."""
    return {"file": Path(path).name, "sha256": file_sha256(path)}


def _check_out(out: Path) -> None:
    """Refuse a bad target before the work rather than after it."""
    if out.suffix != ".npz":
        raise ValueError(
            f"--out {out}: the graph is an .npz file, for instance {out.with_suffix('.npz')}"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"--out {out}: the folder {out.parent} does not exist; create it first"
        )


def _check_filters(namespaces: Collection[str], evidence_exclude: Collection[str]) -> None:
    from goatools.evidence_codes import EvidenceCodes

    branches, codes = sorted(NAMESPACES.values()), sorted(EvidenceCodes.code2nt)
    for option, given, allowed in (
        ("--namespace", namespaces, branches),
        ("--evidence-exclude", evidence_exclude, codes),
    ):
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise ValueError(f"{option}: unknown '{unknown[0]}', allowed: {', '.join(allowed)}")
    if not namespaces:
        raise ValueError(f"--namespace: none given, allowed: {', '.join(branches)}")


def run(args: argparse.Namespace) -> int:
    """Build the graph that the command line asks for, print the report, return the exit status."""
    report = build_gene_graph(
        out=args.out,
        obo=args.obo,
        associations=args.associations,
        genes=args.genes,
        taxid=args.taxid,
        namespaces=args.namespace,
        evidence_exclude=args.evidence_exclude,
        propagate=args.propagate,
        threshold=args.threshold,
        neighbours=args.neighbours,
        hold_out=args.hold_out,
    )
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    counts = report["counts"]
    share = counts["genes_with_go"] / counts["genes"]
    print(
        f"genes        {counts['genes']:,}, with GO terms {counts['genes_with_go']:,} ({share:.1%})"
    )
    for name, group in counts["by_class"].items():
        print(f"  {name:<16} {group['genes']:,}, with GO terms {group['with_go']:,}")
    print(f"associations {json.dumps(counts['association_rows'])}")
    print(f"edges        {counts['edges']:,}, of a gene to itself {counts['self_edges']:,}")
    print(
        f"neighbours   in: mean {counts['in_degree_mean']:.1f}, max {counts['in_degree_max']}; "
        f"out: median {counts['out_degree_median']:.0f}, max {counts['out_degree_max']:,}"
    )
    print(f"written      {report['out']} and {report['picture']}")
    return 0
