"""Arguments of `python -m sclong_ds genes`, apart from its work: `--help` needs no library."""

from __future__ import annotations

import argparse

from data_prep.graph.gene_graph_arguments import add_ontology_arguments
from sclong_ds.command_line import new_file, whole
from sclong_ds.embedding.embed_arguments import add_input_arguments

NETWORKS = ("cosine", "attention", "gradient", "ablation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds genes`."""
    add_input_arguments(parser, input_needed=False)
    parser.add_argument(
        "--out",
        type=new_file,
        required=True,
        metavar="FILE",
        help="new .h5ad with a row for each gene; networks and scores get names beside it",
    )
    parser.add_argument(
        "--by", metavar="KEY", help="obs column of INPUT: contextual vectors of each of its values"
    )
    parser.add_argument(
        "--network",
        nargs="+",
        choices=NETWORKS,
        default=[],
        metavar="KIND",
        help=f"edge lists to write, of {', '.join(NETWORKS)}; all but cosine need INPUT and --of",
    )
    parser.add_argument(
        "--of",
        metavar="GENES",
        help="genes whose edges are wanted, symbols or Ensembl ids (default for cosine: all)",
    )
    parser.add_argument(
        "--edges",
        type=whole(1),
        default=20,
        metavar="N",
        help="edges of each gene, the strongest (default %(default)s)",
    )
    parser.add_argument(
        "--min-cells",
        type=whole(1),
        default=10,
        metavar="N",
        help="fewest cells that an edge of attention, gradient or ablation rests on "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="how well vectors find the genes of GO terms and of known sets, beside controls",
    )
    add_ontology_arguments(parser)
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="of the resampled terms and the SVD (default %(default)s)",
    )
