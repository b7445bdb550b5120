"""Read the gene graph file that `python -m data_prep gene-graph` writes.

The file is an npz (no pickles) with

    format       text     "sclong_ds-gene-graph 1"
    edge_index   (2, E)   int32, row 0 source gene, row 1 target gene, sorted by target, then source
    edge_weight  (E,)     float32, Jaccard index of the two genes' GO term sets
    n_genes      ()       int64, size of the vocabulary
    genes_hash   text     `GeneVocabulary.hash` of the vocabulary whose positions edge_index uses
    settings     text     JSON: inputs with their sha256, filters, threshold, number of neighbours
    counts       text     JSON: coverage and degrees

Reads: one npz. Writes nothing. numpy only, so the model may import it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

GRAPH_FORMAT = "sclong_ds-gene-graph 1"
_KEYS = ("format", "edge_index", "edge_weight", "n_genes", "genes_hash")


def read_gene_graph(path: str | Path, *, genes_hash: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the edges of a gene graph that belongs to a given vocabulary.

    Args:
        path: File written by `python -m data_prep gene-graph`.
        genes_hash: `GeneVocabulary.hash` of the model's genes.

    Returns:
        edge_index (2, E) int64 (source, target) and edge_weight (E,) float32.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a gene graph, a damaged one, or one of another vocabulary.
    """
    path = Path(path)
    make = f"python -m data_prep gene-graph --genes CORPUS/genes.tsv --out {path}"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such gene graph; make it with: {make}")
    try:
        # np.load leaves a file that is no zip open, so the file is opened here. A plain .npy gives
        # an array, which is no context manager: TypeError.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            content = {key: archive[key] for key in _KEYS}
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a gene graph ({error}); make one with: {make}") from None
    if str(content["format"]) != GRAPH_FORMAT:
        raise ValueError(
            f"{path}: format '{content['format']}', this version reads '{GRAPH_FORMAT}'; "
            f"make it with: {make}"
        )
    found = str(content["genes_hash"])
    if found != genes_hash:
        raise ValueError(
            f"{path}: made for another gene vocabulary (hash {found[:12]}, the model's genes have "
            f"{genes_hash[:12]}); make it with: {make}"
        )
    edge_index = content["edge_index"].astype(np.int64)
    edge_weight = content["edge_weight"].astype(np.float32)
    _check_edges(path, edge_index, edge_weight, int(content["n_genes"]))
    return edge_index, edge_weight


def _check_edges(path: Path, edge_index: np.ndarray, edge_weight: np.ndarray, n_genes: int) -> None:
    """Refuse edges that the graph convolution could not use."""
    if (
        edge_index.ndim != 2
        or edge_index.shape[0] != 2
        or edge_weight.shape != edge_index.shape[1:]
    ):
        raise ValueError(
            f"{path}: edge_index {edge_index.shape} and edge_weight {edge_weight.shape} do not "
            "fit; expected (2, E) and (E,)"
        )
    if edge_index.size and not (0 <= edge_index.min() and edge_index.max() < n_genes):
        raise ValueError(f"{path}: edges name genes outside 0..{n_genes - 1}")
    if not (np.isfinite(edge_weight).all() and (edge_weight > 0).all()):
        raise ValueError(f"{path}: edge weights must be finite and > 0")
