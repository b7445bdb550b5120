"""Arguments of `python -m data_prep gene-graph`.

They lie apart from its work, whose libraries take long to import: `--help` needs none.
"""

from __future__ import annotations

import argparse

from data_prep.graph.gene_ontology import GENE_TABLE, GO_FOLDER, HUMAN, NAMESPACES
from sclong_ds.command_line import new_file, share

THRESHOLD = 0.1
"""Edges with a Jaccard index above it are kept."""
NEIGHBOURS = 20
"""Best sources per gene, besides itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of `python -m data_prep gene-graph`."""
    _add_files(parser)
    _add_rules(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=new_file,
        metavar="FILE",
        required=True,
        help="graph to write (.npz); a .png of the degrees goes beside it",
    )
    add_ontology_arguments(parser)
    parser.add_argument(
        "--genes",
        metavar="FILE",
        default=GENE_TABLE,
        help="genes and their order: a CORPUS/genes.tsv, a table with ensembl_id, symbol, class "
        "and optionally entrez_ids, or one id a line (default: the bundled 27,874 genes, which "
        "also supply missing Entrez ids)",
    )


def add_ontology_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files of the Gene Ontology."""
    parser.add_argument(
        "--obo",
        metavar="FILE",
        default=GO_FOLDER / "go-basic.obo.gz",
        help="Gene Ontology, go-basic.obo, .gz or not (default: the bundled release 2022-07-01)",
    )
    parser.add_argument(
        "--associations",
        metavar="FILE",
        default=GO_FOLDER / "gene2go.gz",
        help="NCBI gene2go or GAF 2.x, .gz or not (default: the bundled human gene2go, 2022-09-12)",
    )


def _add_rules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--taxid",
        metavar="ID",
        type=int,
        default=HUMAN,
        help="organism of the associations (default: %(default)s, human)",
    )
    parser.add_argument(
        "--namespace",
        nargs="+",
        default=sorted(NAMESPACES.values()),
        metavar="NAME",
        help="branches of GO to use: BP MF CC (default: all three)",
    )
    parser.add_argument(
        "--evidence-exclude",
        nargs="*",
        default=["ND"],
        metavar="CODE",
        help="evidence codes to leave out (default: ND, 'no data', which only names the root "
        "terms); no code: use all",
    )
    parser.add_argument(
        "--propagate",
        choices=("none", "is_a", "all"),
        default="none",
        help="add the ancestors of each term, through is_a or all relationships "
        "(default: none, as in scLong)",
    )
    parser.add_argument(
        "--threshold",
        metavar="SHARE",
        type=float,
        default=THRESHOLD,
        help="keep edges with a Jaccard index above it (default: %(default)s)",
    )
    parser.add_argument(
        "--neighbours",
        metavar="N",
        type=int,
        default=NEIGHBOURS,
        help="best sources per gene, besides itself (default: %(default)s)",
    )
    parser.add_argument(
        "--hold-out",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="leave out this share of the terms, by the hash of their ids, for `sclong genes "
        "--benchmark` to test with; related terms stay (default: 0)",
    )
