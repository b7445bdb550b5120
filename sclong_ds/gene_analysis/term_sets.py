"""Sets of genes that belong together: GO terms, and the known sets of the bundled table.

A model with a gene graph was given the Gene Ontology. Terms are unknown to it only where its graph
was built without them: `python -m data_prep gene-graph --hold-out SHARE`. With such a graph those
terms alone are used; with any other `TermSets.known` says that the model has seen them.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.graph.gene_ontology import (
    GENE_TABLE,
    is_held_out,
    match_genes,
    read_annotations,
    read_gene_keys,
    read_ontology,
)
from sclong_ds.corpus.gene_graph import graph_settings
from sclong_ds.corpus.genes import GeneVocabulary

GOLD_SETS = GENE_TABLE.parent / "gene_sets.tsv"
SIZES = (10, 200)
"""Smallest and largest number of a set's genes: small ones are noise, large ones no function."""


@dataclass(frozen=True, slots=True)
class TermSets:
    """Sets of genes and which genes are in them."""

    names: tuple[str, ...]
    """(T,)."""
    members: np.ndarray
    """(G, T) bool."""
    known: bool
    """Whether the model's graph was made from them."""

    def within(self, genes: np.ndarray, *, smallest: int) -> TermSets:
        """Return the sets over some genes, without those that are too small or too large.

        Args:
            genes: (G,) bool.
            smallest: Fewest genes of a set.
        """
        members = self.members[genes]
        size = members.sum(axis=0)
        fits = (size >= smallest) & (size <= SIZES[1])
        names = tuple(name for name, fit in zip(self.names, fits, strict=True) if fit)
        return TermSets(names, members[:, fits], self.known)


def go_terms(
    model_genes: Path,
    genes: GeneVocabulary,
    graph: Path | None,
    *,
    obo: str | Path,
    associations: str | Path,
) -> TermSets:
    """Return the GO terms with direct annotations.

    Args:
        model_genes: genes.tsv of the model.
        genes: The same, read.
        graph: gene_graph.npz of the model, or None.
        obo: go-basic.obo.
        associations: gene2go or GAF.
    """
    ontology = read_ontology(obo)
    annotations = read_annotations(associations, ontology=ontology)
    of_gene, _ = match_genes(annotations, read_gene_keys(model_genes))
    share = 0.0 if graph is None else float(graph_settings(graph).get("hold_out", 0.0))
    of_term: defaultdict[str, list[int]] = defaultdict(list)
    for gene, terms in enumerate(of_gene):
        for term in terms:
            if not share or is_held_out(term, share):
                of_term[term].append(gene)
    chosen = sorted(term for term, own in of_term.items() if len(own) >= SIZES[0])
    members = np.zeros((len(genes), len(chosen)), dtype=bool)
    for i, term in enumerate(chosen):
        members[of_term[term], i] = True
    return TermSets(tuple(chosen), members, known=graph is not None and not share)


def gold_sets(genes: GeneVocabulary, *, known: bool) -> TermSets:
    """Return the known sets of the bundled table.

    Args:
        genes: Of the model.
        known: Whether the model has a gene graph.
    """
    with GOLD_SETS.open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    place = {symbol: i for i, symbol in enumerate(genes.symbols)}
    members = np.zeros((len(genes), len(rows)), dtype=bool)
    for i, row in enumerate(rows):
        members[[place[s] for s in row["symbols"].split() if s in place], i] = True
    return TermSets(tuple(row["set"] for row in rows), members, known)
